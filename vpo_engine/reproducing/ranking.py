"""Rank groups of clips with a known preference by every scorer, as the paper's Table 2 does with people's preferences.

    python -m vpo_engine.reproducing.ranking FOLDER

The preference follows from the known damage, not from a score. Each clip has each kind of ``damage.KINDS`` with
probability 1/2 and then a severity uniform in 0..1. Its damage is the sum of the five severities, and the clip with the
least damage is preferred. If the two least damaged clips of a group differ by less than ``GAP``, the group is drawn
again. The groups are ranked as they are rendered and after the autoencoder, since a policy's clips are decoded by it.
The clips are written to video files and scored by the functions of ``python -m vpo_engine.rank``, which gives the same
numbers for these folders.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vpo_engine.data.clips import Clip, read_preferences
from vpo_engine.data.sprites.assets import FPS, load_vae, round_trip
from vpo_engine.data.sprites.damage import KINDS, damaged
from vpo_engine.data.sprites.world import Attributes, withheld_captions
from vpo_engine.metrics.ranking_report import Scores
from vpo_engine.rank import GLOBAL, score_clips
from vpo_engine.reproducing.cells import RESULT, Record
from vpo_engine.rewards.combine import combine
from vpo_engine.rewards.sprites import SpritesOfFiles
from vpo_engine.rewards.sprites_networks import load_network
from vpo_engine.runs.video import read_video, write_mp4
from vpo_engine.seeding import generator

JUDGE = "sprites judge"
VARIANTS = {
    "rendered": "as rendered",
    "decoded": "after the autoencoder, which all clips of a policy come out of",
}
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
"""The scorers that are compared: {label: (reward, dimension)}."""
CANDIDATES = 8
ACTIVE = 0.5
GAP = 0.2
SIDE = 192
"""Least side of the video files, px: NIQE needs two patches of 96."""


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
    """Write the groups of all VARIANTS below ``folder``, unless they exist already."""
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
    for clip in clips:
        found = judge.score(read_video(clip.path)[0].unsqueeze(0), [clip.prompt])
        scores[clip.name, clip.prompt] = {GLOBAL: combine(found, "global").item()}
    return scores


def score_groups(folder: Path) -> dict[str, object]:
    """Score the groups in a variant's folder: {"preferred": [P], "scores": {label of ROWS: [P, CANDIDATES]}}."""
    preferences = read_preferences(folder / "preferences.jsonl", folder)
    clips = [clip for row in preferences for clip in row.clips]
    found = {name: score_clips(clips, name, None) for name in {name for name, _ in ROWS.values()} - {JUDGE}}
    found[JUDGE] = judge_clips(clips)
    return {
        "preferred": [row.preferred for row in preferences],
        "scores": {
            label: [[found[name][clip.name, clip.prompt][key] for clip in row.clips] for row in preferences]
            for label, (name, key) in ROWS.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    (folder,) = map(Path, sys.argv[1:] if arguments is None else arguments)
    record = Record.read(folder)
    assert record is not None, folder
    count = int(dict(word.split("=") for word in record.settings)["groups"])
    make_groups(folder / "groups", count, record.seed)
    found = {variant: score_groups(folder / "groups" / variant) for variant in VARIANTS}
    unfinished = folder / f".{RESULT}"
    unfinished.write_text(json.dumps(found), encoding="utf-8")
    unfinished.replace(folder / RESULT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
