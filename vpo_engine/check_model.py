"""Prove by numbers that the description of a model's family fits a folder.

    python -m vpo_engine.check_model FOLDER [key.path=value ...]

FOLDER is a text-to-video model in diffusers' layout; the family is found by its model_index.json, or named by --kind.
Each line of the table compares one entry of the family's description with the diffusers pipeline of the folder itself:
the error, the largest error that is rounding, and "ok" or "WRONG". A line that depends on a wrong one is not checked.
Families without a diffusers pipeline are checked for agreement with themselves.

Videos are as small as the family allows unless options say otherwise. A tiny folder takes seconds on a CPU; a
published one should run on a GPU. The exit code is 1 if an entry is wrong.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vpo_engine.command import Parser, report_errors
from vpo_engine.help_text import HelpFormatter
from vpo_engine.policy_source import folder_config, nearest
from vpo_engine.sample import parse_size
from vpo_engine.texts import refuse_undecodable, say

if TYPE_CHECKING:  # torch is imported when everything that the arguments alone tell has been said
    from vpo_engine.config import Config
    from vpo_engine.model_checks.table import Row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m vpo_engine.check_model",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a published model")
    parser.add_argument(
        "words", nargs="*", metavar="key.path=value", help="settings, such as model.vae=FOLDER"
    )
    parser.add_argument("--kind", help="family of the model (default: found by model_index.json)")
    parser.add_argument("--frames", type=int, metavar="N", help="number of frames")
    parser.add_argument(
        "--size", type=parse_size, metavar="HEIGHTxWIDTH", help="size in pixels, such as 480x832"
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = parser.parse_intermixed_args(words)

    def run() -> int:
        refuse_undecodable(words)
        rows = check_model(given.folder, given.kind, given.frames, given.size, given.words)
        return _report(rows)

    return report_errors(run, "stopped; the check is not complete")


def check_model(
    folder: Path,
    kind: str | None = None,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    overrides: Sequence[str] = (),
) -> list[Row]:
    """Return the rows of the table. Raise ValueError for a folder that cannot be loaded at all.

    kind: see ``folder_config``. frames, size: of the videos, the smallest of the family unless given.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder of a published model")
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; {nearest(folder)}")
    if kind is not None:
        _check_kind(kind)
    config = folder_config(folder, [*overrides, "model.dtype=float32"], kind)
    from vpo_engine.model_checks.table import all_rows

    with tempfile.TemporaryDirectory() as cache:  # text embeddings of a check are not kept
        return all_rows(_sized(config, frames, size, Path(cache), overrides), folder)


def _check_kind(kind: str) -> None:
    """Raise ValueError, with the nearest name, for a family that is not known."""
    from vpo_engine.config.names import check_kind
    from vpo_engine.models.registry import BUILT_IN, ENTRY_POINTS

    try:
        check_kind(kind, tuple(BUILT_IN), ENTRY_POINTS, "model family", "docs/models.md")
    except ValueError as error:
        raise ValueError(f"--kind {kind}: {error}") from None


def _sized(
    config: Config,
    frames: int | None,
    size: tuple[int, int] | None,
    cache: Path,
    overrides: Sequence[str] = (),
) -> Config:
    """Return the configuration for videos of the asked size; what is not asked for, and no override sets, is small."""
    from vpo_engine.exporting.check import small_size
    from vpo_engine.sample import SampleOptions, changed_config

    given = {word.partition("=")[0].removeprefix("model.") for word in overrides}
    small = {name: value for name, value in small_size(config.model.kind).items() if name not in given}
    settings = config.model.model_copy(update=small)
    config = config.model_copy(
        update={"model": settings, "prompts": config.prompts.model_copy(update={"cache": cache})}
    )
    return changed_config(config, SampleOptions(frames=frames, size=size))


def _report(rows: Sequence[Row]) -> int:
    """Print the table and what is wrong; return the exit code."""
    width = max(len(row.name) for row in rows)
    for row in rows:
        error = "" if row.error is None else f"{row.error:.1e}"
        limit = "" if row.limit is None else f"{row.limit:.0e}"
        say(f"{row.name:<{width}}  {error:>8}  {limit:>6}  {row.verdict}")
    wrong = [row for row in rows if row.ok is False]
    for row in wrong:
        say(f"wrong: {row.entry}: {row.note}", sys.stderr)
    if not wrong:
        print(f"the description fits: {sum(row.ok is True for row in rows)} entries were checked")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
