"""Whole runs of the sprites world whose work DeepSpeed divides among two processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from process_group import Group, run_in_group
from safetensors.torch import load_file
from zero_runs import divided_fully

from vpo_engine.config import Config
from vpo_engine.train import main, train

# Not imported here: that takes seconds in every worker, also where these tests are left out.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


def policy_of(config: Config, step: int) -> dict[str, torch.Tensor]:
    assert config.run_dir is not None
    return load_file(config.run_dir / "checkpoints" / f"step_{step:08d}" / "policy" / "model.safetensors")


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_a_run_begins_divided_and_is_finished_by_one_process(
    small: Callable[..., Config], small_policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held-out clips, counting of operations and saving need the whole policy, of which stage 3 leaves parts."""
    same = (small_policy, "pairs_per_step=2", "rollout.weights=policy", "optimizer.lr=1e-4")
    divided = small(
        *same, "steps=2", "distributed.engine=deepspeed", "distributed.zero_stage=3", divided_fully(tmp_path)
    )
    printed = run_in_group(tmp_path, 2, train, divided)
    assert "going on from" not in printed
    assert divided.run_dir is not None
    given = json.loads((divided.run_dir / "deepspeed.json").read_text(encoding="utf-8"))
    assert given["gradient_clipping"] == divided.optimizer.clip
    assert given["zero_optimization"]["stage"] == 3
    before = policy_of(divided, 2)
    assert train(small(*same, "steps=4")) == 0
    assert "step_00000002" in capsys.readouterr().out
    after = policy_of(divided, 4)
    moved = torch.cat([(after[name] - before[name]).flatten().abs() for name in after])
    assert 0 < float(moved.max()) <= 2.5e-4


def refuse(arguments: list[str]) -> int:
    return main(arguments)


@pytest.mark.long
def test_an_error_of_the_json_file_is_said_once(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"gradient_clipping": 3.0}), encoding="utf-8")
    arguments = [
        "distributed.engine=deepspeed",
        f"distributed.deepspeed_config={file}",
        f"run_dir={tmp_path / 'run'}",
    ]
    group = Group(tmp_path, 2, refuse, arguments)
    printed = group.wait(expected=[1, 0])
    assert printed.count("gradient_clipping=3.0, but this run has 1.0") == 1
    assert "Traceback" not in printed
