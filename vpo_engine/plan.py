"""Plan what a run will take: memory, operations and seconds of every phase of a step, without a GPU or weights.

python -m vpo_engine.plan CONFIG.yaml [key.path=value ...] [--gpu a100-80g] [--no-frames] [--json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.models.registry import model_family
from vpo_engine.planning.estimate import Plan
from vpo_engine.planning.fit import fitting_changes, most_frames
from vpo_engine.planning.gpus import GIB, GPUS, Gpu, find_gpu
from vpo_engine.planning.planner import granted, plan_run
from vpo_engine.planning.presets import resolve_presets
from vpo_engine.planning.report import as_json, whole


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
        "--no-frames",
        action="store_true",
        help="leave out the most frames that fit at each resolution, which take minutes to find",
    )
    given = parser.parse_intermixed_args(arguments)
    source, overrides = given.config, given.overrides
    if source is not None and "=" in source:
        source, overrides = None, [source, *overrides]
    try:
        config, gpu = load_config(source, overrides), find_gpu(given.gpu)
        config, presets = resolve_presets(config, lambda changed: plan_run(changed, gpu).fits)
        plan = plan_run(config, gpu)
        frames = not given.no_frames and bool(model_family(config.model.kind).card.resolutions)
        if given.json:
            found = as_json(plan) | {"presets": presets.splitlines()}
            found |= {"most_frames": dict(frames_that_fit(config, gpu))} if frames else {}
            print(json.dumps(found, indent=1))
            return 0
        print(*filter(None, [presets, whole(plan)]), sep="\n", flush=True)
        if not plan.fits:
            print(*_remedies(config, gpu, plan), sep="\n", flush=True)
        if frames:
            print(
                "most frames that fit, otherwise configured so (minutes; --no-frames leaves them out):",
                flush=True,
            )
            for resolution, count in frames_that_fit(config, gpu):
                print(f"  {resolution}: {count} ({count / config.model.fps:.1f} s)", flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _remedies(config: Config, gpu: Gpu | None, plan: Plan) -> list[str]:
    """Return lines about changes of settings that would make the run fit."""
    changes = fitting_changes(granted(config, gpu), plan, lambda changed: plan_run(changed, gpu))
    lines = [f"  {change}: {change.plan.peak.total / GIB:.2f} GiB" for change in changes]
    if not lines:
        return ["no single setting makes it fit"]
    return ["single settings with which it fits, cheapest first:", *lines]


def frames_that_fit(config: Config, gpu: Gpu | None) -> Iterator[tuple[str, int]]:
    """Find the most frames at each resolution of the model's family, as many at a time as there are cores."""
    resolutions = model_family(config.model.kind).card.resolutions
    workers = min(os.cpu_count() or 1, len(resolutions))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from zip(resolutions, pool.map(partial(_most_frames, config, gpu), resolutions), strict=True)


def _most_frames(config: Config, gpu: Gpu | None, resolution: str) -> int:
    return most_frames(config, resolution, lambda changed: plan_run(changed, gpu))


if __name__ == "__main__":
    sys.exit(main())
