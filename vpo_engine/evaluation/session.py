"""An evaluation from beginning to end: videos are sampled or read, measured, compared, and written down."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vpo_engine.command import is_first_process, same_in_all_processes
from vpo_engine.config.names import check_device
from vpo_engine.evaluation.arms import (
    Arm,
    check_alike,
    find_arm,
    held_out_prompts,
    on_device,
    settings_of,
    starting_policy,
)
from vpo_engine.evaluation.chosen_metrics import Choice, choose
from vpo_engine.evaluation.folders import Video, read_folder, suite_of, write_prompts
from vpo_engine.evaluation.output import OutputFolder, default_folder
from vpo_engine.evaluation.suites import Suite, given_suite, read_suite
from vpo_engine.policy_source import holds_adapter
from vpo_engine.sample import MOST_VIDEOS
from vpo_engine.texts import say

if TYPE_CHECKING:
    from vpo_engine.distributed.processes import Processes
    from vpo_engine.evaluation.measuring import ArmVideos
    from vpo_engine.evaluation.records import Records

_LONGEST_WAIT = timedelta(days=7)
"""How long processes wait for each other: videos of large models take hours, and shares are never quite equal."""


@dataclass(frozen=True)
class Options:
    """The words of the command line; see ``python -m vpo_engine.evaluate --help``.

    baseline: True stands for the policy that the run started from.
    """

    target: Path
    baseline: str | Literal[True] | None = None
    base: Path | None = None
    overrides: Sequence[str] = ()
    metrics: Sequence[str] = ()
    weights: Sequence[str] = ()
    reference: Path | None = None
    prompts: str | None = None
    samples: int | None = None
    seed: int = 0
    out: Path | None = None
    devices: Sequence[str] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a video is looked at. folders: {arm: its videos}, for arms that are folders."""

    arms: Sequence[Arm]
    suite: Suite
    choice: Choice
    out: OutputFolder
    seed: int
    device: str
    folders: dict[str, list[Video]]

    @property
    def videos(self) -> list[tuple[int, str, int]]:
        return self.suite.videos(list(self.choice.cards.values()))

    def covers(self, metric: str, prompt: str, index: int) -> bool:
        """Return whether a metric looks at a video."""
        return self.suite.covers(self.choice.cards[metric], prompt, index)

    def identity(self) -> dict[str, Any]:
        """Return what results in one folder must have in common.

        Metrics may be added later, and videos to a folder of which no prompts were asked for.
        """
        return {
            **{arm.role: arm.identity() for arm in self.arms},
            "prompts": {} if self.suite.given else self.suite.to_json(),
            "samples": self.suite.samples,
            "seed": self.seed,
        }


def plan_evaluation(options: Options) -> Plan:
    """Find arms, prompts, metrics and the folder. Raise ValueError for whatever the words alone tell is wrong."""
    if options.samples is not None and not 1 <= options.samples <= MOST_VIDEOS:
        raise ValueError(
            f"--samples {options.samples} must be from 1 to {MOST_VIDEOS} videos for each prompt"
        )
    _check_devices(options.devices)
    arms, device = _arms(options), _device(options.devices)
    if options.devices:
        arms = [on_device(arm, device) for arm in arms]
    suite, folders = _suite(options, arms)
    choice = choose(options.metrics, options.weights, options.reference, _sprites(arms, suite))
    out = OutputFolder(options.out or default_folder(arms))
    plan = Plan(arms, suite, choice, out, options.seed, device, folders)
    for arm in arms:
        _check_numbers(plan, arm)
    if is_first_process():  # the others may look while it makes the folder
        out.check(plan.identity())
    return plan


