"""Whole runs whose processes hold slices of the same videos, plans of them, and what is refused at their start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from process_group import run_in_group
from safetensors.torch import load_file

from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.data.preference_dataset import read_dataset
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.sequence import SequenceGroup, planned
from vpo_engine.distributed.sequence_traffic import sequence_traffic
from vpo_engine.distributed.stopping import StepAbandonedError, StopPoints
from vpo_engine.models.registry import check_model, model_family
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.planning.trace import trace_step
from vpo_engine.rollout.shared_scores import SharedScorer
from vpo_engine.runs.log import read_metrics
from vpo_engine.train import train

CPU = torch.device("cpu")
LINEAR = ("optimizer.eps=1", "optimizer.lr=0.1", "optimizer.clip=1")
"""A step is nearly the learning rate times the gradient, so that rounding stays rounding."""
RUN = ("steps=3", "rollout.guidance=2", "pairs.dataset=latents")


def config_of(smallest: Sequence[str], folder: Path, *more: str) -> Config:
    return load_config(None, [*smallest, *LINEAR, *RUN, f"run_dir={folder}", *more])


def policy_of(folder: Path, step: int) -> torch.Tensor:
    file = folder / "checkpoints" / f"step_{step:08d}" / "policy" / "model.safetensors"
    return torch.cat([value.flatten() for _, value in sorted(load_file(file).items())])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder / "metrics.jsonl")
    clock = ("seconds/", "speed/", "memory/", "kind")
    return [{key: value for key, value in row.items() if not key.startswith(clock)} for row in rows]


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_two_processes_make_the_run_of_one(smallest: list[str], small_policy: str, tmp_path: Path) -> None:
    """Held-out clips, the preference dataset and checkpoints, too; one process finishes what two have begun."""
    alone, two, smallest = tmp_path / "alone", tmp_path / "two", [*smallest, small_policy]
    run_in_group(tmp_path, 2, train, config_of(smallest, two, "distributed.sequence_parallel=2"))
    assert train(config_of(smallest, alone)) == 0
    begun, expected, found = (policy_of(folder, step) for folder, step in ((alone, 2), (alone, 3), (two, 3)))
    assert float((expected - begun).abs().max()) > 1e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for one, other in zip(rows_of(two), rows_of(alone), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-3)
    pairs = [
        [(pair.step, pair.position, pair.winner, pair.loser) for pair in read_dataset(folder)]
        for folder in (alone, two)
    ]
    assert pairs[0] == pairs[1]
    assert len(pairs[0]) == 3 * 2
    assert train(config_of(smallest, two, "steps=4")) == 0
    assert torch.isfinite(policy_of(two, 4)).all()


def test_units_hold_slices_and_teams_have_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight processes two make a unit, and two units a team."""
    monkeypatch.setattr("torch.distributed.new_group", lambda ranks, timeout: list(ranks))
    processes = [Processes(rank, 8, CPU).in_teams(2, 2) for rank in range(8)]
    assert [one.sequence.group for one in processes[::2]] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [one.sequence.rank for one in processes] == [0, 1] * 4
    assert [one.team.group for one in processes[:4]] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [one.team.rank for one in processes] == [0, 0, 1, 1] * 2
    assert [one.units.group for one in processes[:2]] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [one.units.rank for one in processes] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [[*one.team_range(4, "pairs_per_step")] for one in processes] == [[0, 1]] * 4 + [[2, 3]] * 4
    assert [one.first_of_team for one in processes] == [True, False, False, False] * 2
    with pytest.raises(
        ValueError, match=r"sequence_parallel=3 does not divide the 8 .*; start a multiple of 3"
    ):
        Processes(0, 8, CPU).in_teams(1, 3)
    with pytest.raises(
        ValueError, match=r"parallel=2 times processes.per_prompt=8 .* their product is a divisor"
    ):
        Processes(0, 8, CPU).in_teams(8, 2)


def test_a_process_with_a_slice_goes_on_to_the_end_of_the_block_before_it_gives_the_step_up() -> None:
    """The others of its unit wait for its part of every layer."""
    points = StopPoints(replace(Processes.start("cpu"), _sequence=Processes(0, 2, CPU)))
    points.requested = lambda: True
    layers: list[str] = []
    compute = points.before(layers.append)
    with pytest.raises(StepAbandonedError), points.stoppable():
        compute("the only one")
    assert layers


def test_a_process_without_a_candidate_to_score_gets_the_scores_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two candidates are shared by four processes. A scorer of no videos at all may fail."""

    def score(candidates: torch.Tensor, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        assert candidates.shape == (2, 1, 4, 3, 2, 2)
        return {"mean": candidates.flatten(2).mean(2)}

    monkeypatch.setattr(Processes, "sum", lambda self, values: values)
    candidates = torch.arange(2 * 2 * 48.0).view(2, 2, 4, 3, 2, 2)
    found = [
        SharedScorer(score, ["mean"], Processes(rank, 4, CPU))(candidates, ["a", "b"])["mean"]
        for rank in range(4)
    ]
    assert torch.equal(sum(found), candidates.flatten(2).mean(2))


@pytest.mark.parametrize(("total", "count"), [(20, 8), (5, 4), (30, 8), (7, 7)])
def test_slices_are_as_equal_as_can_be_and_cover_all(total: int, count: int) -> None:
    """20 latent frames of 720p x 68 in eight slices, and CogVideoX-2B's 30 heads, for example."""
    groups = [SequenceGroup(Processes(rank, count, CPU)) for rank in range(count)]
    whole = torch.arange(total)
    parts = [group.own(whole, 0) for group in groups]
    assert torch.equal(torch.cat(parts), whole)
    assert [len(part) for part in parts] == groups[0].sizes(total)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert planned(count).rank == count - 1
    assert len(parts[-1]) == max(map(len, parts))


