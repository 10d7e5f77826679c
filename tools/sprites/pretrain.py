"""Pretrain the sprites policy on the mixture: rectified flow on cached latents, as in Open-Sora 1.2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.sprites.optimizers import Log, MuonAndAdam
from tools.sprites.train_text import CONFIG as TEXT_CONFIG
from tools.sprites.train_vae import CHANNELS
from vpo_engine.data.sprites.assets import FLOW, FPS, MAX_LENGTH, to_pixels
from vpo_engine.data.sprites.damage import sample_mixture
from vpo_engine.data.sprites.world import FRAMES, SIZE
from vpo_engine.models.opensora.rectified_flow import RectifiedFlow
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.models.opensora.vae import OpenSoraVAE
from vpo_engine.protocols import TextEmbedding

UNSHIFTED = RectifiedFlow(use_timestep_transform=False)
CLIPS, BATCH = 9216, 48
EMA_DECAY = 0.998
CONFIG: dict[str, Any] = {
    "model_type": "STDiT3",
    "in_channels": CHANNELS,
    "hidden_size": 128,
    "depth": 3,
    "num_heads": 4,
    "patch_size": [1, 2, 2],
    "mlp_ratio": 4.0,
    "pred_sigma": True,
    "qk_norm": True,
    "caption_channels": TEXT_CONFIG["d_model"],
    "model_max_length": MAX_LENGTH,
    "input_sq_size": SIZE,
    "class_dropout_prob": 0.1,
}


@dataclass(frozen=True)
class Phase:
    """A part of the training, which draws its own clips and has its own learning-rate schedule and moving average."""

    steps: int
    muon_lr: float
    adam_lr: float
    shift_from: int
    """Times are shifted from this step on. Looks are learned at little noise, directions of motion at much noise."""


PHASES = (Phase(3200, 0.02, 2e-3, shift_from=2015), Phase(2700, 0.015, 1.5e-3, shift_from=1))


def latents_of(vae: OpenSoraVAE, count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Draw clips of the mixture; return their latents [count, C, T, H, W] and their captions."""
    latents, captions = [], []
    for start in range(0, count, 256):
        clips = sample_mixture(min(256, count - start), generator)
        with torch.no_grad():
            latents.append(vae.encode(to_pixels(clips.videos), sample=False))
        captions.extend(clips.captions)
    return torch.cat(latents), captions


def pretrain(
    vae: OpenSoraVAE,
    embed: Callable[[list[str]], TextEmbedding],
    seed: int,
    log: Log,
) -> STDiT3:
    """Train a policy to follow captions and to show the mixture, damage included.

    Captions are dropped with the published probability.
    """
    torch.manual_seed(seed)
    network = STDiT3.from_config(CONFIG)
    for number, phase in enumerate(PHASES, 1):
        log(f"policy: phase {number} of {len(PHASES)}")
        run_phase(network, phase, vae, embed, torch.Generator().manual_seed(seed + number - 1), log)
    return network


def run_phase(
    network: STDiT3,
    phase: Phase,
    vae: OpenSoraVAE,
    embed: Callable[[list[str]], TextEmbedding],
    generator: torch.Generator,
    log: Log,
) -> None:
    """Train ``network`` in place, then replace its weights by their moving average, rounded to half precision.

    The next phase starts from these rounded weights, and those of the last phase are shipped, bit for bit.
    """
    latents, captions = latents_of(vae, CLIPS, generator)
    every = sorted(set(captions))
    text = embed(every)
    rows = torch.tensor([every.index(caption) for caption in captions])
    average = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = MuonAndAdam(network, phase.steps, phase.muon_lr, phase.adam_lr)
    mean_loss = 1.0
    for step in range(1, phase.steps + 1):
        picks = torch.randint(CLIPS, (BATCH,), generator=generator)
        flow = FLOW if step >= phase.shift_from else UNSHIFTED
        loss = _loss(network, flow, latents[picks], text[rows[picks]], generator)
        optimizer.step(loss)
        decay = min(EMA_DECAY, step / (step + 9))
        torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 1 - decay)
        mean_loss += max(0.01, 1 / step) * (loss.item() - mean_loss)
        if step % 100 == 0:
            log(f"policy: step {step}/{phase.steps}, loss {mean_loss:.4f}")
    with torch.no_grad():
        for parameter, mean in zip(network.parameters(), average, strict=True):
            parameter.copy_(mean.half())


def _loss(
    network: STDiT3, flow: RectifiedFlow, latents: Tensor, text: TextEmbedding, generator: torch.Generator
) -> Tensor:
    """Return the rectified-flow loss, averaged over the batch, whose times are stratified."""
    count = len(latents)
    strata = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    times = flow.draw_timesteps(strata.clamp(1e-6, 1 - 1e-6), SIZE, SIZE, FRAMES)
    noise = torch.randn(latents.shape, generator=generator)
    captions = network.y_embedder.drop(text.embeddings.unsqueeze(1), CONFIG["class_dropout_prob"], generator)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        out = network(x_t, t, captions, text.mask, fps=FPS, height=SIZE, width=SIZE)
        return out[:, :CHANNELS]

    return flow.training_loss(predict, latents, noise, times).mean()
