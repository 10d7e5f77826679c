"""Build the wheels of a release: vpo-kernels, and a vpo-engine that depends on it.

    python -m tools.wheels FOLDER

In a clone, vpo-engine holds the package vpo_kernels as well, so that ``pip install .`` needs no index that has
vpo-kernels. Two distributions that own the same files must not be installed side by side. So the wheel that is released
leaves the package out and names vpo-kernels, in its own version, among its dependencies. Both wheels are written to
FOLDER, from which ``pip install --find-links FOLDER vpo-engine`` installs them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("vpo_engine", "configs", "README.md", "LICENSE", "NOTICE")
"""What the wheel of the engine is made of, beside pyproject.toml and CMakeLists.txt."""


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, (
        f"{old!r} occurs {text.count(old)} times; change tools/wheels.py with the build files"
    )
    return text.replace(old, new)


def write_engine_alone(folder: Path) -> None:
    """Write the sources of an engine that depends on vpo-kernels in place of holding its package."""
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    project, build = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CMakeLists.txt")
    )
    version = tomllib.loads((ROOT / "kernels/pyproject.toml").read_text(encoding="utf-8"))["project"][
        "version"
    ]
    project = replaced(
        project, "\ndependencies = [\n", f'\ndependencies = [\n    "vpo-kernels=={version}",\n'
    )
    project = replaced(project, '["vpo_engine", "kernels/vpo_kernels"]', '["vpo_engine"]')
    project = replaced(project, 'wheel.py-api = "cp312"', 'wheel.py-api = "py3"\nwheel.platlib = false')
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    (folder / "CMakeLists.txt").write_text(
        replaced(build, "add_subdirectory(kernels)\n", ""), encoding="utf-8"
    )


def build_wheels(out: Path) -> None:
    """Let pip build both wheels, each in an environment of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_engine_alone(Path(folder))
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out.resolve())]
        subprocess.run([*command, folder, str(ROOT / "kernels")], check=True, cwd=folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the wheels are written")
    build_wheels(parser.parse_args(arguments).folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
