"""Deltas of ordered bfloat16 bits on every backend, compared with ranks that are found by sorting the values."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from vpo_kernels import OrderedDelta, decode_delta, encode_delta

SIZES = [(), (0,), (3, 0), (1,), (7,), (1023,), (16383,), (16385,), (4, 20, 27, 30), (3, 5, 65537)]
SPECIAL = {
    0x0000,
    0x8000,
    0x0001,
    0x8001,
    0x7F7F,
    0xFF7F,
    0x7F80,
    0xFF80,
    0x7F81,
    0xFF81,
    0x7FC0,
    0x7FFF,
    0xFFFF,
}


@pytest.fixture
def device() -> str:
    return "cpu"


def ranks() -> np.ndarray:
    """Return, for each of the 65536 bit patterns, how many come before it, int64; NaNs are at the ends by payload."""
    bits = np.arange(65536, dtype=np.uint32)
    value = (bits << 16).view(np.float32)
    nan, negative, payload = np.isnan(value), bits >= 0x8000, (bits & 0x7FFF).astype(np.int64)
    group = np.where(nan, np.where(negative, 0, 2), 1)
    within = np.where(negative, -payload, payload).astype(np.float32)
    within[~nan] = value[~nan]
    order = np.lexsort((~negative, within, group))  # by group, then within it, then -0.0 before 0.0
    rank = np.empty(65536, dtype=np.int64)
    rank[order] = np.arange(65536)
    return rank


RANK = torch.from_numpy(ranks())
PATTERN = torch.argsort(RANK)  # of a rank


def of_bits(bits: Tensor, device: str = "cpu") -> Tensor:
    """Return bfloat16 tensors of these bit patterns, integers from 0 to 65535."""
    return bits.to(torch.int32).to(torch.int16).view(torch.bfloat16).to(device)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16).cpu()


def same(a: OrderedDelta, b: OrderedDelta) -> bool:
    pairs = zip((a.difference, a.index, bits(a.value)), (b.difference, b.index, bits(b.value)), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu()) for x, y in pairs)


def expected(reference: Tensor, policy: Tensor) -> OrderedDelta:
    """Return the delta that the ranks give, computed in int64."""
    step = RANK[bits(reference).long() & 0xFFFF] - RANK[bits(policy).long() & 0xFFFF]
    spills = step.abs() > 127
    (index,) = np.nonzero(spills.reshape(-1).numpy())
    values = bits(reference).reshape(-1)[torch.from_numpy(index)].view(torch.bfloat16)
    difference = torch.where(spills, -128, step).to(torch.int8)
    return OrderedDelta(difference, torch.from_numpy(index.astype(np.int32)), values)


def assert_exact(reference: Tensor, policy: Tensor, backend: str) -> OrderedDelta:
    before = bits(reference).clone(), bits(policy).clone()
    delta = encode_delta(reference, policy, backend=backend)
    assert same(delta, expected(reference, policy))
    decoded = decode_delta(delta, policy, backend=backend)
    assert decoded.dtype == torch.bfloat16
    assert torch.equal(bits(decoded), before[0])
    assert torch.equal(bits(reference), before[0])
    assert torch.equal(bits(policy), before[1])
    return delta


def random_weights(shape: tuple[int, ...], drift: float, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return weights of std 0.02 after a drift of the given rms, and before it."""
    generator = torch.Generator().manual_seed(seed)
    policy = 0.02 * torch.randn(shape, generator=generator)
    reference = policy + drift * torch.randn(shape, generator=generator)
    return reference.bfloat16().to(device), policy.bfloat16().to(device)


