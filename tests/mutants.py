"""Apply meaningful mistakes to copies of the tree, one at a time, and report which test notices each.

    python tests/mutants.py [NAME ...] [--piece 1/10] [--jobs 2] [--list]

A NAME selects all mutations whose name contains it; without one all are tried. --piece 1/10 tries a tenth of them, and
keeps those with the same tests together: all ten pieces, on one machine or on several, are the whole list.

First the tests of the selected mutations run on the tree as it is, and must pass. Then each mutation is applied to a
copy, its tests run, and a line says which test failed. The exit code is 1 if a mutation survives, which means that no
test failed, or if one is stale: its old text must occur exactly once in its file (spaces, line breaks and a trailing
comma aside). Nothing is tried before all selected mutations fit. The lists are in ``tests/mutations``.

One process imports torch and whatever else comes from outside of the tree. It forks a child for each mutation, which
then takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("vpo_engine", "kernels", "tests", "bench", "configs", "examples", "pyproject.toml")
STARTED = ("vpo_engine.train", "pytest", "torch.testing")
"""Modules whose imports from outside of the tree are made once, before the children are forked."""
WHOLE = "(the tree as it is)"
TIME_LIMIT = 180.0
"""Seconds after which a mutation that hangs counts as noticed; more where the tests on the tree as it is took more than
a third of that, as on a busy machine. The tree has so many seconds for each group of tests."""


@dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new`` in ``file``; ``tests`` are arguments of pytest, of which one must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass
class Result:
    """The outcome of the tests of one mutation."""

    name: str
    verdict: str
    by: str = ""
    seconds: float = 0.0
    output: str = field(default="", repr=False)

    @property
    def killed(self) -> bool:
        return self.verdict == "killed"


class StaleError(ValueError):
    """The old text of a mutation is not in its file exactly once."""


def mutated(source: str, mutation: Mutation) -> str:
    """The source with the mutation; StaleError if there is not exactly one place for it."""
    tokens = re.findall(r"\w+|[^\w\s]", mutation.old)
    parts = [rf",?\s*{re.escape(token)}" if token in ")]}" else re.escape(token) for token in tokens]
    found = list(
        re.finditer(r"(?<!\w)" + r"\s*".join(parts) if tokens[0][0].isalnum() else r"\s*".join(parts), source)
    )
    if len(found) != 1:
        raise StaleError(
            f"{mutation.name}: its old text occurs {len(found)} times in {mutation.file}, expected once; adapt it to "
            "the code as it is now"
        )
    (place,) = found
    result = source[: place.start()] + mutation.new + source[place.end() :]
    compile(result, mutation.file, "exec")
    return result


def copy_tree(to: Path) -> None:
    """Links to the files of the tree in folders of their own."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, copy_function=os.symlink)
        elif source.exists():
            (to / name).symlink_to(source)


