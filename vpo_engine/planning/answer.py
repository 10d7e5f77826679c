"""The output of ``vpo_engine.plan``: the plan, changes that would make a run fit, and the longest clips that fit."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from vpo_engine.config import Config
from vpo_engine.disk_plan import as_json as disk_as_json
from vpo_engine.disk_plan import describe
from vpo_engine.models.registry import model_family
from vpo_engine.planning.disk import planned_disk
from vpo_engine.planning.estimate import Plan
from vpo_engine.planning.fit import fitting_changes, most_frames
from vpo_engine.planning.gpus import GIB, Gpu
from vpo_engine.planning.links import Cluster
from vpo_engine.planning.planner import granted, plan_run
from vpo_engine.planning.presets import resolve_presets
from vpo_engine.planning.report import as_json, whole
from vpo_engine.planning.scaling_report import as_json as comparison_as_json
from vpo_engine.planning.scaling_report import comparison
from vpo_engine.planning.strategies import compare, recommended
from vpo_engine.texts import say


def print_plan(config: Config, gpu: Gpu | None, *, frames: bool, machine: bool) -> None:
    """Print the plan of a run on ``gpu``.

    frames: find the longest clips too, where the model has several sizes. machine: print JSON.
    """
    config, presets = resolve_presets(config, lambda changed: plan_run(changed, gpu).fits)
    plan = plan_run(config, gpu)
    frames = frames and bool(model_family(config.model.kind).card.resolutions)
    if machine:
        found = as_json(plan) | {"presets": presets.splitlines(), "disk": planned_disk(config, disk_as_json)}
        found |= {"most_frames": dict(frames_that_fit(config, gpu))} if frames else {}
        print(json.dumps(found, indent=1))
        return
    say("\n".join(filter(None, [presets, planned_disk(config, describe), whole(plan)])))
    if not plan.fits:
        say("\n".join(_remedies(config, gpu, plan)))
    if frames:
        alone = " and rollout.batch_size=1" if config.rollout.batch_size == "auto" else ""
        print(
            f"longest clips that fit with these settings{alone}; this takes minutes (--no-frames leaves it out):",
            flush=True,
        )
        for resolution, count in frames_that_fit(config, gpu):
            print(_clip_line(resolution, count, config.model.fps), flush=True)


def print_comparison(
    config: Config, gpu: Gpu, cluster: Cluster, *, given: Sequence[str], machine: bool
) -> None:
    """Print the ways to divide a run among the GPUs of ``cluster``, each a ``gpu``. machine: print JSON.

    given: the words of the command line that ``config`` was made of.
    """
    rows, refused = compare(config, gpu, cluster)
    chosen, _ = recommended(rows)
    presets = "" if chosen is None else chosen.presets
    if machine:
        print(json.dumps(comparison_as_json(cluster, rows, refused) | {"gpu": gpu.name}, indent=1))
        return
    say("\n".join(filter(None, [presets, comparison(cluster, rows, refused, given)])))


def _clip_line(resolution: str, frames: int, fps: int) -> str:
    if not frames:
        return f"  {resolution}  none"
    return f"  {resolution}  {frames} frames, played in {frames / fps:.1f} s at {fps} frames per second"


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
