"""The report's sections with clips: held-out clips before and after training, and training pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from torch import Tensor

from vpo_engine.metrics.measures import describe
from vpo_engine.runs.charts import dumbbell
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.frame_sheets import make_frame_sheet
from vpo_engine.runs.gallery import HeldOutGallery, PairGallery, pair_gaps, read_held_out, read_pairs
from vpo_engine.runs.readable import readable
from vpo_engine.runs.report_html import missing

_MOTION = "motion"
"""The extra score beside a reward's dimensions where guards.motion_floor is set, as ``rewards.combine`` names it."""
_MAX_HELD_OUT = 16
_MAX_PAIRS = 4
"""Number of pairs with the widest gaps, and of those with the narrowest."""
_WIDE = 128
"""Clips of at least this many pixels in width get a larger card."""
_REMEDY = "remove it for a report without its clips"
_HELD_OUT_BYTES = 4_500_000
_PAIR_BYTES = 1_500_000
"""Bytes of all images of a section. base64 makes them a third larger; the page stays below 10 MB."""


_SPOKEN = {
    "base": "Clip before training",
    "trained": "Clip after training",
    "loser": "Clip that lost its pair",
    "winner": "Clip that won its pair",
}


@dataclass(frozen=True)
class _Card:
    prompt: str
    meta: str
    clips: tuple[Tensor, Tensor]
    scores: tuple[dict[str, float], dict[str, float]]


def held_out_section(run: RunDirectory, weights: Mapping[str, float]) -> str:
    """Show held-out clips of the base and of the trained policy. weights: of the dimensions trained on."""
    if not run.held_out_gallery.is_file():
        return missing("Before and after", "No held-out gallery was saved yet; a run writes it when it ends.")
    with readable(run.held_out_gallery, _REMEDY):
        gallery = read_held_out(run.held_out_gallery)
    cards = _held_out_cards(gallery)
    rises = sum(_selected(c.scores[1], weights) > _selected(c.scores[0], weights) for c in cards)
    total = len(gallery.prompts)
    shown = f"All {total} clips" if total == len(cards) else f"The first {len(cards)} of {total} clips"
    lead = (
        f"{shown} of the held-out gallery. On the left is the policy before training, on the right after it, with the "
        f"same prompt and the same noise. The score is higher after training in {rises} of {len(cards)} clips; one "
        f"clip alone does not tell a change from chance. Sampled with {gallery.settings.rstrip('.')}."
    )
    body = "".join(_card_html(card, ("base", "trained"), weights, _HELD_OUT_BYTES, cards) for card in cards)
    return _section("Before and after", lead, body, gallery.before[0], gallery.fps)


def pairs_section(run: RunDirectory, weights: Mapping[str, float]) -> str:
    """Show the saved training pairs with the widest and with the narrowest score gap."""
    found = []
    for path in sorted(run.pairs_gallery.glob("step_*.safetensors")):
        with readable(path, _REMEDY):
            found += [(gap, path, index) for index, gap in enumerate(pair_gaps(path))]
    if not found:
        return missing("Training pairs", "No training pairs were saved yet.")
    found.sort(key=lambda item: -item[0])
    widest = found[:_MAX_PAIRS]
    narrowest = found[max(_MAX_PAIRS, len(found) - _MAX_PAIRS) :]
    cards = _pair_cards(widest, "wide gap") + _pair_cards(narrowest, "narrow gap")
    first = read_pairs(widest[0][1])
    then = f", followed by the {len(narrowest)} with the smallest" if narrowest else ""
    lead = (
        f"The run saved {len(found)} training pairs. These are the {len(widest)} with the largest difference between "
        f"the winner's and the loser's score{then}."
    )
    body = "".join(_card_html(card, ("loser", "winner"), weights, _PAIR_BYTES, cards) for card in cards)
    return _section("Training pairs", lead, body, first.winner[0], first.fps)


