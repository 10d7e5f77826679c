"""VideoScore without the values of its weights, as the planner builds it, and lets it score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpo_engine.config import RewardConfig
from vpo_engine.planning.parts import materialise
from vpo_engine.planning.tracker import Tracker
from vpo_engine.rewards.videoscore import FrameProcessor, VideoScoreNetwork, frame_indices

QUESTION_TOKENS, TOKENS_AROUND_A_FRAME = 400, 3
"""Tokens of VideoScore's question with a long caption, and tokens around each frame: its boundaries and a space."""

SHORTEST, LONGEST = 378, 980
"""Edges to which VideoScore's preprocessor_config.json resizes frames."""


class PlannedVideoScore:
    """VideoScore's network, with the settings by which it is planned."""

    def __init__(self, network: VideoScoreNetwork, settings: RewardConfig) -> None:
        self.network, self._settings = network, settings
        self._processor = FrameProcessor(SHORTEST, LONGEST)

    def build(self, tracker: Tracker, on_gpu: bool) -> None:
        """Give the network tensors without values, of as many bytes as its weights will have."""
        with tracker.making("reward"):
            materialise(self.network.model, torch.bfloat16 if on_gpu else torch.float32)
            materialise(self.network)
        bits = self._settings.bits
        if bits < 16:
            for module in self.network.model.modules():
                if isinstance(module, nn.Linear):
                    tracker.resize(module.weight, module.weight.numel() * bits // 8)

    def processed(self, rows: int, frames: int, height: int, width: int) -> Tensor:
        """Return empty frames [rows, f, 3, h, w] as they are scored, of videos of this size."""
        size = self._processor.output_size(height, width)
        return torch.empty(rows, len(self._scored(frames)), 3, *size)

    def score_frames(self, tracker: Tracker, videos: Tensor) -> Tensor:
        """Return one number for each of the float videos [B, F, 3, H, W], with its graph."""
        frames = videos[:, self._scored(videos.shape[1])]
        pixels = self._processor.pixels(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return self.read(tracker, pixels).mean(dim=1)

    def read(self, tracker: Tracker, frames: Tensor) -> Tensor:
        """Return the scores [B, 5] of preprocessed frames [B, f, 3, h, w] with long captions."""
        rows, count = frames.shape[:2]
        slots = self.network.model.config.perceiver_config.resampler_n_latents
        tokens = QUESTION_TOKENS + count * (slots + TOKENS_AROUND_A_FRAME)
        before, tracker.answer = tracker.answer, lambda: rows * count * slots
        scores = self.network(
            torch.zeros(rows, tokens, dtype=torch.int64), torch.full((rows,), tokens), frames
        )
        tracker.answer = before
        return scores

    def _scored(self, frames: int) -> list[int]:
        """Return which of a video's frames are looked at."""
        settings = self._settings
        return frame_indices(
            frames, settings.max_frames or (48 if settings.kind == "videoscore_v1_1" else 16)
        )
