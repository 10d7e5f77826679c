"""Processes that hold slices of the same videos train what one process trains (CPU, gloo)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sequence_runs
import torch
import zero_runs
from process_group import run_in_group
from sequence_runs import CASES, DIVIDED, FEW, LAYOUTS, SAMPLED, SETTINGS, kept, relative
from tiny_pipelines import FOLDERS, run_config, sized
from zero_runs import assert_same_training

from vpo_engine.build import build_model
from vpo_engine.distributed.sequence import SequenceGroup
from vpo_engine.model_values import SamplerSettings, TextEmbedding

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import family_slices

from vpo_engine.distributed.processes import Processes

BOUND = 1e-6
"""In float32: see ``assert_same_training``."""
MARGINS = 1e-3
"""A margin is beta / 2 = 250 times a sum of four errors of about 1, which float32 rounds by 1e-6, for candidates that
are rounded, too."""


def alone(settings: tuple[str, ...], cache: dict[tuple[str, ...], dict[str, Any]]) -> dict[str, Any]:
    if settings not in cache:
        cache[settings] = sequence_runs.run(settings, Processes.start("cpu"))
    return cache[settings]


def check_runs(found: list[dict[str, Any]], expected: dict[str, Any], case: str) -> None:
    """All processes have the same bits, those of one process to within rounding, and margin 0 after a refresh."""
    storage = {"in 8 bits": "int8", "in bfloat16": "bf16"}.get(case, "copy")
    assert_same_training(expected, found[0], BOUND, case, storage, MARGINS)
    for other in found[1:]:
        assert torch.equal(found[0]["after"], other["after"]), case
        assert torch.equal(found[0]["reference"], other["reference"]), case
        assert found[0]["metrics"] == other["metrics"], case
    if storage == "copy":
        ages = [each["reference_age"] for each in found[0]["metrics"]]
        assert ages == [1, 0, 1], case
        assert found[0]["metrics"][0]["margin"] == found[0]["metrics"][2]["margin"] == 0.0, case
        assert found[0]["metrics"][1]["margin"] != 0.0, case


@pytest.mark.long
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    run_in_group(tmp_path, 2, sequence_runs.in_two, tmp_path)
    cache: dict[tuple[str, ...], dict[str, Any]] = {}
    for case, settings in CASES.items():
        check_runs(kept(tmp_path, case, 2), alone(settings, cache), case)
    for case, (settings, _) in DIVIDED.items():
        check_runs(kept(tmp_path, case, 2), alone(settings, cache), case)
    one, other = kept(tmp_path, "video", 2)
    assert torch.equal(one, other)
    assert relative(one, sequence_runs.sampled(Processes.start("cpu"))) < SAMPLED
    for margins in kept(tmp_path, "rounded", 2):
        assert margins[0] == margins[2] == 0.0
        assert margins[1] != 0.0
    algorithm = zero_runs.make(SETTINGS, Processes.start("cpu"))
    zero_runs.load(algorithm, tmp_path / "saved")
    zero_runs.make_steps(algorithm, [2])
    ended = kept(tmp_path, "went on", 2)
    torch.testing.assert_close(zero_runs.weights_of(algorithm), ended[0], rtol=0, atol=BOUND)


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
def test_four_processes_compute_what_one_does(tmp_path: Path, name: str) -> None:
    run_in_group(tmp_path, 4, sequence_runs.in_four, tmp_path, name)
    cache: dict[tuple[str, ...], dict[str, Any]] = {}
    for case, settings in FEW.items():
        check_runs(kept(tmp_path, f"{name}, {case}", 4), alone(settings, cache), case)
    videos = kept(tmp_path, f"{name}, video", 4)
    assert all(torch.equal(videos[0], video) for video in videos)
    assert relative(videos[0], sequence_runs.sampled(Processes.start("cpu"))) < SAMPLED


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for kind, write in FOLDERS.items():
        write(root / kind)
    return root


@pytest.mark.long
@pytest.mark.parametrize(("count", "check"), [(2, family_slices.in_two), (4, family_slices.in_four)])
def test_families_of_diffusers_compute_what_one_process_does(
    folders: Path, tmp_path: Path, count: int, check: Callable[[Path], None]
) -> None:
    run_in_group(tmp_path, count, check, folders)


class Noting:
    """A network that predicts its latents, and keeps what the calls of a sampling loop share."""

    def __call__(self, x: torch.Tensor, *_: Any, reuse: Any = None, loop: Any = None, **named: Any) -> Any:
        self.shared = reuse or loop
        return x if loop is None else (x,)


@pytest.mark.parametrize("kind", ["sprites", "wan"])
def test_processes_with_slices_decide_together_what_a_step_reuses(
    kind: str, small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has changed in this process's slice, and much in that of the other one."""
    if kind == "sprites":
        config = small()
    else:
        config = run_config(kind, FOLDERS[kind](tmp_path / kind), tmp_path / "run", *sized(kind))
    model: Any = build_model(config, Processes.start("cpu"), lambda _: None)
    model.network.sequence = SequenceGroup(Processes(0, 2, torch.device("cpu")))
    text = TextEmbedding(torch.zeros(1, 5, model.text_rule.channels), torch.ones(1, 5, dtype=torch.bool))
    network = Noting()
    predict = model.predictor(network, text, SamplerSettings(2, cache=0.5), 1.0)
    predict(torch.zeros(1, *model.latent_shape), torch.tensor([500.0]))
    blocks, first = network.shared.blocks, torch.ones(1, 3)
    monkeypatch.setattr(SequenceGroup, "sum", lambda self, values: values + torch.tensor([[9.0], [1.0]]))
    assert blocks.after_first(first) is None
    blocks.keep(first)
    assert blocks.after_first(first) is None
