"""Runs of the sprites world by which DeepSpeed's ways to divide the work are compared with one process.

The optimizer's eps is 1, so that a step is nearly the learning rate times the gradient, and rounding stays rounding.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from small_policy import shipped_policy_is_small
from step_case import step_on
from test_teams import PROMPTS, TIE
from torch import Tensor

from vpo_engine.build import build_model
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.optimizer_state import MASTER
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.reference.store import build_reference
from vpo_engine.run_state import capture, restore

SETTINGS = (
    "pairs_per_step=4",
    "rollout.candidates=2",
    "rollout.steps=1",
    "objective.timesteps_per_pair=1",
    "objective.beta=50",
    "optimizer.eps=1",
    "optimizer.lr=1",
    "optimizer.clip=0.1",
    "optimizer.warmup_steps=0",
    "reference.refresh_every=2",
)
"""The second of four prompts is a tie: of two processes one has a pair and the other two. Float32 rounds errors of
about 1, and so margins, beta / 2 times as large, by some 1e-6."""
THREE = ("pairs_per_step=3",)
"""For three processes, of which one has no pair."""
LORA = ("model.lora.rank=4", "model.lora.alpha=8", "reference.storage=adapter")
SEQUENTIAL = ("memory.sequential=true",)
MICRO = ("objective.micro_batch_size=1", "objective.timesteps_per_pair=2", "pairs.gap_power=1")
HALF = ("model.dtype=bfloat16", "memory.weights=fp32_master")
CLIPPED = ("optimizer.clip=0.05",)
UNCLIPPED = ("optimizer.clip=null", "optimizer.lr=1e-2")
"""Gradients have norms of about 0.2 with an adapter and 4 without, so that a limit of 0.1, 0.05 or none tells."""


def zero(stage: int, *more: str) -> tuple[str, ...]:
    return ("distributed.engine=deepspeed", f"distributed.zero_stage={stage}", *more)


def divided_fully(folder: Path) -> str:
    """Return the setting with which stage 3 divides the small weights of the sprites world, too."""
    file = folder / "divide_all.json"
    if not file.exists():
        values = {"zero_optimization": {"stage": "auto", "stage3_param_persistence_threshold": 0}}
        beside = file.with_suffix(
            f".{os.getpid()}"
        )  # every process of a group may come here at the same time
        beside.write_text(json.dumps(values), encoding="utf-8")
        beside.replace(file)
    return f"distributed.deepspeed_config={file}"


def make(settings: Sequence[str], processes: Processes) -> OnlineVPO:
    config = load_config(None, [*SETTINGS, *settings])
    with shipped_policy_is_small():
        model = build_model(config, processes, lambda _: None)
    show_latents(model)
    model.prepare(PROMPTS)
    reference = build_reference(config.reference.storage, model.network)
    return OnlineVPO(config, model, FirstNumber(), reference, processes)


def show_latents(model: Any) -> None:
    """Let videos show the first number of their latents in place of what the decoder makes of them.

    The decoder takes as long as all else, and nobody divides it. The pixel's colours are digits, of 2^-20 at the end.
    """

    def show(latents: Tensor) -> Tensor:
        number = ((latents[:, 0, 0, 0, 0].double().clamp(-7.9, 7.9) + 8) * 2**20).long()
        digits = torch.stack([number >> 16, number >> 8 & 255, number & 255], dim=1)
        return digits[:, None, None, None].to(torch.uint8)

    model.to_video = show


class FirstNumber:
    """Scores by what ``show_latents`` shows, which rounding hardly changes; it cannot tell candidates of TIE apart."""

    dimensions = ("temporal_consistency",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        scores = (
            videos[:, 0, 0, 0].double() @ torch.tensor([2.0**16, 2.0**8, 1.0], dtype=torch.double) / 2**20
        )
        ties = torch.tensor([prompt == TIE for prompt in prompts])
        return {"temporal_consistency": scores.masked_fill(ties, 1.0).float()}


def make_steps(algorithm: OnlineVPO, numbers: Sequence[int]) -> list[dict[str, float]]:
    """Make steps of these numbers, and return their metrics."""
    processes, found, total = algorithm.processes, [], algorithm.config.pairs_per_step
    for number in numbers:
        mine = processes.team_range(total, "pairs_per_step")
        texts = [PROMPTS[i % len(PROMPTS)] for i in mine]
        step = step_on(algorithm, texts, [total * number + i for i in mine])
        found.append(step.metrics)
    return found


def weights_of(algorithm: OnlineVPO) -> Tensor:
    """Return all trained weights as they compute, [number]."""
    with algorithm.optimizer.whole():
        return torch.cat([weight.detach().float().flatten() for weight in algorithm.parameters])


def reference_of(algorithm: OnlineVPO) -> Tensor:
    state = algorithm.reference.state_dict()
    return torch.cat([state[name].float().flatten() for name in sorted(state)])


def run(settings: Sequence[str], processes: Processes, steps: int = 3) -> dict[str, Any]:
    """Return what a run made in this process: before and after, metrics, the optimizer's state, the reference."""
    algorithm = make(settings, processes)
    before = weights_of(algorithm)
    metrics = make_steps(algorithm, range(steps))
    return {
        "before": before,
        "after": weights_of(algorithm),
        "metrics": [numbers_of(each) for each in metrics],
        "state": algorithm.optimizer.state_dict(),
        "reference": reference_of(algorithm),
    }


