"""Test candidates of a prompt divided among processes: the pairs, the gradient and the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from process_group import run_in_group
from small_policy import shipped_policy_is_small
from step_case import candidates_of, places_of, step_on
from torch import Tensor, nn

from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.planning.trace import trace_step
from vpo_engine.reference.store import build_reference

PROMPTS = (
    "a red circle moving left",
    "a blue square moving up",
    "a green circle moving right",
    "a red square moving down",
)
TIE = PROMPTS[1]
CASES = {
    "one prompt, one draw": (1, ["objective.timesteps_per_pair=1"]),
    "one prompt, three draws": (1, ["objective.timesteps_per_pair=3", "rollout.candidates=2"]),
    "uneven pairs and a tie": (4, ["objective.timesteps_per_pair=1"]),
    "pruned": (2, ["objective.timesteps_per_pair=2", "rollout.prune.after=0.5", "rollout.prune.keep=2"]),
}
"""Prompts, and settings beside those of ``settings``."""


class Brightness:
    """Scores that are a function of the pixels, and a prompt whose candidates it cannot tell apart."""

    dimensions = ("temporal_consistency",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        scores = videos.float().mean(dim=(1, 2, 3, 4))
        ties = torch.tensor([prompt == TIE for prompt in prompts])
        return {"temporal_consistency": scores.masked_fill(ties, 1.0)}


def settings(case: str) -> Config:
    common = [
        "rollout.candidates=4",
        "rollout.steps=2",
        "optimizer.warmup_steps=0",
        "reference.refresh_every=1",
    ]
    return load_config(None, [*common, *CASES[case][1], f"pairs_per_step={CASES[case][0]}"])


def steps(case: str, processes: Processes) -> list[dict[str, object]]:
    """Return what the steps of a case made in this process, and the gradients that they used."""
    config = settings(case)
    with shipped_policy_is_small():
        model = build_model(config, processes, lambda _: None)
    model.prepare(PROMPTS)
    algorithm = OnlineVPO(config, model, Brightness(), build_reference("copy", model.network), processes)
    gradients: list[Tensor] = []
    optimize = algorithm.optimizer.step

    def recorded() -> float:
        gradients.append(torch.cat([p.grad.flatten() for p in algorithm.parameters if p.grad is not None]))
        return optimize()

    algorithm.optimizer.step = recorded  # type: ignore[method-assign]
    found = []
    for number in range(2 if "uneven" in case else 1):
        mine = processes.team_range(config.pairs_per_step, "pairs_per_step")
        prompts = [PROMPTS[index] for index in mine]
        positions = [number * config.pairs_per_step + index for index in mine]
        step = step_on(algorithm, prompts, positions)
        winners, losers = places_of(step.choices)
        found.append(
            {
                "metrics": {name: value for name, value in step.metrics.items() if "memory/" not in name},
                "pairs": torch.tensor([winners, losers, [not choice.tied for choice in step.choices]]),
                "candidates": candidates_of(step),
                "rows": torch.tensor([step.work.sampled, step.work.compared, step.work.trained]),
                "gradient": gradients[-1],
            }
        )
    return found


def in_a_team(folder: Path) -> None:
    processes = Processes.start("cpu", 2)
    torch.save({case: steps(case, processes) for case in CASES}, folder / f"{processes.rank}.pt")
    processes.stop()


@pytest.mark.long
def test_two_processes_share_the_candidates_of_a_prompt_and_train_as_one(tmp_path: Path) -> None:
    run_in_group(tmp_path, 2, in_a_team, tmp_path)
    team = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for case in CASES:
        for number, alone in enumerate(steps(case, Processes.start("cpu"))):
            one, other = (member[case][number] for member in team)
            for name in ("pairs", "candidates", "gradient", "rows"):
                assert torch.equal(one[name], other[name]), (case, name)
            assert one["metrics"] == other["metrics"]
            assert torch.equal(2 * one["rows"], alone["rows"])  # type: ignore[arg-type]
            assert torch.equal(one["pairs"], alone["pairs"]), case  # type: ignore[arg-type]
            torch.testing.assert_close(one["candidates"], alone["candidates"], rtol=1e-4, atol=1e-4, msg=case)
            expected = alone["gradient"]
            assert isinstance(expected, Tensor)
            assert (one["gradient"] - expected).norm() <= 1e-3 * expected.norm(), case
            assert one["metrics"] == pytest.approx(alone["metrics"], rel=1e-3, abs=1e-5), case
        assert one["metrics"]["pairs"] == CASES[case][0] - (CASES[case][0] > 1)


@pytest.mark.long
def test_the_plan_of_a_process_of_a_team_is_of_its_part() -> None:
    settings = [
        "pairs_per_step=1",
        "rollout.candidates=4",
        "rollout.steps=1",
        "objective.timesteps_per_pair=4",
    ]
    shared = [*settings, "processes.per_prompt=2"]
    alone = trace_step(load_config(None, settings), on_gpu=False, network_only=True)
    part = trace_step(load_config(None, shared), on_gpu=False, network_only=True, processes=2)
    assert part.flops("update") == alone.flops("update") / 2
    # Keys and values of the text are made once a prompt.
    assert part.flops("rollout") == pytest.approx(alone.flops("rollout") / 2, rel=0.02)


def member(rank: int, count: int, size: int) -> Processes:
    team = Processes(rank % size, size, torch.device("cpu"))
    return replace(Processes(rank, count, torch.device("cpu")), _team=team)


def test_teams_take_prompts_in_turn_and_their_members_the_same() -> None:
    shares = [list(member(rank, 6, 2).team_range(6, "pairs_per_step")) for rank in range(6)]
    assert shares == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    with pytest.raises(
        ValueError, match=r"pairs_per_step=4 cannot be shared equally by 3 teams of 2 processes"
    ):
        member(0, 6, 2).team_range(4, "pairs_per_step")


@pytest.mark.parametrize("total", [0, 1, 3, 4, 11])
def test_every_piece_has_one_process(total: int) -> None:
    parts = [Processes(rank, 4, torch.device("cpu")).rank_range(total) for rank in range(4)]
    assert [piece for part in parts for piece in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_teams_that_do_not_come_out_even_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"per_prompt=4 does not divide the 6 processes that train; start a multiple"
    ):
        Processes(0, 6, torch.device("cpu")).in_teams(4)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["rollout.candidates=6"],
            r"rollout.candidates=6 cannot be shared equally by processes.per_prompt=4; make ",
        ),
        (
            ["rollout.candidates=8", "rollout.prune.after=0.5", "rollout.prune.keep=6"],
            r"rollout.prune.keep=6 cannot be shared equally by processes.per_prompt=4",
        ),
    ],
)
def test_candidates_that_cannot_be_shared_equally_are_refused(
    small: Callable[..., Config], overrides: list[str], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        small("processes.per_prompt=4", *overrides)


def test_teams_are_neighbouring_ranks_with_a_group_and_prompts_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of six processes in teams of two each team has its own group, and members have the same prompts."""
    monkeypatch.setattr("torch.distributed.new_group", lambda ranks, timeout: list(ranks))
    here = torch.device("cpu")
    processes = [Processes(rank, 6, here).in_teams(2) for rank in range(6)]
    assert [one.team.group for one in processes] == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert [one.team.rank for one in processes] == [0, 1, 0, 1, 0, 1]
    assert [one.team.first for one in processes] == [True, False] * 3
    prompts = [one.team_range(9, "pairs_per_step") for one in processes]
    assert [[*one] for one in prompts[::2]] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert prompts[::2] == prompts[1::2]


