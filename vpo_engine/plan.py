"""What a run will take: memory, operations and seconds of every phase of a step, without a GPU and without weights.

    python -m vpo_engine.plan CONFIG.yaml [key.path=value ...] [--gpu a100-80g] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from vpo_engine.config import load_config
from vpo_engine.planning.estimate import estimate
from vpo_engine.planning.extrapolate import traced
from vpo_engine.planning.gpus import GIB, GPUS, find_gpu
from vpo_engine.planning.report import as_json, table, verdict


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vpo_engine.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="YAML file, or the name of a shipped one; default: sprites")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the file's")
    parser.add_argument("--gpu", help=f"{', '.join(GPUS)}; default: the one that is here, else a100-80g")
    parser.add_argument("--json", action="store_true", help="numbers for machines")
    given = parser.parse_args(arguments)
    source, overrides = given.config, given.overrides
    if source is not None and "=" in source:
        source, overrides = None, [source, *overrides]
    try:
        config, gpu = load_config(source, overrides), find_gpu(given.gpu)
        limit = config.memory.limit_gib
        plan = estimate(
            config,
            traced(config, on_gpu=True),
            gpu,
            gpu.capacity if limit is None else int(limit * GIB),
            gpu.name if limit is None else "memory.limit_gib",
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    if given.json:
        print(json.dumps(as_json(plan), indent=1))
    else:
        print(table(plan), verdict(plan), *plan.notes, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
