"""Stand-ins for metrics whose networks are not at hand. They need no weights, and are no VBench: their names begin with
``proxy_``, and they are shown apart."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vpo_engine.metrics.metric_card import MetricCard
from vpo_engine.metrics.vbench import arithmetic
from vpo_engine.metrics.vbench.dimensions import ShareOfMoving
from vpo_engine.metrics.video_metric import Measurement, VideoMetric, mean
from vpo_engine.rewards.optical_flow import flow_between

_LUMINANCE = (0.299, 0.587, 0.114)
_GRID = 8
"""The side of the small picture that stands for a frame in place of a network's feature."""


class _Proxy(VideoMetric):
    """The base of stand-ins, which take no weights."""

    @classmethod
    def make(cls, card: MetricCard, weights: Path | None, device: torch.device) -> _Proxy:
        return cls(card)


class FlickerProxy(_Proxy):
    """The likeness of neighbouring frames, of all videos: VBench's arithmetic without its choice of still scenes."""

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        return Measurement({"": arithmetic.flicker_score(video)})


class SmoothnessProxy(_Proxy):
    """Motion smoothness with the mean of two neighbours in place of the network's interpolation."""

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        even = video[::2].short()
        between = ((even[:-1] + even[1:]) // 2).to(torch.uint8)
        return Measurement({"": arithmetic.foretold_score(video[1::2], between)})


class ConsistencyProxy(_Proxy):
    """Subject consistency with a picture of 8 x 8 pixels, without its mean, in place of the network's feature.

    A constant beside the pixels makes blank frames alike.
    """

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        small = F.adaptive_avg_pool2d(video.permute(0, 3, 1, 2).float(), _GRID).flatten(1)
        centred = small - small.mean(dim=1, keepdim=True)
        features = F.pad(centred, (0, 1), value=1.0)
        return Measurement({"": mean(arithmetic.frame_consistency(features))})


class MotionProxy(ShareOfMoving):
    """Dynamic degree with another optical flow than RAFT: OpenCV's DIS if it is installed, or else the engine's own.

    Both find motion up to about a tenth of the shorter side between two frames.
    """

    @classmethod
    def make(cls, card: MetricCard, weights: Path | None, device: torch.device) -> MotionProxy:
        try:
            import cv2
        except ImportError:
            return cls(card, _least_squares_flow, backbone="least squares over windows, coarse to fine")
        finder = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

        def flow(before: Tensor, after: Tensor) -> Tensor:
            greys = [cv2.cvtColor(frame.numpy(), cv2.COLOR_RGB2GRAY) for frame in (before.cpu(), after.cpu())]
            return torch.from_numpy(finder.calc(*greys, None)).permute(2, 0, 1)

        return cls(card, flow, backbone=f"DIS optical flow of OpenCV {cv2.__version__}")


def _least_squares_flow(before: Tensor, after: Tensor) -> Tensor:
    """Return the motion [2, H, W] between two frames, uint8 [H, W, 3], of at least 4 x 4 pixels."""
    weights = torch.tensor(_LUMINANCE, device=before.device)
    greys = [(frame.float() @ weights / arithmetic.LEVELS)[None, None] for frame in (before, after)]
    return flow_between(greys[0], greys[1])[0]
