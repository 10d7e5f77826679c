"""The kinds of reward that come with the engine: where each is, and what it judges. Importing this loads no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

ENTRY_POINTS = "vpo_engine.rewards"
"""The group of entry points under which an installed package offers rewards by name (also in config/reward.py)."""
OF_FRAMES = {
    "batch_size": "batch_size",
    "frames": "frames",
    "frame_reduce": "reduce",
    "frame_decay": "decay",
}
"""Settings of image scorers, with the names that ``VideoOfFrames`` has for them."""


@dataclass(frozen=True)
class Entry:
    """Describe where a reward is: a module of vpo_engine.rewards and a class in it, made by its ``from_pretrained``.

    judges: what it scores, in a few words. images: it scores images, and ``VideoOfFrames`` makes the score of a video.
    timed: it samples by seconds and must know the frames per second. shipped: its weights are in the package. takes:
    the settings that its ``from_pretrained`` has; an image scorer has all of ``OF_FRAMES``. options: keyword arguments
    that make the variant.
    """

    module: str
    scorer: str
    judges: str
    card: str = "CARD"
    images: bool = False
    timed: bool = False
    shipped: bool = False
    takes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(OF_FRAMES) if self.images else self.takes


_VIDEOSCORE = ("batch_size", "max_frames", "bits")
_PREFERRED = "what people prefer, frame by frame, with the prompt"
ENTRIES = {
    "sprites": Entry(
        "sprites", "SpritesOfFiles", "clips of the sprites world, in five dimensions", shipped=True
    ),
    "sprites_image": Entry(
        "sprites_image", "SpritesImage", "single frames of the sprites world", images=True, shipped=True
    ),
    "builtin": Entry(
        "builtin",
        "Builtin",
        "picture quality, consistency and motion",
        shipped=True,
        takes=("frames",),
    ),
    "brisque": Entry(
        "builtin",
        "Builtin",
        "picture quality alone, of small frames too",
        "CARD_BRISQUE",
        shipped=True,
        takes=("frames",),
        options={"dimensions": ("visual_quality",)},
    ),
    "videoscore": Entry(
        "videoscore", "VideoScore", "quality, consistency, motion, text, facts", takes=_VIDEOSCORE
    ),
    "videoscore_v1_1": Entry(
        "videoscore",
        "VideoScore",
        "the same, from 48 frames instead of 16",
        "CARD_V1_1",
        takes=_VIDEOSCORE,
        options={"max_frames": 48},
    ),
    "videoscore2": Entry(
        "videoscore2", "VideoScore2", "quality, text, physics; writes its reasons (slow)", timed=True
    ),
    "videoalign": Entry(
        "videoalign",
        "VideoAlign",
        "picture quality, motion quality, text",
        timed=True,
        takes=("batch_size",),
    ),
    "q_align": Entry(
        "q_align",
        "QAlign",
        "technical quality and aesthetics",
        timed=True,
        takes=("batch_size", "frames"),
    ),
    "unified_reward": Entry(
        "unified_reward", "UnifiedReward", "text, physics, style; writes its answer (slow)", timed=True
    ),
    "laion_aesthetic": Entry("laion_aesthetic", "LaionAesthetic", "aesthetics, frame by frame", images=True),
    "imagereward": Entry("imagereward", "ImageReward", _PREFERRED, images=True),
    "mps": Entry("mps", "MPS", _PREFERRED, images=True),
    "hpsv2": Entry("hpsv2", "HPSv2", _PREFERRED, images=True, options={"version": "v2"}),
    "hpsv2_1": Entry("hpsv2", "HPSv2", _PREFERRED, images=True, options={"version": "v2.1"}),
    "pickscore": Entry("pickscore", "PickScore", _PREFERRED, images=True),
    "viclip": Entry("viclip", "ViCLIP", "how well video and text agree", takes=("batch_size",)),
    "vjepa": Entry("vjepa", "VJepa", "how well hidden parts can be foretold", takes=("batch_size",)),
}
NAMES = tuple(ENTRIES)


def installed_rewards() -> tuple[str, ...]:
    """Return the names of the rewards that installed packages offer."""
    return tuple(sorted(entry_points(group=ENTRY_POINTS).names))


def is_own(kind: str) -> bool:
    """Return whether ``kind`` is written as package.module:Class, or offered by an installed package."""
    return kind not in ENTRIES and (":" in kind or kind in installed_rewards())


def find_entry(name: str) -> Entry:
    """Return the entry of a reward that comes with the engine; ValueError, with the nearest name, for another."""
    if name not in ENTRIES:
        near = difflib.get_close_matches(name.lower(), [*NAMES, *installed_rewards()], n=1)
        raise ValueError(
            f"there is no reward {name!r}; "
            + (f"did you mean {near[0]!r}? Known" if near else "known")
            + f" are {', '.join((*NAMES, *installed_rewards()))}, and package.module:Class names one of your own"
        )
    return ENTRIES[name]


def format_table() -> str:
    """Format a line for each reward: its name, whether its weights must be downloaded, and what it judges."""
    rows = [("reward", "weights", "what it judges")]
    rows += [
        (name, "included" if each.shipped else "download", each.judges) for name, each in ENTRIES.items()
    ]
    rows += [(name, "see card", "a reward of an installed package") for name in installed_rewards()]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:<{width}}  {weights:<8}  {judges}" for name, weights, judges in rows]
    return "\n".join(
        [*lines, "", "--list NAME prints a reward's card: dimensions, frames, size, licence, source"]
    )