def _held_out_cards(gallery: HeldOutGallery) -> list[_Card]:
    return [
        _Card(
            gallery.prompts[i],
            "",
            (gallery.before[i], gallery.after[i]),
            (gallery.before_scores[i], gallery.after_scores[i]),
        )
        for i in range(min(_MAX_HELD_OUT, len(gallery.prompts)))
    ]


def _pair_cards(found: Sequence[tuple[float, Path, int]], what: str) -> list[_Card]:
    cards = []
    opened: dict[Path, PairGallery] = {}
    for gap, path, index in found:
        with readable(path, _REMEDY):
            pairs = opened[path] if path in opened else opened.setdefault(path, read_pairs(path))
        step = int(path.stem.removeprefix("step_"))
        cards.append(
            _Card(
                pairs.prompts[index],
                f"step {step}, {what} {gap:.3f}",
                (pairs.loser[index], pairs.winner[index]),
                (pairs.loser_scores[index], pairs.winner_scores[index]),
            )
        )
    return cards


def _section(title: str, lead: str, cards: str, clip: Tensor, fps: int) -> str:
    """Return a section with a player. clip: any of the clips shown, [F, H, W, 3]; all have the same shape."""
    frames, width = clip.shape[0], clip.shape[2]
    size = " wide" if width >= _WIDE else ""
    return (
        f'<section data-fps="{fps}" data-frames="{frames}"><h2>{escape(title)}</h2>'
        f'<p class="soft">{escape(lead)}</p>'
        '<div class="transport"><button type="button">Play</button>'
        f'<input type="range" min="0" max="{frames - 1}" value="0" aria-label="frame">'
        "<output></output>"
        '<label><input type="checkbox"> quarter speed</label></div>'
        "<noscript><p>Playing the clips needs JavaScript.</p></noscript>"
        f'<div class="cards{size}">{cards}</div></section>'
    )


def _card_html(
    card: _Card, labels: tuple[str, str], weights: Mapping[str, float], budget: int, cards: Sequence[_Card]
) -> str:
    clips = "".join(
        _clip_html(video, label, card.prompt, _selected(scores, weights), budget // (2 * len(cards)))
        for video, label, scores in zip(card.clips, labels, card.scores, strict=True)
    )
    meta = f'<p class="meta">{escape(card.meta)}</p>' if card.meta else ""
    values = [value for other in cards for scores in other.scores for value in scores.values()]
    prompt, (left, right) = escape(card.prompt), card.scores
    rows = "".join(
        f"<dt>{escape(describe(f'reward/{name}').label)}</dt>"
        f"<dd>{left[name]:.2f} → {right[name]:.2f}</dd>"
        f'<dd class="plot">{dumbbell(left[name], right[name], min(values), max(values))}</dd>'
        for name in left
        if name in right
    )
    return (
        f'<article class="card"><p class="prompt" title="{prompt}">{prompt}</p>{meta}'
        f'<div class="two">{clips}</div><dl class="scores">{rows}</dl></article>'
    )


def _clip_html(video: Tensor, label: str, prompt: str, score: float, budget: int) -> str:
    spoken = f"{_SPOKEN[label]}: {prompt}; score {score:.2f}"
    sheet = make_frame_sheet(video, budget)
    kind = ' class="exact"' if sheet.exact else ""
    return (
        f'<figure class="clip"><canvas{kind} width="{sheet.width}" height="{sheet.height}" '
        f'data-columns="{sheet.columns}" role="img" aria-label="{escape(spoken)}"></canvas>'
        f'<img alt="" src="{sheet.url}"><figcaption>{label} <b>{score:.2f}</b></figcaption></figure>'
    )


def _selected(scores: dict[str, float], weights: Mapping[str, float]) -> float:
    """Return a clip's score, the weighted mean of what was trained on; without weights the mean of all but motion."""
    chosen = {name: weight for name, weight in weights.items() if name in scores and weight > 0}
    chosen = chosen or dict.fromkeys(scores.keys() - {_MOTION} or scores, 1.0)
    total = math.fsum(weight * scores[name] for name, weight in chosen.items())
    return total / math.fsum(chosen.values()) if chosen else math.nan
