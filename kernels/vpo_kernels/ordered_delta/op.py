"""``encode_delta`` and ``decode_delta``: checks, choice of backend, registration.

``torch.ops.vpo_kernels.ordered_delta_encode`` and ``ordered_delta_decode`` write to tensors that they are given.
Under fake tensors the shapes of decoding are known. Encoding returns tensors of unbacked size, which needs a fake mode
with a shape environment (``FakeTensorMode(shape_env=ShapeEnv())``); else it raises DynamicOutputShapeException.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vpo_kernels.backends import BackendName, check_name, choose_backend
from vpo_kernels.checks import check_device
from vpo_kernels.ordered_delta.contract import OrderedDelta
from vpo_kernels.registration import operator

LARGEST = 2**31 - 1  # elements, which int32 counts


def _mark_written(tensor: Tensor) -> None:
    """Tell autograd that a tensor was written to, as torch's own operations do.

    So a backward pass that needs the tensor's former values raises an error.
    """
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


@operator("ordered_delta_encode", mutates=("difference",))
def _encode(reference: Tensor, policy: Tensor, difference: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Fill ``difference``, which is contiguous; return index and value of the delta."""
    _mark_written(difference)
    if policy.numel() == 0:
        return policy.new_empty(0, dtype=torch.int32), policy.new_empty(0)
    return choose_backend("ordered_delta", backend, policy.device).encode(
        reference.contiguous(), policy.contiguous(), difference
    )


@torch.library.register_fake("vpo_kernels::ordered_delta_encode")
def _(reference: Tensor, policy: Tensor, difference: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    spilled = torch.library.get_ctx().new_dynamic_size()
    return policy.new_empty(spilled, dtype=torch.int32), policy.new_empty(spilled)


@operator("ordered_delta_decode", mutates=("out",))
def _decode(
    difference: Tensor, index: Tensor, value: Tensor, policy: Tensor, out: Tensor, backend: str
) -> None:
    """Fill ``out``, which is contiguous."""
    _mark_written(out)
    if policy.numel() > 0:
        delta = OrderedDelta(difference.contiguous(), index.contiguous(), value.contiguous())
        choose_backend("ordered_delta", backend, policy.device).decode(delta, policy.contiguous(), out)


@torch.library.register_fake("vpo_kernels::ordered_delta_decode")
def _(difference: Tensor, index: Tensor, value: Tensor, policy: Tensor, out: Tensor, backend: str) -> None:
    return None


def _check(name: str, tensor: object, dtype: torch.dtype, like: Tensor) -> None:
    """Raise ValueError unless this is a tensor of this dtype on the policy's device."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is {type(tensor).__name__}, but must be a tensor")
    if tensor.dtype != dtype:
        exact = "deltas are exact for bfloat16 only, so convert before"
        raise ValueError(
            f"{name} has dtype {tensor.dtype}, but must be {dtype}; "
            + (exact if dtype == torch.bfloat16 else "pass what encode_delta returned")
        )
    check_device(name, tensor, like.device, "policy")


def _check_shape(name: str, tensor: Tensor, policy: Tensor) -> None:
    """Raise ValueError unless the tensor has the policy's shape."""
    if tensor.shape != policy.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but must have that of policy, {list(policy.shape)}; "
            "pass tensors of one parameter"
        )


def _check_policy(policy: object, backend: str) -> None:
    """Raise ValueError for an unknown backend, and for a policy that no backend takes."""
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
    """Raise ValueError unless ``out`` is contiguous and of this dtype and the policy's shape and device."""
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
    """Return the delta that, together with ``policy``, gives ``reference`` back bit for bit.

    reference, policy: bfloat16 of one shape and device, any strides and any bits, NaNs too; at most 2**31 - 1
        elements. They get no gradients.
    out: contiguous int8 of their shape, which becomes ``difference``; None allocates one. It may be the difference of
        an earlier delta that is decoded already.
    backend: ``reference`` is plain torch, ``native`` C++ on CPUs, ``triton`` a kernel on GPUs, ``auto`` the fastest
        that runs on the device; the bits are the same. On a GPU the host waits for the number of spilled elements.

    Raise ValueError for other dtypes, shapes, devices and backends.
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
    """Return the reference that ``encode_delta(reference, policy)`` was given, bit for bit.

    policy: bfloat16, the same values as then, any strides.
    out: contiguous bfloat16 of its shape, which is filled and returned; None allocates one. It may be ``policy``
        itself, and else must not overlap it.
    backend: as in ``encode_delta``. The host does not wait for a GPU.

    Raise ValueError for tensors that do not belong together.
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
