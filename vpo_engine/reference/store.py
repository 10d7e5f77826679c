"""The frozen reference and its refresh from the policy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


class CopiedReference:
    """The reference as a full copy of the policy, in the policy's own dtype: exact, and the largest.

    Calling it runs the same modules as the policy does, in evaluation mode and without a graph, so right after
    a refresh equal inputs give bitwise equal predictions (DESIGN, invariants 1 and 3).
    """

    def __init__(self, policy: nn.Module) -> None:
        self._network = copy.deepcopy(policy).eval().requires_grad_(False)

    @property
    def nbytes(self) -> int:
        tensors = [*self._network.parameters(), *self._network.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @torch.no_grad()
    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        return self._network(*args, **kwargs)

    @torch.no_grad()
    def refresh(self, policy: nn.Module) -> None:
        """reference <- policy, in place."""
        source = policy.state_dict(keep_vars=True)
        for name, tensor in self._network.state_dict(keep_vars=True).items():
            tensor.copy_(source[name])

    def following(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """A copy does not move with the policy."""
        return nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._network.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._network.load_state_dict(state, strict=True)
