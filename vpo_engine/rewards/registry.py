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
from vpo_engine.rewards.frames import ImageScorer, VideoOfFrames

_OF_FRAMES = {"rows": "batch_size", "frames": "frames", "frame_reduce": "reduce", "frame_decay": "decay"}
"""Settings of image scorers, and what ``VideoOfFrames`` calls them."""
_OF_SCORERS = {"rows": "batch_size", "frames": "frames", "max_frames": "max_frames", "bits": "bits"}
"""Settings of the others, and what their ``from_pretrained`` calls them."""


@dataclass(frozen=True)
class _Entry:
    """Where a reward is: module in vpo_engine.rewards and class in it, whose ``from_pretrained`` makes it.

    images: it scores images; frames.py makes the score of a video. timed: it samples by seconds and must know the
    frames per second. shipped: its weights are in the package. takes: names of ``_OF_SCORERS``; an image scorer takes
    all of ``_OF_FRAMES``. options: keyword arguments that make the variant.
    """

    module: str
    scorer: str
    card: str = "CARD"
    images: bool = False
    timed: bool = False
    shipped: bool = False
    takes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(_OF_FRAMES) if self.images else self.takes


_VIDEOSCORE = ("rows", "max_frames", "bits")
_ENTRIES = {
    "sprites": _Entry("sprites", "SpritesOfFiles", shipped=True),
    "sprites_image": _Entry("sprites_image", "SpritesImage", images=True, shipped=True),
    "builtin": _Entry("builtin", "Builtin", shipped=True, takes=("frames",)),
    "brisque": _Entry(
        "builtin",
        "Builtin",
        "CARD_BRISQUE",
        shipped=True,
        takes=("frames",),
        options={"dimensions": ("visual_quality",)},
    ),
    "videoscore": _Entry("videoscore", "VideoScore", takes=_VIDEOSCORE),
    "videoscore_v1_1": _Entry(
        "videoscore", "VideoScore", "CARD_V1_1", takes=_VIDEOSCORE, options={"max_frames": 48}
    ),
    "videoscore2": _Entry("videoscore2", "VideoScore2", timed=True),
    "videoalign": _Entry("videoalign", "VideoAlign", timed=True, takes=("rows",)),
    "q_align": _Entry("q_align", "QAlign", timed=True, takes=("rows", "frames")),
    "unified_reward": _Entry("unified_reward", "UnifiedReward", timed=True),
    "laion_aesthetic": _Entry("laion_aesthetic", "LaionAesthetic", images=True),
    "imagereward": _Entry("imagereward", "ImageReward", images=True),
    "mps": _Entry("mps", "MPS", images=True),
    "hpsv2": _Entry("hpsv2", "HPSv2", images=True, options={"version": "v2"}),
    "hpsv2_1": _Entry("hpsv2", "HPSv2", images=True, options={"version": "v2.1"}),
    "pickscore": _Entry("pickscore", "PickScore", images=True),
    "viclip": _Entry("viclip", "ViCLIP", takes=("rows",)),
    "vjepa": _Entry("vjepa", "VJepa", takes=("rows",)),
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


def check_reward(name: str, path: str | Path | None, settings: Mapping[str, Any] | None = None) -> None:
    """What ``build_reward`` refuses before it reads a weight; its errors."""
    entry = _entry(name)
    if entry.shipped and path is not None:
        raise ValueError(f"reward {name!r} has its weights in the package; leave out the path {path}")
    if not entry.shipped and path is None:
        source = reward_card(name).source
        raise ValueError(
            f"reward {name!r} needs a path: a local folder with the weights published at {source}"
        )
    if path is not None and not Path(path).is_dir():
        raise FileNotFoundError(
            f"no folder at {path}; reward {name!r} reads the weights published at {reward_card(name).source}"
        )
    unknown = [setting for setting in settings or {} if setting not in entry.settings]
    if unknown:
        raise ValueError(
            f"reward {name!r} has no setting {', '.join(unknown)}: it takes {', '.join(entry.settings) or 'none'}; "
            "leave out what it does not take"
        )


def build_reward(
    name: str,
    path: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fps: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Reward:
    """The reward of this name, its weights read from the folder ``path``.

    Those whose weights are in the package take no path. ``fps``: of all videos it will score; read by those that
    ``knows_frame_rate`` names. ``settings``: rows (videos through the network at once, images of an image scorer),
    frames, max_frames, bits, frame_reduce and frame_decay, for those that have them; what is left out is the
    scorer's own. ValueError for an unknown name, a missing or unwanted path, a missing fps, a setting that the reward
    does not have, and whatever the reward refuses; FileNotFoundError for what is missing in the folder.
    """
    check_reward(name, path, settings)
    entry, settings = _entry(name), settings or {}
    options = dict(entry.options)
    if not entry.images:
        options |= {_OF_SCORERS[setting]: value for setting, value in settings.items()}
    if entry.timed:
        if fps is None:
            raise ValueError(f"reward {name!r} samples by seconds; give the videos' frames per second")
        options["fps"] = fps
    make = getattr(_module(entry), entry.scorer).from_pretrained
    scorer = make(*([] if path is None else [path]), device=device, dtype=dtype, **options)
    return _of_videos(scorer, settings) if entry.images else scorer


def _of_videos(scorer: ImageScorer, settings: Mapping[str, Any]) -> VideoOfFrames:
    """frame_reduce=segments scores a frame of each segment: ``frames`` is then their number."""
    options = {_OF_FRAMES[setting]: value for setting, value in settings.items()}
    if options.get("reduce") == "segments" and "frames" in options:
        options["segments"] = options.pop("frames")
    return VideoOfFrames(scorer, **options)


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
        "for training": "yes" if card.for_training else "no: for ranking and evaluation",
        "parameters": size + memory,
        "licence": card.licence,
        "source": card.source,
    }
    return [f"  {fact:<15} {value}" for fact, value in facts.items()]


def _range(low: float | None, high: float | None) -> str:
    """ " 1..4"; an open side is left out."""
    if low is None and high is None:
        return " (unbounded)"
    return f" {'' if low is None else f'{low:g}'}..{'' if high is None else f'{high:g}'}"


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise ValueError(f"there is no reward {name!r}; known are {', '.join(NAMES)}")
    return _ENTRIES[name]


def _module(entry: _Entry) -> Any:
    return importlib.import_module(f"vpo_engine.rewards.{entry.module}")