def test_a_flag_of_one_process_counts_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process has no flag."""

    def reduce(value: Tensor, op: object, group: object) -> None:
        other = torch.zeros_like(value)
        kinds = {torch.distributed.ReduceOp.MAX: torch.maximum, torch.distributed.ReduceOp.MIN: torch.minimum}
        value.copy_(kinds[op](value, other))

    monkeypatch.setattr("torch.distributed.all_reduce", reduce)
    processes = Processes(0, 2, torch.device("cpu"))
    assert processes.any(True)
    assert not processes.any(False)


@pytest.mark.parametrize(
    ("device", "local_ranks", "shares"),
    [
        ("cpu", [0, 1, 2, 0, 1], [[0, 2, 4], [], [], [1, 3], []]),
        ("cpu", [0], [[0, 1, 2, 3, 4]]),
        ("meta", [0, 1, 2], [[0, 3], [1, 4], [2]]),
    ],
)
def test_texts_are_encoded_once_and_on_cpus_by_one_process_of_each_machine(
    device: str, local_ranks: list[int], shares: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    encodes = [device != "cpu" or rank == 0 for rank in local_ranks]
    monkeypatch.setattr(Processes, "gather", lambda self, value: torch.tensor([int(one) for one in encodes]))
    found = []
    for rank, local in enumerate(local_ranks):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        found.append(list(range(5))[Processes(rank, len(local_ranks), torch.device(device)).encoder_share()])
    assert found == shares


def test_a_process_takes_the_gpu_of_its_number_on_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the second process of the second machine of eight GPUs."""
    for name, value in {"WORLD_SIZE": "16", "RANK": "9", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    taken: list[torch.device] = []
    store = torch.distributed.HashStore()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    monkeypatch.setattr("torch.distributed.rendezvous", lambda url: iter([(store, 9, 16)]))
    monkeypatch.setattr("vpo_engine.distributed.processes.meet", lambda store, rank, count: store)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    assert Processes.start("cuda").device == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 1)]