def run_evaluation(plan: Plan) -> dict[str, Any] | None:
    """Sample, measure and compare; return the results, which the first process also writes, and None in the others.

    What earlier starts have done is used: videos that are there, and records of videos with the same bytes.
    """
    from vpo_engine.distributed.processes import Processes
    from vpo_engine.evaluation.measuring import measure
    from vpo_engine.evaluation.records import FACTS, METRIC, Records
    from vpo_engine.evaluation.results import make_results

    processes = Processes.start(plan.device, limit=_LONGEST_WAIT)
    if processes.first:
        plan.out.begin(plan.identity())
    sides = _videos_of_arms(plan, processes)
    processes.wait()
    records = Records(plan.out.records, processes.rank)
    share = [(side, video) for side in sides for video in side.videos.values()]
    share = share[processes.rank :: processes.count]
    _look(sides, [video for _, video in share], records, processes)
    metrics = measure(
        share,
        lambda name, video: plan.covers(name, *video.key),
        plan.choice,
        records,
        processes.device,
        processes.first,
    )
    processes.wait()
    processes.stop()
    if not processes.first:
        return None
    records.read(failures=[FACTS, METRIC])
    results = make_results(
        sides,
        [(prompt, index) for _, prompt, index in plan.videos],
        plan.choice,
        metrics,
        records,
        plan.covers,
        _settings(plan, sides),
        plan.out.root,
    )
    _write(plan, results, sides)
    return results


def _videos_of_arms(plan: Plan, processes: Processes) -> list[ArmVideos]:
    """Sample the videos of policies, and return the planned videos of all arms, as far as they are there."""
    from vpo_engine.evaluation.generate import generate, planned_videos
    from vpo_engine.evaluation.measuring import ArmVideos

    planned = {(prompt, index) for _, prompt, index in plan.videos}
    sides, said = [], set[str]()

    def say_once(line: str) -> None:  # both arms have the same prompts, and mostly the same model
        if line not in said:
            said.add(line)
            say(line, sys.stderr)

    for arm in plan.arms:
        videos = plan.folders.get(arm.role, [])
        if arm.source is not None:
            folder = plan.out.videos / arm.role
            generate(arm, plan.videos, folder, processes, plan.seed, say_once)
            videos = planned_videos(plan.videos, folder)
        sides.append(ArmVideos(arm, {video.key: video for video in videos if video.key in planned}))
    return sides


def _look(sides: Sequence[ArmVideos], share: Sequence[Video], records: Records, processes: Processes) -> None:
    """Find out which videos can be measured. Raise ValueError if the arms' videos are not of one size."""
    from vpo_engine.evaluation.measuring import check_same_shape, scan, settle
    from vpo_engine.evaluation.records import FACTS

    records.begin()
    records.read()
    scan(share, records, processes.first)
    processes.wait()
    records.read(failures=[FACTS])
    with same_in_all_processes():
        for side in sides:
            settle(side, records)
        if len(sides) > 1:
            check_same_shape(*sides)


def _write(plan: Plan, results: dict[str, Any], sides: Sequence[ArmVideos]) -> None:
    from vpo_engine.evaluation.page import write_page
    from vpo_engine.evaluation.vbench_form import write_vbench_results

    plan.out.write_results(results)
    write_vbench_results(plan.out.vbench, results)
    sampled = [video for side in sides if side.arm.source is not None for video in side.videos.values()]
    if sampled:
        write_prompts(plan.out.videos, sampled)
    write_page(plan.out.page, results)


def _settings(plan: Plan, sides: Sequence[ArmVideos]) -> dict[str, Any]:
    assert sides[0].shape is not None
    frames, height, width, fps = sides[0].shape
    sampled = [settings_of(arm) for arm in plan.arms]
    return {
        "frames": frames,
        "height": height,
        "width": width,
        "fps": fps,
        "prompts": plan.suite.to_json(),
        "samples": plan.suite.samples,
        "seed": plan.seed,
        "same_noise": len(plan.arms) > 1 and all(each is not None for each in sampled),
        "sampling": sampled[0],
    }


def _arms(options: Options) -> list[Arm]:
    policy = find_arm("policy", options.target, options.base, options.overrides)
    if options.baseline is None:
        arms = [policy]
    elif options.baseline is True:
        arms = [policy, starting_policy(policy, options.overrides)]
    else:
        arms = [policy, find_arm("baseline", Path(options.baseline), options.base, options.overrides)]
    given = [options.target, *([Path(options.baseline)] if isinstance(options.baseline, str) else [])]
    if options.base is not None and not any(map(holds_adapter, given)):
        raise ValueError(
            f"--base {options.base} is for an adapter, but {' and '.join(arm.label for arm in arms)} is none; leave "
            "--base out"
        )
    if options.overrides and all(arm.source is None for arm in arms):
        raise ValueError(
            f"{options.overrides[0]} is a setting for sampling, but folders of videos are not sampled; leave it out"
        )
    if len(arms) > 1:
        check_alike(*arms)
    return arms


