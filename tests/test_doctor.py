"""``vpo doctor``: each line says what is true of this machine, also where something is missing or broken."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vpo_kernels import native

import vpo_engine
from vpo_engine import doctor


def lines(capsys: pytest.CaptureFixture[str], expected: int = 0) -> dict[str, str]:
    """Run the command and return {name of the line: the first line of that name}."""
    assert doctor.main([]) == expected
    found: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        name, _, text = line.partition(": ")
        found.setdefault(name, text)
    return found


def test_every_line_is_true_here(capsys):
    found = lines(capsys)
    assert found["python"].startswith(platform.python_version())
    assert found["native kernels"] == f"compute like plain torch, with {native.INSTRUCTION_SET}"
    assert found["8 bits"] == "works"
    assert found["shipped weights"] == "present"
    assert found["verdict"] == "the engine runs here"
    assert "was written and read back, wrong by at most" in found["videos"]
    assert int(found["videos"].split()[-3]) <= 3
    for name in ("torch", "diffusers", "av"):
        assert f"{name} {metadata.version(name)}" in found["packages"]
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    assert abs(float(found["disk"].split()[0]) - free) < 1
    if not torch.cuda.is_available():
        assert found["GPUs"].startswith("none")
        assert found["triton kernels"].startswith("not available: ")
        assert (
            found["attention"] == "auto means sdpa (cpu; flash2, flash3, flash4, xformers need a CUDA device)"
        )


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells the processor's instruction sets")
def test_the_instruction_sets_are_those_that_torch_sees():
    text = doctor.processor()
    if platform.machine() == "x86_64" and "ATEN_CPU_CAPABILITY" not in os.environ:
        capability = torch.backends.cpu.get_cpu_capability()
        assert ("AVX-512 yes" in text) == (capability == "AVX512")
        assert ("AVX2 yes" in text) == (capability in ("AVX2", "AVX512"))
    assert f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable" in text


def test_a_missing_needed_package_is_named_and_fails(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    found = lines(capsys, expected=1)
    assert found["verdict"] == "the engine cannot run here: av is not installed"
    assert found["shipped weights"] == "present"


def test_a_package_that_does_not_load_is_told_apart_from_a_missing_one(capsys, monkeypatch):
    def load(name: str) -> object:
        if name == "bitsandbytes":
            raise OSError("libcudart.so.12: cannot open shared object file\nmore")
        return real(name)

    real = importlib.import_module
    monkeypatch.setattr(doctor.importlib, "import_module", load)
    assert doctor.eight_bits() == (
        "not available: bitsandbytes cannot be imported (OSError: libcudart.so.12: cannot open shared object file)"
    )
    doctor.main([])
    version = metadata.version("bitsandbytes")
    assert f"packages: bitsandbytes {version} is installed, but cannot be imported" in capsys.readouterr().out


def test_a_check_that_fails_says_why_and_the_others_go_on(capsys, monkeypatch):
    def broken(*anything: object) -> None:
        raise RuntimeError("no encoder libx264")

    monkeypatch.setattr("vpo_engine.runs.video.write_mp4", broken)
    found = lines(capsys)
    assert found["videos"] == "the check failed: RuntimeError: no encoder libx264"
    assert found["8 bits"] == "works"


def test_kernels_that_compute_something_else_are_noticed(monkeypatch):
    def wrong(*inputs: object, backend: str, **others: object) -> SimpleNamespace:
        return SimpleNamespace(loss=torch.tensor(0.693 if backend == "reference" else 0.7))

    assert doctor.native_kernels().startswith("compute like plain torch")
    monkeypatch.setattr("vpo_kernels.paired_dpo_loss", wrong)
    assert doctor.native_kernels() == "do not work: their loss is another than that of plain torch"


def test_missing_weights_are_named(tmp_path, monkeypatch):
    package = Path(vpo_engine.__file__).parent
    shipped = {str(file.relative_to(package)) for file in package.rglob("*.safetensors")}
    for name in shipped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(doctor, "_PACKAGE", tmp_path)
    folders = ("policy", "vae", "text_encoder")
    configs = ", ".join(f"data/sprites/weights/{name}/config.json" for name in folders)
    assert doctor.shipped_weights() == f"missing in {tmp_path}: {configs}"
    for name in shipped:
        (tmp_path / name).unlink()
    assert all(name in doctor.shipped_weights() for name in shipped)


def test_the_home_folder_is_not_printed(capsys, monkeypatch):
    home = Path(vpo_engine.__file__).parents[1]
    monkeypatch.setattr(Path, "home", lambda: home)
    doctor.main([])
    out = capsys.readouterr().out
    assert f"vpo-engine {vpo_engine.__version__} in ~/vpo_engine" in out
    assert f"{home}/" not in out
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ann"))
    assert doctor.without_home("/home/ann/x, /home/anna, /home/ann") == "~/x, /home/anna, ~"
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert doctor.without_home("/usr/bin") == "/usr/bin"
