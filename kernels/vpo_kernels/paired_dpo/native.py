"""The paired loss on CPUs, in C++ (kernels/native): one pass over the inputs forward, one backward.

Views are read where they lie, whatever their strides. Nothing is allocated but gradients and a few numbers per pair.
Sums are formed in an order that depends on the number of elements alone, so that results depend neither on the number
of threads nor on the processor. Threads are as many as torch's, where the work is worth them; they are kept from call
to call (kernels/native/pool.cpp), and a forked child makes its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vpo_kernels.native import INSTRUCTION_SET, extension
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
from vpo_kernels.registration import arithmetic_dtype

_DTYPES = {torch.bool: 0, torch.bfloat16: 1, torch.float16: 2, torch.float32: 3, torch.float64: 4}


def _view(tensor: Tensor) -> extension.Tensor:
    return tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.stride()


def _numbers(value: PerPair, alive: list[Tensor]) -> extension.Numbers:
    """Return numbers per pair as the extension takes them; a tensor's are valid as long as ``alive`` is."""
    if not isinstance(value, Tensor):
        return value, 0
    alive.append(value.to(torch.float64).contiguous())
    return 0.0, alive[-1].data_ptr()


def _noise(noise: TargetNoise, alive: list[Tensor]) -> extension.Noise:
    return _view(noise.noise), _numbers(noise.x0_scale, alive), _numbers(noise.noise_scale, alive)


def forward(tensors: PairTensors, noise: TargetNoise | None, mask: Mask | None, options: Options) -> Forward:
    """Compute the loss; see ``contract.Backend``."""
    shape = tensors[0].shape
    pairs, per_sample = shape[0], float(math.prod(shape[1:]))
    dtype = arithmetic_dtype(*tensors, noise and noise.noise)
    made = Forward(
        torch.empty((), dtype=dtype),
        torch.empty((PER_PAIR, pairs), dtype=dtype),
        torch.empty((2, pairs), dtype=torch.float64),
        torch.empty((2, pairs), dtype=torch.float64),
    )
    beta, pair_weight, reduction, winner_anchor, loser_scaling = options
    alive: list[Tensor] = []
    extension.forward(
        INSTRUCTION_SET,
        shape,
        [(each.data_ptr(), _DTYPES[each.dtype], each.stride()) for each in tensors],
        noise and _noise(noise, alive),
        mask and _view(mask.counted),
        (per_sample, 0) if mask is None else _numbers(mask.counts, alive),
        (
            _numbers(beta, alive),
            _numbers(pair_weight, alive),
            reduction == "mean",
            winner_anchor,
            loser_scaling,
        ),
        dtype is torch.float64,
        torch.get_num_threads(),
        [result.data_ptr() for result in made],
    )
    return made


def gradient(inputs: GradientInputs) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients; see ``contract.Backend``."""
    policy, target, noise, mask, coefficient, grad_loss, *_ = inputs
    shape = policy[0].shape
    dtype = arithmetic_dtype(*policy, *target, noise and noise.noise)
    coefficient = coefficient.contiguous()
    first = coefficient.data_ptr()
    grads = inputs.places()
    members = [
        (_view(policy[member]), _view(target[member]), _view(grad), first + member * shape[0] * 8)
        for member, grad in enumerate(grads)
        if grad is not None
    ]
    alive: list[Tensor] = []
    extension.gradient(
        INSTRUCTION_SET,
        shape,
        members,
        noise and _noise(noise, alive),
        None if mask is None else _view(mask),
        2 * grad_loss.item(),
        dtype is torch.float64,
        torch.get_num_threads(),
    )
    return grads
