"""exact8: a bfloat16 matrix held as its 8-bit difference from the policy's, bit for bit, while the policy moves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from vpo_kernels import OrderedDelta, decode_delta, encode_delta

from vpo_engine.reference.weights import Scratch, check_parts, in_dtype

_BYTES_PER_SPILLED = 6
"""An int32 index and a bfloat16 value."""


class ExactWeight:
    """The matrix as an ``OrderedDelta`` against the policy's weight of the moment, or plain.

    Plain, in bfloat16, is a matrix while more than a sixth of its differences would not fit into 8 bits: it never
    takes more than 2 bytes a weight. The policy's weight may be bfloat16, or wider with values that bfloat16 has;
    whoever changes it does so within ``following``.
    """

    def __init__(self, policy: Tensor) -> None:
        self.policy = policy
        self._held: OrderedDelta | Tensor = _nothing_moved(policy)

    @property
    def scratch_numel(self) -> int:
        return self.policy.numel()

    @property
    def spilled(self) -> int:
        """Weights that are not held in 8 bits."""
        held = self._held
        return held.index.numel() if isinstance(held, OrderedDelta) else held.numel()

    def tensors(self) -> dict[str, Tensor]:
        held = self._held
        return held._asdict() if isinstance(held, OrderedDelta) else {"bfloat16": held}

    def refresh(self) -> None:
        held = self._held
        self._held = _nothing_moved(self.policy, held.difference if isinstance(held, OrderedDelta) else None)

    def decode(self, dtype: torch.dtype, scratch: Scratch) -> Tensor:
        held, policy = self._held, self.policy.detach()
        if isinstance(held, OrderedDelta) and policy.dtype == dtype == torch.bfloat16:
            return decode_delta(held, policy, out=scratch.take(tuple(policy.shape), dtype, policy.device))
        return in_dtype(self._decoded(), dtype, scratch)

    def check(self, parts: Mapping[str, Tensor]) -> None:
        like = self.policy.detach()
        if "difference" not in parts:
            return check_parts(parts, {"bfloat16": like.to("meta", torch.bfloat16)})
        spilled = parts["index"].shape if "index" in parts else torch.Size([0])
        return check_parts(
            parts,
            {
                "difference": like.to("meta", torch.int8),
                "index": torch.empty(spilled.numel(), dtype=torch.int32, device="meta"),
                "value": torch.empty(spilled.numel(), dtype=torch.bfloat16, device="meta"),
            },
        )

    def load(self, parts: Mapping[str, Tensor]) -> None:
        own = {name: tensor.to(self.policy.device, copy=True) for name, tensor in parts.items()}
        self._held = OrderedDelta(**own) if "difference" in own else own["bfloat16"]

    def _decoded(self) -> Tensor:
        """In bfloat16: a new tensor, or the plain one."""
        if not isinstance(self._held, OrderedDelta):
            return self._held
        policy = self.policy.detach()
        if policy.dtype == torch.bfloat16:
            return decode_delta(self._held, policy)
        policy = policy.bfloat16()
        return decode_delta(self._held, policy, out=policy)

    def _hold(self, reference: Tensor) -> None:
        """Become ``reference``, bfloat16, against the policy's weight as it is now."""
        if isinstance(self.policy, FakeTensor):
            return  # how much is spilled depends on values; a plan counts none
        old = self._held.difference if isinstance(self._held, OrderedDelta) else None
        delta = encode_delta(reference, self.policy.detach().bfloat16(), out=old)
        fits = delta.index.numel() * _BYTES_PER_SPILLED <= reference.numel()
        self._held = delta if fits else reference


@contextmanager
def following(weights: Iterable[ExactWeight]) -> Iterator[None]:
    """Within, the policy's weights may change; these stay what they are. For the time they are there in bfloat16."""
    decoded = [(weight, weight._decoded()) for weight in weights]
    try:
        yield
    finally:
        while decoded:
            weight, reference = decoded.pop()
            weight._hold(reference)


def check_on_grid(weights: Mapping[str, Tensor]) -> None:
    """ValueError that names the first weight with values that bfloat16 has not; waits for a device once at most.

    bfloat16 weights are not looked at, nor are those of a plan.
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
            f"reference.storage=exact8 needs weights that bfloat16 holds exactly, but {found[0]} "
            f"({wide[found[0]].dtype}; {len(found)} of {len(wide)} matrices) has others, or NaN; set memory.weights "
            "to masters or stochastic, or use reference.storage=int8"
        )


def _nothing_moved(policy: Tensor, difference: Tensor | None = None) -> OrderedDelta:
    """The delta of a weight against itself, in ``difference`` if given."""
    if difference is None:
        difference = torch.empty(policy.shape, dtype=torch.int8, device=policy.device)
    index = torch.empty(0, dtype=torch.int32, device=policy.device)
    return OrderedDelta(difference.zero_(), index, index.bfloat16())
