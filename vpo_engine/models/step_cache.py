"""The step cache: steps of a sampling loop reuse what the later blocks added in an earlier step."""

from __future__ import annotations

import torch
from torch import Tensor

from vpo_engine.distributed.sequence import SequenceGroup, alone


class BlockCache:
    """First-block caching, as ParaAttention has it.

    What all blocks but the first add to the tokens is taken from the last step that computed it, as long as the first
    block adds nearly what it added then. Near means that the mean absolute change is below ``threshold`` times the mean
    absolute value, in every sample of the batch. So samples depend on their batch, and the host waits for the device
    once a step. computed, reused: how many calls there were of either kind. shared: the processes that hold slices of
    the tokens; they decide by the means over all tokens, and so alike.
    """

    def __init__(self, threshold: float, shared: SequenceGroup | None = None) -> None:
        self.threshold, self._shared = threshold, shared or alone()
        self.computed = self.reused = 0
        self._first: Tensor | None = None
        self._rest: Tensor | None = None

    def after_first(self, first: Tensor) -> Tensor | None:
        """Return what the later blocks add where the first added ``first`` [B, ...]; None if it must be computed."""
        if self._rest is not None and self._near(first):
            self.reused += 1
            return self._rest
        self._first = first
        return None

    def keep(self, rest: Tensor) -> None:
        """Keep what the later blocks were computed to add."""
        self.computed += 1
        self._rest = rest

    def _near(self, first: Tensor) -> bool:
        assert self._first is not None
        sizes = [values.flatten(1).float().abs().mean(1) for values in (first - self._first, self._first)]
        change, before = sizes
        if self._shared.count > 1:
            change, before = self._shared.sum(torch.stack(sizes) * first[0].numel())
        return bool((change < self.threshold * before).all())
