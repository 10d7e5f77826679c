"""Reproduce the paper's tables and figures on the sprites world, and say for each whether its directions agree.

    python -m vpo_engine.reproduce TABLE [TABLE ...] [--quick] [OPTIONS]
    python -m vpo_engine.reproduce all
    python -m vpo_engine.reproduce --list

A table is a grid of runs of vpo_engine.train, which are compared on the same held-out clips. Finished runs are kept, so
that the same command goes on where it was stopped. --quick has shorter runs and one seed, and takes less than ten
minutes for each table on two cores. Tables, CSV files and pictures go to the output folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vpo_engine.command import Parser, report_errors
from vpo_engine.config.errors import nearest
from vpo_engine.help_text import HelpFormatter
from vpo_engine.reproducing.tables import TABLES
from vpo_engine.texts import refuse_undecodable, say

ALL = "all"
_MOST = 1000
"""Most seeds, and most cells at a time."""


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = _parser().parse_intermixed_args(words)

    def run() -> int:
        refuse_undecodable(words)
        return _reproduce(given)

    return report_errors(run, "stopped")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m vpo_engine.reproduce",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)}, or {ALL}")
    parser.add_argument("--list", action="store_true", help="say what there is and how long it takes")
    parser.add_argument("--quick", action="store_true", help="shorter runs, and one seed")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 3; with --quick: 1)")
    parser.add_argument(
        "--jobs", type=int, default=cores, help="cells at a time (default: the cores, %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/reproduce"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        default=[],
        metavar="METHOD=N",
        help="training steps of a method, in place of those that took as many seconds on the project's machine",
    )
    parser.add_argument(
        "--old",
        choices=("refuse", "keep", "redo"),
        default="refuse",
        help="what to do with finished cells that other code or settings made (default: %(default)s)",
    )
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="put the tables between a page's markers too"
    )
    return parser


def _reproduce(given: argparse.Namespace) -> int:
    from vpo_engine.reproducing.making import Asked, make

    asked = Asked(
        tables=_tables(given.tables, given.list),
        out=given.out,
        jobs=_positive("--jobs", given.jobs),
        quick=given.quick,
        seeds=None if given.seeds is None else _positive("--seeds", given.seeds),
        steps=dict(_step_words(given.steps)),
        old=given.old,
        write=given.write,
    )
    if given.list:
        from vpo_engine.reproducing.listing import listing

        say(listing(asked))
        return 0
    return make(asked, say)


def _tables(words: Sequence[str], every: bool) -> list[str]:
    for word in words:
        if word not in (*TABLES, ALL):
            hint = nearest(word, [*TABLES, ALL]) or f"; there are {', '.join(TABLES)} and {ALL}"
            raise ValueError(f"there is no table {word}{hint}")
    if not words and not every:
        raise ValueError(f"name a table: {', '.join(TABLES)}, or {ALL}; --list says what they are")
    return list(TABLES) if ALL in words or not words else list(dict.fromkeys(words))


def _positive(option: str, value: int) -> int:
    if not 1 <= value <= _MOST:
        raise ValueError(f"{option} {value} must be at {'least 1' if value < 1 else f'most {_MOST}'}")
    return value


def _step_words(words: Sequence[str]) -> list[tuple[str, int]]:
    from vpo_engine.config.methods import METHODS

    found: list[tuple[str, int]] = []
    for word in words:
        name, _, number = word.partition("=")
        if name not in METHODS or not number.isdigit() or int(number) < 1:
            raise ValueError(
                f"--steps {word} must be METHOD=N with a method of {', '.join(METHODS)} and N at least 1"
            )
        found.append((name, int(number)))
    return found


if __name__ == "__main__":
    sys.exit(main())
