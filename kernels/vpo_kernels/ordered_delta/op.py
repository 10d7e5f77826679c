"""``encode_delta`` and ``decode_delta``: checks, choice of backend, registration.

``torch.ops.vpo_kernels.ordered_delta_encode`` and ``ordered_delta_decode`` write to tensors that they are given.
Under fake tensors decoding has no unknowns; encoding returns tensors of unbacked size, which takes a fake mode with
a shape environment (``FakeTensorMode(shape_env=ShapeEnv())``), or else raises DynamicOutputShapeException.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import cast

import torch
from torch import Tensor

from vpo_kernels.ordered_delta.contract import Backend, OrderedDelta
from vpo_kernels.paired_dpo.backends import BackendName, available_backends, check_name, choose_backend
from vpo_kernels.registration import operator

LARGEST = 2**31 - 1  # elements, which int32 counts


@functools.cache
def _say_fallback(name: str, reason: str) -> None:
    warnings.warn(
        f"ordered_delta: the {name} backend is not available ({reason}), so plain torch encodes and decodes, as "
        "exactly but slower",
        RuntimeWarning,
        stacklevel=2,
    )


def _backend(name: str, device: torch.device) -> Backend:
    """The module that ``name`` means on a device. ValueError if it does not run there."""
    if name == "auto":
        name = {"cpu": "native", "cuda": "triton"}.get(device.type, "reference")
        if reason := available_backends(device)[name]:
            _say_fallback(name, reason)
            name = "reference"
    chosen = choose_backend(name, device)
    return cast("Backend", importlib.import_module(f"vpo_kernels.ordered_delta.{chosen}"))


def _written(tensor: Tensor) -> None:
    """Tells autograd, as torch's own operations do, so that a graph that saved the tensor does not go unnoticed."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


@operator("ordered_delta_encode", mutates=("difference",))
def _encode(reference: Tensor, policy: Tensor, difference: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Index and value; ``difference`` is contiguous."""
    _written(difference)
    if policy.numel() == 0:
        return policy.new_empty(0, dtype=torch.int32), policy.new_empty(0)
    return _backend(backend, policy.device).encode(reference.contiguous(), policy.contiguous(), difference)


@torch.library.register_fake("vpo_kernels::ordered_delta_encode")
def _(reference: Tensor, policy: Tensor, difference: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    spilled = torch.library.get_ctx().new_dynamic_size()
    return policy.new_empty(spilled, dtype=torch.int32), policy.new_empty(spilled)


@operator("ordered_delta_decode", mutates=("out",))
def _decode(
    difference: Tensor, index: Tensor, value: Tensor, policy: Tensor, out: Tensor, backend: str
) -> None:
    """``out`` is contiguous."""
    _written(out)
    if policy.numel() > 0:
        delta = OrderedDelta(difference.contiguous(), index.contiguous(), value.contiguous())
        _backend(backend, policy.device).decode(delta, policy.contiguous(), out)


@torch.library.register_fake("vpo_kernels::ordered_delta_decode")
def _(difference: Tensor, index: Tensor, value: Tensor, policy: Tensor, out: Tensor, backend: str) -> None:
    return None


def _check(name: str, tensor: object, dtype: torch.dtype, like: Tensor) -> None:
    """A tensor of this dtype where the policy is."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is {type(tensor).__name__}, but must be a tensor")
    if tensor.dtype != dtype:
        exact = "deltas are exact for bfloat16 only, so convert before"
        raise ValueError(
            f"{name} has dtype {tensor.dtype}, but must be {dtype}; "
            + (exact if dtype == torch.bfloat16 else "pass what encode_delta returned")
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device}, but must be where policy is, on {like.device}; "
            f"pass {name}.to({str(like.device)!r})"
        )


def _check_shape(name: str, tensor: Tensor, policy: Tensor) -> None:
    if tensor.shape != policy.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but must have that of policy, {list(policy.shape)}; "
            "pass tensors of one parameter"
        )


def _check_policy(policy: object, backend: str) -> None:
    check_name(backend)
    if not isinstance(policy, Tensor):
        raise ValueError(f"policy is {type(policy).__name__}, but must be a tensor")
    _check("policy", policy, torch.bfloat16, policy)
    if policy.numel() > LARGEST:
        raise ValueError(
            f"policy has {policy.numel()} elements, but must have at most {LARGEST}, which int32 counts; "
            "encode it in parts"
        )


def _check_out(out: Tensor, dtype: torch.dtype, policy: Tensor) -> None:
    _check("out", out, dtype, policy)
    _check_shape("out", out, policy)
    if not out.is_contiguous():
        raise ValueError(
            f"out has strides {list(out.stride())}, but must be contiguous; pass torch.empty(policy.shape, "
            f"dtype={dtype}) or a view of a flat buffer"
        )


def encode_delta(
    reference: Tensor, policy: Tensor, backend: BackendName = "auto", out: Tensor | None = None
) -> OrderedDelta:
    """What ``decode_delta`` needs beside ``policy`` to give ``reference`` back bit for bit.

    reference, policy: bfloat16 of one shape and device, any strides and any bits, NaNs too; at most 2**31 - 1
        elements. Without gradients.
    out: contiguous int8 of their shape, to become ``difference``; None allocates. It may hold the difference of
        before: decoded, it is not needed any more.
    backend: ``reference`` is plain torch, ``native`` C++ on CPUs, ``triton`` a kernel on GPUs; the bits are the
        same. On a GPU the host waits for the number of spilled elements.

    Raises ValueError for everything else.
    """
    _check_policy(policy, backend)
    _check("reference", reference, torch.bfloat16, policy)
    _check_shape("reference", reference, policy)
    if out is None:
        out = torch.empty(policy.shape, dtype=torch.int8, device=policy.device)
    _check_out(out, torch.int8, policy)
    index, value = _encode(reference.detach(), policy.detach(), out, backend)
    return OrderedDelta(out, index, value)


def decode_delta(
    delta: OrderedDelta, policy: Tensor, out: Tensor | None = None, backend: BackendName = "auto"
) -> Tensor:
    """The reference that ``encode_delta(reference, policy)`` was given, bit for bit.

    policy: bfloat16, the values of then, any strides. out: contiguous bfloat16 of its shape, to be filled and
    returned; it may be ``policy`` itself, and else must not overlap it. None allocates. backend as in
    ``encode_delta``. Nothing waits for a GPU.

    Raises ValueError for tensors that do not belong together.
    """
    _check_policy(policy, backend)
    _check("delta.difference", delta.difference, torch.int8, policy)
    _check_shape("delta.difference", delta.difference, policy)
    _check("delta.index", delta.index, torch.int32, policy)
    _check("delta.value", delta.value, torch.bfloat16, policy)
    if delta.index.ndim != 1 or delta.value.shape != delta.index.shape:
        raise ValueError(
            f"delta.index and delta.value have shapes {list(delta.index.shape)} and {list(delta.value.shape)}, but "
            "must both be [k]; pass what encode_delta returned"
        )
    if out is None:
        out = torch.empty(policy.shape, dtype=torch.bfloat16, device=policy.device)
    _check_out(out, torch.bfloat16, policy)
    _decode(*delta, policy.detach(), out, backend)
    return out
