"""From latents of candidates to scores: videos are decoded, scored and dropped, group by group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vpo_engine.memory.residency import Residency
from vpo_engine.metrics.stages import Stages
from vpo_engine.protocols import Reward, VideoModel
from vpo_engine.rollout.rows import Group, Rows


class Scoring:
    """Decoder and reward model, one after the other on groups of candidates.

    rows: the limit of videos that are decoded at once. residency: which of the two is on the device when; where they
    take turns, all videos wait on the host, as bytes, for one turn.
    """

    def __init__(self, model: VideoModel, reward: Reward, rows: Rows, residency: Residency) -> None:
        self.model, self.reward, self.rows, self.residency = model, reward, rows, residency

    @torch.no_grad()
    def score(self, candidates: Tensor, prompts: Sequence[str], stages: Stages) -> dict[str, Tensor]:
        """{dimension: float32 [P, N]} of clean latents [P, N, C, T, H, W]; prompts: P strings."""
        captions = [prompt for prompt in prompts for _ in range(candidates.shape[1])]
        videos = self._videos(candidates, stages)
        if self.residency.active:
            videos = iter([video.cpu() for video in videos])
        parts: list[dict[str, Tensor]] = []
        first = 0
        for chunk in videos:
            with stages("reward"), self.residency.phase("reward"):
                parts.append(self.reward.score(chunk, captions[first : first + len(chunk)]))
            first += len(chunk)
            del chunk
        return {
            name: torch.cat([part[name] for part in parts]).unflatten(0, candidates.shape[:2])
            for name in self.reward.dimensions
        }

    def _videos(self, candidates: Tensor, stages: Stages) -> Iterator[Tensor]:
        """Videos of candidates [P, N, ...], group by group in their order."""
        latents = candidates.flatten(0, 1)

        def decode(group: Group) -> Tensor:
            return self._decode(latents[group.prompts.start : group.prompts.stop], stages)

        return self.rows.run(decode, len(latents), 1)

    def _decode(self, latents: Tensor, stages: Stages) -> Tensor:
        with stages("decode"):
            return self.model.decode(latents)