def _suite(options: Options, arms: Sequence[Arm]) -> tuple[Suite, dict[str, list[Video]]]:
    """Return the prompts, and the videos of arms that are folders: the prompts asked for, else those there are."""
    suite = read_suite(options.prompts, options.samples) if options.prompts is not None else None
    folders: dict[str, list[Video]] = {
        arm.role: read_folder(arm.folder, suite) for arm in arms if arm.folder is not None
    }
    if suite is not None:
        return suite, folders
    if folders:
        names = " and ".join(arm.label for arm in arms if arm.folder is not None)
        return suite_of(list(folders.values()), names, options.samples), folders
    prompts = next((found for arm in arms if (found := held_out_prompts(arm))), None)
    if prompts is None:
        raise ValueError(
            f"{arms[0].label} has no held-out prompts of its own; give prompts by --prompts FILE, or --prompts vbench"
        )
    assert arms[0].source is not None
    count = options.samples or arms[0].source.config.evaluation.samples_per_prompt
    return given_suite(prompts, "held-out prompts", count), folders


def _check_numbers(plan: Plan, arm: Arm) -> None:
    """Raise ValueError if a folder has none of the planned videos, by their prompts and numbers."""
    planned = [(prompt, index) for _, prompt, index in plan.videos]
    found = {video.key for video in plan.folders.get(arm.role, ())}
    if found and not found.intersection(planned):
        (prompt, index), (other, number) = planned[0], min(found)
        raise ValueError(
            f"{arm.folder} has none of the {len(planned)} videos that are asked for, such as number {index} of "
            f"{prompt!r}; it has others, such as number {number} of {other!r}. Number the videos of a prompt from "
            f"{index} on, or give other --prompts or another --samples"
        )


def _sprites(arms: Sequence[Arm], suite: Suite) -> bool:
    """Return whether the videos are clips of the sprites world, as far as the policies or the prompts tell."""
    kinds = {arm.source.config.model.kind for arm in arms if arm.source is not None}
    if kinds:
        return kinds == {"sprites"}
    from vpo_engine.data.sprites.world import all_captions

    return set(suite.prompts) <= set(all_captions())


def _check_devices(devices: Sequence[str]) -> None:
    """Raise ValueError for a device that has another name than those of model.device, or that is not here."""
    for name in devices:
        try:
            check_device(name)
        except ValueError as error:
            raise ValueError(f"--device {name}: {error}") from None
    if len({name.partition(":")[0] for name in devices}) > 1:
        raise ValueError(
            f"--device {','.join(devices)}: processes on different kinds of devices cannot share the videos; give one, "
            "or several GPUs"
        )
    numbers = [int(name.partition(":")[2]) for name in devices if ":" in name]
    if numbers:
        import torch

        if len(set(numbers)) < len(numbers):
            raise ValueError(f"--device {','.join(devices)}: name each GPU once")
        count = torch.cuda.device_count()
        if max(numbers) >= count:
            have = f"{count} GPUs, cuda:0 to cuda:{count - 1}" if count else "no GPU; give --device cpu"
            raise ValueError(f"--device {','.join(devices)}: this machine has {have}")


def _device(devices: Sequence[str]) -> str:
    """Return this process's device of those that are given."""
    return devices[int(os.environ.get("LOCAL_RANK", "0")) % len(devices)] if devices else "auto"


def start_processes(devices: Sequence[str], words: Sequence[str]) -> int | None:
    """Start a process for each of several devices, wait, and return the exit code; None if this is one already."""
    if len(devices) < 2 or "RANK" in os.environ:
        return None
    import subprocess

    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={len(devices)}",
    ]
    return subprocess.call([*launch, "-m", "vpo_engine.evaluate", *words])
