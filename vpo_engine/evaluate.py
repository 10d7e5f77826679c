"""Measure and compare policies by videos: sampled from them, or in folders. Or compare what finished runs measured.

    python -m vpo_engine.evaluate RUN [RUN ...]
    python -m vpo_engine.evaluate WHAT [--baseline [OTHER]] [OPTIONS]
    python -m vpo_engine.evaluate --study FOLDER [--votes FILE ...]
    python -m vpo_engine.evaluate --list

RUN [RUN ...] alone, without an option: nothing is sampled. One finished run: a table of every measure of the base and
of the final policy, with the change and its 95 % bounds. Several: a table of the changes. Runs with the same name in
their configuration are seeds of one setting and share a column, so they must have the same settings but for the seed.

WHAT with an option, or what is no run: a run, a checkpoint, a YAML configuration, an export, a model as its project
publishes it, an adapter with --base, or a folder of videos named PROMPT-NUMBER.mp4, as VBench has them. Videos are
sampled from a policy with the settings of its run (words key.path=value change them), measured, and written with
results.json, evaluation.html and, for VBench's dimensions, vbench/ to the --out folder. --baseline compares with
another policy on the same prompts and noise; without OTHER it is the one that the run started from. The same command
goes on where it was stopped. Several devices share the videos: --device cuda:0,cuda:1, or torchrun. The exit code is 1
if the results are partial, because a video or a metric failed; what could be measured is written all the same.

--study FOLDER writes a page for people who vote on pairs, of the videos of a comparison (its --out folder); with
--votes FILE ... it reads their votes. docs/evaluation.md describes all of this.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vpo_engine.command import Parser, report_errors, split_settings
from vpo_engine.help_text import HelpFormatter
from vpo_engine.texts import refuse_undecodable

_OF_VIDEOS = ("baseline", "base", "metrics", "weights", "reference", "prompts", "samples", "out", "device")
"""The options of videos that are sampled and measured."""


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    given = parser.parse_intermixed_args(words)
    return report_errors(lambda: _run(parser, given, words), "stopped; the same command goes on")


def _run(parser: argparse.ArgumentParser, given: argparse.Namespace, words: Sequence[str]) -> int:
    from vpo_engine.evaluation import commands

    refuse_undecodable(words)
    found, overrides = split_settings(given.what)
    paths = [Path(word) for word in found]
    if given.list:
        return commands.list_metrics()
    if given.study is not None or given.votes:
        if given.study is None or paths or overrides:
            parser.error("give --study FOLDER, the folder of a comparison, and neither WHAT nor settings")
        _refuse(parser, given, _OF_VIDEOS, "--study FOLDER takes the videos of a comparison as they are")
        if given.votes:
            _refuse(parser, given, ("pairs", "seed"), "--votes FILE ... reads a study as it was written")
        return commands.study(given.study, given.votes, given.seed, given.pairs)
    _refuse(parser, given, ("pairs",), "only a study has pairs (--study FOLDER)")
    if not paths:
        parser.error("give a run, a policy or a folder of videos before the options")
    options = commands.options_of(given, paths[0], overrides)
    if commands.compares_finished_runs(paths, options):
        return commands.compare_finished_runs(paths)
    if len(paths) > 1:
        parser.error(
            f"give one WHAT with options, got {len(paths)}; the second of two is --baseline {paths[1]}"
        )
    return commands.evaluate(options, words)


def _refuse(
    parser: argparse.ArgumentParser, given: argparse.Namespace, names: Sequence[str], reason: str
) -> None:
    """End the command if one of these options was given, which it would not follow."""
    for name in names:
        if getattr(given, name) != parser.get_default(name):
            parser.error(f"{reason}; leave --{name} out")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m vpo_engine.evaluate",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("what", nargs="*", metavar="RUN | WHAT | key.path=value", help="see above")
    add("--baseline", nargs="?", const=True, metavar="OTHER", help="what to compare with, see above")
    add("--base", type=Path, metavar="FOLDER", help="the model that an adapter was trained on")
    add("--metrics", metavar="NAME,...", help="default: those without weights; --list prints all")
    add("--weights", action="append", default=[], metavar="NAME=PATH", help="local weights of a metric")
    add("--reference", type=Path, metavar="PATH", help="other videos, or statistics, for distances (FVD)")
    add("--prompts", metavar="FILE|vbench", help="default: the run's held-out prompts; of a folder, its own")
    add("--samples", type=int, metavar="N", help="videos for each prompt")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the noise; of a study, of sides (%(default)s)",
    )
    add("--out", type=Path, metavar="FOLDER", help="default: evaluations/NAME")
    add("--device", "--devices", metavar="NAME[,NAME]", help="such as cuda:0,cuda:1, or cpu")
    add("--study", type=Path, metavar="FOLDER", help="write a study of the comparison in FOLDER")
    add("--pairs", type=int, metavar="N", help="pairs of the study (default: one for each prompt)")
    add("--votes", nargs="+", type=Path, default=[], metavar="FILE", help="read the votes of a study")
    add("--list", action="store_true", help="print all metrics, and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