def test_every_pattern_against_a_sample_of_patterns(backend: str, device: str) -> None:
    every = torch.arange(65536)
    picked = torch.randint(65536, (27,), generator=torch.Generator().manual_seed(0)).tolist()
    others = torch.tensor([*SPECIAL, *picked])
    delta = assert_exact(
        of_bits(others[:, None].expand(-1, 65536), device),
        of_bits(every.expand(len(others), -1), device),
        backend,
    )
    assert 0 < delta.index.numel() < every.numel() * len(others)
    assert_exact(of_bits(every, device), of_bits(torch.full((65536,), 0x7FFF), device), backend)


def test_every_pattern_against_its_neighbours(backend: str, device: str) -> None:
    """Distances reach both ends of 8 bits and beyond; the distance that equals the mark is stored apart."""
    steps = torch.tensor([0, 1, -1, 64, 126, -126, 127, -127, 128, -128, 129, -129, 255, -256])
    near = (RANK + steps[:, None]).clamp(0, 65535)
    delta = assert_exact(
        of_bits(PATTERN[near], device), of_bits(torch.arange(65536).expand(len(steps), -1), device), backend
    )
    inside = delta.difference[:, RANK.argsort()[1000:64000]].cpu()
    assert [set(row.tolist()) for row in inside] == [
        {step if abs(step) < 128 else -128} for step in steps.tolist()
    ]


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_sizes(shape: tuple[int, ...], backend: str, device: str) -> None:
    assert_exact(*random_weights(shape, 1e-3, device), backend)


