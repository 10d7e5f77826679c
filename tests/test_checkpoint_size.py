"""The disk space of checkpoints, known before the first step."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from smallest_run import SHIPPED

from vpo_engine import train as entry
from vpo_engine.build import build_model
from vpo_engine.checkpoint_size import check_disk, checkpoint_bytes
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.reference.store import build_reference
from vpo_engine.run_state import average_writer, capture
from vpo_engine.runs.checkpoint import save_checkpoint
from vpo_engine.runs.disk_use import SPARE_BYTES

Make = Callable[..., Config]


@pytest.mark.usefixtures("unplanned")
def test_a_disk_that_cannot_hold_the_checkpoints_is_noticed_before_the_first_step(
    smallest: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=80 * 2**20))
    run = tmp_path / "run"
    assert entry.main([*smallest, SHIPPED, f"run_dir={run}"]) == 1
    message = capsys.readouterr().err
    assert f"the disk of {tmp_path} has 0.08 GiB free, but this run needs " in message
    assert " GiB there for 3 checkpoints of 0." in message
    assert "free some space, keep fewer, or give a run_dir on another disk" in message
    assert not run.exists()


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("memory.weights=fp32_master", "reference.storage=exact8", "memory.optimizer_bits=8"),
        ("memory.weights=stochastic_rounding", "reference.storage=int8"),
        ("reference.storage=bf16",),
        ("model.lora.rank=4", "reference.storage=adapter"),
        ("model.lora.rank=4", "reference.storage=adapter", "ema.decay=0.9", "memory.weights=fp32_master"),
        ("memory.weights=fp32_master", "model.dtype=bfloat16", "reference.storage=bf16", "ema.decay=0.9"),
    ],
)
def test_the_size_of_a_checkpoint_is_known_before(
    settings: tuple[str, ...], small: Make, tmp_path: Path
) -> None:
    config = small(SHIPPED, *settings)  # of whose size the headers of files are a small part
    processes = Processes.start("cpu")
    model = build_model(config, processes, lambda _: None)
    algorithm = OnlineVPO(
        config, model, mock.MagicMock(), build_reference(config.reference.storage, model.network), processes
    )
    algorithm.optimizer.begin(1e-5)
    for parameter in algorithm.parameters:
        parameter.grad = torch.zeros_like(parameter)
    algorithm.optimizer.step()
    expected = checkpoint_bytes(config, model)
    saved = capture(algorithm, 1, {})
    folder = save_checkpoint(
        tmp_path,
        1,
        **saved,
        write_policy=model.save_policy,
        write_average=average_writer(algorithm, None),
        keep=1,
    )
    actual = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert actual == pytest.approx(expected, rel=0.1)


def of_any_size(network: torch.nn.Module) -> Any:
    """Return a model that does not tell the size of its videos."""
    return types.SimpleNamespace(network=network, video_size=None)


def test_checkpoints_that_are_there_need_no_more_room(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that are kept and one that is written, one is there, so that two more must fit."""
    config, model = small("checkpoint.keep=2"), of_any_size(torch.nn.Linear(1000, 1000))
    (tmp_path / "checkpoints" / "step_00000020").mkdir(parents=True)
    need = 2 * checkpoint_bytes(config, model) + SPARE_BYTES
    free = types.SimpleNamespace(free=need)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    check_disk(config, model, tmp_path)
    free.free = need - 1
    with pytest.raises(ValueError, match="there for 2 checkpoints of"):
        check_disk(config, model, tmp_path)


def test_a_method_without_a_reference_needs_no_room_for_one() -> None:
    network = torch.nn.Linear(1000, 1000)
    online, refl = (
        checkpoint_bytes(load_config(None, [f"method={name}"]), of_any_size(network))
        for name in ("online_vpo", "refl")
    )
    assert online - refl == 4 * sum(parameter.numel() for parameter in network.parameters())
