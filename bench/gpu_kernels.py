"""Compare every Triton kernel with its formula in float64, without pytest; ``gpu_measure.py kernels`` runs this.

The cases are those of the tests (tests/kernels), at odd sizes and strides, and on a GPU the sizes of 240p x 34 too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from vpo_kernels import decode_delta, encode_delta, paired_dpo_loss

KERNEL_TESTS = Path(__file__).parents[1] / "tests" / "kernels"
sys.path += [str(KERNEL_TESTS), str(KERNEL_TESTS / "fused_ops")]

from cases import (  # noqa: E402
    HEADS,
    LENGTHS,
    MODULATED,
    Case,
    assert_as_good_as_eager,
    modulated,
    normed_heads,
    residual,
    short_sequences,
)

BF16, F32 = torch.bfloat16, torch.float32
PAIRS = ((3, 5, 7), (2, 4, 10, 30, 53), (1, 4, 20, 90, 160))
BETA = 500.0


def fused_cases(large: bool) -> Iterator[tuple[str, Case]]:
    """Yield cases of the four fused operations, in float32 and bfloat16."""
    for dtype in (F32, BF16):
        for shapes in [*MODULATED, *([((2, 10, 405, 1152), (2, 1, 1, 1152))] if large else [])]:
            yield f"modulated_norm {shapes} {dtype}", modulated(*shapes, dtype, True)
            yield f"gated_residual {shapes} {dtype}", residual(*shapes, dtype, True)
        for shape in [*HEADS, *([(810, 10, 16, 72)] if large else [])]:
            for rope in (False, True):
                yield f"qk_norm_rope {shape} rope={rope} {dtype}", normed_heads(shape, dtype, rope)
        for shape in [*((3, n, 2, 72) for n in LENGTHS), *([(810, 10, 16, 72)] if large else [])]:
            yield f"temporal_attention {shape} {dtype}", short_sequences(shape, dtype, exchanged=True)


def wrong_loss(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    """Return how the loss's margins or gradients are wrong; "" if they are right.

    An element of a margin is rounded at most 8 times, and a tree of sums at most 32 times on its way, each by 6e-8 of
    the mean magnitude. A gradient is that of the margin's error, rounded to the predictions' type once.
    """
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=random).to(device, dtype) for _ in range(6)]

    def outcome(backend: str, *given: Tensor) -> list[Tensor]:
        leaves = [given[0].clone().requires_grad_(), given[1].clone().requires_grad_()]
        out = paired_dpo_loss(*leaves, *given[2:], beta=BETA, backend=backend)  # type: ignore[arg-type]
        # Gradients of the margin itself: that of the loss vanishes where a margin is large.
        return [out.margin.detach(), *torch.autograd.grad(out.loss, leaves)]

    exact = outcome("reference", *(t.double() for t in tensors))
    found = outcome("triton", *tensors)
    policy, reference, target = (tensors[i].double() for i in (0, 2, 4))
    magnitude = ((policy - reference) * (policy + reference - 2 * target)).abs().mean()
    allowed = [BETA * 40 * 6e-8 * magnitude]
    allowed += [g.abs().max() * (torch.finfo(dtype).eps + allowed[0]) for g in exact[1:]]
    for name, one, other, bound in zip(("margin", "winner", "loser"), found, exact, allowed, strict=True):
        error = (one.double() - other).abs().max()
        if not error <= bound:
            return f"paired_dpo {shape} {dtype}: {name} is off by {error:.3g}, allowed {bound:.3g}"
    return ""


def wrong_delta(drift: float, device: torch.device, rows: int) -> str:
    """Return how the ordered delta is wrong; "" if it gives the reference's bits back and is plain torch's."""
    random = torch.Generator().manual_seed(0)
    policy = (0.02 * torch.randn(rows, 1152, generator=random)).to(device)
    reference = (policy + drift * torch.randn(rows, 1152, generator=random).to(device)).bfloat16()
    policy = policy.bfloat16()
    ours = encode_delta(reference, policy, backend="triton")
    plain = encode_delta(reference, policy, backend="reference")
    if not all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True)):
        return f"encode_delta with drift {drift}: not what plain torch gives"
    back = decode_delta(ours, policy, backend="triton")
    if not torch.equal(back.view(torch.int16), reference.view(torch.int16)):
        return f"decode_delta with drift {drift}: the reference's bits do not come back"
    return ""


def wrong_kernels(device: torch.device, large: bool) -> list[str]:
    """Return what is wrong, one line for each case, after trying all of them."""
    checks: list[Callable[[], str]] = []
    for name, case in fused_cases(large):
        moved = case._replace(inputs=[one.detach().to(device).requires_grad_() for one in case.inputs])
        checks.append(lambda name=name, case=moved: _worse_than_eager(name, case))
    for shape in PAIRS if large else PAIRS[:1]:
        for dtype in (BF16, F32):
            checks.append(lambda shape=shape, dtype=dtype: wrong_loss(shape, dtype, device))
    for drift in (1e-5, 1e-3):
        checks.append(lambda drift=drift: wrong_delta(drift, device, 4608 if large else 4))
    wrong = [line for line in (check() for check in checks) if line]
    print(f"{len(checks) - len(wrong)} of {len(checks)} comparisons hold")
    return wrong


def _worse_than_eager(name: str, case: Case) -> str:
    try:
        assert_as_good_as_eager(case, "triton")
    except AssertionError as error:
        return f"{name}: {error}"
    return ""
