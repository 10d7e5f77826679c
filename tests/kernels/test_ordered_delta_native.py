"""The native deltas: all instruction sets and numbers of threads give plain torch's bits."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from after_torch import run_after_torch
from test_ordered_delta import bits, random_weights, same
from vpo_kernels import OrderedDelta, decode_delta, encode_delta

native: Any = pytest.importorskip("vpo_kernels.ordered_delta.native", exc_type=ImportError)


@pytest.fixture(params=native.extension.instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "INSTRUCTION_SET", request.param)
    return request.param


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("elements", [*range(1, 70), 4095, 16384 * 3 + 5])
@pytest.mark.parametrize("drift", [0.0, 1e-3, 1.0])
def test_instruction_sets(elements: int, drift: float, instruction_set: str) -> None:
    """The sizes leave all remainders of vectors; no element, a tenth and nearly all of them spill."""
    reference, policy = random_weights((elements,), drift, "cpu", seed=elements)
    ours, plain = (encode_delta(reference, policy, backend=name) for name in ("native", "reference"))
    assert same(ours, plain)
    padded = torch.full((elements + 64,), 7.0, dtype=torch.bfloat16)
    decode_delta(ours, policy, out=padded[32:-32], backend="native")
    assert torch.equal(bits(padded[32:-32]), bits(reference))
    assert (padded[:32] == 7).all()
    assert (padded[-32:] == 7).all()


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads(threads: int, instruction_set: str) -> None:
    torch.set_num_threads(threads)
    reference, policy = random_weights((2**20 + 77,), 1e-3, "cpu")
    delta = encode_delta(reference, policy, backend="native")
    assert same(delta, encode_delta(reference, policy, backend="reference"))
    assert torch.equal(bits(decode_delta(delta, policy, backend="native")), bits(reference))


def test_calls_from_several_threads_at_once() -> None:
    inputs = [random_weights((300_000,), 1e-3, "cpu", seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        deltas = list(pool.map(lambda pair: encode_delta(*pair, backend="native"), inputs))
    for (reference, policy), delta in zip(inputs, deltas, strict=True):
        assert same(delta, encode_delta(reference, policy, backend="reference"))


def test_only_places_of_the_array_are_written() -> None:
    """An index outside the array is ignored, whichever chunk is decoded."""
    policy = torch.zeros(40_000, dtype=torch.bfloat16)
    guarded = torch.zeros(policy.numel() + 200, dtype=torch.bfloat16)
    delta = OrderedDelta(
        torch.zeros(policy.numel(), dtype=torch.int8),
        torch.tensor([-5, 3, 39_999, 40_000, 40_050], dtype=torch.int32),
        torch.ones(5, dtype=torch.bfloat16),
    )
    decode_delta(delta, policy, out=guarded[100:-100], backend="native")
    assert (guarded != 0).nonzero().squeeze(1).tolist() == [103, 100 + 39_999]


PROBE = """
import sys
import torch
from vpo_kernels import decode_delta, encode_delta
x = torch.ones(5, dtype=torch.bfloat16)
assert torch.equal(decode_delta(encode_delta(x, 2 * x), 2 * x), x)
heavy = ("triton", "deepspeed", "bitsandbytes", "vpo_engine", "diffusers", "transformers")
print(sorted(name for name in sys.modules if name.split(".")[0] in heavy))
"""


def test_use_on_a_cpu_loads_nothing_heavy() -> None:
    assert run_after_torch(PROBE) == (0, "[]\n")
