"""Export the policy of a run as the files that other programs load.

    python -m vpo_engine.export RUN --out FOLDER [--step N] [--merge]

RUN is a run directory (its newest checkpoint is used, or that of --step) or a checkpoint. A run that trains all weights
becomes a complete folder, as the model's project publishes it: the policy, and the untouched parts of model.policy's
folder beside it. A run with model.lora becomes an adapter, or with --merge a complete folder too.

Every export is loaded back and compared with the policy before the command says done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vpo_engine.command import Parser, report_errors
from vpo_engine.exporting.folder import refuse_occupied
from vpo_engine.exporting.options import DTYPES, FORMATS, ExportOptions
from vpo_engine.help_text import HelpFormatter
from vpo_engine.policy_source import INDEX, PolicySource, nearest, run_source
from vpo_engine.texts import refuse_undecodable, say

if TYPE_CHECKING:  # torch is imported when everything that the arguments alone tell has been said
    from vpo_engine.exporting.write import Exported


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = _parser().parse_args(words)
    options = ExportOptions(given.step, given.merge, given.format, given.ema, given.dtype, given.base)

    def run() -> None:
        refuse_undecodable(words)
        done = export(given.run, given.out, options)
        for line in done.lines:
            say(line)
        say(f"done: {done.what} at {given.out}; use it: {done.use}")

    return report_errors(run, "stopped; nothing was exported")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m vpo_engine.export",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory or checkpoint")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder that is made; it must be empty or absent",
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into its base, in float32")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="dialect of an adapter: diffusers (the default where the model has a diffusers pipeline), original (the "
        "names of the model's first project, for ComfyUI) or peft",
    )
    parser.add_argument("--ema", action="store_true", help="export the averaged weights (ema.decay)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="type of the written weights (default: that of the checkpoint; merged: float32)",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="FOLDER",
        help="complete published folder of the model, for a run whose model.policy is a bare transformer",
    )
    return parser


def export(run: Path, out: Path, options: ExportOptions | None = None) -> Exported:
    """Write the policy of a run or checkpoint to the folder ``out``, load it back and compare.

    Raise ValueError for arguments that do not fit the run, and ExportMismatchError (a ValueError) where what is loaded
    back is not the policy; the folder is kept then, beside ``out``.
    """
    options = options or ExportOptions()
    refuse_occupied(out)
    if not run.exists():
        raise ValueError(f"there is no run or checkpoint at {run}; {nearest(run)}")
    if not run.is_dir():
        raise ValueError(f"{run} is a file; give a run directory or a checkpoint")
    if options.base is not None and not (options.base / INDEX).is_file():
        raise ValueError(f"--base {options.base} has no {INDEX}; give the folder of a whole published model")
    source = run_source(run, options.step, average=options.ema)
    _check_fit(run, source, options)
    from vpo_engine.exporting.write import write_export

    return write_export(source, out, options)


def _check_fit(run: Path, source: PolicySource, options: ExportOptions) -> None:
    """Raise ValueError for options that the run's configuration rules out."""
    lora = source.config.model.lora is not None
    if options.merge and not lora:
        raise ValueError(
            f"--merge merges an adapter, but {run} has trained all weights (model.lora is null); leave it out"
        )
    if options.form is not None and (options.merge or not lora):
        whole = "a merged export" if lora else f"the policy of {run}, which has trained all weights,"
        raise ValueError(
            f"--format {options.form} is the dialect of an adapter, but {whole} is a whole model; leave --format out"
        )


if __name__ == "__main__":
    sys.exit(main())
