"""Put a run together: model, reward, reference, prompts and run directory, and hand them to the trainer."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vpo_engine.build import (
    blind_reward_note,
    build_held_out,
    build_model,
    build_prompts,
    build_reward,
    check_given,
    check_reward,
    check_scored,
)
from vpo_engine.checkpoint_size import check_disk, check_host_memory
from vpo_engine.command import same_in_all_processes
from vpo_engine.config import Config
from vpo_engine.config_file import parse_config
from vpo_engine.data.prompt_record import Texts, check_record, write_record
from vpo_engine.disk_plan import check_run_fits, describe
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.watchdog import group_limit
from vpo_engine.ending import Ending
from vpo_engine.full_disk import write_whole
from vpo_engine.memory.host_allocator import return_freed_memory
from vpo_engine.memory.idle_offload import IdleOffload
from vpo_engine.methods import method_class
from vpo_engine.models.registry import check_model
from vpo_engine.planning.parts import check_preset, configurations_are_here
from vpo_engine.planning.planner import available_memory, check_fits
from vpo_engine.protocols import Reward
from vpo_engine.reference.store import HeldReference, build_reference
from vpo_engine.rewards.remote import RemoteReward
from vpo_engine.rewards.served import find_reward, serve
from vpo_engine.runs.attempts import begin_attempt
from vpo_engine.runs.checkpoint import step_of, verify_checkpoint
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.lock import RunLock
from vpo_engine.runs.next_steps import going_on
from vpo_engine.runs.progress import wrap_for
from vpo_engine.runs.signals import exit_code
from vpo_engine.runs.start import Start, find_start, resolved_as_before
from vpo_engine.texts import say
from vpo_engine.trainer import Trainer
from vpo_engine.video_model import VideoModel


def run_training(config: Config) -> int:
    """Run ``config`` in this process (one of a torchrun group, or alone); return the exit code."""
    processes = _start_processes(config)
    ending = Ending(processes)
    with ExitStack() as at_end:
        at_end.callback(processes.stop)
        if processes.is_reward_process:
            return _serve_reward(config, processes, at_end)
        at_end.enter_context(ending.watchdog(config))
        served = None
        if config.processes.reward:
            assert processes.store is not None
            served = at_end.enter_context(find_reward(processes.store, processes.rank))
        with same_in_all_processes():
            check_model(config)
            check_reward(config)
            if processes.first:
                _say_note(blind_reward_note(config))
            method = method_class(config.method)
            prompts, held_out_prompts = build_prompts(config, say if processes.first else None)
            stream, texts = method.open_stream(config, prompts)
            given = check_given(config, stream, say if processes.first else None)
        texts = {**texts, "prompts.held_out": held_out_prompts}
        config = _as_before(config, processes, texts)
        config, planned = _planned(config, processes, len(prompts))
        model = build_model(config, processes)
        tensors = [tensor for part in model.parts.values() for tensor in part.parameters()]
        return_freed_memory(processes.device, sum(t.numel() * t.element_size() for t in tensors))
        reward = served or _build_reward(config, processes, at_end, model.idle_offload)
        if served is not None:
            served.wait_until_loaded()
        check_scored(config, model, reward, prompts, held_out_prompts, given)
        method.check(config, model)
        held_out = build_held_out(config, model, held_out_prompts, reward, processes)
        if processes.first:
            _check_room(config, model, None if planned else len(prompts))
        run, checkpoint = _open_run(config, processes, at_end, texts)
        ending.run = run
        at_end.enter_context(ending.noted())
        with model.idle_offload.phase("refresh"):
            reference = _build_reference(config, model)
            algorithm = method(config, model, reward, reference, processes, model.idle_offload, stream)
        _keep_settings(algorithm.optimizer.settings, run, processes)
        trainer = Trainer(
            config,
            algorithm,
            stream,
            held_out,
            run,
            processes,
            lambda: served is not None and served.stopping,
            start_from=checkpoint,
        )
        outcome = trainer.run()
        ending.ended(outcome.how)
    if outcome.stopped_by and processes.first:
        say(_stopped_text(outcome.stopped_by, outcome.steps, run))
    return outcome.exit_code


def _start_processes(config: Config) -> Processes:
    """Join the processes of the run; with split_guidance two of them share a candidate's branches."""
    own, divided = config.processes, config.distributed
    limit = group_limit(divided.stage_minutes)
    processes = Processes.start(
        config.model.device, own.per_prompt, own.reward, limit, divided.sequence_parallel
    )
    if own.split_guidance and not processes.is_reward_process:
        return processes.in_couples(limit)
    return processes


def _say_note(note: str | None) -> None:
    """Print a note beside the results; None says nothing."""
    if note is not None:
        print(wrap_for(sys.stderr, f"note: {note}"), file=sys.stderr, flush=True)


