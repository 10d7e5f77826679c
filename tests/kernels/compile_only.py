"""Compilation of Triton kernels for GPUs on a machine that has none.

``recorded`` records what a launcher would launch while it runs on meta tensors: kernel, arguments, options.
``compiled`` and ``assembled`` compile such a launch for one architecture, specialised as Triton's launcher specialises:
1 and None into the code, divisibility by 16 of integers and addresses into the types. What is compiled once in a
session is not compiled again.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
A100, H100, B200 = 80, 90, 100


class Launch(NamedTuple):
    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by parameter name
    options: dict[str, Any]  # num_warps and the like


class Binary(NamedTuple):
    """A compiled kernel."""

    registers: int
    local_bytes: int  # stack and spills of a thread
    loads: dict[str, int]  # number of loads from global memory, by width: {"v4.b32": 16}
    stores: dict[str, int]

    @property
    def vector_loads(self) -> int:
        return sixteen_bytes(self.loads)

    @property
    def vector_stores(self) -> int:
        return sixteen_bytes(self.stores)


@contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """While this context is open, the kernels of these modules record their launches instead of running."""
    seen: list[Launch] = []
    originals = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    ]
    for module, name, kernel in originals:
        setattr(module, name, _Recorder(kernel, seen))
    try:
        yield seen
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)


class _Recorder:
    def __init__(self, kernel: JITFunction, seen: list[Launch]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names
            options = {key: kwargs.pop(key) for key in ("num_warps", "enable_fp_fusion") if key in kwargs}
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            assert set(arguments) == set(names), set(arguments) ^ set(names)
            self.seen.append(Launch(self.kernel, grid, arguments, options))

        return launch


def _specialise(
    value: Any, path: tuple[int, ...], float_type: str, constants: dict[Any, Any], attributes: dict[Any, Any]
) -> Any:
    """Return the type of an argument in a signature; fill what goes beside the signature."""
    if isinstance(value, tuple):
        return tuple(
            _specialise(v, (*path, i), float_type, constants, attributes) for i, v in enumerate(value)
        )
    if isinstance(value, float):
        return float_type
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    address = value.storage_offset() * value.element_size() if isinstance(value, Tensor) else value
    if address % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


_ASSEMBLED: dict[tuple[object, ...], dict[str, Any]] = {}
_COMPILED: dict[int, Binary] = {}


def assembled(launch: Launch, target: GPUTarget) -> dict[str, Any]:
    """Return what the compiler makes of a launch, by stage."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, p in enumerate(launch.kernel.params):
        value = launch.arguments[p.name]
        if p.is_constexpr:
            signature[p.name], constants[(i,)] = "constexpr", value
        else:
            signature[p.name] = _specialise(value, (i,), p.annotation_type or "fp32", constants, attributes)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    key = (source.hash(), str(target), str(launch.options))
    if key not in _ASSEMBLED:
        _ASSEMBLED[key] = triton.compile(source, target=target, options=launch.options).asm
    return _ASSEMBLED[key]


def compiled(launch: Launch, capability: int) -> Binary:
    """Compile a launch for the CUDA architecture sm_<capability>."""
    assembly = assembled(launch, GPUTarget("cuda", capability, 32))
    if id(assembly) not in _COMPILED:
        widths = [_widths(assembly["ptx"], kind) for kind in ("ld", "st")]
        _COMPILED[id(assembly)] = Binary(*_resources(assembly["cubin"]), *widths)
    return _COMPILED[id(assembly)]


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers, bytes of stack and spills) of a thread, as the bundled cuobjdump reads them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _widths(ptx: str, kind: str) -> dict[str, int]:
    found = re.findall(rf"\b{kind}\.global[.\w:]*?\.((?:v\d\.)?[bfus]\d+)", ptx)
    return {width: found.count(width) for width in set(found)}


def sixteen_bytes(accesses: dict[str, int]) -> int:
    """Return how many of the accesses are of 16 bytes or more, however the compiler spells them."""
    return sum(count for width, count in accesses.items() if _bits(width) >= 128)


def _bits(width: str) -> int:
    vector, _, scalar = width.rpartition(".")
    return int(vector.lstrip("v") or 1) * int(scalar[1:])
