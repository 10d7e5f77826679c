"""Train for many short steps, and judge whether memory, open files, threads, file traffic or time grow with them.

    python bench/soak.py [--steps 10000] [--model sprites] [--folder FOLDER] [--record]

The model is the sprites world at its smallest: a policy of one narrow block, clips of 5 frames of 16 x 16 pixels. With
--model own it is that of examples/own_model.py in videos of 3 frames, whose steps are a third as long. There are two
candidates and two sampling steps. All else is switched on as in a real run: prompt files, text embeddings on disk,
evaluations with a held-out reward and guards, a moving average, the preference dataset with latents, TensorBoard,
refreshes of the reference, checkpoints in the background, galleries, and the report at the end. The run is stopped by
SIGTERM at half of its steps, and the same command goes on with it in a new process.

Each start counts what it holds at every ``EVERY``-th step, between evaluations and checkpoints, after a collection
of garbage. ``judge`` draws a line through what a start held after its first ``WARM_UP`` steps. The exit code is 1 if
anything grows. --record adds the figures to ``bench/results/soak.jsonl``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

EVERY = 50
"""Steps between two counts, as between evaluations and between checkpoints."""
WARM_UP = 150
"""Steps of a start that are not judged: windows of the last hundred steps, and pools of memory, fill up in them."""
SETTINGS = (
    "reward.kind=soak_model:Brightness",
    "guards.reward.kind=soak_model:Contrast",
    "pairs_per_step=1",
    "pairs.dataset=latents",
    "pairs.resample=1",
    "rollout.candidates=2",
    "rollout.steps=2",
    "rollout.guidance=1",
    "rollout.overlap=true",
    "objective.beta=1",
    "objective.timesteps_per_pair=1",
    "reference.refresh_every=10",
    "optimizer.lr=0.000001",
    "ema.decay=0.999",
    "evaluation.prompts=2",
    f"evaluation.every={EVERY}",
    f"checkpoint.every={EVERY}",
    "checkpoint.background=true",
)


MODELS = {"sprites": "soak_model:ShortSprites", "own": "soak_model:Smallest"}


@dataclass(frozen=True)
class Count:
    """The holdings of a process after a step, and what it has used since it began.

    blocks: objects and buffers of Python's allocator. allocated: bytes that malloc has given out. resident: bytes in
    memory. handles: open files. traffic: bytes read and written. processor, clock: seconds.
    """

    step: int
    blocks: int
    allocated: int
    resident: int
    handles: int
    threads: int
    traffic: int
    processor: float
    clock: float


@dataclass(frozen=True)
class Bound:
    """The largest growth of a quantity that is not taken for a leak."""

    name: str
    unit: str
    most: float
    reason: str


BOUNDS = (
    Bound("blocks", "a step", 2.0, "caches of Python and torch still fill up, ever more slowly; a leak stays"),
    Bound("allocated", "bytes a step", 1000, "1 kB a step is 10 MB in 10,000 steps, and a tensor is never smaller"),
    Bound("handles", "in all", 0, "a step opens and closes the same files"),
    Bound("threads", "in all", 0, "a step starts and ends the same threads"),
    Bound("traffic", "of the first quarter", 0.05, "a file that is read or written whole at every step doubles it"),
)  # fmt: skip
LONG_BOUNDS = (
    Bound("blocks", "a step", 0.5, "an object that is kept at every step is at least one block a step"),
    Bound("resident", "bytes a step", 2000, "the system's pages are coarse: 2 kB a step is 20 MB in 10,000 steps"),
    Bound("processor", "of the first decile", 0.3, "work that grows with the steps doubles; the rest is the machine's"),
)  # fmt: skip
"""What is judged over thousands of steps only."""
LONG = 2000


def count(step: int) -> Count:
    """Count what this process holds."""
    gc.collect()
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Count(
        step,
        sys.getallocatedblocks(),
        _allocated(),
        pages * os.sysconf("SC_PAGE_SIZE"),
        len(os.listdir("/proc/self/fd")) - 1,
        threading.active_count(),
        int(io["rchar"]) + int(io["wchar"]),
        time.process_time(),
        time.perf_counter(),
    )


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _allocated() -> int:
    """Return the bytes that glibc's malloc has given out, in all of its arenas and mapped ones."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo2
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


def train(folder: Path, model: str, overrides: Sequence[str]) -> int:
    """Train in this process, and write a count to ``folder/counts.jsonl`` at every ``EVERY``-th step."""
    from vpo_engine import line_files
    from vpo_engine import train as entry
    from vpo_engine.runs.log import RunLog

    line_files.PART_BYTES = 2**20  # so that logs have several parts
    write = RunLog.write
    counts = (folder / "counts.jsonl").open("a")
    stop = next((int(word[5:]) for word in overrides if word.startswith("stop=")), None)

    def counted(self: RunLog, step: int, kind: Any, metrics: Mapping[str, float]) -> None:
        write(self, step, kind, metrics)
        if kind == "train" and step % EVERY == EVERY // 2:
            found = {"pid": os.getpid(), **vars(count(step))}
            counts.write(json.dumps(found) + "\n")
            counts.flush()
        if kind == "train" and step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    RunLog.write = counted  # type: ignore[method-assign]
    words = [word for word in overrides if not word.startswith("stop=")]
    return entry.main([*SETTINGS, *_files(folder, model), f"run_dir={folder / 'run'}", *words])


def _files(folder: Path, model: str) -> list[str]:
    return [
        f"model.kind={MODELS[model]}",
        *([f"model.policy={folder / 'policy'}"] if model == "sprites" else []),
        f"prompts.train={folder / 'train.txt'}",
        f"prompts.held_out={folder / 'held_out.txt'}",
        f"prompts.cache={folder / 'embeddings'}",
    ]


