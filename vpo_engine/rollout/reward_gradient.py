"""Sampling with gradients, for methods that push a reward's gradient through the sampler.

Such a method samples without gradients up to some step, with ``VideoModel.denoise``, and goes on from there with one of
the functions here. The steps are those of the model's own solver, guidance included. Every prediction is checkpointed:
its activations exist while it is made, and again while its backward pass runs. Shape letters are those of
``model_values.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vpo_engine.memory.checkpointing import recomputed
from vpo_engine.model_values import Network, SamplerSettings, SamplerState, TextEmbedding
from vpo_engine.video_model import Solver, VideoModel


def denoise_with_gradients(
    model: VideoModel,
    network: Network,
    state: SamplerState,
    text: TextEmbedding,
    settings: SamplerSettings,
    stop: int | None = None,
) -> SamplerState:
    """Do what ``VideoModel.denoise`` does, with gradients through all steps from ``state`` to ``stop`` (None: all).

    Latents are not detached between steps, so this is backpropagation through time; what led to ``state`` was computed
    without gradients, and ends it. The values are those of ``denoise``: settings that only make that faster (cache,
    compile) are not used.
    """
    solver = model.solver(settings.steps)
    stop = settings.steps if stop is None else stop
    assert state.step < stop <= settings.steps, f"{state.step} steps are done, and {stop} are asked for"
    latents, preview, memory = state.latents, state.preview, state.memory
    for step in range(state.step, stop):
        prediction = _prediction(model, network, solver, step, latents, text, settings)
        before = latents
        latents, memory = solver.advance(step, before, prediction, memory)
        preview = solver.preview(step, before, latents, prediction)
    return SamplerState(latents, preview, stop, memory)


def clean_prediction(
    model: VideoModel,
    network: Network,
    state: SamplerState,
    text: TextEmbedding,
    settings: SamplerSettings,
) -> Tensor:
    """Return the clean latents [B, C, T, H, W] that one prediction from ``state`` points to, with gradients.

    This is x0 as the model sees it before step ``state.step`` of ``settings.steps``.
    """
    return denoise_with_gradients(model, network, state, text, settings, state.step + 1).preview


def first_of_partial(strength: float, steps: int) -> int:
    """Return the first step of a partial chain: of ``steps`` steps the last ``strength`` share is run, rounded up.

    With InstructVideo's 20 steps and strength 0.6 the chain begins at step 8 and has 12 steps. ``strength`` is above 0
    and at most 1.
    """
    return math.floor(steps * (1 - strength) + 1e-9)


def first_below_noise(model: VideoModel, level: float, steps: int) -> int:
    """Return the first of ``steps`` steps before which latents are at most ``level`` noisy, 0 (clean) to 1 (noise).

    It is the last step if all are noisier.
    """
    solver = model.solver(steps)
    return next((step for step in range(steps) if solver.noise_level(step) <= level), steps - 1)


def _prediction(
    model: VideoModel,
    network: Network,
    solver: Solver,
    step: int,
    latents: Tensor,
    text: TextEmbedding,
    settings: SamplerSettings,
) -> Tensor:
    scale = settings.guidance if settings.guided_at(solver.noise_level(step)) else 1.0
    t = torch.full((len(latents),), solver.times[step], device=latents.device)

    def predict(noisy: Tensor) -> Tensor:
        return model.predict(network, noisy, t, text, scale)

    return recomputed(predict, latents)
