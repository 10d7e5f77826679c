"""Measure on a GPU, with torch and triton alone, what the other benchmarks do not: see ``MEASURES``.

    python bench/gpu_measure.py network [--rows FOLDER]      # one of kernels, network, sampling, copies, offload
    python bench/gpu_measure.py memory [--method "OnlineVPO, leanest"] [--rows FOLDER]     # needs the whole engine
    python bench/gpu_measure.py rule                         # reads bench/results, needs no GPU

The network is STDiT3-XL/2 with random weights in bfloat16. ``--tiny`` takes a network and sizes that a CPU computes in
a moment, to try the code. The exit code is 1 if a result is wrong; seconds alone are never wrong.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import device, on_gpu, synchronize
from rows import Row, environment, quantiles, read, record
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vpo_engine.memory.checkpointing import Activations
from vpo_engine.models.opensora.compiled import CompiledBlocks
from vpo_engine.models.opensora.published import STDIT3_XL2
from vpo_engine.models.opensora.reuse import Reuse
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.models.step_graph import StepGraph
from vpo_engine.rollout.quantised_copy import PRODUCTS, SamplingCopy, multiplied, rounded

BF16 = torch.bfloat16
ROUNDS, WARM_UP = 5, 2
PLAN_BAND = 0.10
"""The share by which a measured peak may differ from the planned one."""
FASTER = 1.10
"""How many times faster than compiled plain torch a kernel must be to be taken (vpo_kernels/fused_ops.py)."""


@dataclass(frozen=True)
class Size:
    """A size of video: latent (T, H, W), pixels, tokens of the caption, channels of its states, and the network."""

    latent: tuple[int, int, int]
    pixels: tuple[float, float]
    tokens: int = 120
    channels: int = 4096
    network: str = "STDiT3-XL/2"

    @property
    def config(self) -> dict[str, Any]:
        return STDIT3_XL2 if self.network == "STDiT3-XL/2" else TINY_NETWORK


TINY_NETWORK = {"depth": 2, "hidden_size": 64, "num_heads": 2, "caption_channels": 32, "model_max_length": 16}
SIZES = {
    "240p x 34": Size((10, 30, 53), (240.0, 426.0)),
    "720p x 68": Size((20, 90, 160), (720.0, 1280.0)),
}
TINY = {"tiny": Size((2, 4, 4), (32.0, 32.0), 8, 32, "tiny")}

AddRow = Callable[[str, dict[str, str], dict[str, float]], None]


def seconds_of(run: Callable[[], object], rounds: int = ROUNDS) -> dict[str, float]:
    """Return the quantiles of a call's seconds, from an idle device to an idle device."""
    taken = []
    for number in range(WARM_UP + rounds):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        if number >= WARM_UP:
            taken.append(time.perf_counter() - start)
    return quantiles(taken)


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes allocated on the GPU during a call; 0 on a CPU."""
    if not on_gpu():
        return 0
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def network_of(size: Size) -> STDiT3:
    """Build the network in bfloat16 with random weights, none of which is zero."""
    torch.manual_seed(0)
    with device():
        network = STDiT3.from_config(size.config).to(BF16)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    network.choose_backends(dtype=BF16)
    return network


def arguments_of(size: Size, rows: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, float]]:
    """Return latents, t, one caption and its mask (on the CPU), and the numbers that the network is conditioned on."""
    random = torch.Generator(device()).manual_seed(0)
    x = torch.randn(rows, 4, *size.latent, generator=random, device=device())
    y = torch.randn(1, 1, size.tokens, size.channels, generator=random, device=device()).to(BF16)
    t = torch.full((rows,), 500.0, device=device())
    height, width = size.pixels
    return (x, t, y, torch.ones(1, size.tokens)), {"fps": 24.0, "height": height, "width": width}


def forward_flops(size: Size) -> int:
    """Count the operations of a prediction for one sample, on tensors without values."""
    with FakeTensorMode():
        network = STDiT3.from_config(size.config)
        network.choose_backends("sdpa", "reference", dtype=torch.float32)
        x, t = torch.empty(1, 4, *size.latent), torch.empty(1)
        y = torch.empty(1, 1, size.tokens, size.channels)
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        height, width = size.pixels
        with (
            torch.no_grad(),
            FlopCounterMode(display=False, custom_mapping={attention: _attention}) as counter,
        ):
            network(x, t, y, fps=24.0, height=height, width=width)
    return counter.get_total_flops()


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object) -> int:
    batch, heads, queries, channels = q
    return 2 * batch * heads * queries * k[-2] * (channels + v[-1])


def matrix_rate(side: int) -> float:
    """Return the FLOP/s of a product of two bfloat16 matrices."""
    a = torch.rand(side, side, device=device()).to(BF16)
    return 2 * side**3 / seconds_of(lambda: a @ a)["low_seconds"]


# --- measures ------------------------------------------------------------------------------------------------


def measure_kernels(sizes: dict[str, Size], add_row: AddRow) -> list[str]:
    """Compare every Triton kernel with its formula in float64, forward and backward."""
    from gpu_kernels import wrong_kernels

    return wrong_kernels(device(), large=sizes is SIZES)


def measure_network(sizes: dict[str, Size], add_row: AddRow) -> list[str]:
    """Measure a prediction and a training pass; a training pass counts three times the operations of a prediction."""
    rate = matrix_rate(8192 if on_gpu() else 128)
    for name, size in sizes.items():
        flops = forward_flops(size)
        for kind, make, work in (
            ("prediction", prediction, flops),
            ("training, blocks computed again", training, 3 * flops),
        ):
            run = make(size)
            measured = seconds_of(run)
            used = {"peak_bytes": peak_bytes(run), "flops": work}
            used["utilisation"] = work / (measured["seconds"] * rate)
            add_row("network", {"network": size.network, "size": name, "pass": kind}, measured | used)
            del run  # with its network, before the next is made
    return []


def prediction(size: Size) -> Callable[[], object]:
    network, (arguments, numbers) = network_of(size), arguments_of(size, 1)

    @torch.no_grad()
    def predict() -> None:
        network(*arguments, **numbers)

    return predict


def training(size: Size) -> Callable[[], object]:
    network, (arguments, numbers) = network_of(size), arguments_of(size, 1)
    network.activations = Activations("block")
    return lambda: network(*arguments, **numbers).square().mean().backward()


def first_of(sizes: dict[str, Size]) -> tuple[str, Size]:
    """Return the smallest size, where the host's part in a step shows."""
    return next(iter(sizes.items()))


