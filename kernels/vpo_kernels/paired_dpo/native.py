"""The paired loss on CPUs, in C++ (kernels/native): one pass over the inputs forward, one backward.

Views are read where they lie, whatever their strides. Nothing is allocated but gradients and a few numbers per pair.
Sums are formed in an order that depends on the number of elements alone, so that results depend neither on the number
of threads nor on the processor. Threads are as many as torch's, where the work is worth them; they are kept from call
to call (kernels/native/pool.cpp), and a forked child makes its own.
"""

from __future__ import annotations

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


class _Numbers:
    """Numbers per pair as the extension takes them; tensors among them are kept alive as long as this object."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []

    def __call__(self, value: PerPair) -> extension.Numbers:
        if not isinstance(value, Tensor):
            return value, 0
        self._alive.append(value.to(torch.float64).contiguous())
        return 0.0, self._alive[-1].data_ptr()

    def noise(self, noise: TargetNoise | None) -> extension.Noise | None:
        return None if noise is None else (_view(noise.noise), self(noise.x0_scale), self(noise.noise_scale))


def forward(tensors: PairTensors, noise: TargetNoise | None, mask: Mask | None, options: Options) -> Forward:
    """Compute the loss; see ``contract.Backend``."""
    shape = tensors.policy_winner.shape
    dtype = arithmetic_dtype(*tensors, noise and noise.noise)
    made = Forward(
        torch.empty((), dtype=dtype),
        torch.empty((PER_PAIR, shape[0]), dtype=dtype),
        torch.empty((2, shape[0]), dtype=torch.float64),
        torch.empty((2, shape[0]), dtype=torch.float64),
    )
    numbers = _Numbers()
    extension.forward(
        INSTRUCTION_SET,
        shape,
        [_view(tensor) for tensor in tensors],
        numbers.noise(noise),
        mask and _view(mask.counted),
        numbers(float(shape[1:].numel()) if mask is None else mask.counts),
        (
            numbers(options.beta),
            numbers(options.pair_weight),
            options.reduction == "mean",
            options.winner_anchor,
            options.loser_scaling,
        ),
        dtype == torch.float64,
        torch.get_num_threads(),
        [result.data_ptr() for result in made],
    )
    return made


def gradient(inputs: GradientInputs) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients; see ``contract.Backend``."""
    policy, target, noise, mask, coefficient, grad_loss, *_ = inputs
    shape = policy[0].shape
    dtype = arithmetic_dtype(*policy, *target, noise and noise.noise)
    numbers = _Numbers()
    coefficient = coefficient.contiguous()
    coefficients = coefficient.data_ptr(), coefficient.data_ptr() + shape[0] * coefficient.element_size()
    grads = inputs.places()
    members = [
        (_view(policy[member]), _view(target[member]), _view(grad), coefficients[member])
        for member, grad in enumerate(grads)
        if grad is not None
    ]
    extension.gradient(
        INSTRUCTION_SET,
        shape,
        members,
        numbers.noise(noise),
        None if mask is None else _view(mask),
        2 * grad_loss.item(),
        dtype == torch.float64,
        torch.get_num_threads(),
    )
    return grads
