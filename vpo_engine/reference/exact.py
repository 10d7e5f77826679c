"""exact8: a bfloat16 matrix of the reference, stored as its 8-bit difference from the policy's matrix without loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from vpo_kernels import OrderedDelta, decode_delta, encode_delta

from vpo_engine.reference.weights import Scratch, check_parts, in_dtype

_BYTES_PER_OUTLIER = 6
"""An int32 index and a bfloat16 value."""


class ExactWeight:
    """The matrix as an ``OrderedDelta`` from the policy's current weight, or in bfloat16 as it is.

    It is stored in bfloat16 while more than a sixth of its differences do not fit into 8 bits, so it never takes more
    than 2 bytes per weight. The policy's weight may be bfloat16, or a wider type with values that bfloat16 can
    represent. Code that changes the policy's weight must do so inside ``preserved``.
    """

    def __init__(self, policy: Tensor) -> None:
        self.policy = policy
        self._held: OrderedDelta | Tensor = _zero_delta(policy)

    @property
    def scratch_numel(self) -> int:
        return self.policy.numel()

    @property
    def outliers(self) -> int:
        """Return the number of weights that are not stored in 8 bits."""
        held = self._held
        return held.index.numel() if isinstance(held, OrderedDelta) else held.numel()

    def tensors(self) -> dict[str, Tensor]:
        held = self._held
        return held._asdict() if isinstance(held, OrderedDelta) else {"bfloat16": held}

    def refresh(self) -> None:
        held = self._held
        self._held = _zero_delta(self.policy, held.difference if isinstance(held, OrderedDelta) else None)

    def decode(self, dtype: torch.dtype, scratch: Scratch) -> Tensor:
        held, policy = self._held, self.policy.detach()
        if isinstance(held, OrderedDelta) and policy.dtype == dtype == torch.bfloat16:
            return decode_delta(held, policy, out=scratch.take(tuple(policy.shape), dtype, policy.device))
        return in_dtype(self._decoded(), dtype, scratch)

    def check(self, parts: Mapping[str, Tensor]) -> None:
        like = self.policy.detach()
        if "difference" not in parts:
            return check_parts(parts, {"bfloat16": like.to("meta", torch.bfloat16)})
        outliers = parts["index"].shape if "index" in parts else torch.Size([0])
        return check_parts(
            parts,
            {
                "difference": like.to("meta", torch.int8),
                "index": torch.empty(outliers.numel(), dtype=torch.int32, device="meta"),
                "value": torch.empty(outliers.numel(), dtype=torch.bfloat16, device="meta"),
            },
        )

    def load(self, parts: Mapping[str, Tensor]) -> None:
        own = {name: tensor.to(self.policy.device, copy=True) for name, tensor in parts.items()}
        self._held = OrderedDelta(**own) if "difference" in own else own["bfloat16"]

    def _decoded(self) -> Tensor:
        """Return the matrix in bfloat16, decoded into a new tensor or as it is stored."""
        if not isinstance(self._held, OrderedDelta):
            return self._held
        policy = self.policy.detach()
        if policy.dtype == torch.bfloat16:
            return decode_delta(self._held, policy)
        policy = policy.bfloat16()
        return decode_delta(self._held, policy, out=policy)

    def _encode(self, reference: Tensor) -> None:
        """Store ``reference``, bfloat16, as its difference from the policy's weight as it is now."""
        if isinstance(self.policy, FakeTensor):
            return  # the number of outliers depends on values, which a plan does not have; it assumes none
        old = self._held.difference if isinstance(self._held, OrderedDelta) else None
        delta = encode_delta(reference, self.policy.detach().bfloat16(), out=old)
        fits = delta.index.numel() * _BYTES_PER_OUTLIER <= reference.numel()
        self._held = delta if fits else reference


@contextmanager
def preserved(weights: Iterable[ExactWeight]) -> Iterator[None]:
    """Keep the values of these weights while the policy's weights change; meanwhile they are decoded in bfloat16."""
    decoded = [(weight, weight._decoded()) for weight in weights]
    try:
        yield
    finally:
        while decoded:
            weight, reference = decoded.pop()
            weight._encode(reference)


def check_on_grid(weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the first weight that has a value which bfloat16 cannot represent.

    The host waits for the device at most once. bfloat16 weights are not checked, nor are those of a plan.
    """
    wide = {
        name: weight.detach()
        for name, weight in weights.items()
        if weight.dtype != torch.bfloat16 and not isinstance(weight, FakeTensor)
    }
    if not wide:
        return
    off = torch.stack([(weight.bfloat16() != weight).any() for weight in wide.values()])
    found = [name for name, one in zip(wide, off.tolist(), strict=True) if one]
    if found:
        raise ValueError(
            f"reference.storage=exact8 needs weights that bfloat16 represents exactly, but {found[0]} "
            f"({wide[found[0]].dtype}; {len(found)} of {len(wide)} matrices) has other values, or NaN; set "
            "memory.weights to fp32_master or stochastic_rounding, or use reference.storage=int8"
        )


def _zero_delta(policy: Tensor, difference: Tensor | None = None) -> OrderedDelta:
    """Return the delta of a weight from itself; ``difference`` is overwritten and used if given."""
    if difference is None:
        difference = torch.empty(policy.shape, dtype=torch.int8, device=policy.device)
    index = torch.empty(0, dtype=torch.int32, device=policy.device)
    return OrderedDelta(difference.zero_(), index, index.bfloat16())
