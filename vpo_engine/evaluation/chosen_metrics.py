"""The metrics of an evaluation: those that are asked for, or the ones that need no weights; and their measures.

A metric has one or several outputs. Each output is a measure, with a name, a direction and a heading.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vpo_engine.metrics.measures import SCORES, SPRITES, VIDEOS, Measure
from vpo_engine.metrics.metric_card import Group, MetricCard
from vpo_engine.metrics.registry import METRICS, REWARD, build_metric, check_metric, metric_card

if TYPE_CHECKING:
    import torch

    from vpo_engine.metrics.video_metric import VideoMetric

JUDGE, PIXELS, SPRITES_PIXELS = "judge:sprites", "pixels", "pixels:sprites"
OF_THE_ENGINE = {
    JUDGE: MetricCard(
        name=JUDGE,
        group="reward",
        title="sprites judge",
        measures="The score of the sprites world's judge, which no policy is trained against.",
        reads_prompt=True,
    ),
    PIXELS: MetricCard(
        name=PIXELS,
        group="pixels",
        title="pixel measures",
        measures="Motion, flicker and sharpness of the pixels; no benchmark.",
        better=0,
        least_frames=3,
        least_side=3,
    ),
    SPRITES_PIXELS: MetricCard(
        name=SPRITES_PIXELS,
        group="pixels",
        title="sprites measures",
        measures="Damage and motion of sprites clips, measured without a network.",
        better=0,
        least_frames=3,
        reads_prompt=True,
    ),
}
"""The metrics that stand in ``engine_metrics.py``."""
HEADINGS: Mapping[Group, str] = {
    "vbench": "VBench",
    "fvd": "Distance to other videos",
    "devil": "Dynamics (DEVIL)",
    "reward": "Rewards and judges",
    "pixels": "Pixels",
    "proxy": "Stand-ins, which are not VBench",
}
"""The kinds of metrics in the order in which tables show them."""


@dataclass(frozen=True)
class Choice:
    """The metrics of an evaluation.

    weights: {metric: path}. reference: the videos, or statistics, that distances are to. sprites: whether the videos
    are clips of the sprites world.
    """

    cards: Mapping[str, MetricCard]
    weights: Mapping[str, Path]
    reference: Path | None = None
    sprites: bool = False

    def build(self, name: str, device: torch.device) -> VideoMetric:
        """Make a metric; errors are those of ``registry.build_metric``."""
        from vpo_engine.evaluation.engine_metrics import adapted, build_engine_metric

        if name in OF_THE_ENGINE:
            return adapted(build_engine_metric(self.cards[name]), self.sprites)
        reference = self.reference if self.cards[name].group == "fvd" else None
        metric = build_metric(name, weights=self.weights.get(name), device=device, reference=reference)
        return adapted(metric, self.sprites)

    def passes(self) -> list[list[str]]:
        """Return the metrics in groups that are in memory together: all without weights, then one after the other."""
        light = [name for name, card in self.cards.items() if not card.needs]
        return [*([light] if light else []), *([name] for name in self.cards if name not in light)]


def choose(names: Sequence[str], weights: Sequence[str], reference: Path | None, sprites: bool) -> Choice:
    """Find the metrics by their names; without one, they are those of ``default_metrics``.

    weights: NAME=PATH, or a PATH that all metrics without one of their own take. Raise ValueError for an unknown name,
    and, with all that is wrong, for weights and references that are missing or not wanted; FileNotFoundError likewise.
    """
    cards = {name: _card(name) for name in dict.fromkeys(names or default_metrics(sprites))}
    given = _weights(weights, cards)
    everywhere = given.pop("", None)
    paths = {name: given.get(name, everywhere) for name, card in cards.items() if name in given or card.needs}
    choice = Choice(
        cards, {name: path for name, path in paths.items() if path is not None}, reference, sprites
    )
    wrong = []
    for name, card in cards.items():
        if name not in OF_THE_ENGINE:
            path = paths.get(name)
            try:
                if path is not None and not path.exists():
                    raise ValueError(f"there is nothing at {path}, which should hold the weights of {name}")
                check_metric(name, path, reference if card.group == "fvd" else None)
            except (ValueError, OSError) as error:
                wrong.append(f"{error} (--weights {name}=PATH)" if card.needs else str(error))
    if wrong:
        raise ValueError("; ".join(wrong))
    if everywhere is not None and not any(card.needs for card in cards.values()):
        raise ValueError(
            f"--weights {everywhere}: none of the metrics {', '.join(cards)} needs weights; leave it out, or name the "
            "metric that does by --metrics"
        )
    if reference is not None and not any(card.group == "fvd" for card in cards.values()):
        raise ValueError(
            f"--reference {reference}: none of the metrics is a distance to other videos; leave it out"
        )
    return choice


def default_metrics(sprites: bool) -> list[str]:
    """Return the metrics that need no weights: for clips of the sprites world its own, for other videos all."""
    light = [name for name, entry in METRICS.items() if not entry.card.needs and entry.card.group != "fvd"]
    if sprites:
        return [
            f"{REWARD}sprites",
            JUDGE,
            SPRITES_PIXELS,
            *(n for n in light if METRICS[n].card.group == "proxy"),
        ]
    return [PIXELS, *light]


def measure_of(card: MetricCard, output: str) -> Measure:
    """Return the name, unit and direction by which an output of a metric is shown."""
    if not output:
        return Measure(card.title, card.unit, card.measures, card.better)
    if card.name == SPRITES_PIXELS:
        return SPRITES[output]
    if card.name == PIXELS:
        return VIDEOS[output]
    if output == "mean":
        return Measure(f"Mean, {card.title}", card.unit, "The mean of the dimensions.", card.better)
    known = SCORES.get(output)
    label = known.label if known else output.replace("_", " ").capitalize()
    return Measure(
        f"{label}, {card.title}", card.unit, known.meaning if known else card.measures, card.better
    )


def metric_key(metric: VideoMetric) -> str:
    """Return a digest of everything that a metric's records depend on beside the video and its prompt."""
    content = [
        metric.card.name,
        metric.card.version,
        metric.backbone,
        dict(metric.weights),
        dict(metric.settings),
        list(metric.outputs),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _card(name: str) -> MetricCard:
    if name in OF_THE_ENGINE:
        return OF_THE_ENGINE[name]
    near = difflib.get_close_matches(name, OF_THE_ENGINE, n=1, cutoff=0.8)
    if near:
        raise ValueError(f"there is no metric {name!r}; did you mean {near[0]!r}?")
    return metric_card(name)


def _weights(words: Sequence[str], cards: Mapping[str, MetricCard]) -> dict[str, Path]:
    """Return {metric: path}; the path that is for all has the key ""."""
    found: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.rpartition("=")
        if equals and name not in cards:
            raise ValueError(
                f"--weights {word}: {name!r} is none of the metrics of this evaluation, which are {', '.join(cards)}"
            )
        found[name if equals else ""] = Path(path)
    return found
