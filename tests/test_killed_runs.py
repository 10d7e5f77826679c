"""Runs that are killed at random moments, by the system, end as the run that nobody disturbed."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from process_group import Group
from safetensors.torch import load_file

from vpo_engine import train as entry

SETTINGS = (
    "steps=4",
    "checkpoint.every=1",
    "evaluation.every=2",
    "checkpoint.keep=9",
    "pairs.dataset=scores",
)
CLOCKS = ("seconds/", "speed/", "memory/")


def rows(run: Path) -> list[dict[str, object]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in found]


def everything(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints/step_00000004"
    return {
        f"{path.name}/{name}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def start(folder: Path, arguments: list[str]) -> Group:
    return Group(folder, 1, entry.main, arguments)


@pytest.mark.long
def test_kill_9_and_sigterm_at_six_random_moments(
    smallest: list[str], small_policy: str, tmp_path: Path
) -> None:
    """In two runs, of which one saves in the background; test_killed_anywhere.py kills at chosen places."""
    whole, settings = tmp_path / "whole", [*smallest, small_policy, *SETTINGS]
    Group(tmp_path, 1, int).wait()  # the server has imported the engine
    began = time.monotonic()
    start(tmp_path, [*settings, f"run_dir={whole}"]).wait()
    seconds = time.monotonic() - began
    random.seed(0)
    killed = 0
    for number in range(2):
        run = tmp_path / f"run_{number}"
        background = "true" if number % 2 else "false"
        arguments = [*settings, f"run_dir={run}", f"checkpoint.background={background}"]
        for _ in range(3):
            process = start(tmp_path, arguments).processes[0]
            time.sleep(random.uniform(0.1, 0.7) * seconds)
            sent = signal.SIGKILL if killed % 2 == 0 else signal.SIGTERM
            process.kill() if sent == signal.SIGKILL else process.terminate()  # nothing if it has ended
            process.join(600)
            assert process.exitcode in (-sent, 128 + sent, 0), process.exitcode
            killed += 1
        start(tmp_path, arguments).wait()
        assert rows(run) == rows(whole)
        found, expected = everything(run), everything(whole)
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        summaries = [json.loads((one / "summary.json").read_text())["measures"] for one in (run, whole)]
        assert summaries[0] == summaries[1]
        assert list(summaries[0]) == list(summaries[1])
        dataset = "preference_dataset/pairs_0000.jsonl"
        assert (run / dataset).read_bytes() == (whole / dataset).read_bytes()
        assert (run / "report.html").exists()
        assert not list((run / "checkpoints").glob(".*"))
