"""The registry of rewards: every kind's card, and how it is made. A module is imported when its reward is asked for.

A kind is a name of NAMES, a name that an installed package offers, or package.module:Class; see ``own.py`` for the
last two.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vpo_engine.rewards.card import RewardCard
from vpo_engine.rewards.frames import ImageScorer, VideoOfFrames
from vpo_engine.rewards.kinds import OF_FRAMES, Entry, find_entry, is_own
from vpo_engine.rewards.own import build_own, check_own, own_card, own_parameters
from vpo_engine.rewards.videos import FileReward

_OF_SCORERS = {"batch_size": "batch_size", "frames": "frames", "max_frames": "max_frames", "bits": "bits"}
"""Settings of the other scorers, with the names that their ``from_pretrained`` has for them."""


def reward_card(name: str) -> RewardCard:
    """Return what the reward declares about itself, under its kind. Raise ValueError for an unknown kind."""
    if is_own(name):
        return own_card(name)
    entry = find_entry(name)
    card: RewardCard = getattr(_module(entry), entry.card)
    return replace(card, name=name)


def knows_frame_rate(name: str) -> bool:
    """Return whether the scores depend on the frames per second, which ``build_reward`` then needs."""
    if is_own(name):
        return "fps" in own_parameters(name)
    return find_entry(name).timed


def made_for_one_rate(name: str) -> bool:
    """Return whether the reward is made for one frame rate; others take that of each file, or do not look at it."""
    return is_own(name) and knows_frame_rate(name)


def scores_single_frames(name: str) -> bool:
    """Return whether the reward scores frames one by one, so that any of them are a video to it."""
    return not is_own(name) and find_entry(name).images


def check_reward(name: str, path: str | Path | None, settings: Mapping[str, Any] | None = None) -> None:
    """Raise what ``build_reward`` would raise before it reads a weight."""
    if is_own(name):
        _check_folder(name, path, "its weights")
        check_own(name, path, settings or {})
        return
    entry = find_entry(name)
    if entry.shipped and path is not None:
        raise ValueError(f"reward {name!r} has its weights in the package; leave out the path {path}")
    if not entry.shipped and path is None:
        source = reward_card(name).source
        raise ValueError(
            f"reward {name!r} needs a path: a local folder with the weights published at {source}; "
            "give it with reward.path (--reward-path of rank)"
        )
    _check_folder(name, path, f"the weights published at {reward_card(name).source}")
    unknown = [setting for setting in settings or {} if setting not in entry.settings]
    if unknown:
        raise ValueError(
            f"reward {name!r} has no setting {', '.join(unknown)}: it takes {', '.join(entry.settings) or 'none'}; "
            "leave out what it does not take"
        )


def _check_folder(name: str, path: str | Path | None, content: str) -> None:
    if path is not None and not Path(path).is_dir():
        raise FileNotFoundError(f"no folder at {path}; reward {name!r} reads {content}")


def build_reward(
    name: str,
    path: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fps: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> FileReward:
    """Make the reward of this kind, its weights read from the folder ``path``.

    Those whose weights are in the package take no path. ``fps`` is the frame rate of the videos in tensors that it will
    score, and is needed where ``knows_frame_rate``; video files have their own. ``settings``: batch_size (videos
    through the network at once; of an image scorer: images), frames, max_frames, bits, frame_reduce and frame_decay,
    for those that have them; for what is left out the scorer has its own value. Raise ValueError for an unknown kind, a
    missing or unwanted path, a missing fps, a setting that the reward does not have, and whatever the reward refuses;
    FileNotFoundError for what is missing in the folder.
    """
    check_reward(name, path, settings)
    settings = settings or {}
    if is_own(name):
        folder = None if path is None else Path(path)
        given = {"path": folder, "device": torch.device(device), "dtype": dtype, "fps": fps}
        return build_own(name, {**given, **settings})
    entry = find_entry(name)
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
    """Make a reward of an image scorer; with frame_reduce=segments ``frames`` is the number of segments."""
    options = {OF_FRAMES[setting]: value for setting, value in settings.items()}
    if options.get("reduce") == "segments" and "frames" in options:
        options["segments"] = options.pop("frames")
    return VideoOfFrames(scorer, **options)


@dataclass(frozen=True)
class RewardSpec:
    """Everything that ``build_reward`` is called with, which JSON can carry to another process."""

    kind: str
    path: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    fps: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> FileReward:
        """Make the reward; errors are those of ``build_reward``."""
        return build_reward(
            self.kind,
            self.path,
            device=self.device,
            dtype=self.dtype,
            fps=self.fps,
            settings=self.settings,
        )

    def to_fields(self) -> dict[str, Any]:
        """Return the specification as plain values for JSON."""
        return {
            "kind": self.kind,
            "path": None if self.path is None else str(self.path),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "fps": self.fps,
            "settings": dict(self.settings),
        }

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> RewardSpec:
        """Make the specification of which ``to_fields`` gave the plain values."""
        path, device, dtype = fields["path"], fields["device"], fields["dtype"]
        return RewardSpec(
            fields["kind"],
            None if path is None else Path(path),
            torch.device(device),
            getattr(torch, dtype),
            fields["fps"],
            fields["settings"],
        )


def format_card(name: str) -> str:
    """Format a reward's card for people to read; where its module cannot be imported, say why."""
    try:
        return "\n".join([name, *_lines(reward_card(name))])
    except ImportError as error:
        return f"{name}\n  cannot be imported: {error}"


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
    """Format a range as " 1..4"; an open side is left out."""
    if low is None and high is None:
        return " (unbounded)"
    return f" {'' if low is None else f'{low:g}'}..{'' if high is None else f'{high:g}'}"


def _module(entry: Entry) -> Any:
    return importlib.import_module(f"vpo_engine.rewards.{entry.module}")
