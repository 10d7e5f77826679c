"""What a run will take: memory, operations and seconds of every phase of a step, without a GPU and without weights.

python -m vpo_engine.plan CONFIG.yaml [key.path=value ...] [--gpu a100-80g] [--frames] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.planning.estimate import Plan
from vpo_engine.planning.fit import fitting_changes, most_frames
from vpo_engine.planning.gpus import GIB, GPUS, find_gpu
from vpo_engine.planning.planner import granted, plan_run
from vpo_engine.planning.report import as_json, provenance, table, verdict

RESOLUTIONS = ("240p", "360p", "480p", "720p")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vpo_engine.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="YAML file, or the name of a shipped one; default: sprites")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="settings that replace the file's"
    )
    parser.add_argument("--gpu", help=f"{', '.join(GPUS)}; default: the one that is here, else a100-80g")
    parser.add_argument("--json", action="store_true", help="numbers for machines")
    parser.add_argument(
        "--frames", action="store_true", help=f"also the most frames that fit at {', '.join(RESOLUTIONS)}"
    )
    given = parser.parse_args(arguments)
    source, overrides = given.config, given.overrides
    if source is not None and "=" in source:
        source, overrides = None, [source, *overrides]
    try:
        config, gpu = load_config(source, overrides), find_gpu(given.gpu)
        plan = plan_run(config, gpu)
        if given.json:
            print(json.dumps(as_json(plan), indent=1))
            return 0
        print(table(plan), *provenance(plan), verdict(plan), sep="\n", flush=True)

        def planner(changed: Config) -> Plan:
            return plan_run(changed, gpu)

        if not plan.fits:
            changes = [
                f"  {c}: {c.plan.peak.total / GIB:.2f} GiB"
                for c in fitting_changes(granted(config, gpu), plan, planner)
            ]
            found = (
                "single settings with which it fits, cheapest first:"
                if changes
                else "no single setting makes it fit"
            )
            print(found, *changes, sep="\n", flush=True)
        if given.frames:
            for resolution in RESOLUTIONS:
                frames = most_frames(config, resolution, planner)
                print(
                    f"most frames at {resolution}: {frames} ({frames / config.model.fps:.1f} s)", flush=True
                )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
