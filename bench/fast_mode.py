"""Compare the fast mode of the sprites run with its exact mode, seed by seed, and the effect of single options.

    python bench/fast_mode.py --runs FOLDER --write docs/rollout.md           # exact and fast, three seeds
    python bench/fast_mode.py --runs FOLDER --list --write docs/rollout.md    # the fast mode with other settings

Every run is a process on one core, `python -m vpo_engine.train CONFIG seed=S`; runs that FOLDER has already are
not repeated. Exact and fast runs take turns, so that changes of the machine's speed affect both. The final policies are
then evaluated with the exact configuration: both sample clips from the same noise, and are compared clip by clip.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from agreement import RESAMPLES
from report import Table, replaced
from rows import commit, hardware
from torch import Tensor

from vpo_engine.build import build_held_out, build_model, build_prompts, build_reward
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.runs.checkpoint import newest_complete
from vpo_engine.runs.directory import RunDirectory

CPU = torch.device("cpu")
EXACT, FAST = "sprites.yaml", "sprites_fast.yaml"
OTHERS = (
    "",
    "objective.updates_per_rollout=2 objective.timesteps_per_pair=2",
    "objective.updates_per_rollout=1 objective.timesteps_per_pair=4",
    "objective.updates_per_rollout=1 objective.timesteps_per_pair=1",
    "objective.updates_per_rollout=1 objective.timesteps_per_pair=2",
    "objective.updates_per_rollout=1 objective.timesteps_per_pair=8",
    "objective.updates_per_rollout=2",
    "objective.updates_per_rollout=8",
    "rollout.cache=null",
    "rollout.cache=0.2",
    "rollout.cache=null rollout.steps=8 evaluation.steps=12",
    "rollout.steps=8 evaluation.steps=12",
    "rollout.cache=null rollout.prune.after=0.5 rollout.prune.keep=2",
    "rollout.cache=null rollout.explore.steps=6",
    "rollout.cache=null rollout.weights=int8",
    "rollout.cache=null rollout.weights=fp8",
)
"""Settings added to the fast mode, one set for each run; the number of rollouts is the same in all runs."""
MODES = "<!-- fast mode -->\n", "<!-- end of fast mode -->"
LIST = "<!-- options -->\n", "<!-- end of options -->"
STAGES = ("rollout", "decode", "reward", "update", "refresh")


@dataclass(frozen=True)
class Took:
    """The time that a run took: CPU seconds, wall-clock seconds, and wall-clock seconds in ``STAGES``."""

    cpu: float
    clock: float
    stages: float


@dataclass(frozen=True)
class Run:
    """A run in the folder. ``settings``: a configuration file followed by overrides, separated by blanks."""

    folder: Path
    settings: str
    seed: int

    @property
    def root(self) -> Path:
        name, *overrides = self.settings.split()
        return self.folder / "-".join([Path(name).stem, *overrides, str(self.seed)])

    @property
    def record(self) -> Path:
        """The file with the time that the run took; it is written when the run has succeeded."""
        return self.root.with_name(f"{self.root.name}.json")

    def took(self) -> Took:
        return Took(**json.loads(self.record.read_text(encoding="utf-8")))

    def make(self, cpu: int) -> None:
        """Run on core ``cpu`` alone, with one thread. RuntimeError, naming its log, if the run fails."""
        command = [sys.executable, "-m", "vpo_engine.train", *self.settings.split()]
        command += [f"seed={self.seed}", f"run_dir={self.root}", "checkpoint.every=null"]
        log = self.root.with_name(f"{self.root.name}.log")
        start = time.perf_counter()
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                preexec_fn=partial(os.sched_setaffinity, 0, {cpu}),
            )
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(
                f"the run {self.root} failed; see {log}, then delete {self.root} and start again"
            )
        stages = sum(self.summary()["timings"].get(stage, 0.0) for stage in STAGES)
        took = Took(usage.ru_utime + usage.ru_stime, time.perf_counter() - start, stages)
        self.record.write_text(json.dumps(asdict(took)), encoding="utf-8")

    def summary(self) -> dict[str, Any]:
        return json.loads(RunDirectory.open(self.root).summary.read_text(encoding="utf-8"))


def make_all(runs: Sequence[Run], cpus: Sequence[int]) -> None:
    """Do the runs that have not been done yet, in order, one at a time on each core."""
    free: SimpleQueue[int] = SimpleQueue()
    for cpu in cpus:
        free.put(cpu)

    def make(run: Run) -> None:
        cpu = free.get()
        try:
            run.make(cpu)
        finally:
            free.put(cpu)
        print(f"{run.root.name}: {run.took()}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(len(cpus)) as pool:
        list(pool.map(make, [run for run in runs if not run.record.exists()]))


def final_rewards(run: Run) -> Tensor:
    """Return the rewards of the run's last policy, float64 [clips], with the exact configuration and the run's seed."""
    newest = newest_complete(RunDirectory.open(run.root).checkpoints)
    if newest is None:
        raise ValueError(f"{run.root} has no checkpoint; delete it and its .json, and start again")
    config = load_config(EXACT, [f"seed={run.seed}", f"model.policy={newest / 'policy'}", "model.device=cpu"])
    processes = Processes.start("cpu")
    model = build_model(config, processes, lambda _: None)
    held_out = build_held_out(config, model, build_prompts(config)[1], build_reward(config, CPU), processes)
    model.prepare(held_out.prompts)
    found = held_out.evaluate(model.network, config.evaluation.samples_per_prompt)
    return found["reward/selected"].double()


def interval(differences: Tensor) -> tuple[float, float, float]:
    """Return the mean of ``differences`` [clips] and the ends of its 95 % bootstrap interval over clips."""
    random = torch.Generator().manual_seed(0)
    picks = torch.randint(len(differences), (RESAMPLES, len(differences)), generator=random)
    low, high = differences[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(differences.mean()), float(low), float(high)


HEADER = [
    "seed",
    "exact",
    "fast",
    "fast - exact",
    "processor, s",
    "share",
    "clock, s",
    "share",
    "stages, s",
    "share",
]


def table(folder: Path, seeds: Sequence[int]) -> Table:
    """Return a table with a line for each seed and one for all of them."""
    lines, differences, times = [], [], []
    for seed in seeds:
        exact, fast = Run(folder, EXACT, seed), Run(folder, FAST, seed)
        rewards = final_rewards(exact), final_rewards(fast)
        differences.append(rewards[1] - rewards[0])
        times.append((exact.took(), fast.took()))
        means = [f"{float(values.mean()):.3f}" for values in rewards]
        lines.append([str(seed), *means, _change(differences[-1]), *_shares(times[-1:])])
    lines.append(["all", "", "", _change(torch.cat(differences)), *_shares(times)])
    return Table(HEADER, lines, [])


def list_table(folder: Path, settings: Sequence[str], seed: int) -> Table:
    """Return a table with a line for each run: its held-out gain, and its time without start, evaluation and end."""
    lines = []
    for name in settings:
        run = Run(folder, f"{FAST} {name}", seed)
        took, found = run.took(), run.summary()["measures"]["reward/selected"]
        seconds = took.cpu * took.stages / took.clock
        gain = found["difference"]
        lines.append(
            [
                f"`{name}`" if name else "fast mode",
                f"{gain:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})",
                f"{seconds:.0f}",
                f"{100 * gain / seconds:.2f}",
            ]
        )
    return Table(["settings", "gain", "processor, s", "gain in 100 s"], lines, [])


def _change(differences: Tensor) -> str:
    mean, low, high = interval(differences)
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _shares(times: Sequence[tuple[Took, Took]]) -> list[str]:
    cells = []
    for name in ("cpu", "clock", "stages"):
        exact, fast = (sum(getattr(pair[side], name) for pair in times) for side in (0, 1))
        cells += [f"{exact:.0f}, {fast:.0f}", f"{fast / exact:.2f}"]
    return cells


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="the folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument(
        "--cpus",
        type=int,
        nargs="+",
        default=sorted(os.sched_getaffinity(0)),
        help="cores to use, with one run at a time on each (default: all)",
    )
    parser.add_argument(
        "--list", action="store_true", help="run the fast mode with other settings, for one seed"
    )
    parser.add_argument("--settings", nargs="+", help="the other settings (default: those of the page)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the page's markers")
    given = parser.parse_args(arguments)
    folder, seeds = given.runs.resolve(), given.seeds[:1] if given.list else given.seeds
    folder.mkdir(parents=True, exist_ok=True)
    others = given.settings or OTHERS
    every = [f"{FAST} {name}" for name in others] if given.list else [EXACT, FAST]
    try:
        make_all([Run(folder, settings, seed) for seed in seeds for settings in every], given.cpus)
        found = list_table(folder, others, seeds[0]) if given.list else table(folder, seeds)
        text = f"{hardware(CPU)}, torch {torch.__version__}, commit {commit()}:\n\n{found.markdown()}\n"
        print(text)
        if given.write is not None:
            page = replaced(given.write.read_text(encoding="utf-8"), text, *(LIST if given.list else MODES))
            given.write.write_text(page, encoding="utf-8")
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
