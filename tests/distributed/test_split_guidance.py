"""Two processes share a guided candidate, a branch each: the candidates are those of one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import test_teams
import torch
from process_group import run_in_group
from test_teams import PROMPTS
from torch import Tensor
from zero_runs import make

from vpo_engine import training
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.distributed.couples import Couples
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.stopping import StepAbandonedError
from vpo_engine.distributed.watchdog import group_limit
from vpo_engine.memory.batches import Batches
from vpo_engine.models.registry import check_model
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.planning.trace import trace_step

SPLIT = ("processes.split_guidance=true",)
ROUNDING = 1e-5
"""Relative differences of float32 latents after some steps: a pass of B rows multiplies matrices of other shapes than
one of 2 B does, and each product rounds by about 1e-7 of it."""


def steps(settings: Sequence[str], processes: Processes) -> list[dict[str, object]]:
    found = []
    algorithm = make(settings, processes)
    for number in range(2):
        mine = processes.team_range(algorithm.config.pairs_per_step, "pairs_per_step")
        step = test_teams.step_on(
            algorithm,
            [PROMPTS[i] for i in mine],
            [algorithm.config.pairs_per_step * number + i for i in mine],
        )
        winners, losers = test_teams.places_of(step.choices)
        found.append(
            {
                "pairs": torch.tensor([winners, losers]),
                "candidates": test_teams.candidates_of(step),
                "rows": step.work.sampled,
                "weights": torch.cat([weight.detach().flatten() for weight in algorithm.parameters]),
            }
        )
    return found


CASE = (
    "pairs_per_step=2",
    "rollout.candidates=2",
    "rollout.steps=2",
    "rollout.guidance=4",
    "optimizer.lr=1e-3",
)
"""The second prompt is a tie."""
PRUNED = ("rollout.candidates=4", "rollout.prune.after=0.5", "rollout.prune.keep=2")


def in_couples(folder: Path, more: Sequence[str]) -> None:
    processes = Processes.start("cpu", 4).in_couples()
    settings = (*CASE, *more, *SPLIT, "processes.per_prompt=4")
    torch.save(steps(settings, processes), folder / f"{processes.rank}.pt")
    processes.stop()


@pytest.mark.long
@pytest.mark.parametrize("more", [(), PRUNED], ids=["", "pruned"])
def test_two_couples_train_as_one_process_does(more: tuple[str, ...], tmp_path: Path) -> None:
    run_in_group(tmp_path, 4, in_couples, tmp_path, more)
    team = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    alone = steps((*CASE, *more), Processes.start("cpu"))
    for number, expected in enumerate(alone):
        members = [member[number] for member in team]
        for name in ("pairs", "candidates", "weights"):
            assert all(torch.equal(members[0][name], other[name]) for other in members[1:]), name
        assert torch.equal(members[0]["pairs"], expected["pairs"])
        for name in ("candidates", "weights"):
            whole = expected[name]
            assert isinstance(whole, Tensor)
            difference = float((members[0][name] - whole).norm() / whole.norm())
            assert difference <= ROUNDING, (number, name, difference)
        assert [member["rows"] for member in members] == [expected["rows"] / 4] * 4  # type: ignore[operator]


def asked_in_the_middle(folder: Path) -> None:
    """Make a step as a couple, of which rank 1 is asked to stop in the second of four passes."""
    limit, passes = timedelta(seconds=30), 0  # after which one that waits for the other in vain fails
    processes = Processes.start("cpu", 2, limit=limit).in_couples(limit)
    algorithm = make((*CASE, *SPLIT, "processes.per_prompt=2", "rollout.steps=4"), processes)

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    algorithm.model.network.register_forward_pre_hook(count)
    algorithm.stopping.requested = lambda: processes.rank == 1 and passes >= 2
    with pytest.raises(StepAbandonedError):
        test_teams.step_on(algorithm, PROMPTS[:2], [0, 1])
    torch.save(passes, folder / f"{processes.rank}.pt")
    processes.stop()


@pytest.mark.long
def test_a_couple_goes_on_to_the_end_of_the_rollout_before_it_gives_the_step_up(tmp_path: Path) -> None:
    """Each half waits for the predictions of the other, so none may leave alone."""
    run_in_group(tmp_path, 2, asked_in_the_middle, tmp_path)
    assert [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)] == [4, 4]


def test_couples_are_neighbours_and_the_first_of_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.new_group", lambda ranks, timeout: list(ranks))
    here = torch.device("cpu")
    members = [Processes(rank, 8, here).in_teams(4).in_couples().team for rank in range(8)]
    assert [member.couple.pair.group for member in members if member.couple] == [
        [rank, rank + 1] for rank in (0, 0, 2, 2, 4, 4, 6, 6)
    ]
    assert [member.couple.half for member in members if member.couple] == [0, 1] * 4
    assert [[*member.sharers.rank_range(4)] for member in members[:4]] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    made = torch.tensor([[10, 11, 20, 21, 30, 31, 40, 41]])
    monkeypatch.setattr(Processes, "gather", lambda self, values, dim: made)
    assert Couples(members[2]).gather(torch.zeros(1, 2), 1).tolist() == [[10, 11, 30, 31]]


def test_without_split_guidance_there_are_no_couples() -> None:
    alone = Processes.start("cpu")
    assert alone.team.couple is None
    assert isinstance(alone.team.sharers, Processes)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["processes.per_prompt=3"], r"processes.per_prompt=3: .* set an even number"),
        (["rollout.guidance=1"], r"rollout.guidance=1: there is one branch only; set "),
        (["rollout.cache=0.1"], r"rollout.cache=0.1: .*; set null"),
        (["rollout.compile=graphs"], r"rollout.compile=graphs: .*; set none or blocks"),
        (
            ["processes.per_prompt=8", "rollout.candidates=2"],
            r"rollout.candidates=2 cannot be shared equally by the 4 couples of processes.per_prompt=8; make "
            r"rollout.candidates a multiple of 4, or set processes.per_prompt to twice a divisor of 2",
        ),
        (
            ["processes.per_prompt=8", "rollout.explore.steps=1"],
            r"rollout.explore samples two .* set processes.per_prompt to 4 or 2",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_at_the_start(settings: list[str], text: str) -> None:
    given = ["processes.per_prompt=4", "rollout.guidance=4", *settings, *SPLIT]
    with pytest.raises(ValueError, match=text):
        load_config(None, given)


def test_a_family_that_does_not_batch_branches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, ["processes.per_prompt=2", "rollout.guidance=4", *SPLIT])
    check_model(config)
    family = "vpo_engine.models.registry.model_family"
    from vpo_engine.models.registry import model_family

    sprites = model_family("sprites")
    card = replace(sprites.card, supports=sprites.card.supports - {"processes.split_guidance"})
    without = type("Own", (sprites,), {"card": card})
    monkeypatch.setattr(family, lambda kind: without)
    with pytest.raises(
        ValueError, match=r"processes.split_guidance=true is not supported by model.kind=sprites"
    ):
        check_model(config)


def test_a_batch_that_does_not_fit_is_not_halved_behind_the_other_process() -> None:
    def work(batch: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(
        torch.OutOfMemoryError, match=r"a batch of 4 candidates .*; set rollout.batch_size to 2"
    ):
        list(Batches(None, halved=False).run(work, 1, 4))


@pytest.mark.parametrize("shared", ["slices", "branches"])
def test_a_step_that_two_processes_compute_together_does_not_halve_its_batch(
    monkeypatch: pytest.MonkeyPatch, shared: str
) -> None:
    two = Processes(0, 2, torch.device("cpu"))
    parts = {"slices": {"_sequence": two}, "branches": {"_team": replace(two, _pair=two)}}
    one = make(CASE, Processes.start("cpu"))
    algorithm = OnlineVPO(one.config, one.model, one.reward, one.reference, replace(two, **parts[shared]))

    def does_not_fit(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(algorithm.model, "denoise", does_not_fit)
    with pytest.raises(torch.OutOfMemoryError, match=r"in the memory of the device; set rollout.batch_size"):
        test_teams.step_on(algorithm, PROMPTS[:2], [0, 1])


@pytest.mark.long
def test_the_plan_of_a_process_of_a_couple_is_of_half_a_pass() -> None:
    def trace(processes: int, *more: str) -> Any:
        config: Config = load_config(
            None, ["pairs_per_step=1", "rollout.candidates=2", "rollout.steps=1", "rollout.guidance=4", *more]
        )
        return trace_step(config, on_gpu=False, network_only=True, processes=processes)

    # Keys and values of the text are made once a prompt, by every process.
    whole, part = trace(1), trace(4, "processes.per_prompt=4", *SPLIT)
    assert part.flops("rollout") == pytest.approx(whole.flops("rollout") / 4, rel=0.05)


@pytest.mark.parametrize("split", [False, True])
def test_a_run_makes_couples_of_its_processes_only_when_it_is_told(
    monkeypatch: pytest.MonkeyPatch, split: bool
) -> None:
    monkeypatch.setattr("torch.distributed.new_group", lambda ranks, timeout: list(ranks))
    team = Processes(1, 2, torch.device("cpu")).in_teams(2)
    monkeypatch.setattr(Processes, "start", staticmethod(lambda *_: team))
    given = ["processes.per_prompt=2", "rollout.guidance=4", f"processes.split_guidance={split}"]
    assert (training._start_processes(load_config(None, given)).team.couple is not None) == split


def test_the_groups_of_a_run_wait_longer_than_its_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[timedelta | None] = []
    given: list[tuple[object, ...]] = []

    def new_group(ranks: Sequence[int], timeout: timedelta | None) -> list[int]:
        limits.append(timeout)
        return list(ranks)

    monkeypatch.setattr("torch.distributed.new_group", new_group)
    team = Processes(1, 2, torch.device("cpu")).in_teams(2)

    def start(*words: object) -> Processes:
        given.append(words)
        return team

    monkeypatch.setattr(Processes, "start", staticmethod(start))
    couples = ["processes.per_prompt=2", "rollout.guidance=4", *SPLIT]
    training._start_processes(load_config(None, [*couples, "distributed.stage_minutes=3000.0"]))
    assert given == [("auto", 2, False, group_limit(3000.0), 1)]
    assert limits == [None, group_limit(3000.0)]