@torch.no_grad()
def measure_sampling(sizes: dict[str, Size], add_row: AddRow) -> list[str]:
    """Measure a guided sampling step plainly, with compiled blocks, and as a CUDA graph; all predict the same."""
    wrong = []
    name, size = first_of(sizes)
    network, ((x, t, y, mask), numbers) = network_of(size), arguments_of(size, 2)

    def predictor(run: Callable[..., Tensor] | None) -> Callable[[Tensor, Tensor], Tensor]:
        reuse = Reuse(run=run)
        return lambda x, t: network(x, t, y, mask, **numbers, reuse=reuse)

    steps = {"plain": predictor(None), "blocks": predictor(CompiledBlocks(device()))}
    if on_gpu():
        steps["graphs"] = StepGraph(predictor(None), network)
    expected = steps["plain"](x, t).clone()
    for way, step in steps.items():
        start = time.perf_counter()
        for _ in range(3):  # compiles, or captures
            found = step(x, t)
        synchronize()
        first = time.perf_counter() - start
        error = float((found - expected).norm() / expected.norm())
        case = {"network": size.network, "size": name, "rollout.compile": way, "rollout.weights": "policy"}
        extra = {"first_three_seconds": first, "relative_error": error}
        add_row("sampling_step", case, seconds_of(functools.partial(step, x, t)) | extra)
        if not error <= (0.02 if way == "blocks" else 0.0):  # bfloat16, rounded elsewhere by compiled code
            wrong.append(f"{name}: rollout.compile={way} is off by {error:.2g} of the prediction's norm")
    return wrong


