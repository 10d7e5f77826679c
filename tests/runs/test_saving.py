"""Saving in the background: what is written, and what waits for it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from vpo_engine.config import CheckpointConfig, LoraConfig
from vpo_engine.errors import CheckpointError
from vpo_engine.memory.host_copy import HostCopies
from vpo_engine.models.lora import inject_adapter, save_adapter
from vpo_engine.runs import saving
from vpo_engine.runs.checkpoint import load_checkpoint, newest_complete
from vpo_engine.runs.saving import CheckpointSaver

CPU = torch.device("cpu")


class Gate:
    """Lets the writer of a checkpoint begin only when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.expired = False
        write = saving.save_checkpoint

        def gated(*args: Any, **parts: Any) -> None:
            self.reached.set()
            self.expired = not self.open.wait(60)
            write(*args, **parts)

        monkeypatch.setattr(saving, "save_checkpoint", gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def saver(folder: Path, said: list[str] | None = None, keep: int = 9) -> CheckpointSaver:
    say = (lambda text: None) if said is None else said.append
    return CheckpointSaver(folder, CheckpointConfig(keep=keep, background=True), CPU, say)


def save(
    saver: CheckpointSaver, step: int, weights: torch.Tensor, state: dict[str, Any] | None = None
) -> None:
    saver.begin(step)
    saver.save(step, tensors={"optimizer": {"m": weights}}, state=state or {"step": step}, write_policy=None)


def saved(folder: Path, step: int) -> torch.Tensor:
    return load_checkpoint(folder / f"step_{step:08d}").tensors["optimizer"]["m"]


def test_training_goes_on_and_changes_nothing_of_what_is_written(tmp_path: Path, gate: Gate) -> None:
    weights, state = torch.ones(1000), {"guards": [1]}
    with saver(tmp_path) as writing:
        save(writing, 3, weights, state)
        assert gate.reached.wait(60), "save returned before the file was written"
        assert newest_complete(tmp_path) is None
        weights.zero_()
        state["guards"].append(2)
        writing.check()
        gate.open.set()
    assert torch.equal(saved(tmp_path, 3), torch.ones(1000))
    assert load_checkpoint(tmp_path / "step_00000003").state == {"guards": [1]}


def test_copies_that_a_device_makes_meanwhile_are_complete_before_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU makes them while the host goes on; here they are made when they are waited for."""
    under_way: list[tuple[torch.Tensor, torch.Tensor]] = []
    reserve = HostCopies.tensor

    def tensor(self: HostCopies, source: torch.Tensor) -> torch.Tensor:
        under_way.append((reserve(self, torch.zeros_like(source)), source))
        return under_way[-1][0]

    def wait(self: HostCopies) -> None:
        for made, source in under_way:
            made.copy_(source)

    monkeypatch.setattr(HostCopies, "tensor", tensor)
    monkeypatch.setattr(HostCopies, "wait", wait)
    weights = torch.ones(1000)
    with saver(tmp_path) as writing:
        save(writing, 3, weights)
        weights.zero_()
    assert torch.equal(saved(tmp_path, 3), torch.ones(1000))


def test_a_second_save_waits_for_the_first_and_says_so(tmp_path: Path, gate: Gate) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        gate.open.set()

    with CheckpointSaver(tmp_path, CheckpointConfig(keep=9, background=True), CPU, say) as writing:
        save(writing, 1, torch.full((5,), 1.0))
        assert gate.reached.wait(60)
        save(writing, 2, torch.full((5,), 2.0))
        assert newest_complete(tmp_path) is not None, "the first is in place before the second is copied"
    assert said == [
        "step 2 is to be saved, and waits for the checkpoint of step 1, which is still being written; a larger "
        "checkpoint.every avoids this"
    ]
    assert [float(saved(tmp_path, step)[0]) for step in (1, 2)] == [1.0, 2.0]


def end_by(error: BaseException, saver: CheckpointSaver, step: int) -> None:
    """Let a run end by an error while a checkpoint is being written."""

    def run() -> None:
        with saver:
            save(saver, step, torch.ones(5))
            raise error

    with pytest.raises(type(error)) as caught:
        run()
    assert caught.value is error


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_error_of_the_writer_is_raised_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with saver(tmp_path) as writing:
        save(writing, 1, torch.ones(5))
        writing.wait()
        monkeypatch.setattr(safetensors.torch, "save_file", full)
        save(writing, 2, torch.ones(5))
        writing.settle()
        with pytest.raises(
            CheckpointError, match=r"the disk is full: could not save checkpoint '.*step_00000002'"
        ):
            writing.check()
        writing.check()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    saved(tmp_path, 1)


def test_the_end_waits_and_raises_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="the disk is full"), saver(tmp_path) as writing:
        save(writing, 1, torch.ones(5))


def test_another_error_ends_the_run_and_that_of_the_writer_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    end_by(RuntimeError("the reward failed"), saver(tmp_path, said), 1)
    (line,) = said
    assert line.startswith("the checkpoint of step 1 was not saved: the disk is full")


def test_another_error_lets_the_save_finish_and_a_second_signal_does_not_wait(
    tmp_path: Path, gate: Gate
) -> None:
    writing = saver(tmp_path)
    end_by(KeyboardInterrupt(), writing, 1)
    assert not gate.expired, "it waited for the writer"
    assert newest_complete(tmp_path) is None
    gate.open.set()
    writing.settle()
    end_by(RuntimeError("the reward failed"), saver(tmp_path), 2)
    assert (tmp_path / "step_00000002").is_dir()


def test_the_copies_use_the_same_memory_at_every_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpo_engine.memory.host_copy._SLAB_BYTES", 1024)
    copies, places, kept = HostCopies(CPU), set(), 0
    tensors = [
        torch.randn(100),
        torch.randn(300).double(),
        torch.tensor(True),
        torch.empty(0, 3),
        torch.randn(6, 8).T,
    ]
    for _ in range(3):
        copies.begin()
        made = [copies.tensor(tensor) for tensor in tensors]
        assert all(torch.equal(*both) for both in zip(made, tensors, strict=True))
        assert all(
            one.dtype == tensor.dtype and one.is_contiguous()
            for one, tensor in zip(made, tensors, strict=True)
        )
        places.add(tuple(one.data_ptr() for one in made))
        assert kept in (0, copies.nbytes)
        kept = copies.nbytes
    assert len(places) == 1


def test_the_copy_of_a_network_shares_what_is_never_trained() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    network[0].requires_grad_(False)
    network[1].bias.requires_grad_(False)
    made = HostCopies(CPU).network(network)
    assert made[0] is network[0]
    assert made[1].bias is network[1].bias
    assert made[2] is not network[2]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        for value in (p for p in network.parameters() if p.requires_grad):
            value.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_the_copy_of_a_network_with_an_adapter_writes_the_adapter(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).requires_grad_(False).eval()
    layers = inject_adapter(network, LoraConfig(rank=2, targets=("0", "1")), ("0", "1"), 0)
    save_adapter(network, tmp_path / "live")
    made = HostCopies(CPU).network(network)
    assert all(
        made.get_submodule(name).base_layer is network.get_submodule(name).base_layer for name in layers
    )
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    save_adapter(made, tmp_path / "copy")
    live, copied = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("live", "copy")
    )
    assert live == copied


def test_the_foreground_writes_at_once(tmp_path: Path) -> None:
    with CheckpointSaver(tmp_path, CheckpointConfig(background=False), CPU) as writing:
        assert writing.begin(1) is None
        writing.save(1, tensors={"optimizer": {"m": torch.ones(2)}}, state={}, write_policy=None)
        assert newest_complete(tmp_path) is not None


def test_the_background_keeps_as_many_as_it_is_told(tmp_path: Path) -> None:
    with saver(tmp_path, keep=2) as writing:
        for step in (1, 2, 3):
            save(writing, step, torch.ones(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
