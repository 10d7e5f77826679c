"""Test the offload of block inputs: when each copy is made and freed, and that gradients are the same."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from vpo_engine.memory.checkpointing import Activations
from vpo_engine.memory.offload import OffloadedInputs, PlainCopies
from vpo_engine.models.opensora.stdit3 import STDiT3

MANIFEST = json.loads((Path(__file__).parents[1] / "data" / "opensora" / "stdit3_tiny.json").read_text())
DEPTH = 3
BLOCKS = 2 * DEPTH


class Recorder(PlainCopies):
    """Copies that write down what is asked of them, and how much of it the device holds.

    Inputs are called by their host memory, in the order it was made. ``pending`` copies have not been waited for.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.log: list[str] = []
        self.hosts: list[Tensor] = []
        self.on_device: list[StorageWeakRef] = []
        self.pending: set[str] = set()
        self.most = 0

    def host_like(self, tensor: Tensor) -> Tensor:
        self.hosts.append(super().host_like(tensor))
        return self.hosts[-1]

    def number(self, host: Tensor) -> int:
        return next(index for index, known in enumerate(self.hosts) if known is host)

    def to_host(self, source: Tensor, host: Tensor) -> str:  # type: ignore[override]
        super().to_host(source, host)
        return self._begin(f"out {self.number(host)}", source)

    def to_device(self, host: Tensor) -> tuple[Tensor, str]:  # type: ignore[override]
        tensor, _ = super().to_device(host)
        return tensor, self._begin(f"in {self.number(host)}", tensor)

    def wait(self, mark: str) -> None:  # type: ignore[override]
        self.pending.discard(mark)

    def _begin(self, what: str, tensor: Tensor) -> str:
        self.log.append(what)
        self.pending.add(what)
        self.on_device.append(StorageWeakRef(tensor.untyped_storage()))
        self.most = max(self.most, self.held)
        return what

    @property
    def held(self) -> int:
        return len({ref.cdata for ref in self.on_device if not ref.expired()})


