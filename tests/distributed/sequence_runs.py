"""Work of processes that hold slices of the same videos, and of one process with the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import zero_runs
from torch import Tensor
from zero_runs import HALF, LORA, MICRO, PROMPTS, SEQUENTIAL, divided_fully, zero

from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.sequence import SequenceGroup
from vpo_engine.distributed.sequence_traffic import sequence_traffic
from vpo_engine.memory.checkpointing import Activations
from vpo_engine.models.opensora.reuse import Reuse
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.protocols import SamplerSettings

EXACT = 1e-12
"""Relative differences in float64, which rounds to 1e-16; sums are of some thousand numbers, in another order."""
SAMPLED = 1e-5
"""Relative differences of videos in float32: each of a few steps rounds to about 1e-6."""

# --- the network ---

CONFIG = {
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "in_channels": 4,
    "caption_channels": 12,
    "model_max_length": 6,
}
FRAMES, PATCHES = 5, (3, 5)
"""Neither 5 frames nor 15 patches come out even for 2 or 4 processes."""


def network() -> STDiT3:
    made = STDiT3.from_config(CONFIG).double()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    return made


def inputs(x_mask: bool = False) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    given: dict[str, Any] = {
        "x": draw(4, 4, FRAMES, 2 * PATCHES[0], 2 * PATCHES[1]),
        "timestep": torch.tensor([100.0, 400.0, 700.0, 900.0]),
        "y": draw(2, 1, 6, 12),
        "mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]),
        "fps": 8.0,
        "height": 48,
        "width": 80,
    }
    if x_mask:
        given["x_mask"] = torch.tensor([[True, False, True, True, True]] * 3 + [[False] * 4 + [True]])
    return given


def prediction_and_gradients(made: STDiT3, given: dict[str, Any]) -> list[Tensor]:
    """Return the prediction, the gradient of the latents, and those of the parameters."""
    made.zero_grad()
    latents = given["x"].requires_grad_()
    latents.grad = None
    prediction = made(**given)
    weights = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (prediction * weights).sum().backward()
    assert latents.grad is not None
    parts = [p.grad.clone() for p in made.parameters() if p.grad is not None]
    return [prediction.detach(), latents.grad, *parts]


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, as a share of the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


WAYS = {
    "plain": (Activations(), False),
    "conditioned frames": (Activations("block"), True),
    "checkpointed": (Activations("all_but_attention", mlp_chunks=2), False),
    "offloaded": (Activations("block", offload=True), False),
}


def check_network(group: SequenceGroup) -> None:
    """Predictions, gradients and cached steps of slices are those of the whole."""
    whole = network()
    divided = copy.deepcopy(whole)
    divided.sequence = group
    for name, (activations, x_mask) in WAYS.items():
        given = inputs(x_mask)
        expected = prediction_and_gradients(whole, given)
        divided.activations = activations
        prediction, latents, *own = prediction_and_gradients(divided, given)
        found = [prediction, latents, *(group.sum(gradient) for gradient in own)]
        assert len(found) == len(expected) > 40
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert relative(one, other) < EXACT, (name, number)
        assert relative(own[0], expected[2]) > 0.1, "a process has a part of the gradient"
    check_bytes(group)
    for threshold in (0.01, 10.0):
        check_cached(whole, divided, threshold)


def check_bytes(group: SequenceGroup) -> None:
    """The bytes that a process sends are those of the formulas, where all slices are equal."""
    made, before = network(), group.sent
    made.sequence, given = group, inputs()
    given["x"] = torch.ones(4, 4, 4, 4, 8, dtype=torch.float64)
    prediction = made(**given)
    forward = group.sent - before
    prediction.sum().backward()
    expected = sequence_traffic(
        "axes",
        processes=group.count,
        blocks=2 * 2,
        tokens=4 * 4 * 2 * 4,
        width=32,
        element_size=8,
        output_tokens=4 * 4 * 2 * 4,
        output_values=4 * 8,
        output_size=8,
    )
    assert forward == expected.forward
    assert group.sent - before - forward == expected.backward


@torch.no_grad()
def check_cached(whole: STDiT3, divided: STDiT3, threshold: float) -> None:
    """All processes take the same steps from the cache as one does."""
    given = inputs()
    loops = Reuse(threshold), Reuse(threshold, shared=divided.sequence)
    for step in range(3):
        given["timestep"] = torch.full((4,), 900.0 - step)
        expected, found = (
            made(**given, reuse=loop) for made, loop in zip((whole, divided), loops, strict=True)
        )
        assert relative(found, expected) < EXACT, (threshold, step)
    counts = [(loop.blocks.computed, loop.blocks.reused) for loop in loops if loop.blocks]
    assert counts[0] == counts[1]
    assert counts[0] == ((1, 2) if threshold == 10.0 else counts[0])


# --- steps of Algorithm 1 ---

SETTINGS = ("pairs_per_step=2", "rollout.candidates=4", "rollout.steps=2")
"""The second of two prompts is a tie, so that of two units one has no pair."""
FEW: dict[str, tuple[str, ...]] = {
    "full": (),
    "adapter sequential": (*LORA, *SEQUENTIAL),
}
CASES = FEW | {
    "full sequential": SEQUENTIAL,
    "adapter": LORA,
    "micro-batches": (*MICRO, "memory.activation_checkpointing=block", "memory.mlp_chunks=2"),
    "pruned": ("rollout.prune.after=0.5", "rollout.prune.keep=2"),
    "explored": ("rollout.explore.steps=1", "rollout.explore.cache=0.2"),
    "in 8 bits": ("reference.storage=int8",),
    "in bfloat16": ("reference.storage=bf16",),
}
DIVIDED = {
    "full by stage 0": ((), 0),
    "adapter sequential by stage 2": ((*LORA, *SEQUENTIAL), 2),
    "full sequential by stage 3": (SEQUENTIAL, 3),
}
"""Settings of runs with DeepSpeed as well, and its stage."""


def split(sequence: int, per_team: int = 1) -> tuple[str, ...]:
    return (f"distributed.sequence_parallel={sequence}", f"processes.per_prompt={per_team}")


def run(settings: Sequence[str], processes: Processes) -> dict[str, Any]:
    return zero_runs.run((*SETTINGS, *settings), processes, steps=3)


def keep(folder: Path, name: str, found: Any, processes: Processes) -> None:
    torch.save(found, folder / f"{name} {processes.rank}.pt")


def kept(folder: Path, name: str, count: int) -> list[Any]:
    return [torch.load(folder / f"{name} {rank}.pt", weights_only=True) for rank in range(count)]


def sampled(processes: Processes, *settings: str) -> Tensor:
    """Return the latents [2, C, T, H, W] of two videos of one prompt, sampled with guidance."""
    model = zero_runs.make(settings, processes).model
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    text, options = model.embed(PROMPTS[:1]), SamplerSettings(4, 3.0)
    return model.denoise(model.network, model.start(noise), text, options).latents


def rounded(processes: Processes, *more: str) -> list[float]:
    """Return the margins of steps with bfloat16 weights and a reference of differences from them; it is refreshed after
    the second."""
    found = run((*HALF, "reference.storage=exact8", *more), processes)
    return [metrics.get("margin", 0.0) for metrics in found["metrics"]]


def in_two(folder: Path) -> None:
    processes = Processes.start("cpu", sequence=2)
    check_network(SequenceGroup(processes.sequence))
    for name, settings in CASES.items():
        keep(folder, name, run((*settings, *split(2)), processes), processes)
    for name, (settings, stage) in DIVIDED.items():
        division = zero(stage, *([divided_fully(folder)] if stage == 3 else []))
        keep(folder, name, run((*settings, *division, *split(2)), processes), processes)
    keep(folder, "video", sampled(processes, *split(2)), processes)
    keep(folder, "rounded", rounded(processes, *split(2)), processes)
    algorithm = zero_runs.make((*SETTINGS, *split(2)), processes)
    zero_runs.make_steps(algorithm, [0, 1])
    zero_runs.save(algorithm, folder / "saved", 2)
    zero_runs.make_steps(algorithm, [2])
    keep(folder, "went on", zero_runs.weights_of(algorithm), processes)
    processes.stop()


LAYOUTS = {"four slices": (4, 1), "two units": (2, 1), "a team of two units": (2, 2)}
"""Processes of a unit, and units of a team, among four processes."""


def in_four(folder: Path, name: str) -> None:
    sequence, per_team = LAYOUTS[name]
    processes = Processes.start("cpu", per_team, sequence=sequence)
    check_network(SequenceGroup(processes.sequence))
    for case, settings in FEW.items():
        found = run((*settings, *split(sequence, per_team)), processes)
        keep(folder, f"{name}, {case}", found, processes)
    keep(folder, f"{name}, video", sampled(processes, *split(sequence, per_team)), processes)
    processes.stop()