def _planned(config: Config, processes: Processes, prompts: int) -> tuple[Config, bool]:
    """Plan the run, print the plan, and return the configuration with what its presets set, and whether it was planned.

    A run is not planned where a size would have to be assumed; building the model then says which file is missing.
    """
    if not configurations_are_here(config):
        check_preset(config)
        return config, False
    agree = processes.broadcast_text
    config, plan = check_fits(config, processes.device, processes.count, agree, prompts)
    if processes.first:
        say(wrap_for(sys.stdout, str(plan)))
    return config, True


def _build_reference(config: Config, model: VideoModel) -> HeldReference | None:
    """Make the reference of the policy as it is now; None for a method that has none."""
    if not config.card.reference:
        return None
    share = config.reference.refresh_share if config.refreshes else 1.0
    return build_reference(config.reference.storage, model.network, share)


def _check_room(config: Config, model: VideoModel, prompts: int | None) -> None:
    """Raise ValueError if the run does not fit on its disk, or its checkpoints not in host memory.

    prompts: the number of them, for a line about the disk; None if the plan has said it.
    """
    if prompts is not None:
        print(wrap_for(sys.stdout, describe(config, model, prompts)), flush=True)
    start = find_start(config)
    root = start.root or Path("runs") / config.name
    check_disk(config, model, root)
    check_run_fits(config, model, root, step_of(start.checkpoint))
    check_host_memory(config, model, available_memory())


def _keep_settings(settings: dict[str, Any] | None, run: RunDirectory, processes: Processes) -> None:
    """Write what a library that divides the work was given into the run directory."""
    if processes.first and settings is not None:
        write_whole(run.root / "deepspeed.json", json.dumps(settings, indent=1) + "\n")


def _stopped_text(by: str, step: int, run: RunDirectory) -> str:
    if step == 0:
        return f"stopped by {by} before the first step was finished; the same command starts the run again"
    return f"stopped by {by} after step {step}, which is saved; go on with\n  {going_on(run)}"


def _serve_reward(config: Config, processes: Processes, at_end: ExitStack) -> int:
    """Serve the reward model in the process that is given to it; return the exit code."""
    assert processes.store is not None
    received = serve(lambda: _build_reward(config, processes, at_end), processes.store, processes.count)
    return exit_code(received) if received else 0


def _build_reward(
    config: Config, processes: Processes, at_end: ExitStack, idle_offload: IdleOffload | None = None
) -> Reward:
    reward = build_reward(config, processes.device, idle_offload)
    return at_end.enter_context(reward) if isinstance(reward, RemoteReward) else reward


def _as_before(config: Config, processes: Processes, texts: Texts) -> Config:
    """Return ``config`` with what an earlier start of the run has chosen; the same in every process.

    Raise ValueError if a run that goes on from a checkpoint was started with other prompts.
    """
    text = ""
    if processes.first:
        start = find_start(config)
        if start.checkpoint is not None and (note := check_record(start.checkpoint.parent.parent, texts)):
            say(note)
        if start.exists and start.root is not None:
            text = RunDirectory.open(start.root).config.read_text(encoding="utf-8")
    text = processes.broadcast_text(text)
    return resolved_as_before(config, parse_config(text, "the saved configuration")) if text else config


def _open_run(
    config: Config, processes: Processes, at_end: ExitStack, texts: Texts
) -> tuple[RunDirectory, Path | None]:
    """Return the run directory, and the checkpoint to go on from.

    The first process makes or opens the directory and holds its lock until the end; it tells the others.
    """
    place = chosen = ""
    if processes.first:
        start = find_start(config)
        if start.root is not None:
            start.root.mkdir(parents=True, exist_ok=True)
            at_end.enter_context(RunLock(start.root))
            start = find_start(config)  # another process may have ended meanwhile
        chosen = str(start.checkpoint or "")
    checkpoint = Path(found) if (found := processes.broadcast_text(chosen)) else None
    if checkpoint is not None:  # in all processes at once, and before anything of the run is changed
        verify_checkpoint(checkpoint)
    if processes.first:
        run = start.open(config)
        if start.checkpoint is None:
            write_record(run.root, texts)
        if start.root is None:
            at_end.enter_context(RunLock(run.root))
        _say(start, run)
        place = str(run.root)
    return RunDirectory.open(Path(processes.broadcast_text(place))), checkpoint


def _say(start: Start, run: RunDirectory) -> None:
    """Say where the run begins, and whether it began there before."""
    step = step_of(start.checkpoint)
    if (note := begin_attempt(run, step)) is not None:
        say(wrap_for(sys.stderr, f"note: {note}"), sys.stderr)
    if start.checkpoint is not None:
        say(f"going on from {start.checkpoint}")
    elif start.exists:
        say(f"the run at {start.root} had saved no checkpoint; it begins again at the first step")
