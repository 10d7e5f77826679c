"""Score video files with a reward model, and see how well it agrees with what people prefer.

    python -m vpo_engine.rank VIDEOS --reward NAME [--reward-path DIR] [--preferences FILE] [--out DIR]
                              [--time-limit SECONDS]
    python -m vpo_engine.rank --list

VIDEOS is a folder of mp4 files. Prompts stand beside them in prompts.csv (columns video,prompt), prompts.jsonl
({"video": .., "prompt": ..} a line) or prompts.txt (one a line, in the order of the sorted file names), or else in
the file names: 0003-a-red-circle-moving-left-1.mp4. The scores are printed, and written to DIR/scores.csv. NAME is a
reward that --list prints, or package.module:Class for one of your own (see docs/rewards.md).

--preferences is a file with a line {"prompt": "..", "videos": ["a.mp4", "b.mp4", ..], "preferred": 1} for each prompt,
the preferred one by its position from 0. Then MRR and recall@k of each dimension, and of the mean of all, are printed,
and written to DIR/ranking.csv and DIR/ranking.png. Ties count half.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vpo_engine.data.clips import Clip, Preference, find_clips, read_preferences
from vpo_engine.errors import RewardProcessError
from vpo_engine.metrics.ranking import Ranking, rank_preferences
from vpo_engine.metrics.ranking_report import (
    Scores,
    draw_ranking,
    format_ranking,
    format_scores,
    write_ranking_csv,
    write_scores_csv,
)
from vpo_engine.protocols import Reward
from vpo_engine.rewards.combine import combine
from vpo_engine.rewards.process import start_reward
from vpo_engine.rewards.registry import NAMES, RewardSpec, format_cards, knows_frame_rate, reward_card
from vpo_engine.runs.video import read_video

GLOBAL = "mean of all"
"""Beside the dimensions, if there are several."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vpo_engine.rank",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("videos", nargs="?", type=Path, metavar="VIDEOS")
    parser.add_argument(
        "--reward", metavar="NAME", help=f"one of {', '.join(NAMES)}; or package.module:Class"
    )
    parser.add_argument(
        "--reward-path", type=Path, metavar="DIR", help="folder with the reward model's weights"
    )
    parser.add_argument("--preferences", type=Path, metavar="FILE", help="which videos people prefer, .jsonl")
    parser.add_argument(
        "--out", type=Path, default=Path("ranking"), metavar="DIR", help="folder for the files (%(default)s)"
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="score in a child process, and stop if one video takes longer",
    )
    parser.add_argument("--list", action="store_true", help="print every reward model's card, and stop")
    given = parser.parse_args(arguments)
    if given.list:
        print(format_cards())
        return 0
    if given.videos is None or given.reward is None:
        parser.error("give VIDEOS and --reward NAME, or --list")
    try:
        rank(given.videos, given.reward, given.reward_path, given.preferences, given.out, given.time_limit)
    except (ValueError, FileNotFoundError, RewardProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def rank(
    folder: Path,
    name: str,
    weights: Path | None,
    preferences: Path | None,
    out: Path,
    time_limit: float | None = None,
) -> None:
    """Score the videos, print the result and write it to ``out``."""
    reward_card(name)
    preferred = None if preferences is None else read_preferences(preferences, folder)
    clips = find_clips(folder) if preferred is None else [clip for row in preferred for clip in row.clips]
    scores = score_clips(clips, name, weights, time_limit)
    out.mkdir(parents=True, exist_ok=True)
    write_scores_csv(out / "scores.csv", scores)
    if preferred is None:
        print(format_scores(scores))
        return
    rankings = rank_scores(scores, preferred)
    print(format_ranking(rankings))
    write_ranking_csv(out / "ranking.csv", rankings)
    draw_ranking(
        out / "ranking.png", rankings, f"{name} against people's preferences, {len(preferred)} prompts"
    )


@torch.no_grad()
def score_clips(
    clips: Sequence[Clip], name: str, weights: Path | None, time_limit: float | None = None
) -> Scores:
    """Score every clip once, one at a time. ValueError, naming the file, for one that cannot be.

    With ``time_limit``, in seconds for each video, the reward is in a child process. RewardProcessError, naming the
    file, if a video takes longer.
    """
    if reward_card(name).reads_prompt:
        for clip in clips:
            if not clip.prompt.strip():
                raise ValueError(
                    f"video {clip.name} has no prompt, by which {name} judges; name it in prompts.csv"
                )
    timed = knows_frame_rate(name)
    rate = read_video(clips[0].path)[1] if timed else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    spec = RewardSpec(name, weights, device=device, dtype=dtype, fps=rate)
    scores: Scores = {}
    with ExitStack() as at_end:
        reward = (
            spec.build()
            if time_limit is None
            else at_end.enter_context(start_reward(spec, time_limit=time_limit))
        )
        for clip in tqdm(clips, unit="video", disable=None):
            if (clip.name, clip.prompt) in scores:
                continue
            video, fps = read_video(clip.path)
            if rate is not None and fps != rate:
                raise ValueError(
                    f"{clips[0].name} has {rate:g} frames per second and {clip.name} {fps:g}, but {name} samples by "
                    "seconds; rank videos of one frame rate at a time"
                )
            found = _score(reward, clip, video)
            scores[clip.name, clip.prompt] = {dimension: values.item() for dimension, values in found.items()}
    return scores


def _score(reward: Reward, clip: Clip, video: Tensor) -> dict[str, Tensor]:
    """Score one video; the mean of all dimensions is added if there are several."""
    try:
        found = reward.score(video.unsqueeze(0), [clip.prompt])
    except ValueError as error:
        raise ValueError(f"video {clip.name}: {error}") from error
    except RewardProcessError as error:
        raise RewardProcessError(f"video {clip.name}: {error}") from error
    return {**found, GLOBAL: combine(found, "global")} if len(found) > 1 else found


def rank_scores(scores: Scores, preferences: Sequence[Preference]) -> dict[str, Ranking]:
    """Return, for every dimension, how well it ranks the candidates."""
    best = [row.preferred for row in preferences]
    return {
        dimension: rank_preferences(
            [[scores[clip.name, clip.prompt][dimension] for clip in row.clips] for row in preferences], best
        )
        for dimension in next(iter(scores.values()))
    }


if __name__ == "__main__":
    sys.exit(main())