class _FirstFailure:
    """A plugin of pytest that notes the first test that fails, or the module that cannot be imported."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = f"import of {report.nodeid}"


def run_tests(tree: Path, tests: Sequence[str]) -> None:
    """In a child: run pytest in ``tree``, write what came out to ``tree``/result.json, and end the process."""
    import pytest

    os.setsid()
    log = os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(tree)
    places = [str(tree), str(tree / "kernels")]
    outside = [place for place in sys.path if not Path(place or ".").resolve().is_relative_to(ROOT)]
    sys.path[:] = [*places, *outside]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
    os.environ |= {"PYTHONPATH": os.pathsep.join(places), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    first = _FirstFailure()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={tree}"]
    code = int(pytest.main([*options, *tests], plugins=[first]))
    module = sys.modules.get("vpo_engine")
    own = module is None or str(getattr(module, "__file__", tree)).startswith(str(tree))
    (tree / "result.json").write_text(json.dumps({"code": code, "failed": first.failed, "own": own}))
    sys.stdout.flush()
    os._exit(0)


@dataclass
class Job:
    """A child at work."""

    mutation: Mutation
    tree: Path
    pid: int
    started: float


def start(mutation: Mutation, scratch: Path) -> Job:
    tree = Path(tempfile.mkdtemp(dir=scratch))
    copy_tree(tree)
    if mutation.file:
        place = tree / mutation.file
        text = mutated(place.read_text(encoding="utf-8"), mutation)
        place.unlink()
        place.write_text(text, encoding="utf-8")
    pid = os.fork()
    if pid == 0:
        try:
            run_tests(tree, mutation.tests)
        finally:
            os._exit(3)
    return Job(mutation, tree, pid, time.monotonic())


def end(job: Job, in_time: bool, limit: float) -> Result:
    """Return the result of a child process that ended or was stopped after ``limit`` seconds."""
    seconds = time.monotonic() - job.started
    output = job.tree / "output.txt"
    text = output.read_text(errors="replace") if output.exists() else ""
    result = job.tree / "result.json"
    found = json.loads(result.read_text()) if result.exists() else None
    shutil.rmtree(job.tree, ignore_errors=True)
    name = job.mutation.name
    if not in_time:
        return Result(name, "killed", f"the time limit of {limit:.0f} s", seconds, text)
    if found is None:
        return Result(name, "killed", "the end of the process", seconds, text)
    if not found["own"]:
        return Result(name, "ERROR", "the tests imported another vpo_engine", seconds, text)
    if found["code"] in (1, 2) and found["failed"]:
        return Result(name, "killed", found["failed"], seconds, text)
    if found["code"] == 0:
        return Result(name, "SURVIVED", "", seconds, text)
    return Result(name, "ERROR", f"pytest ended with {found['code']}", seconds, text)


def work(mutations: Sequence[Mutation], jobs: int, limit: float) -> list[Result]:
    """Run all mutations, ``jobs`` at a time and each for at most ``limit`` seconds, and print a line for each."""
    results, waiting, running = [], list(mutations), []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(start(waiting.pop(0), Path(folder)))
            for job in list(running):
                ended = os.waitpid(job.pid, os.WNOHANG)[0] != 0
                late = time.monotonic() - job.started > limit
                if ended or late:
                    with suppress(ProcessLookupError, PermissionError):
                        os.killpg(job.pid, signal.SIGKILL)
                    if late and not ended:
                        os.waitpid(job.pid, 0)
                    running.remove(job)
                    results.append(end(job, not late, limit))
                    report(results[-1], f"{len(results)}/{len(mutations)}")
            time.sleep(0.02)
    return results


def report(result: Result, place: str) -> None:
    """Print the line of a mutation; ``place`` says how many are done."""
    said = "killed by" if result.killed else result.verdict
    if result.name == WHOLE:
        place, said = "", "passes" if result.verdict == "SURVIVED" else "fails"
    print(f"{place:>7} {result.name:<68} {said:<9} {result.by}  ({result.seconds:.1f} s)", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="part of the names of mutations; default: all"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="how many mutations are tried at a time; default: 2"
    )
    parser.add_argument("--list", action="store_true", help="print the names and the stale ones; try none")
    parser.add_argument(
        "--from",
        dest="source",
        default="mutations",
        metavar="MODULE",
        help="take the list MUTATIONS of this module, mutations.step for example; default: all",
    )
    parser.add_argument(
        "--piece", type=piece, default=(1, 1), metavar="K/N", help="try piece K of N pieces; default: 1/1"
    )
    given = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT / "tests"))
    everything = [Mutation(*row) for row in importlib.import_module(given.source).MUTATIONS]
    chosen = [one for one in everything if not given.names or any(name in one.name for name in given.names)]
    if not chosen:
        parser.error(f"no mutation is named like {', '.join(given.names)}")
    number, pieces = given.piece
    chosen.sort(key=lambda one: one.tests)
    chosen = chosen[len(chosen) * (number - 1) // pieces : len(chosen) * number // pieces]
    if len({one.name for one in everything}) < len(everything):
        parser.error("two mutations have the same name")
    stale = stale_ones(chosen)
    if given.list:
        print(*(one.name for one in chosen), sep="\n")
        print(f"{len(chosen)} mutations, {len(stale)} of them stale")
    for line in stale:
        print(f"STALE {line}")
    if given.list or stale:
        return 1 if stale else 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    preload()
    tests = tuple(dict.fromkeys(test for one in chosen for test in one.tests))
    groups = len({one.tests for one in chosen})
    (whole,) = work([Mutation(WHOLE, "", "", "", tests)], 1, groups * TIME_LIMIT)
    if whole.verdict != "SURVIVED":
        print(
            whole.output, f"The tests must pass before anything is changed, but {whole.by} failed.", sep="\n"
        )
        return 1
    results = work(chosen, given.jobs, max(TIME_LIMIT, 3 * whole.seconds))
    bad = [result for result in results if not result.killed]
    print(f"{len(results) - len(bad)} of {len(results)} mutations are killed")
    for result in bad:
        print(f"{result.verdict}: {result.name} {result.by}")
    return 1 if bad else 0


def piece(text: str) -> tuple[int, int]:
    """Return K and N of "K/N"."""
    number, _, pieces = text.partition("/")
    if not (number.isdecimal() and pieces.isdecimal() and 1 <= int(number) <= int(pieces)):
        raise argparse.ArgumentTypeError(f"{text!r} is no piece; give K/N with K from 1 to N, such as 1/10")
    return int(number), int(pieces)


def preload() -> None:
    """Import what the children would all import, but nothing of the tree itself."""
    said = f"import sys, {', '.join(STARTED)}; print(*sys.modules)"
    places = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": places}
    done = subprocess.run(
        [sys.executable, "-c", said], env=environment, capture_output=True, text=True, check=True
    )
    for name in done.stdout.split():
        if not name.startswith(("vpo_", "__")):
            with suppress(Exception):  # a name of sys.modules need not be importable
                importlib.import_module(name)


def stale_ones(chosen: Sequence[Mutation]) -> list[str]:
    """Return what is wrong with each mutation that does not fit the tree."""
    found = []
    for one in chosen:
        try:
            mutated((ROOT / one.file).read_text(encoding="utf-8"), one)
        except StaleError as error:
            found.append(str(error))
        except (FileNotFoundError, SyntaxError) as error:
            found.append(f"{one.name}: {error}")
    return found


if __name__ == "__main__":
    sys.exit(main())
