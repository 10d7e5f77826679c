"""A table like the paper's Table 2 on the sprites world: how well does each scorer find the least damaged of 8 clips?

The preference follows from the known damage, not from a score. Each clip has each kind of ``damage.KINDS`` with
probability 1/2 and then a severity uniform in 0..1. Its damage is the sum of the five severities, and the clip with the
least damage is preferred. If the two least damaged clips of a group differ by less than ``GAP``, the group is drawn
again. The groups are ranked as they are rendered and after the autoencoder, since a policy's clips are decoded by it.
The clips are written to video files and ranked by the functions of ``python -m vpo_engine.rank``, which gives the same
numbers for these folders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vpo_engine.data.clips import Clip, read_preferences
from vpo_engine.data.sprites.assets import FPS, load_vae, round_trip
from vpo_engine.data.sprites.damage import KINDS, damaged
from vpo_engine.data.sprites.world import Attributes, withheld_captions
from vpo_engine.metrics.ranking import Estimate, Ranking
from vpo_engine.metrics.ranking_report import Scores
from vpo_engine.rank import GLOBAL, rank_scores, score_clips
from vpo_engine.rewards.combine import combine
from vpo_engine.rewards.sprites import SpritesOfFiles
from vpo_engine.rewards.sprites_networks import load_network
from vpo_engine.runs.video import read_video, write_mp4
from vpo_engine.seeding import generator

GROUPS = 48
"""The number of groups: three of each withheld caption."""
CANDIDATES = 8
ACTIVE = 0.5
GAP = 0.2
SIDE = 192
"""Least side of the video files, px: NIQE needs two patches of 96."""
VARIANTS = ("rendered", "decoded")
REWARDS = ("builtin", "sprites_image", "sprites")
JUDGE = "sprites judge"
ROWS = {
    "BRISQUE (builtin, frames)": ("builtin", "visual_quality"),
    "NIQE (builtin, frames)": ("builtin", "naturalness"),
    "sprites_image (frames)": ("sprites_image", "image"),
    "builtin, temporal consistency": ("builtin", "temporal_consistency"),
    "builtin, mean of all": ("builtin", GLOBAL),
    "sprites, temporal consistency": ("sprites", "temporal_consistency"),
    "sprites, mean of all": ("sprites", GLOBAL),
    "sprites judge, mean of all": (JUDGE, GLOBAL),
}
"""The rows of the table: {label: (reward, dimension)}."""
Rankings = dict[str, dict[str, Ranking]]
"""The rankings: {variant: {label: ranking}}."""


@dataclass(frozen=True)
class Group:
    """Candidates of one caption."""

    caption: str
    videos: Tensor  # uint8 [CANDIDATES, F, H, W, 3]
    severities: Tensor  # [CANDIDATES, 5]
    preferred: int


def draw_severities(random: torch.Generator) -> Tensor:
    """Draw the severities [CANDIDATES, 5] of a group, whose least sum is at least ``GAP`` below the next."""
    while True:
        severities = torch.rand(CANDIDATES, len(KINDS), generator=random)
        severities = severities * (torch.rand(CANDIDATES, len(KINDS), generator=random) < ACTIVE)
        first, second = severities.sum(1).sort().values[:2]
        if second - first >= GAP:
            return severities


def draw_groups(count: int, seed: int) -> list[Group]:
    """Draw ``count`` groups with the withheld captions in turn. The same arguments give the same groups."""
    captions = withheld_captions()
    groups = []
    for number in range(count):
        random = generator(seed, "preferred sprites", number)
        caption = captions[number % len(captions)]
        severities = draw_severities(random)
        clips = damaged(Attributes.of([caption] * CANDIDATES), severities, random)
        groups.append(Group(caption, clips.videos, severities, int(severities.sum(1).argmin())))
    return groups


def write_groups(folder: Path, groups: Sequence[Group]) -> None:
    """Write ``folder``/NNN/K.mp4 and then ``folder``/preferences.jsonl, as ``vpo_engine.rank`` reads them."""
    lines = []
    for number, group in enumerate(groups):
        names = [f"{number:03d}/{place}.mp4" for place in range(CANDIDATES)]
        (folder / names[0]).parent.mkdir(parents=True, exist_ok=True)
        for name, video in zip(names, group.videos, strict=True):
            write_mp4(folder / name, video, FPS, min_side=SIDE)
        lines.append(json.dumps({"prompt": group.caption, "videos": names, "preferred": group.preferred}))
    (folder / "preferences.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_groups(folder: Path, count: int, seed: int) -> None:
    """Write the groups of both VARIANTS below ``folder``, unless they exist already."""
    if all((folder / variant / "preferences.jsonl").is_file() for variant in VARIANTS):
        return
    groups, vae = draw_groups(count, seed), load_vae()
    decoded = [Group(g.caption, round_trip(vae, g.videos), g.severities, g.preferred) for g in groups]
    for variant, made in zip(VARIANTS, (groups, decoded), strict=True):
        write_groups(folder / variant, made)


@torch.no_grad()
def judge_clips(clips: Sequence[Clip]) -> Scores:
    """Score clips by the judge, like ``vpo_engine.rank.score_clips``; the judge is not in the registry of rewards."""
    judge = SpritesOfFiles(load_network("judge"))
    scores: Scores = {}
    for clip in tqdm(clips, unit="video", disable=None):
        found = judge.score(read_video(clip.path)[0].unsqueeze(0), [clip.prompt])
        scores[clip.name, clip.prompt] = {GLOBAL: combine(found, "global").item()}
    return scores


def rank_groups(folder: Path) -> dict[str, Ranking]:
    """Rank the groups in a variant's folder: {label: ranking}, in the order of ROWS."""
    preferences = read_preferences(folder / "preferences.jsonl", folder)
    clips = [clip for row in preferences for clip in row.clips]
    found = {name: rank_scores(score_clips(clips, name, None), preferences) for name in REWARDS}
    found[JUDGE] = rank_scores(judge_clips(clips), preferences)
    return {label: found[name][dimension] for label, (name, dimension) in ROWS.items()}


def save(path: Path, rankings: Rankings, settings: Mapping[str, object]) -> None:
    """Write the rankings and their settings as JSON."""
    table = {
        variant: {
            label: {
                "prompts": each.prompts,
                "chance": each.chance,
                "measures": {key: [m.value, m.low, m.high] for key, m in each.measures.items()},
            }
            for label, each in rows.items()
        }
        for variant, rows in rankings.items()
    }
    path.write_text(json.dumps({"settings": settings, "rankings": table}, indent=1), encoding="utf-8")


def load(path: Path) -> tuple[Rankings, dict[str, object]]:
    """Read the rankings and settings that ``save`` wrote."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    rankings = {
        variant: {
            label: Ranking(
                each["prompts"],
                {key: Estimate(*values) for key, values in each["measures"].items()},
                each["chance"],
            )
            for label, each in rows.items()
        }
        for variant, rows in stored["rankings"].items()
    }
    return rankings, stored["settings"]


def make_rankings(out: Path, count: int, seed: int, origin: str) -> tuple[Rankings, dict[str, object]]:
    """Make the rankings of table 2, or read them from ``out`` if they were made with these numbers before.

    ``origin`` names the machine and the commit.
    """
    path = out / f"ranking_{count}_{seed}.json"
    if not path.is_file():
        folder = path.with_suffix("")
        make_groups(folder, count, seed)
        rankings = {variant: rank_groups(folder / variant) for variant in VARIANTS}
        save(path, rankings, {"groups": count, "seed": seed, "origin": origin})
    return load(path)
