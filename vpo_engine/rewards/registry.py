"""Every reward model by name: its card, and how it is made. A module is imported when its reward is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vpo_engine.protocols import Reward
from vpo_engine.rewards.card import RewardCard
from vpo_engine.rewards.frames import VideoOfFrames


@dataclass(frozen=True)
class _Entry:
    """Where a reward is: module in vpo_engine.rewards and class in it, whose ``from_pretrained`` makes it.

    images: it scores images; the video's score is the mean over all frames. timed: it samples by seconds and must know
    the frames per second. shipped: its weights are in the package. options: keyword arguments that make the variant.
    """

    module: str
    scorer: str
    card: str = "CARD"
    images: bool = False
    timed: bool = False
    shipped: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


_ENTRIES = {
    "sprites": _Entry("sprites", "SpritesOfFiles", shipped=True),
    "builtin": _Entry("builtin", "Builtin", shipped=True),
    "videoscore": _Entry("videoscore", "VideoScore"),
    "videoscore_v1_1": _Entry("videoscore", "VideoScore", "CARD_V1_1", options={"max_frames": 48}),
    "videoscore2": _Entry("videoscore2", "VideoScore2", timed=True),
    "videoalign": _Entry("videoalign", "VideoAlign", timed=True),
    "q_align": _Entry("q_align", "QAlign", timed=True),
    "unified_reward": _Entry("unified_reward", "UnifiedReward", timed=True),
    "laion_aesthetic": _Entry("laion_aesthetic", "LaionAesthetic", images=True),
    "imagereward": _Entry("imagereward", "ImageReward", images=True),
    "mps": _Entry("mps", "MPS", images=True),
    "hpsv2": _Entry("hpsv2", "HPSv2", images=True, options={"version": "v2"}),
    "hpsv2_1": _Entry("hpsv2", "HPSv2", images=True, options={"version": "v2.1"}),
    "pickscore": _Entry("pickscore", "PickScore", images=True),
    "viclip": _Entry("viclip", "ViCLIP"),
    "vjepa": _Entry("vjepa", "VJepa"),
}
NAMES = tuple(_ENTRIES)


def reward_card(name: str) -> RewardCard:
    """What the reward declares, under the name it is registered by. ValueError for an unknown name."""
    entry = _entry(name)
    card: RewardCard = getattr(_module(entry), entry.card)
    return replace(card, name=name)


def knows_frame_rate(name: str) -> bool:
    """Whether the scores depend on the frames per second, which ``build_reward`` then needs."""
    return _entry(name).timed


def build_reward(
    name: str,
    path: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fps: float | None = None,
) -> Reward:
    """The reward of this name, its weights read from the folder ``path``.

    Sprites and builtin ship theirs and take no path. ``fps``: of all videos it will score; read by those that
    ``knows_frame_rate`` names. ValueError for an unknown name, a missing or unwanted path, a missing fps, and whatever
    the reward refuses; FileNotFoundError for what is missing in the folder.
    """
    entry = _entry(name)
    if entry.shipped and path is not None:
        raise ValueError(f"reward {name!r} has its weights in the package; leave out the path {path}")
    if not entry.shipped and path is None:
        source = reward_card(name).source
        raise ValueError(
            f"reward {name!r} needs a path: a local folder with the weights published at {source}"
        )
    options = dict(entry.options)
    if entry.timed:
        if fps is None:
            raise ValueError(f"reward {name!r} samples by seconds; give the videos' frames per second")
        options["fps"] = fps
    make = getattr(_module(entry), entry.scorer).from_pretrained
    scorer = make(*([] if path is None else [path]), device=device, dtype=dtype, **options)
    return VideoOfFrames(scorer) if entry.images else scorer


def format_cards() -> str:
    """Every reward's card for people to read; of one whose module cannot be imported, why."""
    blocks = []
    for name in NAMES:
        try:
            blocks.append("\n".join([name, *_lines(reward_card(name))]))
        except ImportError as error:
            blocks.append(f"{name}\n  cannot be imported: {error}")
    return "\n\n".join(blocks)


def _lines(card: RewardCard) -> list[str]:
    ranges = ", ".join(name + _range(*bounds) for name, bounds in card.dimensions.items())
    size = f"{card.parameters / 1e9:.2f} billion" if card.parameters >= 1e7 else f"{card.parameters:,}"
    memory = (
        f" ({card.gib_bf16:.1f} GiB in bfloat16, {card.gib_8bit:.1f} in 8 bits)"
        if card.parameters >= 1e7
        else ""
    )
    facts = {
        "dimensions": ranges,
        "frames": card.frames,
        "resolution": card.resolution,
        "reads prompt": "yes" if card.reads_prompt else "no",
        "differentiable": "yes" if card.differentiable else "no",
        "parameters": size + memory,
        "licence": card.licence,
        "source": card.source,
    }
    return [f"  {fact:<15} {value}" for fact, value in facts.items()]


def _range(low: float | None, high: float | None) -> str:
    """ " 1..4"; an open side is left out, as is a range without any."""
    if low is None and high is None:
        return ""
    return f" {'' if low is None else f'{low:g}'}..{'' if high is None else f'{high:g}'}"


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise ValueError(f"there is no reward {name!r}; known are {', '.join(NAMES)}")
    return _ENTRIES[name]


def _module(entry: _Entry) -> Any:
    return importlib.import_module(f"vpo_engine.rewards.{entry.module}")
