"""A run directory with invented numbers and with clips of moving squares."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from vpo_engine.metrics.summary import summarise
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.gallery import HeldOutGallery, PairGallery, write_held_out, write_pairs
from vpo_engine.runs.log import RunLog

DIMENSIONS = (
    "visual_quality",
    "temporal_consistency",
    "dynamic_degree",
    "text_alignment",
    "factual_consistency",
)
BASE = {"jitter": 1.51, "colour_change": 0.21, "flicker": 0.016, "displacement": 8.2, "sharpness": 0.455}
GAIN = {"jitter": -0.57, "colour_change": -0.077, "flicker": -0.001, "displacement": 0.08, "sharpness": -0.03}
CONFIG = """name: sprites
seed: 1
steps: 48
pairs_per_step: 16
rollout:
  candidates: 4
  steps: 12
  guidance: 1.0
reward:
  kind: sprites
  dimensions: [visual_quality, temporal_consistency, dynamic_degree, text_alignment, factual_consistency]
objective:
  beta: 250.0
reference:
  refresh_every: 10
optimizer:
  lr: 0.0001
"""
PROMPTS = ["a red square moves right", "a blue circle moves up", "a green triangle moves left"]


def clip(generator: torch.Generator, damage: float, *, frames: int = 17, side: int = 32) -> Tensor:
    """A square on its way, the more ``damage`` the less steady in place and colour. uint8 [F, H, W, 3]."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    background, colour = 40 + 40 * rand(3), 120 + 120 * rand(3)
    start, velocity = 0.15 + 0.2 * rand(2), (0.35 + 0.1 * rand(2)) / frames
    size = max(3, side // 5)
    video = background.expand(frames, side, side, 3).clone()
    for f in range(frames):
        place = (start + f * velocity + 0.06 * damage * (rand(2) - 0.5)) * side
        y, x = (int(v) for v in place.clamp(0, side - size))
        video[f, y : y + size, x : x + size] = colour + 90 * damage * (rand(3) - 0.5)
        video[f] += 14 * damage * (rand(1) - 0.5)
    video += 3 * torch.randn(video.shape, generator=generator)
    return video.clamp(0, 255).to(torch.uint8)


def scores(generator: torch.Generator, level: float) -> dict[str, float]:
    noise = torch.randn(len(DIMENSIONS), generator=generator) * 0.3
    return {name: level + float(n) for name, n in zip(DIMENSIONS, noise, strict=True)}


def write_galleries(run: RunDirectory, generator: torch.Generator, prompts: list[str], count: int) -> None:
    names = [prompts[i % len(prompts)] for i in range(count)]
    held_out = HeldOutGallery(
        before=torch.stack([clip(generator, 1.6) for _ in names]),
        after=torch.stack([clip(generator, 0.4) for _ in names]),
        prompts=names,
        before_scores=[scores(generator, 4.5) for _ in names],
        after_scores=[scores(generator, 4.8) for _ in names],
        fps=8,
        settings="12 steps, no guidance.",
    )
    write_held_out(run.held_out_gallery, held_out)
    for step in (12, 24, 36, 48):
        pairs = PairGallery(
            winner=torch.stack([clip(generator, 0.3) for _ in range(4)]),
            loser=torch.stack([clip(generator, 2.0) for _ in range(4)]),
            prompts=[prompts[(step + i) % len(prompts)] for i in range(4)],
            winner_scores=[scores(generator, 5.0) for _ in range(4)],
            loser_scores=[scores(generator, 4.2) for _ in range(4)],
            gap=[0.8 - 0.18 * i + step / 500 for i in range(4)],
            fps=8,
        )
        write_pairs(run.pairs_file(step), pairs)


def train_row(generator: torch.Generator, step: int, steps: int) -> dict[str, float]:
    noise = torch.randn(20, generator=generator).tolist()
    done, age = step / steps, step % 10
    row = {
        "loss": math.log(2) - 0.02 * age + 0.04 * noise[0],
        "margin": 0.08 * age + 0.1 * noise[1],
        **({"implicit_accuracy": min(1.0, 0.52 + 0.016 * age + 0.05 * noise[2])} if age != 1 else {}),
        "winner_error_change": -0.0006 * age + 0.0008 * noise[3],
        "loser_error_change": 0.0012 * age + 0.0008 * noise[4],
        "tie_rate": max(0.0, 0.02 * noise[5]),
        "pairs": 16,
        "grad_norm": 2.4 + 0.5 * abs(noise[6]),
        "lr": 1e-4 * min(1.0, step / 5) * (1 - 0.8 * done),
        "reward/selected": 4.52 + 0.2 * done + 0.06 * noise[7],
        "reward/gap": 0.8 + 0.08 * noise[8],
        "seconds/rollout": 1.76,
        "seconds/decode": 0.08,
        "seconds/reward": 0.03,
        "seconds/update": 1.44 + 0.1 * abs(noise[9]),
        "seconds/refresh": 0.002,
        **({"seconds/evaluate": 6.0} if step % 12 == 0 else {}),
        "seconds/step": 3.35 + 0.1 * abs(noise[9]) + 6.0 * (step % 12 == 0),
        "speed/samples_per_second": 19.0 + noise[9],
        "speed/idle": 0.01,
        "speed/rollout_mfu": 0.43 + 0.01 * noise[10],
        "speed/update_mfu": 0.38,
        "speed/ceiling": 7.21e10,
        "optimizer_steps": step,
        "reference_age": age,
    }
    return row | {
        f"reward/{name}": 4.5 + 0.2 * done + 0.1 * noise[10 + i] for i, name in enumerate(DIMENSIONS)
    }


def evaluation(generator: torch.Generator, done: float, clips: int) -> dict[str, Tensor]:
    found = {}
    for kind, gain in (("reward", 0.32), ("judge", 0.27)):
        for i, name in enumerate((*DIMENSIONS, "selected")):
            noise = 0.15 * torch.randn(clips, generator=generator)
            found[f"{kind}/{name}"] = 4.57 - 0.1 * i + gain * done * (0.4 + 0.25 * i) + noise
    for name, base in BASE.items():
        noise = 0.3 * base * torch.randn(clips, generator=generator)
        found[f"pixels/{name}"] = base + GAIN[name] * done + 0.5 * noise
    return found


def make_run(
    root: Path, *, prompts: list[str] | None = None, steps: int = 48, gallery: int = 16
) -> RunDirectory:
    """A finished run with everything that a report shows."""
    generator = torch.Generator().manual_seed(0)
    run = RunDirectory.create_at(root, CONFIG)
    base = final = evaluation(generator, 0.0, 128)
    with RunLog(run) as log:
        for step in range(steps + 1):
            if step:
                log.write(step, "train", train_row(generator, step, steps))
            if step % 12 == 0:
                final = evaluation(generator, step / steps, 128) if step else base
                log.write(step, "eval", {f"held_out/{k}": float(v.mean()) for k, v in final.items()})
    timings = {"rollout": 84.5, "update": 70.2, "decode": 3.8, "reward": 1.4, "evaluate": 30.0}
    run.summary.write_text(json.dumps(summarise(base, final, timings)))
    write_galleries(run, generator, prompts or PROMPTS, gallery)
    return run