def test_unrelated_tensors_are_told_by_their_values(backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = of_bits(torch.randint(65536, (40000,), generator=generator), device)
    assert_exact(reference, of_bits(torch.randint(65536, (40000,), generator=generator), device), backend)
    delta = assert_exact(reference.abs() + 1, torch.full_like(reference, -1.0), backend)
    assert torch.equal(delta.index.cpu(), torch.arange(40000, dtype=torch.int32))
    assert torch.equal(bits(delta.value), bits(reference.abs() + 1))


def test_bytes_after_the_drift_between_two_refreshes(backend: str, device: str) -> None:
    """The drift is 15 lr at lr 1e-5, a little more than one rounding of weights of std 0.02."""
    delta = assert_exact(*random_weights((512, 1024), 1.5e-4, device), backend)
    nbytes = sum(tensor.nbytes for tensor in delta)
    assert nbytes == 512 * 1024 + 6 * delta.index.numel()
    assert nbytes <= 1.05 * 512 * 1024


def test_the_reference_stays_while_the_policy_drifts(backend: str, device: str) -> None:
    """After decoding, a step and encoding into the same tensor, the delta still means the first reference."""
    reference, policy = random_weights((3, 41, 67), 1e-3, device)
    delta = encode_delta(reference, policy, backend=backend)
    buffer, address = torch.empty_like(policy), delta.difference.data_ptr()
    for step in range(8):
        decoded = decode_delta(delta, policy, out=buffer, backend=backend)
        assert decoded is buffer
        policy = policy + random_weights((3, 41, 67), 0.0, device, seed=step)[0] * 0.1
        delta = encode_delta(decoded, policy, backend=backend, out=delta.difference)
        assert delta.difference.data_ptr() == address
        assert same(delta, expected(reference, policy))
    assert torch.equal(bits(decode_delta(delta, policy, backend=backend)), bits(reference))


def test_decoding_in_place_of_the_policy(backend: str, device: str) -> None:
    reference, policy = random_weights((64800,), 1e-3, device)
    delta = encode_delta(reference, policy, backend=backend)
    assert decode_delta(delta, policy, out=policy, backend=backend) is policy
    assert torch.equal(bits(policy), bits(reference))


VIEWS = {
    "transposed": lambda x: x.transpose(0, 2),
    "sliced": lambda x: x[:, 1:, ::2],
    "repeated": lambda x: x[:, :1].expand(-1, 9, -1),
    "offset": lambda x: x.flatten()[3:],
}


@pytest.mark.parametrize(("first", "second"), [*itertools.product(VIEWS, ["same", "contiguous"])])
def test_strides_make_no_difference(first: str, second: str, backend: str, device: str) -> None:
    reference, policy = (VIEWS[first](x) for x in random_weights((4, 9, 30), 1e-3, device))
    if second == "contiguous":
        policy = policy.clone(memory_format=torch.contiguous_format)
    delta = assert_exact(reference, policy, backend)
    assert delta.difference.is_contiguous()
    spread = OrderedDelta(*(torch.stack([x, x], -1)[..., 0] for x in delta))
    assert torch.equal(bits(decode_delta(spread, policy, backend=backend)), bits(reference))
    flat = torch.zeros(policy.numel() + 1, dtype=torch.bfloat16, device=device)
    decode_delta(delta, policy, out=flat[1:].view(policy.shape), backend=backend)
    assert torch.equal(bits(flat[1:].view(policy.shape)), bits(reference))
    assert flat[0] == 0


def test_weights_with_gradients_leave_no_graph(backend: str, device: str) -> None:
    reference, policy = random_weights((50,), 1e-3, device)
    policy.requires_grad_()
    delta = encode_delta(reference.requires_grad_(), policy, backend=backend)
    decoded = decode_delta(delta, policy, backend=backend)
    assert not any(tensor.requires_grad for tensor in (*delta, decoded))


def test_autograd_notices_that_a_saved_buffer_was_written_again(backend: str, device: str) -> None:
    reference, policy = random_weights((50,), 1e-3, device)
    delta = encode_delta(reference, policy, backend=backend)
    buffer = decode_delta(delta, policy, backend=backend)
    loss = (policy.clone().requires_grad_() * buffer).sum()
    decode_delta(delta, policy, out=buffer, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        inside = encode_delta(reference, policy, backend=backend)
        assert torch.equal(decode_delta(inside, policy, backend=backend), reference)


def test_opcheck(backend: str, device: str) -> None:
    reference, policy = random_weights((5, 40, 3), 1e-2, device)
    ops = torch.ops.vpo_kernels
    for view in (reference, reference.transpose(0, 2).contiguous().transpose(0, 2)):
        difference = torch.empty(policy.shape, dtype=torch.int8, device=device)
        torch.library.opcheck(ops.ordered_delta_encode, (view, policy, difference, backend))
        delta = encode_delta(view, policy, backend=backend)
        torch.library.opcheck(ops.ordered_delta_decode, (*delta, view, torch.empty_like(policy), backend))


def test_decoding_compiles_as_one_graph(backend: str, device: str) -> None:
    reference, policy = random_weights((30, 7), 1e-3, device)
    delta = encode_delta(reference, policy, backend=backend)
    compiled = torch.compile(
        lambda delta, policy, out: decode_delta(delta, policy, out=out, backend=backend) * 2,
        backend="aot_eager",
        fullgraph=True,
    )
    out = torch.empty_like(policy)
    assert torch.equal(compiled(delta, policy, out), reference * 2)
    assert torch.equal(bits(out), bits(reference))


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_fake_tensors(place: str) -> None:
    """Fake tensors may be on a GPU where there is none; only the number of spilled elements is unknown."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        policy = torch.empty(6, 5, dtype=torch.bfloat16, device=place)
        index = torch.empty(4, dtype=torch.int32, device=place)
        delta = OrderedDelta(
            torch.empty(6, 5, dtype=torch.int8, device=place), index, index.to(torch.bfloat16)
        )
        decoded = decode_delta(delta, policy)
        assert (decoded.shape, decoded.dtype, decoded.device.type) == (policy.shape, torch.bfloat16, place)
        out = torch.empty_like(policy)
        assert decode_delta(delta, policy, out=out) is out
        made = encode_delta(policy, policy)
        assert made.difference.shape == policy.shape
        assert (made.index.dtype, made.value.dtype) == (torch.int32, torch.bfloat16)
        assert made.index.ndim == made.value.ndim == 1
        assert isinstance(made.index.shape[0], torch.SymInt)
