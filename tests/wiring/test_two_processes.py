"""Two processes, with prompts of their own or as a team, do what one does."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import oracle
import pytest
import torch
from checks import CASES, check_lines, check_metrics, check_policies, check_rows, expected_of
from process_group import run_in_group

from vpo_engine.distributed.stopping import StopPoints
from vpo_engine.memory.optimizer import PolicyOptimizer
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.rollout.sampler import CandidateSampler
from vpo_engine.runs.log import NullLog
from vpo_engine.runs.signals import StopRequest
from vpo_engine.trainer import Trainer


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


def stopped(folder: Path, number: int) -> None:
    """Train as a team of two. In pass ``number`` of its rollouts rank 1 gets SIGTERM, before its second check there.

    Note how many passes each has begun, and how often it has looked for the signal from there on.
    """
    check, run, rank = StopPoints.check, CandidateSampler._run, os.environ["RANK"]
    begun, inside, later = 0, 0, 0

    def counted(points: StopPoints) -> None:
        nonlocal inside, later
        inside += 0 < begun == number
        if inside == 2 and rank == "1" and not later:
            signal.raise_signal(signal.SIGTERM)
        later += inside >= 2
        check(points)

    def run_and_count(sampler: CandidateSampler, *given: Any) -> Any:
        nonlocal begun
        begun += 1
        return run(sampler, *given)

    StopPoints.check, CandidateSampler._run = counted, run_and_count  # type: ignore[method-assign]
    config = engine.make_config(folder, *CASES[TEAM], "processes.per_prompt=2")
    engine.train(config, exit_code=143 if number else 0)
    (folder / f"counts of {rank}").write_text(f"{begun} {later}")


TEAM = "draws split over a team"


@pytest.mark.long
def test_a_team_is_stopped_in_the_middle_of_a_rollout_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Who is asked leaves its share at once, and the other one when its own is done; then both give the step up."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    run_in_group(tmp_path, 2, stopped, whole, 0)
    passes = int((whole / "counts of 1").read_text().split()[0])
    assert passes >= 6, "two passes of a rollout, some of them for ties"
    run_in_group(tmp_path, 2, stopped, again, passes // 2)
    (other, looks), (asked, later) = (
        map(int, (again / f"counts of {rank}").read_text().split()) for rank in range(2)
    )
    assert (asked, later) == (passes // 2, 1), "it left where the signal came"
    assert other == passes // 2, "it did not begin what would come next"
    assert looks > 1
    steps = [row["step"] for row in engine.metrics_of(again / "run")]
    assert steps == list(range(1, len(steps) + 1))
    run_in_group(tmp_path, 2, stopped, again, 0)
    expected, found = (engine.saved_tensors(folder / "run", 5) for folder in (whole, again))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert engine.metrics_of(again / "run") == engine.metrics_of(whole / "run")


def fingerprint(row: engine.Row | oracle.LossRow) -> tuple[float, ...]:
    """The noise of a row tells it from all others."""
    return tuple(row.noise.flatten()[:4].tolist())


@pytest.mark.parametrize("evaluation", [None, {"step": 2, "kind": "eval", "guards/held_out": 1.0}])
def test_all_know_the_evaluation_that_the_first_one_has_logged_or_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: dict[str, Any] | None
) -> None:
    """The first process has the log, and the others hear from it."""
    recalled: list[object] = []
    kept = SimpleNamespace(tensors={}, state={}, policy=tmp_path, average=tmp_path)
    monkeypatch.setattr("vpo_engine.trainer.load_checkpoint", lambda path: kept)
    monkeypatch.setattr("vpo_engine.trainer.restore", lambda *_: (2, {}))
    trainer = SimpleNamespace(
        _config=engine.make_config(tmp_path, "evaluation.every=2"),
        _start_from=tmp_path,
        _algorithm=None,
        _log=NullLog(),
        _monitor=SimpleNamespace(load=lambda state: None, recall=lambda *given: recalled.extend(given)),
        _processes=SimpleNamespace(
            first=False, broadcast_text=lambda text: json.dumps([["alarm"], evaluation])
        ),
        _due=Trainer._due,
    )
    assert Trainer._resume(trainer) == 2  # type: ignore[arg-type]
    assert trainer._evaluation_missing == (evaluation is None)
    assert recalled == [["alarm"], evaluation]


@pytest.mark.parametrize(("heard", "full"), [(1, False), (2, True)])
def test_a_process_stops_after_the_step_in_which_another_one_must(heard: int, full: bool) -> None:
    """That one was asked to stop, or has found the disk full."""
    trainer = SimpleNamespace(
        _processes=SimpleNamespace(first=False, largest=lambda number: max(number, heard)),
        _stop_elsewhere=lambda: False,
        _alarmed=False,
    )
    assert Trainer._must_stop(trainer, StopRequest())  # type: ignore[arg-type]
    assert trainer._disk_is_full == full


def test_passes_that_keep_step_with_other_processes_add_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's processes make equally many; here there are two more in every step, of a pair that was trained on."""
    engine.train(engine.make_config(tmp_path / "alone", "steps=2"))
    monkeypatch.setattr(PolicyOptimizer, "in_lockstep", True)
    monkeypatch.setattr(OnlineVPO, "_passes_behind", lambda self, samples: 2)
    engine.train(engine.make_config(tmp_path / "together", "steps=2"))
    one, other = (engine.policy_of(tmp_path / name / "run", 2) for name in ("alone", "together"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