def soak(folder: Path, steps: int, model: str = "sprites") -> list[list[Count]]:
    """Make the whole run in ``folder``, in two starts; return the counts of each."""
    from soak_model import write_inputs

    write_inputs(folder)
    for number, words in enumerate(([f"stop={steps // 2}"], [])):
        command = [sys.executable, __file__, "--child", str(folder), model, f"steps={steps}", *words]
        code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
        if code != (128 + signal.SIGTERM, 0)[number]:
            raise SystemExit(f"start {number + 1} of the run ended with exit code {code}")
    return read_counts(folder)


def read_counts(folder: Path) -> list[list[Count]]:
    """Return the counts of each start of the run."""
    starts: dict[int, list[Count]] = {}
    for line in (folder / "counts.jsonl").read_text().splitlines():
        values = json.loads(line)
        starts.setdefault(values.pop("pid"), []).append(Count(**values))
    return list(starts.values())


def growth(counts: Sequence[Count], name: str) -> float:
    """Return how much a quantity grew over the counts, in the unit of its ``Bound``."""
    values = [getattr(each, name) for each in counts]
    if name in ("handles", "threads"):
        half = len(values) // 2
        return float(max(values[half:]) - max(values[:half]))
    if name in ("traffic", "processor"):
        parts = 4 if name == "traffic" else 10
        spent = [later - sooner for sooner, later in pairwise(values)]
        size = max(1, len(spent) // parts)
        return statistics.median(spent[-size:]) / statistics.median(spent[:size]) - 1
    return statistics.linear_regression([each.step for each in counts], values).slope


def judge(starts: Sequence[Sequence[Count]], steps: int) -> list[str]:
    """Return a line for every quantity that grows in one of the starts by more than its bound."""
    faults = []
    for number, counts in enumerate(starts, start=1):
        settled = [each for each in counts if each.step >= counts[0].step + WARM_UP]
        for bound in (*BOUNDS, *(LONG_BOUNDS if steps >= LONG else ())):
            found = growth(settled, bound.name)
            if found > bound.most:
                faults.append(
                    f"start {number}: {bound.name} grows by {found:.3g} {bound.unit}, more than {bound.most:g} "
                    f"({bound.reason})"
                )
    return faults


def figures(starts: Sequence[Sequence[Count]], folder: Path) -> dict[str, float]:
    """Return the numbers of the record: levels along the run, growth, time of a step, and sizes of files."""
    together = [each for counts in starts for each in counts]
    found: dict[str, float] = {}
    for share, name in ((0.1, "tenth"), (0.5, "half"), (1.0, "end")):
        at = together[max(0, round(share * len(together)) - 1)]
        found |= {f"{name}_step": at.step, f"{name}_resident_bytes": at.resident, f"{name}_blocks": at.blocks}
        found |= {f"{name}_handles": at.handles, f"{name}_threads": at.threads}
    for number, counts in enumerate(starts, start=1):
        settled = [each for each in counts if each.step >= counts[0].step + WARM_UP]
        for bound in (*BOUNDS, *LONG_BOUNDS):
            found[f"start_{number}_{bound.name}_growth"] = growth(settled, bound.name)
        for clock in ("processor", "clock"):
            spent = [
                (getattr(later, clock) - getattr(sooner, clock)) / (later.step - sooner.step)
                for sooner, later in pairwise(settled)
            ]
            size = max(1, len(spent) // 10)
            found[f"start_{number}_first_decile_{clock}_seconds"] = statistics.median(spent[:size])
            found[f"start_{number}_last_decile_{clock}_seconds"] = statistics.median(spent[-size:])
    run = folder / "run"
    for name, pattern in (
        ("log", "metrics*.jsonl"),
        ("events", "tensorboard/*"),
        ("pairs", "preference_dataset/*.jsonl"),
        ("latents", "preference_dataset/latents/*"),
        ("report", "report.html"),
    ):
        files = list(run.glob(pattern))
        found |= {f"{name}_files": len(files), f"{name}_bytes": sum(each.stat().st_size for each in files)}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--child"]:
        return train(Path(words[1]), words[2], words[3:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=10_000, help="steps of the run, at least 1000 (default: 10000)"
    )
    parser.add_argument("--model", choices=MODELS, default="sprites", help="default: sprites")
    parser.add_argument(
        "--folder", type=Path, help="a new folder for the run, which is kept; default: one that is not"
    )
    parser.add_argument("--record", action="store_true", help="add the figures to bench/results")
    given = parser.parse_args(words)
    if given.steps < 1000:
        parser.error(f"--steps {given.steps} is too few to tell growth from noise; give at least 1000")
    with tempfile.TemporaryDirectory() as place:
        folder = given.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        starts = soak(folder, given.steps, given.model)
        found = figures(starts, folder)
    for name, value in found.items():
        print(f"{name:40} {value:.6g}")
    if given.record:
        _record(given.steps, given.model, found)
    faults = judge(starts, given.steps)
    print(*(faults or ["nothing grows"]), sep="\n")
    return 1 if faults else 0


def _record(steps: int, model: str, found: Mapping[str, float]) -> None:
    import torch
    from rows import Row, environment, record

    command = f"python bench/soak.py --steps {steps} --model {model}"
    case = {"steps": str(steps), "model": model}
    record([Row("soak", case, dict(found), environment(torch.device("cpu"), command))])


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # for the model of examples/
    sys.exit(main())
