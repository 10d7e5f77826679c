"""Comparing finished runs: seeds of one setting, and what is not comparable."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from vpo_engine import evaluate
from vpo_engine.config_file import dump_config, load_config
from vpo_engine.evaluation.commands import compares_finished_runs
from vpo_engine.evaluation.session import Options

Make = Callable[..., Path]


@pytest.fixture
def a_run(tmp_path: Path) -> Make:
    """Make what ``evaluate`` reads of a finished run; ``measures``: {name: change of it}."""

    def make(folder: str, *overrides: str, **measures: float) -> Path:
        root = tmp_path / folder
        root.mkdir()
        (root / "config.yaml").write_text(dump_config(load_config(None, [*overrides, f"run_dir={root}"])))
        found = {
            f"reward/{name}": {
                "before": 1.0,
                "after": 1 + by,
                "difference": by,
                "low": by - 0.1,
                "high": by + 0.1,
            }
            for name, by in (measures or {"selected": 0.2, "text_alignment": 0.05}).items()
        }
        summary = {"clips": 8, "confidence": 0.95, "measures": found, "timings": {}}
        (root / "summary.json").write_text(json.dumps(summary))
        return root

    return make


def refused(capsys: pytest.CaptureFixture[str], *roots: Path) -> str:
    assert evaluate.main([str(root) for root in roots]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_seeds_of_one_setting_share_a_column(a_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """They may have other directories, checkpoints, processes and planned batch sizes."""
    one = a_run("one", "seed=1", selected=0.1)
    two = a_run("two", "seed=2", "checkpoint.keep=9", "processes.reward=true", selected=0.3)
    three = a_run(
        "three",
        "seed=3",
        "rollout.batch_size=8",
        "prompts.cache=/c",
        "model.device=cpu",
        "log.wandb=mine",
        "distributed.stage_minutes=60",
        "disk.limit_gib=50",
        "memory.limit_gib=4",
        "memory.overcommit=true",
        selected=0.2,
    )
    assert evaluate.main([str(one), str(two), str(three)]) == 0
    said = capsys.readouterr().out
    assert "sprites (3 seeds)" in said
    assert "+0.200 ± 0.100  2/3" in said


def test_names_have_columns_of_their_own(a_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    online, offline = a_run("a", "name=online"), a_run("b", "name=offline", "objective.beta=9")
    assert evaluate.main([str(online), str(offline)]) == 0
    assert "online (1 seed) offline (1 seed)" in " ".join(capsys.readouterr().out.split())


def test_a_resumed_run_and_an_undisturbed_one_compare_in_any_order_of_their_measures(
    a_run: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    one = a_run("one", "seed=1", selected=0.1, text_alignment=0.2)
    two = a_run("two", "seed=2", text_alignment=0.4, selected=0.3)
    assert evaluate.main([str(one), str(two)]) == 0
    said = capsys.readouterr().out
    assert "+0.200 ± 0.141" in said
    assert "+0.300 ± 0.141" in said


def test_runs_of_other_settings_are_no_seeds(a_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    one = a_run("one", "seed=1")
    two = a_run("two", "seed=2", "objective.beta=9", "optimizer.clip=null")
    said = refused(capsys, one, two)
    assert "settings differ (objective.beta: 250 -> 9; optimizer.clip: 1 -> null)" in said
    assert "give one of them another name" in said
    longer = a_run("longer", "seed=3", "steps=80")
    assert "steps: 40 -> 80" in refused(capsys, one, longer)


def test_one_seed_is_one_result(a_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, three = a_run("one", "seed=1"), a_run("two", "seed=2"), a_run("three", "seed=1")
    said = refused(capsys, one, two, three)
    assert f"{one} and {three} are both 'sprites' with seed=1" in said
    assert "with seed=1" in refused(capsys, one, one)


def test_runs_that_cannot_be_read_are_named(a_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = a_run("one", "seed=1"), a_run("two", "seed=2", selected=0.1)
    assert "only some have: reward/text_alignment" in refused(capsys, one, two)
    (two / "summary.json").write_text('{"measures"')
    assert f"'{two / 'summary.json'}' is damaged" in refused(capsys, one, two)
    (two / "summary.json").unlink()
    assert f"{two} has no summary.json, so the run has not finished" in refused(capsys, one, two)
    assert "there is no run directory at" in refused(capsys, one.parent / "gone")
    assert "is not a run directory: it has no config.yaml" in refused(capsys, one.parent)


def test_any_option_evaluates_a_run_anew(a_run: Make) -> None:
    root = a_run("one")
    assert compares_finished_runs([root], Options(root))
    for given in (Options(root, devices=("cpu",)), Options(root, samples=2), Options(root, seed=1)):
        assert not compares_finished_runs([root], given)
        assert not compares_finished_runs([root, root], given)


def test_the_command_that_measures_anew_works_for_any_name(
    a_run: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    root = a_run("my run")
    assert evaluate.main([str(root)]) == 0
    words = shlex.split(capsys.readouterr().err.rpartition(": ")[2])
    assert words == ["vpo", "evaluate", str(root), "--baseline"]
