"""``train`` with a scorer that is asked to stop, or fails, at its n-th group of four videos: stops|fails N ..."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from torch import Tensor

from vpo_engine.rewards.sprites import SpritesReward
from vpo_engine.train import main

what, number = sys.argv[1], int(sys.argv[2])
score, seen = SpritesReward.score, []


def troubled(self: SpritesReward, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    seen.append(len(videos))
    if len(videos) == 4 and seen.count(4) == number:
        if what == "fails":
            raise ValueError("the scorer broke down")
        signal.raise_signal(signal.SIGTERM)
    return score(self, videos, prompts)


SpritesReward.score = troubled  # type: ignore[method-assign]
sys.exit(main(sys.argv[3:]))