def numbers_of(metrics: Mapping[str, float]) -> dict[str, float]:
    names = ("pairs", "loss", "margin", "grad_norm", "reference_age")
    return {name: metrics[name] for name in names if name in metrics}


def save(algorithm: OnlineVPO, folder: Path, step: int) -> None:
    """Save what a checkpoint holds of the algorithm, as the trainer does."""
    with algorithm.optimizer.whole():
        snapshot = capture(algorithm, step, {})
        if algorithm.processes.first:
            (folder / "policy").mkdir(parents=True)
            algorithm.model.save_policy(folder / "policy")
            torch.save(snapshot, folder / "snapshot.pt")
    algorithm.processes.wait()


def load(algorithm: OnlineVPO, folder: Path) -> None:
    snapshot = torch.load(folder / "snapshot.pt", weights_only=True)
    restore(algorithm, snapshot["tensors"], snapshot["state"], folder / "policy")


ROUNDED = {"int8": {"rtol": 0.0, "atol": 1.0}, "bf16": {"rtol": 2**-7, "atol": 1e-6}}
"""Differences of a stored reference where a weight on the edge between two rounded values got the other one."""


def assert_same_training(
    one: dict[str, Any],
    other: dict[str, Any],
    bound: float,
    case: object,
    storage: str = "copy",
    margins: float = 1e-5,
) -> None:
    """Assert that two runs made the same weights, references and optimizer states.

    bound: of absolute differences. A step moves a weight by at most its gradient, clipped to a norm of 0.1, and
    float32 sums in another order round by some 1e-6 of that. Moments are of gradients with a norm of up to 4 without
    one. margins: of the differences of margins and losses.
    """
    moved = float((one["after"] - one["before"]).abs().max())
    assert moved > 1e3 * bound, (case, moved)
    for name in ("after", "reference"):
        limits = ROUNDED.get(storage, {}) if name == "reference" else {}
        limits = limits or {"rtol": 0.0, "atol": bound}
        torch.testing.assert_close(
            other[name], one[name], **limits, msg=lambda m, n=name: f"{case}, {n}: {m}"
        )
    for mine, theirs in zip(one["metrics"], other["metrics"], strict=True):
        assert mine.keys() == theirs.keys(), case
        for name, value in mine.items():
            near = math.isclose(
                value, theirs[name], rel_tol=1e-2 if storage in ROUNDED else 1e-4, abs_tol=margins
            )
            assert near, (case, name, value, theirs)
    assert other["state"].keys() == one["state"].keys(), case
    for name, value in one["state"].items():
        limit = 4 * bound * max(1.0, float(value.abs().max())) if value.is_floating_point() else 0
        if name.endswith(MASTER):
            limit = bound
        torch.testing.assert_close(
            other["state"][name], value, rtol=0, atol=limit, msg=lambda m, n=name: f"{case}, {n}: {m}"
        )
