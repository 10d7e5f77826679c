"""Score video files with a reward model, and see how well it agrees with what people prefer.

    python -m vpo_engine.rank VIDEOS --reward NAME [--preferences FILE]
    python -m vpo_engine.rank --list [NAME]

VIDEOS is a folder of video files. Prompts stand beside them in prompts.jsonl ({"video": .., "prompt": ..} a line, as
vpo_engine.sample writes it), prompts.csv (columns video,prompt) or prompts.txt (one a line, in the order of the sorted
file names), or else in the file names: 0003-a-red-circle-moving-left-1.mp4. Videos are scored as players show them, and
each at its own frame rate; a damaged file is refused. The scores are printed, and written to DIR/scores.csv. NAME is a
reward that --list prints, or package.module:Class for one of your own (see docs/rewards.md).

--preferences is a file with a line {"prompt": "..", "videos": ["a.mp4", "b.mp4", ..], "preferred": 1} for each prompt,
the preferred one by its position from 0. Then MRR and recall@k of each dimension, and of the mean of all, are printed,
and written to DIR/ranking.csv and DIR/ranking.png. Ties count half.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vpo_engine.command import Parser, report_errors
from vpo_engine.data.clips import Clip, Preference, find_clips, read_preferences
from vpo_engine.errors import RewardProcessError
from vpo_engine.help_text import HelpFormatter
from vpo_engine.rewards.kinds import NAMES, find_entry, format_table, is_own
from vpo_engine.texts import refuse_undecodable, say

if TYPE_CHECKING:  # torch is imported when everything that the arguments alone tell has been said
    from torch import Tensor

    from vpo_engine.metrics.ranking import Ranking
    from vpo_engine.metrics.ranking_report import Scores
    from vpo_engine.rewards.videos import FileReward
    from vpo_engine.runs.video_file import VideoFile

GLOBAL = "mean of all"
"""Beside the dimensions, if there are several."""
_TABLE = ""
"""The value of --list without a name."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = parser.parse_args(words)
    if given.list is None and (given.videos is None or given.reward is None):
        parser.error("give VIDEOS and --reward NAME, or --list")

    def run() -> None:
        refuse_undecodable(words)
        if given.list is not None:
            print_rewards(given.list)
        else:
            rank(
                given.videos,
                given.reward,
                given.reward_path,
                given.preferences,
                given.out,
                given.time_limit,
            )

    return report_errors(run, "stopped; no scores were written")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m vpo_engine.rank",
        description=__doc__,
        formatter_class=HelpFormatter,
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
    parser.add_argument(
        "--list",
        nargs="?",
        const=_TABLE,
        metavar="NAME",
        help="print a line for every reward, or the whole card of one, and stop",
    )
    return parser


def print_rewards(name: str) -> None:
    """Print the table of rewards, or the card of one."""
    if name == _TABLE:
        print(format_table())
        return
    _check_name(name)
    from vpo_engine.rewards.registry import format_card

    print(format_card(name))


def rank(
    folder: Path,
    name: str,
    weights: Path | None,
    preferences: Path | None,
    out: Path,
    time_limit: float | None = None,
) -> None:
    """Score the videos, print the result and write it to ``out``."""
    _check_name(name)
    if time_limit is not None and not 0 < time_limit < float("inf"):
        raise ValueError(f"--time-limit {time_limit:g} is no time; give seconds above 0, or leave it out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder, or a name that is not taken")
    preferred = None if preferences is None else read_preferences(preferences, folder)
    clips = find_clips(folder) if preferred is None else [clip for row in preferred for clip in row.clips]
    scores = score_clips(clips, name, weights, time_limit)
    from vpo_engine.metrics import ranking_report as report

    out.mkdir(parents=True, exist_ok=True)
    report.write_scores_csv(out / "scores.csv", scores)
    if preferred is None:
        say(report.format_scores(scores))
        return
    rankings = rank_scores(scores, preferred)
    say(report.format_ranking(rankings))
    report.write_ranking_csv(out / "ranking.csv", rankings)
    title = f"{name} against people's preferences, {len(preferred)} prompts"
    report.draw_ranking(out / "ranking.png", rankings, title)


