"""Every reward of the registry with tiny weights, made as the tests of each make it."""

from __future__ import annotations

from collections.abc import Callable
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

MAKERS: dict[str, Callable[[Path], Any]] = {
    "sprites": lambda _: SpritesOfFiles.from_pretrained(),
    "builtin": lambda _: Builtin(),
    "videoscore": lambda folder: VideoScore.from_pretrained(
        test_videoscore.write_checkpoint(folder), dtype=torch.float32
    ),
    "videoscore2": lambda folder: VideoScore2.from_pretrained(write_judge(folder), dtype=torch.float32),
    "videoalign": lambda folder: VideoAlign.from_pretrained(
        test_videoalign.write_checkpoint(folder), dtype=torch.float32
    ),
    "q_align": lambda folder: QAlign.from_pretrained(
        test_q_align.write_checkpoint(folder), dtype=torch.float32, frames=4
    ),
    "unified_reward": lambda folder: UnifiedReward.from_pretrained(write_judge(folder), dtype=torch.float32),
    "viclip": lambda folder: ViCLIP.from_pretrained(
        test_viclip.write_checkpoint(folder, test_viclip.WEIGHTS), shape=test_viclip.TINY
    ),
    "vjepa": lambda folder: VJepa.from_pretrained(test_vjepa.write_checkpoint(folder, test_vjepa.WEIGHTS)),
    "laion_aesthetic": lambda folder: VideoOfFrames(
        LaionAesthetic.from_pretrained(test_laion_aesthetic.write_checkpoint(folder))
    ),
    "imagereward": lambda folder: VideoOfFrames(
        test_imagereward.load(test_imagereward.write_checkpoint(folder))
    ),
    "mps": lambda folder: VideoOfFrames(
        MPS.from_pretrained(test_mps.write_checkpoint(folder, test_mps.WEIGHTS))
    ),
    "hpsv2": lambda folder: VideoOfFrames(test_hpsv2.load(test_hpsv2.write_checkpoint(folder))),
    "pickscore": lambda folder: VideoOfFrames(
        PickScore.from_pretrained(test_pickscore.write_checkpoint(folder))
    ),
}
PUBLISHED: dict[str, tuple[Any, str]] = {
    "videoscore": (VideoScore, "VideoScore"),
    "videoscore2": (VideoScore2, "VideoScore2"),
    "videoalign": (VideoAlign, "VideoAlign"),
    "q_align": (QAlign, "Q-Align"),
    "unified_reward": (UnifiedReward, "UnifiedReward"),
    "viclip": (ViCLIP, "ViCLIP"),
    "vjepa": (VJepa, "V-JEPA"),
    "laion_aesthetic": (LaionAesthetic, "LAION's aesthetic predictor"),
    "imagereward": (ImageReward, "ImageReward"),
    "mps": (MPS, "MPS"),
    "hpsv2": (HPSv2, "HPSv2"),
    "pickscore": (PickScore, "PickScore"),
}
"""Those with weights to download: the class, and what errors call it."""
IMAGES = ("laion_aesthetic", "imagereward", "mps", "hpsv2", "pickscore")
"""Those that score frames one by one."""
PICTURES = (*IMAGES, "q_align")
"""Those that score a single frame; Q-Align with its ``frames`` set, as its fixtures have it."""
