"""The metrics of videos by name. A metric's module is imported when it is built; their cards load no torch."""

from __future__ import annotations

import difflib
import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vpo_engine.metrics.catalogue import ENTRIES, Entry
from vpo_engine.metrics.metric_card import MetricCard
from vpo_engine.metrics.weight_paths import check_weights_found

if TYPE_CHECKING:
    import torch

    from vpo_engine.metrics.video_metric import VideoMetric

REWARD = "reward:"
"""What comes before the kind of a reward in the name of its metric."""


METRICS = {entry.card.name: entry for entry in ENTRIES}


def metric_names() -> tuple[str, ...]:
    """Return the names of all metrics, those of the engine's rewards among them."""
    from vpo_engine.rewards.kinds import NAMES

    return (*METRICS, *(REWARD + kind for kind in NAMES))


def metric_card(name: str) -> MetricCard:
    """Return a metric's card. Raise ValueError, with the nearest name, for a metric that is not known."""
    if name.startswith(REWARD):
        from vpo_engine.metrics.rewards import card_of_reward

        return card_of_reward(name, name.removeprefix(REWARD))
    return _entry(name).card


def build_metric(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    reference: str | Path | None = None,
) -> VideoMetric:
    """Make a metric of its name.

    weights: a local folder with the files that the card names, in VBench's own cache layout or beside each other, or
    one such file; a reward's folder. reference: for a distance of two sets, the folder of videos or the .npz file of
    the other set. Nothing is downloaded. Raise ValueError for an unknown name, a path that is missing or not wanted,
    files of another network and, with the command that installs it, for a package that is missing; FileNotFoundError
    for what is missing in the folder.
    """
    import torch

    weights = None if weights is None else Path(weights).expanduser()
    device = torch.device(device)
    check_metric(name, weights, reference)
    if name.startswith(REWARD):
        from vpo_engine.metrics.rewards import RewardMetric

        return RewardMetric.of_kind(metric_card(name), name.removeprefix(REWARD), weights, device)
    entry = _entry(name)
    maker = getattr(importlib.import_module(f"vpo_engine.metrics.{entry.module}"), entry.maker)
    options = {"reference": Path(reference).expanduser()} if reference is not None else {}
    metric: VideoMetric = maker.make(entry.card, weights, device, **options)
    return metric


def check_metric(name: str, weights: str | Path | None, reference: str | Path | None = None) -> None:
    """Raise what can be known before a weight is read: an unknown name, a path, file or package that is missing, a path
    that is not wanted."""
    from vpo_engine.rewards.kinds import is_own

    card = metric_card(name)
    kind = name.removeprefix(REWARD)
    # A reward of the user's own may do without its path.
    if card.needs and weights is None and not (card.group == "reward" and is_own(kind)):
        raise ValueError(
            f"{name} needs a local path to {' and '.join(card.needs)}, published at {card.source}; give the folder "
            "that holds it, or leave this metric out"
        )
    if card.group != "fvd" and reference is not None:
        raise ValueError(f"{name} compares with no reference; leave out {reference}")
    if card.group == "reward":
        from vpo_engine.rewards.registry import check_reward

        check_reward(kind, weights)
        return
    if not card.needs and weights is not None:
        raise ValueError(f"{name} has no weights; leave out the path {weights}")
    if card.group == "fvd" and reference is None:
        raise ValueError(
            f"{name} is a distance to other videos; give them as a reference, a folder of videos or an .npz file"
        )
    if weights is not None:
        check_weights_found(Path(weights).expanduser(), card.needs)
    if card.package and find_spec(card.package) is None:
        raise ValueError(
            f"{name} needs the package {card.package}, which is not installed: {card.install} (its licence is "
            f"{card.licence}); or leave this metric out"
        )


def _entry(name: str) -> Entry:
    if name not in METRICS:
        near = difflib.get_close_matches(name, metric_names(), n=1)
        raise ValueError(
            f"there is no metric {name!r}; "
            + (f"did you mean {near[0]!r}? Known" if near else "known")
            + f" are {', '.join(METRICS)}, and {REWARD}KIND for every reward"
        )
    return METRICS[name]
