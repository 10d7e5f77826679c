"""The parts of a release: the files in its wheels, the list of shipped parameters, one version everywhere."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import vpo_engine
from tools import sbom, wheels
from vpo_engine import cli

ROOT = Path(__file__).parents[1]
ENGINE_METADATA = (
    *("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE"),
    "licenses/vpo_engine/rewards/builtin_data/LICENSES.txt",
    "sboms/vpo-engine.cdx.json",
)


def wheel(folder: Path, name: str, files: set[str]) -> Path:
    """Write a wheel of empty files."""
    with zipfile.ZipFile(folder / name, "w") as archive:
        for each in sorted(files):
            archive.writestr(each, "")
    return folder / name


def engine_wheel() -> set[str]:
    return set(wheels.engine_files()) | {f"vpo_engine-1.dist-info/{each}" for each in ENGINE_METADATA}


def kernels_wheel() -> set[str]:
    return set(wheels.kernel_files()) | {f"vpo_kernels-1.dist-info/{each}" for each in ENGINE_METADATA[:6]}


def test_wheels_hold_exactly_their_package(tmp_path: Path) -> None:
    wheels.check_contents(wheel(tmp_path, "vpo_engine-1-py3-none-any.whl", engine_wheel()))
    wheels.check_contents(wheel(tmp_path, "vpo_kernels-1-py3-none-any.whl", kernels_wheel()))
    native = kernels_wheel() | {
        "vpo_kernels/_native.abi3.so",
        "vpo_kernels/",
    }  # auditwheel lists folders, too
    wheels.check_contents(wheel(tmp_path, "vpo_kernels-1-cp312-abi3-manylinux_2_28_x86_64.whl", native))
    assert {"vpo_engine/configs/sprites.yaml", "vpo_engine/train.py"} <= engine_wheel()


@pytest.mark.parametrize(
    ("more", "less", "said"),
    [
        ("tests/test_cli.py", "", "should not hold"),
        ("tools/wheels.py", "", "should not hold"),
        ("vpo_kernels/__init__.py", "", "should not hold"),
        ("vpo_engine/__pycache__/cli.cpython-311.pyc", "", "should not hold"),
        ("", "vpo_engine/rewards/builtin_data/parameters.safetensors", "lacks"),
        ("", "vpo_engine-1.dist-info/licenses/NOTICE", "lacks licenses/NOTICE"),
        ("", "vpo_engine-1.dist-info/sboms/vpo-engine.cdx.json", "lacks sboms"),
    ],
)
def test_a_file_too_many_or_too_few_in_a_wheel_is_named(
    more: str, less: str, said: str, tmp_path: Path
) -> None:
    files = (engine_wheel() | {more} - {""}) - {less}
    with pytest.raises(ValueError, match=said) as caught:
        wheels.check_contents(wheel(tmp_path, "vpo_engine-1-py3-none-any.whl", files))
    assert (more or Path(less).name) in str(caught.value)


def test_a_wheel_for_one_platform_has_the_kernels_in_cpp_and_the_one_for_all_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 0 C\+\+ extensions.*compiler"):
        wheels.check_contents(wheel(tmp_path, "vpo_kernels-1-cp311-cp311-linux_x86_64.whl", kernels_wheel()))
    stale = kernels_wheel() | {"vpo_kernels/_native.cpython-311-x86_64-linux-gnu.so"}
    with pytest.raises(ValueError, match=r"holds 1 C\+\+ extensions"):
        wheels.check_contents(wheel(tmp_path, "vpo_kernels-1-py3-none-any.whl", stale))


def test_files_of_other_kinds_do_not_slip_into_a_package(tmp_path: Path) -> None:
    (tmp_path / "__pycache__").mkdir()
    for name in ("code.py", "_native.so", ".hidden", "__pycache__/code.pyc"):
        (tmp_path / name).touch()
    assert [file.name for file in wheels.package_files(tmp_path)] == ["code.py"]
    (tmp_path / "code.py.orig").touch()
    with pytest.raises(ValueError, match=r"code\.py\.orig would be in the wheel.*remove it"):
        list(wheels.package_files(tmp_path))


def test_the_list_of_shipped_parameters_agrees_with_the_files_and_with_notice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sbom.main([]) == 0, capsys.readouterr().err
    others = {name for name in sbom.listed_files() if sbom.origin(name).sources}
    assert others == {
        "vpo_engine/rewards/builtin_data/parameters.safetensors",
        "vpo_engine/evaluation/vbench_prompts.json",
    }


@pytest.mark.parametrize("case", ["new weights", "changed weights", "removed weights", "notice"])
def test_the_list_notices(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = wheels.engine_files()
    name = "vpo_engine/data/sprites/weights/reward.safetensors"
    changed = tmp_path / "changed.safetensors"
    content = bytearray(files[name].read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    expected = name
    if case == "new weights":
        expected = "vpo_engine/data/sprites/weights/new.safetensors"
        files[expected] = changed
    elif case == "changed weights":
        files[name] = changed
    elif case == "removed weights":
        del files[name]
    else:
        expected = "scikit-video"
        for each in ("NOTICE", "pyproject.toml"):
            text = (ROOT / each).read_text(encoding="utf-8")
            (tmp_path / each).write_text(text.replace(expected, "another package"), encoding="utf-8")
        monkeypatch.setattr(sbom, "ROOT", tmp_path)
    monkeypatch.setattr(sbom, "engine_files", lambda: files)
    assert sbom.main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert expected in said


def test_one_version_everywhere() -> None:
    projects = [
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for folder in ("", "kernels")
    ]
    (version,) = {project["version"] for project in projects}
    assert vpo_engine.__version__ == version
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^\]]*)\]", changes, re.MULTILINE)
    assert released[0] == version


def test_the_container_installs_packages_within_the_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "container" / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = dict(line.lower().split("==") for line in lines)
    extras = re.search(r"\$\{engine\}\[([\w,]+)\]", (ROOT / "Containerfile").read_text(encoding="utf-8"))
    assert extras is not None
    wanted = list(project["dependencies"])
    for extra in extras[1].split(","):
        wanted += project["optional-dependencies"][extra]
    for each in map(Requirement, wanted):
        name = each.name.lower().replace("_", "-")
        assert name in pinned, f"renew container/constraints.txt (docs/how_to/container.md): it lacks {name}"
        assert each.specifier.contains(pinned[name]), (
            f"container/constraints.txt has {name} {pinned[name]}, not {each}"
        )


def test_the_container_names_what_exists() -> None:
    """Its files, its Python, the packages of the system that it calls, and the commands of the engine."""
    text = (ROOT / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    copied = [line.split()[1:-1] for line in text.splitlines() if re.match(r"COPY (?!--from)", line)]
    files = [file for files in copied for file in files]
    assert "container/constraints.txt" in files
    assert [file for file in files if not (ROOT / file).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not {*files, "container", "vpo_engine", "kernels", "tools", "configs"} & set(ignored)
    assert "!vpo_engine/**/*.safetensors" in ignored, "the shipped weights are part of the wheel"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = set(re.findall(r"python(3\.\d+)", text))
    page = (ROOT / "docs/how_to/container.md").read_text(encoding="utf-8")
    assert len(pythons) == 1
    (python,) = pythons
    assert SpecifierSet(project["requires-python"]).contains(python)
    assert f"Python {python}" in page
    assert f"--python-version {python} " in page
    installed = [set(found.split()) for found in re.findall(r"--no-install-recommends ([^&]+)&&", text)]
    assert all({f"python{python}-venv", f"python{python}-dev"} <= each for each in installed)
    assert {"g++", "make"} <= installed[0], "the kernels are compiled in the first stage"
    assert {"gcc", "tini"} <= installed[1], "Triton compiles, and the container begins with tini"
    assert (
        set(re.findall(r"(?:^RUN |\[\")vpo\W+(\w+)", text, re.MULTILINE)) == {"doctor"} <= set(cli.COMMANDS)
    )


def test_the_container_builds_the_wheels_that_it_installs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    found = re.search(r"^RUN python -m tools\.wheels (\S+) (.+)$", text, re.MULTILINE)
    assert found is not None
    with pytest.raises(SystemExit):
        wheels.main(["--help"])
    known = capsys.readouterr().out
    assert [word for word in found[2].split() if f"{word} " not in known] == []
    assert f"COPY --from=build {found[1]} /tmp/wheels" in text
    assert all(f"/tmp/wheels/{name}" in text for name in ("vpo_engine-*.whl", "vpo_kernels-*-abi3-*.whl"))


def test_the_image_of_cuda_is_not_newer_than_the_cuda_of_torch() -> None:
    """The driver that the base asks for is one that torch's CUDA libraries run with: the same major version."""
    base = re.search(r"nvidia/cuda:(\d+)\.(\d+)", (ROOT / "Containerfile").read_text(encoding="utf-8"))
    pinned = re.search(
        r"cuda-toolkit==(\d+)\.(\d+)", (ROOT / "container/constraints.txt").read_text(encoding="utf-8")
    )
    assert base is not None
    assert pinned is not None
    assert base[1] == pinned[1]
    assert int(base[2]) <= int(pinned[2])
