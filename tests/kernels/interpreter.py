"""Runs tests in a process in which Triton interprets its kernels, so that they need no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_interpreted(*modules: str | Path, select: str = "", timeout_s: float = 1200) -> None:
    """Run test modules of this folder with TRITON_INTERPRET=1, and fail with their output.

    It takes another process, because Triton decides between interpreter and compiler when a kernel is defined.
    ``select`` is pytest's -k. It is a failure, too, if nothing ran or anything was skipped.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", select]
    done = subprocess.run(
        [*command, *(str(HERE / module) for module in modules)],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    summary = done.stdout.strip().rpartition("\n")[2]
    if done.returncode or " passed" not in summary or "skipped" in summary:
        pytest.fail(f"{' '.join(map(str, modules))} with TRITON_INTERPRET=1:\n{done.stdout}", pytrace=False)
