"""Install the wheels of a release in clean environments, and run there what the README promises.

    python -m tools.wheels dist
    python -m tools.check_release dist [--python PYTHON] [--torch VERSION ...] [--kernels-torch VERSION ...] [--whole]

For every PYTHON and torch VERSION, an environment of its own gets vpo-engine from the folder. In it run ``vpo doctor``,
the default training (a few steps, or with --whole all of it) and the embedding example. Other environments get
vpo-kernels alone, with the oldest and the newest torch that it claims, and run the embedding example: once with the
C++ kernels, once with the wheel for every machine. Source archives in the folder must build their own wheels. One line
is printed for each check. The environments are removed. It takes uv (the extra "release") and gigabytes of torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from tools.wheels import ROOT, check_contents

FEW_STEPS = (
    "steps=3",
    "pairs_per_step=4",
    "evaluation.samples_per_prompt=1",
    "evaluation.samples_between=1",
    "evaluation.every=3",
    "checkpoint.every=3",
)
"""Settings that shorten the default training to seconds."""
_BACKENDS = (
    "from vpo_kernels import available_backends; found = available_backends('cpu'); "
    "print(*[name for name, obstacle in found.items() if not obstacle])"
)
_VERSIONS = (
    "import platform, torch, importlib.metadata as m; names = {d.name for d in m.distributions()}; "
    "print(platform.python_version(), torch.__version__, 'vpo-engine' in names, 'vpo-kernels' in names)"
)


@dataclass
class Environment:
    """A virtual environment, and an empty folder in which its commands run."""

    folder: Path

    @classmethod
    def create(cls, folder: Path, python: str, packages: Sequence[str], wheels: Path) -> Environment:
        """Make an environment for an interpreter with packages; those of this project come from a folder of wheels."""
        uv = [sys.executable, "-m", "uv"]
        call([*uv, "venv", "-q", "--python", python, str(folder / "venv")])
        target = ["--python", str(folder / "venv" / "bin" / "python"), "--find-links", str(wheels)]
        call([*uv, "pip", "install", "-q", *target, *packages])
        (folder / "work").mkdir()
        return cls(folder)

    def run(self, *command: str) -> str:
        """Run one of the environment's commands in its folder, and return what it printed."""
        return call([str(self.folder / "venv" / "bin" / command[0]), *command[1:]], self.folder / "work")

    def embed_loss(self, backends: str) -> str:
        """Run the embedding example. It must learn, with exactly these backends at hand."""
        found = sorted(self.run("python", "-c", _BACKENDS).split())
        if found != backends.split():
            hint = (
                "; the folder may lack a wheel with the C++ kernels for this Python (tools.wheels --python)"
            )
            raise ValueError(
                f"the backends that run are {' '.join(found)}, not {backends}{hint if 'native' not in found else ''}"
            )
        shutil.copy(ROOT / "examples" / "embed_loss.py", self.folder / "work")
        said = self.run("python", "embed_loss.py").strip()
        numbers = re.fullmatch(r"margin at the first step (\S+), just before the first refresh (\S+)", said)
        if not numbers or float(numbers[1]) != 0 or float(numbers[2]) <= 0:
            raise ValueError(f"the embedding example printed {said!r}")
        return f"{' and '.join(found)}: {said}"


def call(command: Sequence[str], folder: Path | None = None) -> str:
    """Run a command without this process's Python paths, and return what it printed. ValueError if it fails."""
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return done.stdout


def train_by_default(environment: Environment, whole: bool) -> str:
    """Run the default training; it must leave a report and a policy. Return what it printed last, if it ran whole."""
    settings = () if whole else FEW_STEPS
    said = environment.run("torchrun", "-m", "vpo_engine.train", "run_dir=run", *settings)
    run = environment.folder / "work" / "run"
    absent = [name for name in ("report.html", "checkpoints") if not (run / name).exists()]
    if absent:
        raise ValueError(f"the training left no {absent[0]}; it printed:\n{said[-3000:]}")
    return said if whole else "a report and checkpoints"


