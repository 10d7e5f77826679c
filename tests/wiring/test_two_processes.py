"""Two processes, with prompts of their own or as a team, do what one does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import engine
import oracle
import pytest
import torch
from checks import CASES, check_lines, check_metrics, check_policies, check_rows, expected_of
from process_group import run_in_group

from vpo_engine.distributed.stopping import StopPoints


def in_two(folder: Path) -> None:
    rank = os.environ["RANK"]
    for number, (case, size) in enumerate(shared_cases()):
        own = folder / str(number)
        config = engine.make_config(own, *CASES[case], *evaluation(size), f"processes.per_prompt={size}")
        torch.save(engine.train(config).rows, own / f"rows_{rank}.pt")


def shared_cases() -> list[tuple[str, int]]:
    """Cases and the processes that share a prompt."""
    return [
        ("draws, updates and weights", 1),
        ("more candidates for ties", 1),
        ("draws split over a team", 2),
    ]


def evaluation(size: int) -> tuple[str, ...]:
    """Return settings of evaluations: clips that two processes share equally, and clips that they cannot."""
    return ("evaluation.prompts=1", "evaluation.samples_per_prompt=3") if size == 2 else ()


@pytest.mark.long
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    run_in_group(tmp_path, 2, in_two, tmp_path)
    for number, (case, size) in enumerate(shared_cases()):
        folder = tmp_path / str(number)
        parts = [torch.load(folder / f"rows_{rank}.pt", weights_only=False) for rank in range(2)]
        expected = {fingerprint(row): place for place, row in enumerate(expected_of(case).rows)}
        places = [[expected[fingerprint(row)] for row in part] for part in parts]
        for part, own in zip(parts, places, strict=True):
            assert own == sorted(own), (case, size)
            check_rows(part, [expected_of(case).rows[place] for place in own])
        assert sorted(places[0] + places[1]) == list(range(len(expected))), (case, size)
        assert all(places), (case, size)
        if size == 1:
            sides = [{expected_of(case).rows[place].position % 4 for place in own} for own in places]
            assert sides[0] <= {0, 1}
            assert sides[1] <= {2, 3}
        check_lines(case, folder / "run")
        check_policies(case, folder / "run")
        check_metrics(case, folder / "run")
        check_evaluation(case, size, folder / "run", tmp_path / f"alone {number}")


def check_evaluation(case: str, size: int, run: Path, alone: Path) -> None:
    """Held-out clips are the same, whoever samples them."""
    engine.train(engine.make_config(alone, *CASES[case], *evaluation(size)))
    for one, other in zip(
        engine.metrics_of(run, "eval"), engine.metrics_of(alone / "run", "eval"), strict=True
    ):
        assert one.pop("kind") == other.pop("kind")
        assert one == pytest.approx(other, rel=1e-2, abs=1e-2), case
    shown, expected = engine.held_out_gallery(run), engine.held_out_gallery(alone / "run")
    assert shown.prompts == expected.prompts
    assert (shown.before.int() - expected.before.int()).abs().max() <= 1


def stopped(folder: Path, call: int) -> None:
    """Train as a team of two. Before check number ``call`` of rank 1 it gets SIGTERM; note its checks from then on."""
    check, rank, asked, later = StopPoints.check, os.environ["RANK"], [], []

    def counted(points: StopPoints) -> None:
        asked.append(points)
        if len(asked) == call and rank == "1":
            signal.raise_signal(signal.SIGTERM)
        if len(asked) >= call:
            later.append(points)
        check(points)

    StopPoints.check = counted  # type: ignore[method-assign]
    config = engine.make_config(folder, *CASES[TEAM], "processes.per_prompt=2")
    engine.train(config, exit_code=143 if call else 0)
    (folder / f"checks of {rank}").write_text(f"{len(asked)} {len(later)}")


TEAM = "draws split over a team"


@pytest.mark.long
def test_a_team_is_stopped_in_the_middle_of_a_rollout_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Who is asked leaves its share at once, and the other one when its own is done; then both give the step up."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    run_in_group(tmp_path, 2, stopped, whole, 0)
    asked, _ = map(int, (whole / "checks of 1").read_text().split())
    run_in_group(tmp_path, 2, stopped, again, asked // 2)
    (_, later), (all_of_0, _) = (map(int, (again / f"checks of {rank}").read_text().split()) for rank in "10")
    assert later == 1, "the share was left where the signal came"
    assert asked // 2 <= all_of_0 < asked // 2 + asked / 8, "the other one did not begin what would come next"
    steps = [row["step"] for row in engine.metrics_of(again / "run")]
    assert steps == list(range(1, len(steps) + 1))
    run_in_group(tmp_path, 2, stopped, again, 0)
    expected = engine.saved_tensors(whole / "run", 5)
    found = engine.saved_tensors(again / "run", 5)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert engine.metrics_of(again / "run") == engine.metrics_of(whole / "run")


def fingerprint(row: engine.Row | oracle.LossRow) -> tuple[float, ...]:
    """The noise of a row tells it from all others."""
    return tuple(row.noise.flatten()[:4].tolist())
