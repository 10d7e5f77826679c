"""The distribution vpo-kernels: the same package as in vpo-engine, for older Pythons and torches, with torch alone."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tools import wheels

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "kernels" / "vpo_kernels"


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def packages(folder: Path) -> dict[str, Path]:
    """Return the Python packages that a distribution holds, by name."""
    listed = project(folder)["tool"]["scikit-build"]["wheel"]["packages"]
    return {Path(each).name: (folder / each).resolve() for each in listed}


def test_both_distributions_hold_the_same_package_in_the_same_version() -> None:
    engine, kernels = project(ROOT), project(ROOT / "kernels")
    assert kernels["project"]["name"] == "vpo-kernels"
    assert kernels["project"]["version"] == engine["project"]["version"]
    assert packages(ROOT / "kernels") == {"vpo_kernels": SOURCES}
    assert packages(ROOT)["vpo_kernels"] == SOURCES
    assert kernels["build-system"] == engine["build-system"]
    builds = [each["tool"]["scikit-build"] for each in (engine, kernels)]
    assert builds[0]["wheel"]["py-api"] == builds[1]["wheel"]["py-api"]


def test_the_engines_build_takes_the_native_kernels_from_the_folder_of_vpo_kernels() -> None:
    assert "add_subdirectory(kernels)" in (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert (ROOT / "kernels" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_it_needs_torch_alone_and_serves_the_pins_of_public_trainers() -> None:
    found = project(ROOT / "kernels")["project"]
    assert found["dependencies"] == ["torch>=2.6"]
    assert found["requires-python"] == ">=3.10"
    assert list(found["optional-dependencies"]) == ["triton"]


@pytest.mark.parametrize(
    "file", sorted(SOURCES.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCES))
)
def test_sources_parse_as_python_3_10(file: Path) -> None:
    ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_sources_import_nothing_but_python_torch_and_triton() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton", "vpo_kernels", "flash_attn", "xformers"}
    newer = {"tomllib"}  # modules that Python 3.10 has not
    found: set[str] = set()
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            found.update(name.partition(".")[0] for name in names)
    assert found - (allowed - newer) == set()


def test_an_old_triton_is_told_from_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.6 and 2.7 bring one that does not compile the kernels; plain torch takes over there."""
    triton = pytest.importorskip("triton")
    spec = importlib.util.find_spec("vpo_kernels.triton_parts")
    assert spec is not None
    assert spec.loader is not None
    for version, old in (
        ("3.2.0", True),
        ("3.3.1+git1", True),
        ("3.4.0", False),
        ("3.10.0", False),
        ("4.0.0", False),
    ):
        monkeypatch.setattr(triton, "__version__", version)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclass looks for it there
        if not old:
            spec.loader.exec_module(module)
            continue
        with pytest.raises(ImportError, match=rf"^triton {version.replace('+', '.')} is too old; .*need 3.4"):
            spec.loader.exec_module(module)


@pytest.mark.long
def test_the_wheels_of_a_release_share_no_file_and_the_engine_depends_on_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip builds all, each in an environment of its own; without optimisation, for speed."""
    monkeypatch.setenv("SKBUILD_CMAKE_BUILD_TYPE", "Debug")
    assert wheels.main([str(tmp_path), "--no-archives"]) == 0
    engine, kernels, pure = sorted(tmp_path.glob("*.whl"))
    assert pure.name == f"vpo_kernels-{project(ROOT / 'kernels')['project']['version']}-py3-none-any.whl"
    held: dict[str, set[str]] = {}
    said: dict[str, str] = {}
    for file in (engine, kernels):
        with zipfile.ZipFile(file) as archive:
            name = file.name.partition("-")[0]
            held[name] = {each for each in archive.namelist() if ".dist-info/" not in each}
            (metadata,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
            said[name] = archive.read(metadata).decode()
    version = project(ROOT / "kernels")["project"]["version"]
    assert f"Requires-Dist: vpo-kernels=={version}" in said["vpo_engine"]
    assert not held["vpo_engine"] & held["vpo_kernels"]
    assert {name.partition("/")[0] for name in held["vpo_engine"]} == {"vpo_engine"}
    assert any(name.startswith("vpo_kernels/_native") for name in held["vpo_kernels"])
    assert engine.name.endswith("-py3-none-any.whl")
    for folder in (ROOT / "vpo_engine", ROOT / "kernels" / "vpo_kernels"):
        python = {f"{folder.name}/{file.relative_to(folder)}" for file in folder.rglob("*.py")}
        assert len(python) > 30
        assert python <= held[folder.name]
    assert "vpo_engine/configs/opensora_v1_2_720p.yaml" in held["vpo_engine"]
    # pip finds the kernels beside the engine, without an index. Their own dependency, torch, lies elsewhere.
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
    ]
    names = ["vpo-engine", "vpo-kernels"]
    subprocess.run([*install, "--find-links", str(tmp_path), *names], check=True)
    # It prefers the wheel of this machine to the one for every machine. Where only that fits, the loss runs in torch.
    assert list((tmp_path / "site/vpo_kernels").glob("_native*.so"))
    for wheel, found in ((kernels, ("native", "reference")), (pure, ("reference",))):
        source = (  # an editable install of vpo_kernels has a finder of its own, which must not come first
            "import sys; from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder; "
            "sys.meta_path[:] = [BuiltinImporter, FrozenImporter, PathFinder]; "
            f"sys.path.insert(0, {str(tmp_path / wheel.stem)!r}); from vpo_kernels import available_backends; "
            "print(*[name for name in ('native', 'reference') if not available_backends('cpu')[name]])"
        )
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / wheel.stem)
        command = [sys.executable, "-I", "-c", source]
        assert subprocess.check_output(command, text=True).split() == list(found)