@torch.no_grad()
def measure_copies(sizes: dict[str, Size], add_row: AddRow) -> list[str]:
    """Measure a guided sampling step of 8-bit copies, and compare their matrix products with exact ones."""
    wrong = []
    name, size = first_of(sizes)
    network, ((x, t, y, mask), numbers) = network_of(size), arguments_of(size, 2)
    call = functools.partial(network, x, t, y, mask, **numbers)
    expected, plain = call().clone(), seconds_of(call)["seconds"]
    for bits in ("int8", "fp8"):
        wrong += wrong_product(bits)
        copied = functools.partial(SamplingCopy(network, bits), x, t, y, mask, **numbers)
        error = float((copied() - expected).norm() / expected.norm())
        case = {
            "network": size.network,
            "size": name,
            "rollout.compile": "plain",
            "rollout.weights": bits,
        }
        extra = {"relative_error": error, "policy_seconds": plain}
        add_row("sampling_step", case, seconds_of(copied) | extra)
        if not error < 0.5:  # else it is no copy of the policy; nan is refused too
            wrong.append(f"{name}: the {bits} copy is off by {error:.2g} of the prediction's norm")
    return wrong


def wrong_product(bits: Any) -> list[str]:
    """Compare the device's 8-bit product with the same factors multiplied in float32."""
    if bits == "fp8" and on_gpu() and torch.cuda.get_device_capability() < (9, 0):
        return []
    a, b = (torch.randn(512, 1152, device=device()) for _ in range(2))
    (x, x_scales), (weight, scales) = rounded(a, bits), rounded(b, bits)
    found, exact = (each(x, weight, x_scales, scales).float() for each in (PRODUCTS[bits], multiplied))
    error = float((found - exact).norm() / exact.norm())
    allowed = 1e-5 if bits == "int8" else 2.0**-8  # fp8: of a result in bfloat16
    return [f"the {bits} product is off by {error:.2g} of its norm, allowed {allowed:.2g}"] * (
        error > allowed
    )


def measure_offload(sizes: dict[str, Size], add_row: AddRow) -> list[str]:
    """Measure a training pass with and without offload of activations; gradients differ no more than between two runs.

    Attention's backward pass adds in any order on a GPU, so that two equal runs may differ.
    """
    wrong = []
    name, size = list(sizes.items())[-1]
    network, (arguments, numbers) = network_of(size), arguments_of(size, 1)

    def train() -> None:
        network.zero_grad()
        network(*arguments, **numbers).square().mean().backward()

    def gradients() -> list[Tensor]:
        train()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    for offload in (False, True):
        network.activations = Activations("block", offload=offload)
        used = {"peak_bytes": peak_bytes(train)}
        case = {"network": size.network, "size": name, "offload_activations": str(offload).lower()}
        add_row("offload", case, seconds_of(train) | used)
    with_offload = gradients()
    network.activations = Activations("block")
    once, again = gradients(), gradients()
    noise, error = difference(again, once), difference(with_offload, once)
    print(f"gradients of two equal runs differ by {noise:.3g} of their norm, with offload by {error:.3g}")
    if not error <= 2 * noise:
        wrong.append(
            f"{name}: with offload gradients differ by {error:.3g}, without by {noise:.3g} of their norm"
        )
    return wrong


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the norm of the difference of lists of tensors, relative to that of ``expected``."""
    off = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(found, expected, strict=True))
    return (off / sum(float(b.float().square().sum()) for b in expected)) ** 0.5


def measure_memory(method: str, add_row: AddRow) -> list[str]:
    """Compare the measured peak of an update and an optimizer step at 720p x 68 with the plan's."""
    from update_memory import METHODS, config_of, measured, planned

    if method not in METHODS:
        raise SystemExit(f"error: --method {method} is not one of {', '.join(METHODS)}")

    config = config_of(method, "720p", 68)
    start = time.perf_counter()
    peak = measured(config)
    seconds = time.perf_counter() - start
    expected = max(planned(config))
    numbers = {"planned_bytes": expected, "measured_bytes": float(peak), "seconds": seconds}
    add_row("gpu_memory", {"method": method, "size": "720p x 68"}, numbers)
    off = peak / expected - 1
    return [f"the measured peak differs by {off:+.1%} from the planned one"] * (abs(off) > PLAN_BAND)