def test_more_processes_than_slices_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"sequence_parallel=8 divides the latent frames of a video .* there are 5; set it to 5",
    ):
        planned(8).check(latent_frames=5, patches=64)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("rollout.overlap=true", r"=2 excludes rollout.overlap=true: .*; set false"),
        ("rollout.compile=graphs", r"=2 excludes rollout.compile=graphs: .*; set blocks or none"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    small: Callable[..., Config], setting: str, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        small("distributed.sequence_parallel=2", setting)


def test_a_family_that_cannot_divide_its_videos_is_refused(
    small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small("distributed.sequence_parallel=2")
    check_model(config)
    family = model_family("sprites")
    fewer = family.card.supports - {"distributed.sequence_parallel"}
    monkeypatch.setattr(family, "card", replace(family.card, supports=fewer))
    with pytest.raises(
        ValueError,
        match=r"distributed.sequence_parallel=2 is not supported by .* set distributed.sequence_parallel=1",
    ):
        check_model(config)


def test_a_plan_is_of_the_largest_slices() -> None:
    """Of 5 latent frames one of two processes computes 3, and so half of the step and a little more."""
    given = ["pairs_per_step=1", "rollout.candidates=4", "rollout.steps=1"]
    alone = trace_step(load_config(None, given), on_gpu=False, network_only=True, depth=1)
    sliced = load_config(None, [*given, "distributed.sequence_parallel=2"])
    part = trace_step(sliced, on_gpu=False, network_only=True, processes=2, depth=1)
    for phase in ("rollout", "update"):
        assert 0.5 < part.flops(phase) / alone.flops(phase) < 0.62
    activations = [trace.peak("update")["activations"] for trace in (alone, part)]
    assert activations[1] < 0.65 * activations[0]


def test_bytes_of_the_paper_s_size() -> None:
    """Open-Sora's STDiT3-XL/2 at 720p x 68: 20 frames of 45 x 80 patches, 56 blocks of 1152 channels, bfloat16."""
    tokens, size = 20 * 45 * 80, {"element_size": 2, "output_values": 32, "output_size": 4}
    axes = sequence_traffic(
        "axes", processes=8, blocks=56, tokens=tokens, output_tokens=tokens, width=1152, **size
    )
    assert axes.exchange == tokens * 1152 * 2 / 8 * 7 / 8
    assert axes.backward == 56 * axes.exchange
    assert axes.forward - axes.backward == axes.gather == tokens * 32 * 4 * 7 / 8
    heads = sequence_traffic(
        "heads",
        processes=8,
        blocks=56,
        tokens=tokens,
        output_tokens=tokens,
        width=1152,
        **size,
        recomputed=True,
    )
    assert heads.block_forward == 4 * axes.exchange
    assert heads.block_backward == 8 * axes.exchange


def test_a_model_refuses_more_processes_than_it_has_latent_frames(small: Callable[..., Config]) -> None:
    model: Any = build_model(small(), Processes.start("cpu"), lambda _: None)
    with pytest.raises(
        ValueError, match=r"=6 divides the latent frames of a video .* there are 5; set it to 5"
    ):
        model.share_sequence(planned(6))
    model.share_sequence(planned(5))
    assert model.network.sequence.count == 5


def test_a_process_with_a_slice_counts_its_part_of_each_input() -> None:
    """What its device could have done is compared with what it computes itself."""

    def work_of(processes: Processes) -> Any:
        method: Any = SimpleNamespace(
            config=load_config(None, []),
            processes=processes,
            selector=SimpleNamespace(metrics=lambda choices: {}),
            watched=SimpleNamespace(take=lambda prompts, processes: {}),
            reference=SimpleNamespace(numbers=dict),
            optimizer_steps=0,
            refreshed_at=0,
            _networks=[SimpleNamespace(take=lambda: 8)],
            _videos=4,
            _step_made=lambda metrics, work, choices, pairs: work,
        )
        pairs: Any = [None, None]
        return OnlineVPO._learned(method, [], pairs, {})

    alone = Processes(0, 1, CPU)
    whole, half = work_of(alone), work_of(replace(alone, _sequence=Processes(0, 2, CPU)))
    for name in ("sampled", "compared", "trained"):
        assert 2 * getattr(half, name) == getattr(whole, name) > 0, name
    assert half.videos == whole.videos


def test_a_process_with_a_slice_does_not_leave_a_share_of_its_team_either() -> None:
    """Two units share the candidates; the other process of this one's unit waits for its part of every layer."""
    two = Processes(0, 2, CPU)
    points = StopPoints(replace(Processes.start("cpu"), _sequence=two))
    points.requested = lambda: True
    layers: list[str] = []
    compute = points.before(layers.append)
    with pytest.raises(StepAbandonedError), points.stoppable(together=True), points.share(two):
        compute("the only one")
    assert layers


def test_processes_wait_for_their_team_and_unit_as_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog sees that they wait, and every group has the limit that the run gives."""
    limits: list[timedelta | None] = []

    def new_group(ranks: Sequence[int], timeout: timedelta | None) -> list[int]:
        limits.append(timeout)
        return list(ranks)

    monkeypatch.setattr("torch.distributed.new_group", new_group)
    given = timedelta(hours=30)
    one = Processes(0, 4, CPU).in_teams(2, 2, given)
    other = Processes(0, 2, CPU).in_teams(2, 1, given).in_couples(given)
    assert all(part.stages is one.stages for part in (one.team, one.sequence, one.units))
    assert other.team.couple is not None
    assert other.team.couple.pair.stages is other.team.stages is other.stages
    assert set(limits) == {given}
