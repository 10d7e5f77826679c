"""The paired DPO loss on GPUs: two launches forward, one backward, and the host waits for none of them.

Without a mask, forward and backward can be captured in a CUDA graph. Results are the same bits on every run
and every GPU; ``triton_kernels.py`` says why. In a process with TRITON_INTERPRET=1 the same kernels run on the
CPU, slowly, for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpo_kernels.paired_dpo import triton_kernels as kernels
from vpo_kernels.paired_dpo.contract import (
    PER_PAIR,
    Forward,
    GradientInputs,
    Mask,
    Options,
    PairTensors,
    PerPair,
    TargetNoise,
)
from vpo_kernels.paired_dpo.triton_layout import views
from vpo_kernels.registration import arithmetic_dtype

# These are no settings: other numbers here change the order of sums, and so the results.
CHUNK_LEVELS = 12
"""2**12 elements of a sample make one partial sum."""
FEW_CHUNKS, MANY_CHUNKS = 4, 8
"""2**4 partial sums of a sample are added side by side, or 2**8 if the sample has more than 2**4."""
PAIR_LEVELS = 7
"""The losses of 2**7 pairs are added side by side."""

_ARITHMETIC = {torch.float32: tl.float32, torch.float64: tl.float64}
_PerPairArguments = tuple[float, tuple[Tensor, int] | None]


@dataclass(frozen=True)
class Launches:
    """The configuration of the kernels' launches. Their time depends on it, their results do not."""

    sums_warps: int
    finish_warps: int
    finish_levels: int  # 2**finish_levels partial sums of a kind at a time
    gradient_warps: int
    gradient_levels: int  # 2**gradient_levels elements per program


_GPU = Launches(sums_warps=8, finish_warps=8, finish_levels=11, gradient_warps=4, gradient_levels=11)
# These are not measured, but chosen by what the compiler reports for A100 and H100: loads of 16 bytes, no spills, and
# registers for two blocks of partial_sums per SM.
_INTERPRETER = Launches(sums_warps=1, finish_warps=1, finish_levels=11, gradient_warps=1, gradient_levels=15)


def launches(device: torch.device) -> Launches:
    """Return the launch configuration of a device, a function of its kind alone."""
    return _GPU if device.type == "cuda" else _INTERPRETER


def _per_pair(value: PerPair) -> _PerPairArguments:
    """Return a kernel's two arguments for a number per pair."""
    return (0.0, (value, value.stride(0))) if isinstance(value, Tensor) else (value, None)


