"""The Triton kernels of the deltas compiled for GPUs on a machine that has none."""

import os

import pytest
import torch
from torch import Tensor

compile_only = pytest.importorskip("compile_only", exc_type=ImportError)
from vpo_kernels.ordered_delta import triton as backend  # noqa: E402
from vpo_kernels.ordered_delta.contract import OrderedDelta  # noqa: E402


def launches(elements: int, monkeypatch: pytest.MonkeyPatch) -> list:
    """Return the launches of encoding and decoding on meta tensors."""
    monkeypatch.setattr(backend.plain, "spilled", lambda *_: None)

    def meta(dtype: torch.dtype, elements: int = elements) -> Tensor:
        return torch.empty(elements, dtype=dtype, device="meta")

    delta = OrderedDelta(meta(torch.int8), meta(torch.int32, 3), meta(torch.bfloat16, 3))
    with compile_only.recorded(backend) as seen:
        backend.encode(meta(torch.bfloat16), meta(torch.bfloat16), delta.difference)
        backend.decode(delta, meta(torch.bfloat16), meta(torch.bfloat16))
    return seen


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("elements", [1152 * 4608, 1152 * 4608 + 7, 2**31 - 1])
def test_compiles_without_spills_and_with_whole_vectors(
    elements: int, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread takes 16 elements: two 16-byte accesses of each bfloat16 tensor, one of the differences.

    This holds where the number of elements is a multiple of 16, as in a layer's weights; else each element has a mask
    of its own.
    """
    encode, decode = launches(elements, monkeypatch)
    per_thread = backend.BLOCK // (32 * backend.WARPS)
    assert per_thread == 16
    for launch in (encode, decode):
        binary = compile_only.compiled(launch, capability)
        assert binary.local_bytes == 0, f"{launch.kernel.__name__} spills: {binary}"
        assert binary.registers <= 64, f"{launch.kernel.__name__} leaves SMs half empty: {binary}"
        whole = (4, 1) if launch is encode else (3, 2)
        if elements % 16 == 0:
            assert (binary.vector_loads, binary.vector_stores) == whole, binary
        assert launch.grid == (-(-elements // backend.BLOCK),)
