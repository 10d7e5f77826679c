"""The paired loss's Triton kernels compiled for A100, H100, B200 and MI300 on a machine that has none of them."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
from torch import Tensor

compile_only = pytest.importorskip("compile_only", exc_type=ImportError)
from compile_only import A100, B200, H100, Launch, assembled, compiled  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from vpo_kernels.paired_dpo import triton as backend  # noqa: E402
from vpo_kernels.paired_dpo import triton_kernels  # noqa: E402
from vpo_kernels.paired_dpo.contract import (  # noqa: E402
    GradientInputs,
    Mask,
    Options,
    PairTensors,
    TargetNoise,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

BF16, FP32 = torch.bfloat16, torch.float32


def long(*values: Any, id: str | None = None) -> Any:
    """A case that CI compiles, and that a shorter run leaves to the others."""
    return pytest.param(*values, id=id, marks=pytest.mark.long)


@pytest.fixture(autouse=True)
def launched_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "launches", lambda _: backend._GPU)


def run(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    noise: bool = False,
    mask: tuple[int, ...] | None = None,
    options: Options | None = None,
    channels_last: bool = False,
    offset: int = 0,
    wanted: tuple[bool, bool] = (True, True),
) -> dict[str, Launch]:
    """Return what the launcher launches, by name, forward and backward on meta tensors of a shape [P, C, T, H, W]."""

    def meta(dtype: torch.dtype) -> Tensor:
        if channels_last:
            p, c, *rest = shape
            return torch.empty(p, *rest, c, dtype=dtype, device="meta").movedim(-1, 1)
        size = torch.Size(shape).numel()
        return torch.empty(size + offset, dtype=dtype, device="meta")[offset:].view(shape)

    tensors = PairTensors(*(meta(dtypes[i // 2]) for i in range(6)))
    made = TargetNoise(meta(dtypes[2]), torch.empty(shape[0], device="meta"), -1.0) if noise else None
    counted = None if mask is None else torch.empty(mask, dtype=torch.bool, device="meta").expand(shape)
    counts = torch.empty(shape[0], dtype=torch.int64, device="meta")
    hidden = None if counted is None else Mask(counted, counts)
    with compile_only.recorded(triton_kernels) as seen:
        done = backend.forward(tensors, made, hidden, options or Options(500.0, 1.0, "mean", 0.0, None))
        grad_loss = torch.empty((), device="meta")
        backend.gradient(
            GradientInputs(tensors.policy, tensors.target, made, counted, done.coefficient, grad_loss, wanted)
        )
    return {launch.kernel.__name__: launch for launch in seen}


P720, ODD = (2, 4, 20, 90, 160), (2, 1, 3, 31, 11)
EVERYTHING = Options(500.0, 1.0, "mean", 0.1, 0.5)


@pytest.mark.parametrize(
    ("capability", "dtypes", "extras"),
    [
        (A100, (BF16, BF16, FP32), False),
        long(H100, (BF16, BF16, BF16), False),
        (H100, (FP32, FP32, FP32), True),
        long(B200, (BF16, BF16, FP32), False),
    ],
)
def test_contiguous_samples_move_in_16_bytes(
    capability: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    extras: bool,
) -> None:
    """A thread of partial_sums and of gradients takes 16 elements of each input, and writes 16 of each gradient."""
    launched = run(P720, dtypes, noise=extras, options=EVERYTHING if extras else None)
    policy, reference, target = (dtype.itemsize for dtype in dtypes)
    sums = compiled(launched["partial_sums"], capability)
    assert sums.vector_loads == 2 * (policy + reference + target) + (target if extras else 0)
    gradients = compiled(launched["gradients"], capability)
    assert gradients.vector_loads == 2 * (policy + target) + (target if extras else 0)
    assert gradients.vector_stores == 2 * policy
    for binary in (sums, gradients):
        assert binary.local_bytes == 0
        assert binary.registers * 256 <= 65536 // 2  # two blocks of partial_sums per SM at least


@pytest.mark.parametrize(("capability", "options"), [(A100, None), (H100, EVERYTHING)])
def test_finish(capability: int, options: Options | None) -> None:
    launched = run(P720, (BF16, BF16, FP32), options=options)
    assert compiled(launched["finish"], capability).local_bytes == 0


@pytest.mark.parametrize(
    ("capability", "variant"),
    [
        long(A100, {"shape": ODD}, id="odd size"),
        long(A100, {"shape": P720, "offset": 1}, id="odd address"),
        pytest.param(H100, {"shape": P720, "mask": (1, 1, 20, 1, 1)}, id="mask"),
        long(H100, {"shape": P720, "channels_last": True, "wanted": (True, False)}, id="strides"),
    ],
)
def test_other_samples_compile_without_spills(capability: int, variant: dict[str, Any]) -> None:
    launched = run(dtypes=(BF16, BF16, FP32), **variant)
    for name in ("partial_sums", "gradients"):
        binary = compiled(launched[name], capability)
        assert binary.local_bytes == 0
        assert binary.loads
        if "mask" in variant:  # it leaves the other tensors' fast path alone
            assert binary.vector_loads >= 12


@pytest.mark.long
def test_rocm() -> None:
    launched = run(P720, (BF16, BF16, FP32), noise=True, options=EVERYTHING)
    for launch in launched.values():
        assembly = assembled(launch, GPUTarget("hip", "gfx942", 64))["amdgcn"]
        assert re.search(r"\.vgpr_spill_count: +0\b", assembly)
        assert "_load_dwordx4" in assembly


def test_multiplications_and_additions_stay_apart() -> None:
    """If they were fused, results would depend on what the compiler fuses."""
    launched = run(P720, (BF16, BF16, BF16))
    assert set(launched) == {"partial_sums", "finish", "gradients"}
    assert all(launch.options["enable_fp_fusion"] is False for launch in launched.values())