def newest(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(
            f"{folder} holds {len(found)} files {pattern}, not one; write it with: python -m tools.wheels {folder}"
        )
    return found[0].resolve()


class Checks:
    """The checks, each a printed line with its seconds."""

    def __init__(self, wheels: Path) -> None:
        self.wheels = wheels.resolve()
        self.failed = 0

    def check(self, name: str, work: Callable[[], str]) -> None:
        started = time.perf_counter()
        try:
            state, said = "ok", work()
        except ValueError as error:
            state, said = "FAILED", str(error)
            self.failed += 1
        print(f"{state:6} {time.perf_counter() - started:6.1f} s  {name}: {said}", flush=True)

    def contents(self) -> str:
        found = sorted(self.wheels.glob("vpo_*.whl"))
        for wheel in found:
            check_contents(wheel)
        newest(self.wheels, "vpo_engine-*-py3-none-any.whl")
        newest(self.wheels, "vpo_kernels-*-py3-none-any.whl")
        return f"{len(found)} wheels hold the files of their package and nothing else"

    def archives(self) -> None:
        for archive in sorted(self.wheels.glob("vpo_*.tar.gz")):
            self.check(f"source archive {archive.name}", partial(self.rebuilt, archive))

    def rebuilt(self, archive: Path) -> str:
        with tempfile.TemporaryDirectory() as folder:
            call([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(archive)])
            (wheel,) = Path(folder).glob("*.whl")
            check_contents(wheel)
            return f"builds {wheel.name}"

    def engine(self, python: str, torch: str, whole: bool) -> None:
        """Check the engine with its default training and the embedding example."""
        with tempfile.TemporaryDirectory(prefix="vpo-") as folder:
            made: list[Environment] = []

            def install() -> str:
                packages = [str(newest(self.wheels, "vpo_engine-*.whl")), f"torch=={torch}"]
                made.append(Environment.create(Path(folder), python, packages, self.wheels))
                version, found, *_ = made[0].run("python", "-c", _VERSIONS).split()
                return f"Python {version}, torch {found}"

            self.check(f"engine, {python}, torch {torch}: install", install)
            if made:
                self.check("  vpo doctor", lambda: f"{len(made[0].run('vpo', 'doctor').splitlines())} lines")
                self.check("  embedding example", lambda: made[0].embed_loss("native reference"))
                self.check("  default training", lambda: train_by_default(made[0], whole))

    def kernels(self, python: str, torch: str) -> None:
        """Check vpo-kernels alone: the wheel that pip picks, and the one for every machine."""
        pure = str(newest(self.wheels, "vpo_kernels-*-py3-none-any.whl"))
        for packages, backends in ((["vpo-kernels"], "native reference"), ([pure], "reference")):
            with tempfile.TemporaryDirectory(prefix="vpo-") as folder:

                def work(
                    folder: str = folder, packages: list[str] = packages, backends: str = backends
                ) -> str:
                    made = Environment.create(
                        Path(folder), python, [*packages, f"torch=={torch}"], self.wheels
                    )
                    if made.run("python", "-c", _VERSIONS).split()[2:] != ["False", "True"]:
                        raise ValueError("the environment does not hold vpo-kernels alone")
                    return made.embed_loss(backends)

                self.check(f"kernels alone, {python}, torch {torch}", work)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what python -m tools.wheels wrote")
    parser.add_argument(
        "--python", action="append", metavar="PYTHON", help="an interpreter; default: this one"
    )
    parser.add_argument("--torch", nargs="*", default=["2.15.0"], metavar="VERSION", help="for the engine")
    parser.add_argument("--kernels-torch", nargs="*", default=["2.6.0", "2.15.0"], metavar="VERSION")
    parser.add_argument("--whole", action="store_true", help="run all steps of the default training")
    given = parser.parse_args(arguments)
    if find_spec("uv") is None:
        print("error: this needs the package uv; install it with: pip install '.[release]'", file=sys.stderr)
        return 1
    checks = Checks(given.folder)
    checks.check("contents", checks.contents)
    checks.archives()
    for python in given.python or [sys.executable]:
        for torch in given.torch:
            checks.engine(python, torch, given.whole)
        for torch in given.kernels_torch:
            checks.kernels(python, torch)
    print(f"{checks.failed} checks failed" if checks.failed else "all checks passed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
