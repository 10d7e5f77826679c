"""Print what works on this machine and why not, as text to paste into a bug report.

    vpo doctor        (or python -m vpo_engine.doctor)

What can be tried is tried: kernels compute a small loss, 8-bit weights are made and read, a clip is written and read
back. The home folder is printed as ~. The exit code is 0 unless the engine cannot run at all.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import vpo_engine
from vpo_engine.help_text import HelpFormatter

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "peft",
    "deepspeed",
    "numpy",
    "pydantic",
    "av",
    "tensorboard",
    "wandb",
    "huggingface_hub",
)
_NEEDED = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pydantic", "av")
"""Packages without which no command runs."""
_CPU_FLAGS = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "AVX-512 BF16": "avx512_bf16",
    "AMX": "amx_tile",
    "AMX BF16": "amx_bf16",
}
"""Instruction sets, and what Linux calls them in /proc/cpuinfo."""
_PACKAGE = Path(__file__).parent
_SHIPPED = (
    *(
        f"data/sprites/weights/{name}"
        for part in ("policy", "vae", "text_encoder")
        for name in (f"{part}/config.json", f"{part}/model.safetensors")
    ),
    *(f"data/sprites/weights/{name}.safetensors" for name in ("reward", "judge", "image")),
    "rewards/builtin_data/parameters.safetensors",
)
_GIB = 2**30

Check = Callable[[], str | Sequence[str]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vpo doctor", description=__doc__, formatter_class=HelpFormatter)
    parser.parse_args(arguments)
    obstacle = cannot_run()
    for line in report(obstacle):
        print(without_home(line), flush=True)
    return 1 if obstacle else 0


def report(obstacle: str) -> Iterator[str]:
    """Yield the lines of the report. ``obstacle``: what ``cannot_run`` returned."""
    yield f"vpo-engine {vpo_engine.__version__} in {Path(vpo_engine.__file__).parent}"
    yield from _lines("python", python)
    yield from _lines("system", system)
    yield from _lines("processor", processor)
    yield from _lines("memory", memory)
    yield from _lines("packages", packages)
    for name, check in CHECKS.items():
        if find_spec("torch") is not None:
            yield from _lines(name, check)
    yield from _lines("disk", disk)
    yield from _lines("shipped weights", shipped_weights)
    yield f"verdict: the engine cannot run here: {obstacle}" if obstacle else "verdict: the engine runs here"


def cannot_run() -> str:
    """Return why the engine cannot run at all; "" if it can."""
    for name in _NEEDED:
        if (reason := import_error(name)) is not None:
            return f"{name} {reason}"
    try:
        importlib.import_module("vpo_engine.build")
    except (
        Exception
    ) as error:  # a broken installation may raise anything, and the report must still be printed
        return f"vpo_engine cannot be imported ({_reason(error)})"
    return ""


def import_error(name: str) -> str | None:
    """Return why a package cannot be imported; None if it can."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "is not installed" if error.name == name else f"cannot be imported ({_reason(error)})"
    except Exception as error:  # see cannot_run
        return f"cannot be imported ({_reason(error)})"
    return None


def without_home(text: str) -> str:
    """Return the text with the home folder written as ~."""
    homes = {str(Path.home()), str(Path.home().resolve())} - {"/"}
    for home in sorted(homes, key=len, reverse=True):
        text = re.sub(r"(?<![\w.-])" + re.escape(home) + r"(?![\w.-])", "~", text)
    return text


def python() -> str:
    return f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}"


def system() -> str:
    return f"{platform.platform()}, {platform.machine()}"


def processor() -> str:
    """Return the processor's name, the cores of this process, and the instruction sets that matter."""
    flags, name = _cpu_info()
    sets = [f"{label} {'yes' if flag in flags else 'no'}" for label, flag in _CPU_FLAGS.items()]
    if not flags:
        sets = ["its instruction sets are not told by this system"]
    return f"{name}, {_usable_cores()} of {os.cpu_count()} cores usable; {', '.join(sets)}"


def memory() -> str:
    path = Path("/proc/meminfo")
    if not path.exists():
        return "not told by this system"
    fields = dict(entry.split(":") for entry in path.read_text().splitlines())
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return f"{total / _GIB:.1f} GiB, of which {available / _GIB:.1f} GiB are available"


def packages() -> list[str]:
    """Return the version of each package, and a line for each that is installed but cannot be imported."""
    versions, broken = [], []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
            continue
        if (reason := import_error(name)) is not None:
            broken.append(f"{name} {metadata.version(name)} is installed, but {reason}")
    return [", ".join(versions), *broken]


