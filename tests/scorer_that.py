"""``train`` with a scorer that stops the run or fails: run by the processes of a group, hence a module of its own."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from torch import Tensor

from vpo_engine.rewards.sprites import SpritesReward
from vpo_engine.train import main


def train_with_a_scorer_that(what: str, number: int, arguments: Sequence[str]) -> int:
    """Train; at its ``number``-th group of four videos the scorer ``stops`` (gets SIGTERM) or ``fails``."""
    score, seen = SpritesReward.score, []

    def troubled(self: SpritesReward, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        seen.append(len(videos))
        if len(videos) == 4 and seen.count(4) == number:
            if what == "fails":
                raise ValueError("the scorer broke down")
            signal.raise_signal(signal.SIGTERM)
        return score(self, videos, prompts)

    SpritesReward.score = troubled  # type: ignore[method-assign]
    return main(arguments)