class Chain:
    """Blocks tanh(x W), each checkpointed with its input on the host."""

    def __init__(self, blocks: int = 5) -> None:
        torch.manual_seed(0)
        self.weights = [torch.randn(8, 8, requires_grad=True) for _ in range(blocks)]
        self.scale = torch.randn(4, 8, requires_grad=True)  # of an input's shape, but shared by all blocks
        self.recorders: list[Recorder] = []
        self.store = OffloadedInputs(self.record)

    def record(self, tensor: Tensor) -> Recorder:
        self.recorders.append(Recorder(tensor.device))
        return self.recorders[-1]

    @property
    def recorder(self) -> Recorder:
        (recorder,) = self.recorders
        return recorder

    def forward(self, x: Tensor) -> Tensor:
        sender = self.store.forward_pass()
        for weight in self.weights:
            with sender.sending(x):
                x = checkpoint(self._block, x, self.scale, weight, use_reentrant=False)
        return x

    @staticmethod
    def _block(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        return torch.tanh((x * scale) @ weight)

    def plain(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = self._block(x, self.scale, weight)
        return x

    def gradients(self) -> list[Tensor]:
        found = [tensor.grad for tensor in (self.scale, *self.weights)]
        for tensor in (self.scale, *self.weights):
            tensor.grad = None
        assert all(grad is not None for grad in found)
        return found  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    """Switch the garbage collector off, so that only reference counts free memory, at once."""
    gc.disable()
    yield
    gc.enable()


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_inputs_leave_in_order_and_come_back_one_block_ahead() -> None:
    chain = Chain(4)
    out = chain.forward(torch.randn(4, 8))
    assert chain.recorder.log == ["out 0", "out 1", "out 2", "out 3"]
    assert chain.recorder.held == 1  # that of the last block, which is needed first
    seen: list[tuple[int, list[str]]] = []
    for index, weight in enumerate(chain.weights):
        weight.register_hook(lambda _, index=index: seen.append((index, chain.recorder.log[4:])))
    out.sum().backward()
    assert seen == [
        (3, ["in 2"]),
        (2, ["in 2", "in 1"]),
        (1, ["in 2", "in 1", "in 0"]),
        (0, ["in 2", "in 1", "in 0"]),
    ]


def test_at_most_one_input_is_on_the_device_besides_the_running_one() -> None:
    chain = Chain(6)
    out = chain.forward(torch.randn(4, 8))
    assert chain.recorder.most <= 2
    out.sum().backward()
    assert chain.recorder.most <= 2


def test_gradients_are_the_same_bits_and_everything_is_free_afterwards() -> None:
    chain, x = Chain(), torch.randn(4, 8, requires_grad=True)
    chain.plain(x).square().sum().backward()
    expected, expected_x = chain.gradients(), x.grad
    x.grad = None
    chain.forward(x).square().sum().backward()
    assert same(chain.gradients(), expected)
    assert torch.equal(x.grad, expected_x)
    assert chain.recorder.pending == set()
    assert chain.recorder.held == 1  # x, which the caller has
    assert len(free_hosts(chain.store)) == len(chain.weights)


def free_hosts(store: OffloadedInputs) -> list[Tensor]:
    return [host for hosts in store._free_hosts.values() for host in hosts]


def test_host_memory_is_used_again() -> None:
    chain = Chain()
    for _ in range(3):
        chain.forward(torch.randn(4, 8)).sum().backward()
    assert len(chain.recorder.hosts) == len(chain.weights)
    chain.forward(torch.randn(3, 8)[:, :].expand(4, 3, 8)[:, 0])
    assert len(chain.recorder.hosts) > len(chain.weights)  # another layout, another buffer


def test_an_error_between_forward_and_backward_leaks_nothing() -> None:
    chain = Chain()

    def fail() -> None:
        chain.forward(torch.randn(4, 8))
        raise KeyError("the reward model failed")

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
        assert chain.recorder.held == 0
        assert chain.recorder.pending == set()
        assert len(free_hosts(chain.store)) == len(chain.recorder.hosts) == len(chain.weights)


def test_an_error_in_the_backward_pass_leaks_nothing() -> None:
    """Autograd itself keeps what is left of a failed pass until the next one."""
    chain = Chain()

    def fail(_: Tensor) -> None:
        raise KeyError("no memory")

    def step() -> None:
        chain.forward(torch.randn(4, 8)).sum().backward()

    hook = chain.weights[2].register_hook(fail)
    for _ in range(4):
        with pytest.raises(KeyError):
            step()
        assert chain.recorder.held <= 2
        assert len(chain.recorder.hosts) < 2 * len(chain.weights)
    hook.remove()
    step()
    assert chain.recorder.held == 0
    assert chain.recorder.pending == set()
    assert len(free_hosts(chain.store)) == len(chain.recorder.hosts)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("together", [False, True])
def test_two_forward_passes_before_one_backward(order: tuple[int, int], together: bool) -> None:
    chain = Chain()
    inputs = [torch.randn(4, 8) for _ in range(2)]
    outs = [chain.plain(x).square().sum() for x in inputs]
    (outs[0] + outs[1]).backward() if together else [outs[i].backward() for i in order]
    expected = chain.gradients()
    del outs
    outs = [chain.forward(x).square().sum() for x in inputs]
    assert len(chain.recorder.hosts) == 2 * len(chain.weights)
    (outs[0] + outs[1]).backward() if together else [outs[i].backward() for i in order]
    assert same(chain.gradients(), expected)
    del outs, inputs
    assert chain.recorder.held == 0
    assert len(free_hosts(chain.store)) == 2 * len(chain.weights)


def test_a_retained_graph_is_run_again() -> None:
    chain = Chain()
    out = chain.forward(torch.randn(4, 8)).square().sum()
    out.backward(retain_graph=True)
    first = chain.gradients()
    out.backward()
    assert same(chain.gradients(), first)


def test_a_copy_has_host_memory_of_its_own() -> None:
    chain = Chain()
    chain.forward(torch.randn(4, 8)).sum().backward()
    assert free_hosts(copy.deepcopy(chain.store)) == []
    assert len(free_hosts(chain.store)) == len(chain.weights)


# --- STDiT3 ---


def network() -> STDiT3:
    torch.manual_seed(0)
    return STDiT3.from_config({**MANIFEST["config"], "depth": DEPTH})


def predict(model: STDiT3, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 2, 6, 4, generator=random)
    text = torch.randn(2, 1, 5, 32, generator=random)
    return model(x, torch.tensor([100.0, 700.0]), text, fps=24.0, height=48.0, width=32.0)


def gradients(model: STDiT3, backward_passes: int = 1) -> list[Tensor]:
    model.zero_grad()
    for seed in range(backward_passes):
        predict(model, seed).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", ["block", "all_but_attention"])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_model_has_the_same_gradients(checkpointing: str, parts: int) -> None:
    model = network()
    model.activations = Activations(checkpointing, mlp_chunks=parts)  # type: ignore[arg-type]
    expected = gradients(model, 2)
    recorders: list[Recorder] = []
    model.offloaded = OffloadedInputs(
        lambda tensor: recorders.append(Recorder(tensor.device)) or recorders[-1]
    )
    model.activations = Activations(checkpointing, offload=True, mlp_chunks=parts)  # type: ignore[arg-type]
    assert same(gradients(model, 2), expected)
    (recorder,) = recorders
    sent = [f"out {block}" for block in range(BLOCKS)]
    returned = [f"in {block}" for block in reversed(range(BLOCKS - 1))]
    assert [line.split()[0] for line in recorder.log] == [
        line.split()[0] for line in (*sent, *returned, *sent, *returned)
    ]
    assert recorder.log[: len(sent + returned)] == sent + returned
    assert len(recorder.hosts) == BLOCKS
    assert recorder.most <= 2
    assert recorder.held == 0
    assert recorder.pending == set()


def test_nothing_is_sent_without_grad() -> None:
    model = network()
    model.activations = Activations("block", offload=True)
    with torch.no_grad():
        predict(model)
    assert free_hosts(model.offloaded) == []


def test_fake_tensors_are_sent_too() -> None:
    with FakeTensorMode():
        model = network()
        model.activations = Activations("block", offload=True)
        predict(model).square().mean().backward()
        assert [host.shape[-1] for host in free_hosts(model.offloaded)] == [64] * BLOCKS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_gradients_are_the_same_bits_and_host_memory_is_pinned() -> None:
    model = network().cuda()
    random = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 32, 32, generator=random).cuda(), torch.randn(2, 1, 5, 32).cuda()

    def step(offload: bool) -> list[Tensor]:
        model.zero_grad()
        model.activations = Activations("block", offload=offload)
        for _ in range(3):
            out = model(x, torch.tensor([100.0, 700.0]).cuda(), text, fps=24.0, height=256.0, width=256.0)
            out.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        expected, found = step(False), step(True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(found, expected)
    hosts = free_hosts(model.offloaded)
    assert len(hosts) == BLOCKS
    assert all(host.is_pinned() for host in hosts)


def test_free_host_memory_of_another_type_is_left_alone() -> None:
    store, third = OffloadedInputs(), torch.full((2, 3), 1 / 3, dtype=torch.bfloat16)
    store.send(torch.ones(2, 3), None)  # dropped at once, so that its host memory is free
    sent = store.send(third, None)
    sent.release()
    found = sent.fetch()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, third)