def rule(rows: Sequence[Row]) -> list[str]:
    """Return a line for each fused operation: what AUTO in vpo_kernels/fused_ops.py should say, and why.

    A kernel is taken if forward and backward together are ``FASTER`` than compiled plain torch at every size, or if it
    keeps fewer bytes for the backward pass than that does.
    """
    cases = {
        (r.case["operation"], r.case["size"], r.case["pass"], r.case["implementation"]): r.numbers
        for r in rows
    }
    lines = []
    for operation in dict.fromkeys(row.case["operation"] for row in rows):
        sizes = sorted({size for name, size, *_ in cases if name == operation})
        pairs = {
            kind: [
                [cases.get((operation, size, kind, way)) for way in ("compile", "triton")] for size in sizes
            ]
            for kind in ("forward", "both")
        }
        if any(None in pair for pairs_of in pairs.values() for pair in pairs_of):
            lines.append(f"{operation}: reference (not measured by all implementations yet)")
            continue
        speed = min(compiled["seconds"] / triton["seconds"] for compiled, triton in pairs["both"])
        saved = min(compiled["kept_bytes"] - triton["kept_bytes"] for compiled, triton in pairs["forward"])
        taken = "triton" if speed >= FASTER or saved > 0 else "reference"
        lines.append(
            f"{operation}: {taken} (at {' and '.join(sizes)} at least {speed:.2f} times as fast as torch.compile, "
            f"{saved / 2**20:+.1f} MiB kept less)"
        )
    return lines


MEASURES: dict[str, Callable[[dict[str, Size], AddRow], list[str]]] = {
    "kernels": measure_kernels,
    "network": measure_network,
    "sampling": measure_sampling,
    "copies": measure_copies,
    "offload": measure_offload,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measure", choices=[*MEASURES, "memory", "rule"])
    parser.add_argument("--rows", type=Path, metavar="FOLDER", help="write each row to FOLDER/TOPIC.jsonl")
    parser.add_argument(
        "--method", default="OnlineVPO, recommended", help="memory: a line of bench/update_memory.py"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny network, which a CPU computes in a moment"
    )
    given = parser.parse_args(arguments)
    if given.measure == "rule":
        print("\n".join(rule(read().get("fused_ops", []))) or "bench/results has no rows of fused_ops yet")
        return 0
    if not (on_gpu() or given.tiny):
        parser.error("full sizes need a CUDA device; --tiny takes sizes for a CPU")
    where = environment(device(), " ".join(["python bench/gpu_measure.py", *sys.argv[1:]]))
    print(f"{where.hardware}, torch {where.torch}, triton {where.triton}, commit {where.commit}")

    def add_row(topic: str, case: dict[str, str], numbers: dict[str, float]) -> None:
        print(topic, *case.values(), *(f"{name}={value:.4g}" for name, value in numbers.items()), flush=True)
        if given.rows:
            record([Row(topic, case, numbers, where)], given.rows)

    if given.measure == "memory":
        wrong = measure_memory(given.method, add_row)
    else:
        wrong = MEASURES[given.measure](TINY if given.tiny else SIZES, add_row)
    for line in wrong:
        print("wrong:", line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
