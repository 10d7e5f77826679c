"""Every method on the sprites world through train(): it learns, and a run that was cut goes on bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from power_cut import copy_cut
from safetensors.torch import load_file
from torch import Tensor

from vpo_engine import train as entry
from vpo_engine.config.methods import CARDS, MethodName

METHODS: dict[MethodName, tuple[str, ...]] = {
    "offline_dpo": ("offline_dpo.pairs=4",),
    "refl": ("refl.steps=2", "refl.last_steps=1", "refl.margin=null"),
    "vader": ("vader.steps=3", "vader.guidance=1", "vader.last_steps=2"),
    "instructvideo": ("instructvideo.steps=3", "instructvideo.guidance=1"),
    "t2v_turbo": ("t2v_turbo.guidance=1",),
}


def of_run(run: Path, step: int) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, by file and name."""
    found: dict[str, Tensor] = {}
    folder = run / f"checkpoints/step_{step:08d}"
    for file in sorted(folder.rglob("*.safetensors")):
        place = file.relative_to(folder).as_posix()
        found |= {f"{place}/{name}": value for name, value in load_file(file).items()}
    return found


def rows_of(run: Path) -> list[dict[str, object]]:
    """The rows of the log without what a clock wrote."""
    clocks = ("seconds/", "speed/", "memory/")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(clocks)} for row in rows]


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_and_its_resumed_run_is_the_uninterrupted_one(
    method: MethodName, smallest: list[str], small_policy: str, tmp_path: Path
) -> None:
    unused = CARDS[method].unused
    shared = [text for text in smallest if not text.startswith((*unused, "steps=", "pairs_per_step="))]
    own = (small_policy, f"method={method}", *METHODS[method])
    settings = [*shared, *own, "steps=3", "pairs_per_step=1", "guards.style_bound=null"]
    run, again = tmp_path / "run", tmp_path / "again"
    assert entry.main([*settings, f"run_dir={run}"]) == 0
    copy_cut(run, again, 2)
    assert entry.main([*settings, f"run_dir={again}", "checkpoint.resume=true"]) == 0
    saved, expected = of_run(again, 3), of_run(run, 3)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(value, saved[name]) for name, value in expected.items())
    assert rows_of(again) == rows_of(run)
    earlier = of_run(run, 2)
    moved = [name for name, value in expected.items() if not torch.equal(value, earlier[name])]
    assert any(name.startswith("policy/model.safetensors/") for name in moved)