def gpus() -> str | list[str]:
    """Return a line for each GPU that torch sees: name, compute capability, memory, and whether it computes."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "none" if built else f"none, because torch {torch.__version__} is built for CPUs only"
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(64, 64, dtype=torch.bfloat16, device=f"cuda:{index}")
        works = "computes" if (ones @ ones == 64).all() else "computes wrong products"
        found.append(
            f"cuda:{index} {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{total / _GIB:.1f} GiB, of which {free / _GIB:.1f} GiB are free; {works}"
        )
    return found


def native_kernels() -> str:
    """Return whether the C++ kernels compute on the CPU, and with which instruction set, or why they do not."""
    from vpo_kernels.backends import available_backends

    if reason := available_backends("cpu")["native"]:
        return f"not available: {reason}; plain torch takes their place"
    from vpo_kernels.native import INSTRUCTION_SET

    return (
        f"compute like plain torch, with {INSTRUCTION_SET}" if _loss_agrees("native", "cpu") else _DISAGREES
    )


def triton_kernels() -> str:
    """Return whether the Triton kernels compute on the GPU, or why they do not."""
    import torch
    from vpo_kernels.backends import available_backends

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reason := available_backends(device)["triton"]:
        return f"not available: {reason}"
    return "compute like plain torch" if _loss_agrees("triton", device) else _DISAGREES


def attention() -> list[str]:
    """Return what model.attention=auto means here for Open-Sora's heads, and why each other name does not work."""
    import torch
    from vpo_kernels.attention import choose_attention
    from vpo_kernels.attention.packages import PACKAGES as OTHERS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose_attention("auto", device=device, dtype=torch.bfloat16, head_dim=72)
    lines = [f"auto means {chosen.name} ({chosen.reason})"]
    for name in OTHERS if device.type == "cuda" else ():
        try:
            choose_attention(name, device=device, dtype=torch.bfloat16, head_dim=72)
        except ValueError as error:
            lines.append(str(error))
        else:
            lines.append(f"attention={name!r} works")
    return lines


def eight_bits() -> str:
    """Return whether bitsandbytes quantises weights, which reward.bits and memory.optimizer_bits need."""
    import torch

    if (reason := import_error("bitsandbytes")) is not None:
        return f"not available: bitsandbytes {reason}"
    from vpo_engine.rewards.quantize import QuantisedLinear

    weight = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)
    error = float((QuantisedLinear(weight, None, 8).weight(torch.float32) - weight).abs().max())
    return "works" if error < 0.01 else f"does not work: weights in [-1, 1] come back wrong by {error:.3g}"


def videos() -> str:
    """Return whether an mp4 file is written and read back."""
    import torch

    from vpo_engine.runs.video import read_video, write_mp4

    clip = torch.arange(8, dtype=torch.uint8).mul(30).view(8, 1, 1, 1).expand(8, 256, 256, 3)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_mp4(file, clip, 8.0)
        back, rate = read_video(file)
    if back.shape != clip.shape or rate != 8.0:
        return (
            f"a clip of {list(clip.shape)} at 8 frames a second came back as {list(back.shape)} at {rate:g}"
        )
    return f"an mp4 file was written and read back, wrong by at most {int((back.int() - clip).abs().max())} of 255"


def disk() -> str:
    usage = shutil.disk_usage(Path.cwd())
    return f"{usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f} in {Path.cwd()}"


def shipped_weights() -> str:
    """Return whether the weights of the sprites world and of the builtin reward are there."""
    missing = [name for name in _SHIPPED if not (_PACKAGE / name).is_file()]
    return f"missing in {_PACKAGE}: {', '.join(missing)}" if missing else "present"


CHECKS: dict[str, Check] = {
    "GPUs": gpus,
    "native kernels": native_kernels,
    "triton kernels": triton_kernels,
    "attention": attention,
    "8 bits": eight_bits,
    "videos": videos,
}
"""The checks that need torch."""
_DISAGREES = "do not work: their loss is another than that of plain torch"


def _lines(name: str, check: Check) -> Iterator[str]:
    try:
        found = check()
    except Exception as error:  # what fails here is what the report is about
        found = f"the check failed: {_reason(error)}"
    for line in [found] if isinstance(found, str) else found:
        yield f"{name}: {line}"


def _reason(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _loss_agrees(backend: Any, device: str) -> bool:
    """Return whether ``backend`` computes the loss of plain torch for a small pair."""
    import torch
    from vpo_kernels import paired_dpo_loss

    one, two, three, four, five, six = torch.randn(6, 2, 96, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    found = paired_dpo_loss(one, two, three, four, five, six, beta=2.0, backend=backend).loss
    expected = paired_dpo_loss(one, two, three, four, five, six, beta=2.0, backend="reference").loss
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def _cpu_info() -> tuple[set[str], str]:
    """Return the flags and the name of the processor; no flags where the system does not tell them."""
    path = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return flags, fields.get("model name") or platform.processor() or platform.machine()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
