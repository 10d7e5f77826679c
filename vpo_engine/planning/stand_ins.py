"""Stand-ins, in a traced step, for things that need values, other processes or the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vpo_engine.memory.offload import PlainCopies
from vpo_engine.planning.tracker import Tracker
from vpo_engine.protocols import TextEmbedding
from vpo_engine.values import Candidate, Pair, Prompt


class HostCopies(PlainCopies):
    """Copies whose host memory has a category of its own."""

    def __init__(self, device: torch.device, tracker: Tracker) -> None:
        super().__init__(device)
        self._tracker = tracker

    def host_like(self, tensor: Tensor) -> Tensor:
        with self._tracker.making("host"):
            return super().host_like(tensor)


class FirstHalf:
    """The process that computes the first half of guided passes, with a second half that takes no time."""

    half = 0

    def exchange(self, prediction: Tensor) -> Tensor:
        return torch.cat([prediction, prediction])


@contextmanager
def without_collections() -> Iterator[None]:
    """Switch the search for reference cycles off: counts free all storages, and it takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def pair_without_values(latents: Tensor, embedding: TextEmbedding, position: int) -> Pair:
    """Return a pair of the two latents, with a prompt that has no text."""
    prompt = Prompt("", embedding, position)
    return Pair(Candidate(prompt, 0, latents, {}), Candidate(prompt, 1, latents, {}))
