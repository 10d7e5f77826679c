"""Runs of the toy whose work DeepSpeed divides among two processes do what one process does."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import engine
import pytest
from checks import CASES, check_lines, check_metrics, check_policies
from process_group import run_in_group

# Not imported here: that takes seconds in every worker, also where these tests are left out.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

CASE = "draws, updates and weights"
DIVIDED = ("distributed.engine=deepspeed", "distributed.zero_stage=3")


def in_two(folder: Path) -> None:
    own = (*DIVIDED, f"distributed.deepspeed_config={folder / 'own.json'}")
    engine.train(engine.make_config(folder, *CASES[CASE], *own))


@pytest.mark.long
def test_a_divided_run_is_that_of_one_process_and_goes_on_as_one(tmp_path: Path) -> None:
    values = {"gradient_clipping": "auto", "zero_optimization": {"stage3_param_persistence_threshold": 0}}
    (tmp_path / "own.json").write_text(json.dumps(values), encoding="utf-8")
    run_in_group(tmp_path, 2, in_two, tmp_path)
    run = tmp_path / "run"
    check_lines(CASE, run)
    check_policies(CASE, run)
    check_metrics(CASE, run)
    given = json.loads((run / "deepspeed.json").read_text(encoding="utf-8"))
    assert (given["gradient_clipping"], given["zero_optimization"]["stage"]) == (0.05, 3)
    again = tmp_path / "again" / "run"
    shutil.copytree(run, again)
    engine.forget_after(again, 2)
    config = engine.make_config(tmp_path, *CASES[CASE], f"run_dir={again}", "checkpoint.resume=true")
    engine.train(config)
    for name, value in engine.saved_tensors(run, 5).items():
        mine, value = engine.saved_tensors(again, 5)[name].double(), value.double()
        assert (mine - value).norm() <= 2e-2 * value.norm(), name  # as in ``checks.assert_moved_alike``