def score_clips(
    clips: Sequence[Clip], name: str, weights: Path | None, time_limit: float | None = None
) -> Scores:
    """Score every clip once, one at a time. ValueError, naming the file, for one that cannot be.

    All files are checked before the reward is loaded. With ``time_limit``, in seconds for each video, the reward is in
    a child process. RewardProcessError, naming the file, if a video takes longer.
    """
    import torch
    from tqdm import tqdm

    from vpo_engine.rewards.registry import check_reward, made_for_one_rate
    from vpo_engine.runs.video_file import VideoFile

    check_reward(name, weights)
    reads_prompt = _check_prompts(clips, name)
    paths = dict.fromkeys(clip.path for clip in clips)
    files = {path: VideoFile.open(path) for path in tqdm(paths, unit="file checked", disable=None)}
    rates = list(dict.fromkeys(file.fps for file in files.values()))
    found: Scores = {}
    with torch.no_grad(), tqdm(total=len(clips), unit="video", disable=None) as progress:
        for rate in rates if made_for_one_rate(name) else rates[:1]:
            with _made(name, weights, rate, time_limit) as reward:
                if not found:
                    _refuse_prompts(reward, clips)
                    if reads_prompt:
                        _say_which_are_of_names(clips)
                for clip in clips:
                    key, file = (clip.name, clip.prompt), files[clip.path]
                    if key not in found and (file.fps == rate or not made_for_one_rate(name)):
                        found[key] = {kind: each.item() for kind, each in _score(reward, clip, file).items()}
                        progress.update()
    return {(clip.name, clip.prompt): found[clip.name, clip.prompt] for clip in clips}


def _refuse_prompts(reward: FileReward, clips: Sequence[Clip]) -> None:
    """Raise ValueError, naming the videos, for prompts that the reward says that it refuses, before one is scored."""
    from vpo_engine.rewards.refusals import refusals

    refused = refusals(reward, [clip.prompt for clip in clips])
    if refused:
        row, reason = next(iter(refused.items()))
        more = f" ({len(refused)} of {len(clips)} prompts are refused)" if len(refused) > 1 else ""
        raise ValueError(f"video {clips[row].name}: {reason}{more}")


def rank_scores(scores: Scores, preferences: Sequence[Preference]) -> dict[str, Ranking]:
    """Return, for every dimension, how well it ranks the candidates."""
    from vpo_engine.metrics.ranking import rank_preferences

    best = [row.preferred for row in preferences]
    return {
        dimension: rank_preferences(
            [[scores[clip.name, clip.prompt][dimension] for clip in row.clips] for row in preferences], best
        )
        for dimension in next(iter(scores.values()))
    }


def _check_name(name: str) -> None:
    if not is_own(name):
        find_entry(name)


def _check_prompts(clips: Sequence[Clip], name: str) -> bool:
    """Return whether the reward reads prompts. Raise ValueError, naming the video, where it does and there is none."""
    from vpo_engine.rewards.registry import reward_card

    if not reward_card(name).reads_prompt:
        return False
    for clip in clips:
        if not clip.prompt.strip():
            raise ValueError(
                f"video {clip.name} has no prompt, by which {name} judges; name it in prompts.csv or prompts.jsonl"
            )
    return True


def _say_which_are_of_names(clips: Sequence[Clip]) -> None:
    named = [clip for clip in clips if clip.named]
    if named:
        say(
            f"note: the prompts of {len(named)} of {len(clips)} videos are taken from their file names, such as "
            f"{named[0].prompt!r}; a prompts.jsonl or prompts.csv beside them is exact",
            sys.stderr,
        )


@contextmanager
def _made(name: str, weights: Path | None, rate: float, time_limit: float | None) -> Iterator[FileReward]:
    """Make the reward, in a child process if there is a time limit. ``rate`` is for those that are made for one."""
    import torch

    from vpo_engine.rewards.process import start_reward
    from vpo_engine.rewards.registry import RewardSpec, knows_frame_rate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    spec = RewardSpec(name, weights, device=device, dtype=dtype, fps=rate if knows_frame_rate(name) else None)
    with ExitStack() as at_end:
        if time_limit is None:
            yield spec.build()
        else:
            yield at_end.enter_context(start_reward(spec, time_limit=time_limit))


def _score(reward: FileReward, clip: Clip, file: VideoFile) -> dict[str, Tensor]:
    """Score one video; the mean of all dimensions is added if there are several."""
    from vpo_engine.rewards.combine import combine

    try:
        found = reward.score(file, [clip.prompt])
    except ValueError as error:
        raise ValueError(f"video {clip.name}: {error}") from error
    except RewardProcessError as error:
        raise RewardProcessError(f"video {clip.name}: {error}") from error
    finally:
        file.close()
    return {**found, GLOBAL: combine(found, "global")} if len(found) > 1 else found


if __name__ == "__main__":
    sys.exit(main())
