"""Plan what a run will take: memory, operations and seconds of every phase of a step, without a GPU or weights.

    python -m vpo_engine.plan [CONFIG.yaml] [key.path=value ...] [--gpu a100-80g] [--no-frames] [--json]

It also says which setting would make a run fit that does not, and how long clips may be at each resolution.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vpo_engine.command import report_errors, split_words
from vpo_engine.config_file import load_config
from vpo_engine.planning.gpus import GPUS, check_gpu_name, find_gpu


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vpo_engine.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml | key.path=value",
        help="YAML file, or the name of a shipped one (default: sprites); and settings that replace the file's",
    )
    parser.add_argument("--gpu", help=f"{', '.join(GPUS)}; default: the one that is here, else a100-80g")
    parser.add_argument("--json", action="store_true", help="numbers for machines")
    parser.add_argument(
        "--no-frames",
        action="store_true",
        help="leave out the longest clips that fit at each resolution, which take minutes to find",
    )
    given = parser.parse_intermixed_args(arguments)
    return report_errors(lambda: _plan(given))


def _plan(given: argparse.Namespace) -> int:
    """Plan as the command line asks; torch is imported after its words have been checked."""
    source, overrides = split_words(given.words)
    config = load_config(source, overrides)
    check_gpu_name(given.gpu)
    from vpo_engine.planning.answer import print_plan

    print_plan(config, find_gpu(given.gpu), frames=not given.no_frames, machine=given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
