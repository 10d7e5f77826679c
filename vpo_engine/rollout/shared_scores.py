"""Decode and score candidates that several processes have sampled together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.batches import as_slice
from vpo_engine.rollout.sampler import OverlappedScores, Scores, VideoScorer


class SharedScorer:
    """A ``VideoScorer`` for processes that hold the same candidates: each decodes and scores a part of them.

    sequence: these processes. All of them get all scores, bit for bit the same.
    """

    def __init__(self, scorer: VideoScorer, dimensions: Sequence[str], sequence: Processes) -> None:
        self._scorer, self._dimensions, self._sequence = scorer, dimensions, sequence

    def __call__(
        self, candidates: Tensor, texts: Sequence[str], begun: OverlappedScores | None = None
    ) -> Scores:
        """Return the scores {dimension: float32 [P, N]} of clean latents [P, N, C, T, H, W] of P prompts."""
        sequence, count = self._sequence, candidates.shape[1]
        if sequence.count == 1:
            return self._scorer(candidates, texts, begun)
        assert begun is None, "rollout.overlap is refused"
        mine = sequence.rank_range(count)
        scores = torch.zeros(len(self._dimensions), len(texts), count, device=sequence.device)
        if len(mine):
            own = self._scorer(candidates[:, as_slice(mine)], texts)
            for number, name in enumerate(self._dimensions):
                scores[number, :, as_slice(mine)] = own[name]
        return dict(zip(self._dimensions, sequence.sum(scores).unbind(), strict=True))