def _norm(like: Tensor, mask: Mask | None, options: Options) -> _PerPairArguments:
    """Return what a pair's sums are divided by."""
    if options.reduction == "sum":
        return 1.0, None
    return _per_pair(float(like.numel() // like.shape[0]) if mask is None else mask.counts)


def _elementwise(
    like: Tensor, noise: TargetNoise | None, dtype: torch.dtype, sizes: tuple[int, ...], levels: int
) -> dict[str, Any]:
    """Return the arguments that both elementwise kernels share, for chunks of 2**levels elements."""
    n = like.numel() // like.shape[0]
    x0_scale, x0_scale_each = _per_pair(0.0 if noise is None else noise.x0_scale)
    noise_scale, noise_scale_each = _per_pair(0.0 if noise is None else noise.noise_scale)
    return {
        "sizes": sizes,
        "n": n,
        "chunks": triton.cdiv(n, 2**levels),
        "x0_scale": x0_scale,
        "x0_scale_each": x0_scale_each,
        "noise_scale": noise_scale,
        "noise_scale_each": noise_scale_each,
        "ARITHMETIC": _ARITHMETIC[dtype],
        "INDEX": tl.int32 if n + 2**levels < 2**31 else tl.int64,
        "LEVELS": levels,
        "enable_fp_fusion": False,
    }


def _partial_sums(
    tensors: PairTensors, noise: TargetNoise | None, counted: Tensor | None, kinds: int, dtype: torch.dtype
) -> Tensor:
    """Return the sums of every chunk, [P, chunks, kinds]: both error changes, four errors and, as a seventh, a . b."""
    first = tensors.policy_winner
    mask = None if counted is None else counted.view(torch.uint8)
    (*six, noises, masks), sizes = views([*tensors, noise and noise.noise, mask])
    shared = _elementwise(first, noise, dtype, sizes, CHUNK_LEVELS)
    partials = first.new_empty((first.shape[0], shared["chunks"], kinds), dtype=dtype)
    grid = (first.shape[0] * shared["chunks"],)
    kernels.partial_sums[grid](
        partials,
        tuple(six),
        noises,
        masks,
        **shared,
        SUMS=kinds,
        num_warps=launches(first.device).sums_warps,
    )
    return partials


def _finish(partials: Tensor, norm: _PerPairArguments, options: Options) -> Forward:
    """Launch the kernel that makes results and coefficients of partial sums; ``norm`` divides them."""
    pairs, chunks, kinds = partials.shape
    config = launches(partials.device)
    chunk_levels = FEW_CHUNKS if chunks <= 2**FEW_CHUNKS else MANY_CHUNKS
    made = Forward(
        partials.new_empty(()),
        partials.new_empty((PER_PAIR, pairs)),
        partials.new_empty((2, pairs), dtype=torch.float64),
        partials.new_empty((2, pairs), dtype=torch.float64),
    )
    kernels.finish[(1,)](
        *made,
        partials.new_empty((pairs, kinds), dtype=torch.float64),
        partials,
        pairs,
        chunks,
        *norm,
        *_per_pair(options.beta),
        *_per_pair(options.pair_weight),
        options.winner_anchor,
        options.loser_scaling or 0.0,
        ANCHORED=options.winner_anchor != 0,
        SCALED=options.loser_scaling is not None,
        SUMS=kinds,
        ARITHMETIC=_ARITHMETIC[partials.dtype],
        PAIRS=min(2 ** (config.finish_levels - chunk_levels), triton.next_power_of_2(pairs)),
        CHUNK_LEVELS=chunk_levels,
        PAIR_LEVELS=PAIR_LEVELS,
        num_warps=config.finish_warps,
        enable_fp_fusion=False,
    )
    return made


def forward(tensors: PairTensors, noise: TargetNoise | None, mask: Mask | None, options: Options) -> Forward:
    """Compute the loss; see ``contract.Backend``."""
    kinds = PER_PAIR - 1 if options.loser_scaling is None else PER_PAIR
    dtype = arithmetic_dtype(*tensors, noise and noise.noise)
    with torch.cuda.device_of(tensors.policy_winner):
        partials = _partial_sums(tensors, noise, mask and mask.counted, kinds, dtype)
        return _finish(partials, _norm(tensors.policy_winner, mask, options), options)


def gradient(inputs: GradientInputs) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients; see ``contract.Backend``."""
    policy, target, noise, mask, coefficient, grad_loss, *_ = inputs
    first = policy[0]
    config = launches(first.device)
    grads = inputs.places()
    hidden = None if mask is None else mask.view(torch.uint8)
    (gw, gl, *four, noises, masks), sizes = views([*grads, *policy, *target, noise and noise.noise, hidden])
    dtype = arithmetic_dtype(*policy, *target, noise and noise.noise)
    shared = _elementwise(first, noise, dtype, sizes, config.gradient_levels)
    with torch.cuda.device_of(first):
        kernels.gradients[(first.shape[0] * shared["chunks"],)](
            (gw or (), gl or ()),
            tuple(four[:2]),
            tuple(four[2:]),
            noises,
            masks,
            pairs=first.shape[0],
            coefficient=coefficient,
            grad_loss=grad_loss,
            **shared,
            num_warps=config.gradient_warps,
        )
    return grads
