"""Every reward of the registry with tiny weights, made as the tests of each make it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import test_hpsv2
import test_imagereward
import test_laion_aesthetic
import test_mps
import test_pickscore
import test_q_align
import test_viclip
import test_videoalign
import test_videoscore
import test_vjepa
import torch
from tiny_qwen import write_judge

from vpo_engine.rewards.builtin import Builtin
from vpo_engine.rewards.frames import VideoOfFrames
from vpo_engine.rewards.hpsv2 import HPSv2
from vpo_engine.rewards.imagereward import ImageReward
from vpo_engine.rewards.laion_aesthetic import LaionAesthetic
from vpo_engine.rewards.mps import MPS
from vpo_engine.rewards.pickscore import PickScore
from vpo_engine.rewards.q_align import QAlign
from vpo_engine.rewards.sprites import SpritesOfFiles
from vpo_engine.rewards.unified_reward import UnifiedReward
from vpo_engine.rewards.viclip import ViCLIP
from vpo_engine.rewards.videoalign import VideoAlign
from vpo_engine.rewards.videoscore import VideoScore
from vpo_engine.rewards.videoscore2 import VideoScore2
from vpo_engine.rewards.vjepa import VJepa


@dataclass(frozen=True)
class Published:
    """A scorer with weights to download. called: what errors call it. write: its tiny checkpoint into a folder.

    options: of ``from_pretrained``, for the tiny sizes.
    """

    scorer: Any
    called: str
    write: Callable[[Path], Path]
    options: dict[str, Any] = field(default_factory=dict)

    def load(self, folder: Path, **options: object) -> Any:
        return self.scorer.from_pretrained(folder, **self.options, **options)


EXACT = {"dtype": torch.float32}
PUBLISHED = {
    "videoscore": Published(VideoScore, "VideoScore", test_videoscore.write_checkpoint, EXACT),
    "videoscore2": Published(VideoScore2, "VideoScore2", write_judge, EXACT),
    "videoalign": Published(VideoAlign, "VideoAlign", test_videoalign.write_checkpoint, EXACT),
    "q_align": Published(QAlign, "Q-Align", test_q_align.write_checkpoint, EXACT),
    "unified_reward": Published(UnifiedReward, "UnifiedReward", write_judge, EXACT),
    "viclip": Published(
        ViCLIP,
        "ViCLIP",
        lambda folder: test_viclip.write_checkpoint(folder, test_viclip.WEIGHTS),
        {"shape": test_viclip.TINY},
    ),
    "vjepa": Published(
        VJepa, "V-JEPA", lambda folder: test_vjepa.write_checkpoint(folder, test_vjepa.WEIGHTS)
    ),
    "laion_aesthetic": Published(
        LaionAesthetic, "LAION's aesthetic predictor", test_laion_aesthetic.write_checkpoint
    ),
    "imagereward": Published(
        ImageReward, "ImageReward", test_imagereward.write_checkpoint, {"shape": test_imagereward.SHAPE}
    ),
    "mps": Published(MPS, "MPS", lambda folder: test_mps.write_checkpoint(folder, test_mps.WEIGHTS)),
    "hpsv2": Published(HPSv2, "HPSv2", test_hpsv2.write_checkpoint, {"shape": test_hpsv2.SHAPE}),
    "pickscore": Published(PickScore, "PickScore", test_pickscore.write_checkpoint),
}
IMAGES = ("laion_aesthetic", "imagereward", "mps", "hpsv2", "pickscore")
"""Those that score frames one by one."""
PICTURES = (*IMAGES, "q_align")
"""Those that score a single frame; Q-Align with its ``frames`` set."""
SCORERS = ("sprites", "builtin", *PUBLISHED)


def make(name: str, folder: Path) -> Any:
    """The scorer of videos, its checkpoint in the folder, which does not exist yet."""
    if name == "sprites":
        return SpritesOfFiles.from_pretrained()
    if name == "builtin":
        return Builtin()
    tiny = PUBLISHED[name]
    scorer = tiny.load(tiny.write(folder), **({"frames": 4} if name == "q_align" else {}))
    return VideoOfFrames(scorer) if name in IMAGES else scorer
