"""Diffusion-DPO of a diffusers UNet as the public trainers do it, with the fused loss in the place of theirs.

Run it as ``python examples/diffusers_trainer.py [--eager]``; weights and data are toys. The loop is that of
SalesforceAIResearch/DiffusionDPO (``train.py``) and of diffusers' ``train_diffusion_dpo.py``: batches ordered [winners,
losers], one noise and one timestep per pair, epsilon prediction, a frozen copy as reference. Only ``preference_loss``
differs from them. Under accelerate it is called in the same way, with ``accelerator.backward(loss)`` in place of
``loss.backward()``.
"""

from __future__ import annotations

import copy
import sys

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import logsigmoid
from vpo_kernels import batched_paired_dpo_loss


def preference_loss(
    prediction: Tensor, reference: Tensor, target: Tensor, beta: float, fused: bool
) -> tuple[Tensor, Tensor]:
    """Return loss (scalar) and margins [P] of a batch [2P, C, H, W] whose first half are the winners.

    ``beta`` is that of DiffusionDPO and of diffusers' SDXL script: the margin is -(beta / 2) * (winner's error change -
    loser's error change), where an error change is the policy's mean squared error less the reference's. The SD 1.5
    script writes no half: give twice its ``--beta_dpo``. The page docs/loss.md converts those of other trainers.
    """
    if fused:
        out = batched_paired_dpo_loss(prediction, reference, target, beta=beta)
        return out.loss, out.margin
    error, reference_error = (
        (each.float() - target.float()).pow(2).flatten(1).mean(1) for each in (prediction, reference)
    )
    winner_error_change, loser_error_change = (error - reference_error).chunk(2)
    margin = -beta / 2 * (winner_error_change - loser_error_change)
    return -logsigmoid(margin).mean(), margin.detach()


def tiny_unet() -> UNet2DConditionModel:
    """Build Stable Diffusion's class with 200 thousand weights, for latents [B, 4, 8, 8] and text [B, L, 16]."""
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=16,
    )


def toy_batch(pairs: int) -> tuple[Tensor, Tensor]:
    """Return latents [2P, 4, 8, 8], bright winners and dark losers, and the text [P, 4, 16] that both share."""
    winners, losers = torch.randn(2, pairs, 4, 8, 8) * 0.3
    return torch.cat([winners + 1, losers - 1]), torch.randn(pairs, 4, 16)


def train(
    fused: bool, steps: int = 30, pairs: int = 4, beta: float = 200.0
) -> tuple[UNet2DConditionModel, list[float]]:
    """Return the trained UNet and the loss of every step. Random numbers do not depend on ``fused``."""
    torch.manual_seed(0)
    unet = tiny_unet()
    reference = copy.deepcopy(unet).requires_grad_(False)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-5)
    losses = []
    for step in range(steps):
        latents, text = toy_batch(pairs)
        noise = torch.randn_like(latents[:pairs]).repeat(2, 1, 1, 1)  # shared by winner and loser
        t = torch.randint(0, len(scheduler.timesteps), (pairs,)).repeat(2)
        noisy, text = scheduler.add_noise(latents, noise, t), text.repeat(2, 1, 1)

        prediction = unet(noisy, t, text).sample
        with torch.no_grad():
            reference_prediction = reference(noisy, t, text).sample
        loss, margin = preference_loss(prediction, reference_prediction, noise, beta, fused)

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}, accuracy {(margin > 0).float().mean():.2f}")
    return unet, losses


if __name__ == "__main__":
    train(fused="--eager" not in sys.argv[1:])
