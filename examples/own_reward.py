"""A reward of your own: videos are scored by how colourful they are. See docs/rewards.md.

Run from the repository's root:

    python -m vpo_engine.train reward.kind=examples.own_reward:Colourfulness reward.dimensions=global
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Colourfulness:
    """Score videos by the mean difference between a pixel's strongest and weakest colour channel.

    It is a toy that shows the interface: a policy can please it with loud colours alone.
    """

    dimensions = ("colourfulness",)
    reads_prompt = False

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return {"colourfulness": float32 [B] in 0..1} for uint8 videos [B, F, H, W, 3]; prompts are not read."""
        levels = videos.float() / 255
        spread = levels.amax(dim=-1) - levels.amin(dim=-1)
        return {"colourfulness": spread.flatten(1).mean(dim=1)}
