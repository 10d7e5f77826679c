"""Checks that need no diffusers pipeline: a family agrees with itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpo_engine.exporting.check import fixed_inputs, relative_error
from vpo_engine.model_checks.table import Finding, Table
from vpo_engine.model_values import TextEmbedding
from vpo_engine.reference.store import build_reference
from vpo_engine.seeding import normal
from vpo_engine.video_model import VideoModel

PROMPT = "a red cat"
STEPS, GUIDANCE = 4, 3.0
"""Sampling steps and guidance of the checks. 4 divides the 1000 times of schedules with whole times."""
ROUNDING = 1e-4
"""The largest relative error in float32 that is rounding."""


def own_checks(table: Table, model: VideoModel) -> None:
    """Add the checks that every family can pass."""
    if not model.card.pipelines:
        table.check("target and solver", "target_scales, noising_scales or solver", lambda: _walk(model))
        table.check("guidance", "predict, for a guidance other than 1", lambda: _guidance(model))
        table.check("size of the videos", "to_video, latent_shape or video_size", lambda: _video_size(model))
    needs = ["prediction"] if model.card.pipelines else []
    entry = "the network, which is random or changes"
    table.check("policy equals reference", entry, lambda: _reference(model), needs)
    table.check("LoRA targets", "card.lora_targets", lambda: _targets(model))


def clean_and_noise(model: VideoModel) -> tuple[Tensor, Tensor]:
    """Return clean latents and noise of the model's size, [1, C, T, H, W]."""
    shape = (1, *model.latent_shape)
    return tuple(normal(shape, 0, "check", name).to(model.device) for name in ("clean", "noise"))  # type: ignore[return-value]


def target(model: VideoModel, clean: Tensor, noise: Tensor, time: float) -> Tensor:
    """Return what the network should predict at a time, by the family's description."""
    scales = model.target_scales(torch.tensor([time], device=clean.device))
    kept, added = (torch.as_tensor(scale, device=clean.device).reshape(-1, 1, 1, 1, 1) for scale in scales)
    return kept * clean + added * noise


def noised(model: VideoModel, clean: Tensor, noise: Tensor, time: float) -> Tensor:
    return model.add_noise(clean, noise, torch.tensor([time], device=clean.device))


def _walk(model: VideoModel) -> Finding:
    """Let the solver walk with exact predictions: it must stay on the line from noise to clean latents."""
    clean, noise = clean_and_noise(model)
    solver = model.solver(STEPS)
    latents = noised(model, clean, noise, solver.times[0])
    memory: tuple[Tensor, ...] = ()
    errors = []
    for step in range(STEPS):
        latents, memory = solver.advance(
            step, latents, target(model, clean, noise, solver.times[step]), memory
        )
        if step + 1 < STEPS:
            expected = noised(model, clean, noise, solver.times[step + 1])
            errors.append(relative_error(expected, latents))
    return Finding(
        max(errors),
        ROUNDING,
        "steps with exact predictions do not lead to the noised latents of the next time",
    )


@torch.no_grad()
def _guidance(model: VideoModel) -> Finding:
    """Compare with both branches in one batch, and with one after the other; a family may compute either.

    Rounding differs with the batch, and a trained network can enlarge it beyond ROUNDING. So the smaller error counts.
    """
    latents, t, text = fixed_inputs(model)
    null = model.null_text(text)
    found = model.predict(model.network, latents, t, text, GUIDANCE)

    def error(prompted: Tensor, unprompted: Tensor) -> float:
        return relative_error(unprompted + GUIDANCE * (prompted - unprompted), found)

    apart = (model.predict(model.network, latents, t, each) for each in (text, null))
    both = torch.cat([latents, latents]), torch.cat([t, t]), TextEmbedding.cat([text, null])
    together = model.predict(model.network, *both).chunk(2)
    return Finding(
        min(error(*apart), error(*together)), ROUNDING, "the guided prediction is not u + guidance * (c - u)"
    )


def _video_size(model: VideoModel) -> Finding:
    clean, _ = clean_and_noise(model)
    found = tuple(model.decode(clean).shape)
    if model.video_size is None:
        return Finding(0.0, 0.0, "")
    expected = (1, *model.video_size, 3)
    return Finding(float(found != expected), 0.0, f"decoded videos are {found}, expected {expected}")


def _reference(model: VideoModel) -> Finding:
    """Predict for two samples of a prompt, as the update does: the policy with a graph, the reference without one."""
    reference = build_reference("copy", model.network)
    latents, t, text = fixed_inputs(model)
    pair = torch.cat([latents, -latents]), torch.cat([t, t])
    policy = model.predict(model.network, *pair, text).detach()
    again = model.predict(reference, *pair, text)
    return Finding(
        float((policy - again).abs().max()),
        0.0,
        "an exact copy predicts something else, so margins are not 0",
    )


def _targets(model: VideoModel) -> Finding:
    linear = [name for name, part in model.network.named_modules() if isinstance(part, nn.Linear)]
    wrong = [
        end for end in model.card.lora_targets if not any(f".{name}".endswith(f".{end}") for name in linear)
    ]
    return Finding(float(len(wrong)), 0.0, f"{', '.join(wrong)} ends the name of no linear layer")
