"""The code that the four fused operations around STDiT3's memory-bound layers share: the choice between formula and
Triton kernel, the checks of arguments, and the registration with torch.library. It does not need triton.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from vpo_kernels.checks import check_device, check_floating
from vpo_kernels.registration import define_operator, refuse_second_derivative

BackendName = Literal["auto", "reference", "triton"]


class Verdict(NamedTuple):
    """The backend that ``backend="auto"`` takes for an operation on a CUDA tensor, and the measurement behind it."""

    backend: Literal["reference", "triton"]
    reason: str


AUTO: dict[str, Verdict] = {
    "modulated_norm": Verdict("reference", "not measured yet"),
    "gated_residual": Verdict("reference", "not measured yet"),
    "qk_norm_rope": Verdict("reference", "not measured yet"),
    "temporal_attention": Verdict("reference", "not measured yet"),
}
"""A kernel is taken only where a recorded GPU run (bench/test_fused_ops.py) shows that it beats torch.compile of
the plain code by 10 %, or that it saves activation memory which torch.compile does not save."""


def interpreted() -> bool:
    """Return whether Triton interprets its kernels; then they take CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def uses_triton(operation: str, backend: str, tensor: Tensor) -> bool:
    """Return whether ``operation`` on ``tensor`` runs its Triton kernel rather than the plain formula.

    float64 always takes the formula, because the kernels compute in float32. Raise ValueError for an unknown backend,
    and for ``triton`` on a CPU tensor unless Triton interprets.
    """
    if backend not in get_args(BackendName):
        raise ValueError(
            f"backend={backend!r} of {operation} is unknown; it must be one of: "
            f"{', '.join(get_args(BackendName))}. Use backend='auto'"
        )
    if backend == "auto":
        backend = AUTO[operation].backend if tensor.is_cuda else "reference"
    if backend == "reference":
        return False
    if not tensor.is_cuda and not interpreted():
        raise ValueError(
            f"backend='triton' of {operation} got a tensor on {tensor.device}, but must get one on a CUDA "
            "device; use backend='auto', or set TRITON_INTERPRET=1 before triton is imported to test the "
            "kernel on a CPU"
        )
    return tensor.dtype != torch.float64


def check_floats(operation: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are floating point and on the device of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check_floating(name, tensor, operation)
        check_device(name, tensor, first.device, first_name, operation)


def check_modulation(operation: str, x: Tensor, **modulations: Tensor) -> None:
    """Raise ValueError unless every modulation broadcasts to x [..., C] and has all C channels of its own."""
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(
            f"x of {operation} has shape {list(x.shape)}, but must be [..., C] with two dimensions or more "
            "and at least one element; give a single token as x[None]"
        )
    for name, tensor in modulations.items():
        fits = 1 <= tensor.ndim <= x.ndim and tensor.shape[-1] == x.shape[-1]
        ours = x.shape[x.ndim - tensor.ndim :]
        if not fits or any(size != 1 and size != full for size, full in zip(tensor.shape, ours, strict=True)):
            raise ValueError(
                f"{name} of {operation} has shape {list(tensor.shape)}, but must broadcast to that of x, "
                f"{list(x.shape)}, with all {x.shape[-1]} channels; for x [B, T, S, C] give "
                "[B, 1, 1, C] or [B, T, 1, C]"
            )


# --- registration ----------------------------------------------------------------------------------------

SetupContext = Callable[[Any, tuple[Any, ...], Tensor], None]
Differentiate = Callable[[Any, Tensor], tuple[Tensor | None, ...]]


class Operators(NamedTuple):
    """An operation and its gradient, as registered with torch.library."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]


def register_fused_op(
    name: str,
    formula: Callable[..., Tensor],
    backward_formula: Callable[..., tuple[Tensor, ...]],
    *,
    new_output: Callable[..., Tensor],
    new_gradients: Callable[..., tuple[Tensor, ...]],
) -> Operators:
    """Register torch.ops.vpo_kernels.NAME and NAME_backward, without connecting them; see ``connect``.

    Both operators run ``forward`` and ``backward`` of the module ``vpo_kernels.NAME.triton`` on CUDA tensors and
    where Triton interprets, and else the formulas. float64 always takes the formulas.

    formula, backward_formula: plain torch functions whose annotated parameters are those of the operators.
    new_output, new_gradients: functions that allocate what the operators return; they get the operators' inputs.
    """

    def forward(*inputs: Any) -> Tensor:
        if kernels := _kernels(name, inputs):
            with torch.cuda.device_of(inputs[0]):
                return kernels.forward(*inputs)
        with torch.autocast(inputs[0].device.type, enabled=False):
            return new_output(*inputs).copy_(formula(*inputs))

    def backward(*inputs: Any) -> tuple[Tensor, ...]:
        if kernels := _kernels(name, inputs):
            with torch.cuda.device_of(inputs[0]):
                return kernels.backward(*inputs)
        with torch.autocast(inputs[0].device.type, enabled=False):
            return backward_formula(*inputs)

    operators = Operators(
        define_operator(name, formula, forward),
        define_operator(f"{name}_backward", backward_formula, backward),
    )
    torch.library.register_fake(f"vpo_kernels::{name}", new_output)
    torch.library.register_fake(f"vpo_kernels::{name}_backward", new_gradients)
    refuse_second_derivative(name, f"{name}_backward", "use backend='reference'")
    return operators


def connect(
    name: str,
    operators: Operators,
    setup_context: SetupContext | None = None,
    differentiate: Differentiate | None = None,
) -> None:
    """Make ``operators.backward`` the gradient of ``operators.forward``.

    By default all tensors are saved, and ``backward`` takes the output's gradient before the inputs of ``forward``.
    It returns gradients of the leading inputs; the others get none.
    """

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors = [value for value in inputs if value is None or isinstance(value, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.numbers = inputs[len(tensors) :]

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = (*ctx.saved_tensors, *ctx.numbers)
        found = operators.backward(grad, *inputs)
        return *found, *[None] * (len(inputs) - len(found))

    torch.library.register_autograd(
        f"vpo_kernels::{name}", differentiate or gradients, setup_context=setup_context or save_inputs
    )


def _kernels(name: str, inputs: tuple[Any, ...]) -> ModuleType | None:
    """Return the module with an operation's kernels, or None if the formula computes these inputs."""
    if any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in inputs):
        return None
    if not inputs[0].is_cuda and not interpreted():
        return None
    return importlib.import_module(f"vpo_kernels.{name}.triton")
