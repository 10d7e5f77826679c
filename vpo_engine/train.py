"""Train a text-to-video policy by online video preference optimization.

    torchrun -m vpo_engine.train [CONFIG.yaml] [key.path=value ...]
    python -m vpo_engine.train --help settings [SECTION]          what every setting does

Without a configuration it trains the embedded sprites world, which needs nothing but this package. Under torchrun
with several processes each (with processes.per_prompt each team of them) takes its own prompts; gradients are averaged.
With processes.reward the last process holds the reward model, and scores for the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from vpo_engine import settings
from vpo_engine.build import (
    build_held_out,
    build_model,
    build_prompts,
    build_reward,
    check_reward,
    check_scored,
)
from vpo_engine.config import Config
from vpo_engine.config_file import dump_config, load_config
from vpo_engine.data.prompt_record import Texts, check_record, write_record
from vpo_engine.data.prompts import PromptStream
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.idle_offload import IdleOffload
from vpo_engine.models.registry import check_model
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.planning.parts import configurations_are_here
from vpo_engine.planning.planner import check_fits
from vpo_engine.protocols import Reward
from vpo_engine.reference.store import build_reference
from vpo_engine.rewards.remote import RemoteReward
from vpo_engine.rewards.served import find_reward, serve
from vpo_engine.rewards.wire import RewardProcessError
from vpo_engine.rollout.preference_dataset import StoredPairs
from vpo_engine.run_state import check_same_run
from vpo_engine.runs.checkpoint import CheckpointError, newest_complete
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:2] in (["--help", "settings"], ["-h", "settings"]):
        return settings.main(words[2:])
    parser = argparse.ArgumentParser(
        prog="torchrun -m vpo_engine.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="YAML file, or the name of a shipped one; default: sprites")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="settings that replace the file's"
    )
    given = parser.parse_intermixed_args(words)
    source, overrides = given.config, given.overrides
    if source is not None and "=" in source:
        source, overrides = None, [source, *overrides]
    try:
        return train(load_config(source, overrides))
    except (ValueError, FileNotFoundError, CheckpointError, RewardProcessError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def train(config: Config) -> int:
    """Run ``config`` in this process (one of a torchrun group, or alone); return the exit code."""
    own = config.processes
    processes = Processes.start(config.model.device, own.per_prompt, own.reward)
    with ExitStack() as at_end:
        at_end.callback(processes.stop)
        if processes.is_reward_process:
            return _serve_reward(config, processes, at_end)
        served = None
        if processes.store is not None:
            served = at_end.enter_context(find_reward(processes.store, processes.rank))
        check_model(config)
        check_reward(config)
        dataset = config.rollout.dataset
        stored = None if dataset is None else StoredPairs(dataset, config.pairs.min_gap)
        prompts, held_out_prompts = build_prompts(config, print if processes.first else None)
        if configurations_are_here(config):  # else building the model says which is missing
            config, plan = check_fits(config, processes.device, processes.count, processes.broadcast_text)
            if processes.first:
                print(plan, flush=True)
        model = build_model(config, processes)
        reward = served or _build_reward(config, processes, at_end, model.idle_offload)
        if served is not None:
            served.wait_until_loaded()
        check_scored(config, model, reward, prompts, held_out_prompts)
        held_out = build_held_out(config, model, held_out_prompts, reward, processes)
        texts: Texts = {"prompts.train": prompts} if stored is None else {"rollout.dataset": stored.texts()}
        run = _run_directory(config, processes, {**texts, "prompts.held_out": held_out_prompts})
        with model.idle_offload.phase("refresh"):
            reference = build_reference(config.reference.storage, model.network)
            algorithm = OnlineVPO(config, model, reward, reference, processes, model.idle_offload, stored)
        stream = PromptStream(prompts, config.seed) if stored is None else stored
        trainer = Trainer(
            config,
            algorithm,
            stream,
            held_out,
            run,
            processes,
            lambda: served is not None and served.stopping,
        )
        outcome = trainer.run()
    if outcome.stopped_by and processes.first:
        print(
            f"stopped by {outcome.stopped_by} after step {outcome.steps}, which is saved; go on with\n"
            f"  torchrun -m vpo_engine.train {run.config} run_dir={run.root} checkpoint.resume=true",
            flush=True,
        )
    return 1 if outcome.alarmed else 0


def _serve_reward(config: Config, processes: Processes, at_end: ExitStack) -> int:
    """Serve the reward model in the process that is given to it; return the exit code."""
    assert processes.store is not None
    serve(lambda: _build_reward(config, processes, at_end), processes.store, processes.count)
    return 0


def _build_reward(
    config: Config, processes: Processes, at_end: ExitStack, idle_offload: IdleOffload | None = None
) -> Reward:
    reward = build_reward(config, processes.device, idle_offload)
    return at_end.enter_context(reward) if isinstance(reward, RemoteReward) else reward


def _run_directory(config: Config, processes: Processes, texts: Texts) -> RunDirectory:
    """Return the run directory. The first process makes it, or opens it to resume; the others are told where it is."""
    path = str(_open_or_create(config, texts).root) if processes.first else ""
    return RunDirectory.open(Path(processes.broadcast_text(path)))


def _open_or_create(config: Config, texts: Texts) -> RunDirectory:
    """Open the run to resume (that of run_dir, else the newest of this name), or create a run directory."""
    root = config.run_dir
    if config.checkpoint.resume:
        earlier = Path("runs").glob(f"{config.name}-*/")
        root = root or max(earlier, key=lambda path: path.stat().st_mtime, default=None)
        if root is not None and root.is_dir() and any(root.iterdir()):
            run = RunDirectory.open(root)
            check_same_run(config, run.config)
            if newest_complete(run.checkpoints) is None:  # it begins again at the first step
                write_record(run.root, texts)
            elif note := check_record(run.root, texts):
                print(note, flush=True)
            return run
    text = dump_config(config)
    run = RunDirectory.create_at(root, text) if root else RunDirectory.create(config.name, text)
    write_record(run.root, texts)
    return run


if __name__ == "__main__":
    sys.exit(main())