def start_on(gpus: int, monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[torch.device]:
    """Prepare for a process of a machine with so many GPUs; return the list of those that it takes."""
    taken: list[torch.device] = []
    store = torch.distributed.HashStore()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    monkeypatch.setattr("torch.distributed.rendezvous", lambda url: iter([(store, 0, 1)]))
    monkeypatch.setattr("vpo_engine.distributed.processes.meet", lambda store, rank, count: store)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    return taken


@pytest.mark.parametrize("device", ["auto", "cuda:5"])
def test_a_gpu_that_is_not_there_is_named(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start_on(2, monkeypatch, WORLD_SIZE="8", RANK="5", LOCAL_RANK="5")
    with pytest.raises(ValueError, match=r"this process takes cuda:5, but torch sees 2 CUDA devices; "):
        Processes.start(device)


def test_the_process_of_the_reward_needs_no_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With reward.device=cpu, or one that another process has, too."""
    taken = start_on(2, monkeypatch, WORLD_SIZE="3", RANK="2", LOCAL_RANK="2")
    assert Processes.start("auto", reward_process=True).is_reward_process
    assert taken == []


def test_processes_on_gpus_wait_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would take the GPU of the rank's number, which may be another one, for the first operation of a group."""
    given: list[object] = []
    monkeypatch.setattr("torch.distributed.barrier", lambda **named: given.append(named["device_ids"]))
    for device in ("cuda:3", "cpu"):
        Processes(0, 2, torch.device(device)).wait()
    assert given == [[3], None]


def test_what_all_processes_say_is_waited_for_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the wait is for the number, not for the call."""
    processes, seen = Processes(0, 2, torch.device("cpu")), list[bool]()
    item = Tensor.item

    def asked(value: Tensor) -> float:
        seen.append(processes.stages.now.waiting)
        return item(value)

    monkeypatch.setattr("torch.distributed.all_reduce", lambda value, op, group: None)
    monkeypatch.setattr(Tensor, "item", asked)
    assert processes.any(True)
    assert processes.largest(7) == 7
    assert seen == [True, True]


def test_a_missing_gradient_counts_as_zero_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process has a gradient of 4 for both weights."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values, group: values.add_(4.0))
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    weights[0].grad = torch.full((2,), 2.0)
    Processes(0, 2, torch.device("cpu")).average_gradients(weights)
    assert [weight.grad.tolist() for weight in weights if weight.grad is not None] == [[3.0, 3.0], [2.0, 2.0]]
