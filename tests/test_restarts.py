"""torchrun starts a run again by itself: it goes on from its newest checkpoint and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import Group, run_in_group
from safetensors.torch import load_file

from vpo_engine import train
from vpo_engine.online_vpo import OnlineVPO

SETTINGS = ("checkpoint.every=2", "checkpoint.keep=9", "evaluation.every=null")
WORKER = """
import os, signal, sys
from vpo_engine import train, training
from vpo_engine.online_vpo import OnlineVPO

training.check_fits = lambda config, *_: (config, "")  # a plan takes seconds
step, made, attempt = OnlineVPO.step, [], int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def deadly(algorithm, *prompts):
    made.append(1)
    if os.environ["RANK"] == "1" and len(made) == 2 and attempt == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(algorithm, *prompts)

OnlineVPO.step = deadly
sys.exit(train.main(sys.argv[1:]))
"""


def torchrun(folder: Path, arguments: list[str]) -> tuple[int, str]:
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "--max-restarts=3", str(worker), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=folder)
    return ended.returncode, ended.stdout + ended.stderr


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints/step_00000004"
    return {
        f"{path.name}/{name}": value
        for path in folder.rglob("*.safetensors")
        for name, value in load_file(path).items()
    }


@pytest.mark.long
def test_a_killed_rank_ends_the_others_and_the_run_goes_on_by_itself(
    smallest: list[str], small_policy: str, tmp_path: Path
) -> None:
    """Without run_dir: the restarted run finds its directory again. The first attempt dies in step 2."""
    arguments = [*smallest, small_policy, *SETTINGS]
    code, said = torchrun(tmp_path, arguments)
    assert code == 0, said
    (run,) = [path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]
    assert "rank 0 lost another process while it waited for all of them in " in said
    assert "Traceback" not in said
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert [(line["from"], line["restart"]) for line in attempts if "from" in line] == [(0, 0), (0, 1)]
    assert "note: the attempt before began after step 0 as well, and saved nothing" in said
    whole = tmp_path / "whole"
    run_in_group(tmp_path, 2, train.main, [*arguments, f"run_dir={whole}"])
    found, expected = weights(run), weights(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def fail(arguments: list[str], restart: int) -> int:
    """Train, as torchrun's attempt number ``restart``; rank 1 has the same error in step 2 of every attempt."""
    step, made = OnlineVPO.step, []

    def broken(algorithm: OnlineVPO, *prompts: Any) -> Any:
        made.append(1)
        if os.environ["RANK"] == "1" and len(made) == 2:
            raise ValueError(f"broken at {os.getpid()}")
        return step(algorithm, *prompts)

    OnlineVPO.step = broken  # type: ignore[method-assign]
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restart)
    return train.main(arguments)


@pytest.mark.long
def test_a_run_that_fails_in_the_same_way_again_says_so(
    smallest: list[str], small_policy: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [*smallest, small_policy, *SETTINGS, f"run_dir={run}"]
    Group(tmp_path, 2, fail, arguments, 0).wait(expected=1)
    said = Group(tmp_path, 2, fail, arguments, 1).wait(expected=1)
    assert (
        "note: the attempt before began after step 0 as well, and saved nothing; the last ended in step 2 by an error "
        "of rank 1: broken at "
    ) in said
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert [line["from"] for line in attempts if "from" in line] == [0, 0]
    assert [(line["step"], line["rank"]) for line in attempts if "error" in line] == [(2, 1), (2, 1)]


FAKES = {
    "scontrol": 'echo "scontrol $*" >> "$LOG"; [ "$1" != show ] || printf "node1\\nnode2\\n"',
    "srun": """trap "echo told >> $LOG; exit 1" TERM; echo "srun $*" >> "$LOG"
for i in $(seq $WAIT); do sleep 0.05; done""",
}


def slurm(folder: Path, wait: int) -> subprocess.Popen[bytes]:
    """Start examples/slurm.sh with stand-ins for Slurm's programs; srun takes ``wait`` twentieths of a second."""
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "LOG": str(folder / "log"),
        "WAIT": str(wait),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
    }
    script = Path(__file__).parents[1] / "examples/slurm.sh"
    return subprocess.Popen(["bash", str(script), "my.yaml", "steps=9"], env=environment)


def log_of(folder: Path) -> str:
    return (folder / "log").read_text() if (folder / "log").exists() else ""


def has_a_trap(pid: int) -> bool:
    """Return whether a process catches SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def test_the_slurm_script_starts_torchrun_on_every_machine(tmp_path: Path) -> None:
    assert slurm(tmp_path, 1).wait(120) == 0
    shown, started = (tmp_path / "log").read_text().splitlines()
    assert shown == "scontrol show hostnames node[1-2]"
    assert started == (
        "srun --kill-on-bad-exit=1 torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id=17 "
        "--rdzv-endpoint=node1:29500 --max-restarts=3 --shutdown-timeout=240 -m vpo_engine.train my.yaml steps=9 "
        "run_dir=runs/slurm-17"
    )


def test_the_slurm_script_goes_back_into_the_queue_after_the_run_has_saved(tmp_path: Path) -> None:
    job = slurm(tmp_path, 4000)
    while job.poll() is None and not ("srun" in log_of(tmp_path) and has_a_trap(job.pid)):
        time.sleep(0.02)
    job.terminate()
    assert job.wait(120) == 0
    assert (tmp_path / "log").read_text().splitlines()[2:] == ["told", "scontrol requeue 17"]
