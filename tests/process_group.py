"""Run a function in several processes that form a group, as torchrun would, at a fraction of its start-up time.

Importing the engine takes several seconds, which a test would otherwise pay once per process. Here a fork server
imports it once per pytest worker, and every process of every test is a fork of that server.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection, forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = [
    "unsynced",
    "pytest",
    "torch.distributed.fsdp",
    "torch.multiprocessing",
    "vpo_engine.train",
    "vpo_engine.training",
    "peft",
    "bitsandbytes",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]


@functools.cache
def fork_server() -> ForkServerContext:
    """Start the server once per pytest worker, with one thread: a fork may not inherit a pool of threads."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads
    return context


def _member(
    environment: dict[str, str],
    threads: int,
    output: str,
    function: Callable[..., int | None],
    arguments: Any,
) -> None:
    from vpo_engine import trainer, training  # which the server has imported
    from vpo_engine.model_values import RowFlops

    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(threads)
    gc.freeze()  # what the server imported stays to the end: no search for garbage goes through it
    gc.set_threshold(20_000)
    training.check_fits = lambda config, *_: (config, "")
    trainer.matrix_rate = functools.partial(trainer.matrix_rate, seconds=0.03)
    trainer.count_row_flops = lambda *_: RowFlops(1e9, 3e9)
    sys.exit(function(*arguments))


LAST_WORDS = 20.0
"""Seconds that the other processes of a group have to end by themselves when one has ended wrongly."""


class Group:
    """Processes that call ``function(*arguments)``, started in a group as torchrun starts them, or one alone.

    A run in them is not planned, the device is measured for a moment only, and operations are not counted: each of
    these takes seconds in every process.

    Their store is here, as it is in torchrun's agent: it listens at a port that the system chose for it, so that no
    other group can take the port between the choice and the use.

    folder: where each process's output is kept. threads: of torch, in each process.
    """

    def __init__(
        self, folder: Path, count: int, function: Callable[..., int | None], *arguments: Any, threads: int = 1
    ) -> None:
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=30)
        )
        shared = {
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        self._outputs = [folder / f"output_{rank}.txt" for rank in range(count)]
        self.processes = [
            fork_server().Process(
                target=_member,
                args=(
                    {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    threads,
                    str(self._outputs[rank]),
                    function,
                    arguments,
                ),
                daemon=True,  # ends with pytest, should a test fail before it waits
            )
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def wait(self, expected: int | Sequence[int] = 0, seconds: float = 900) -> str:
        """Wait until every process has ended, check its exit code, and return what they printed, rank by rank.

        expected: the exit code of all, or of each. When one ends with another code, the others would wait for it in
        vain: they get ``LAST_WORDS`` seconds, not ``seconds``.
        """
        expected = [expected] * len(self.processes) if isinstance(expected, int) else list(expected)
        running = dict(zip(self.processes, expected, strict=True))
        deadline = time.monotonic() + seconds
        while running and (left := deadline - time.monotonic()) > 0:
            ended = connection.wait([process.sentinel for process in running], left)
            for process in [each for each in running if each.sentinel in ended]:
                process.join()
                if process.exitcode != running.pop(process):
                    deadline = min(deadline, time.monotonic() + LAST_WORDS)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        printed = self.printed()
        assert codes == expected, f"exit codes {codes} (None: did not end)\n{printed}"
        return printed

    def printed(self) -> str:
        """Return what the processes have printed until now, rank by rank."""
        return "".join(path.read_text(errors="replace") for path in self._outputs if path.exists())


def run_in_group(
    folder: Path, count: int, function: Callable[..., int | None], *arguments: Any, threads: int = 1
) -> str:
    """Call ``function(*arguments)`` in a group of ``count`` processes, which must succeed; return what they printed."""
    return Group(folder, count, function, *arguments, threads=threads).wait()
