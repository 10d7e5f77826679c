"""The fused loss in your own training loop: a toy denoiser learns to prefer one kind of sample, in plain torch.

Run it as ``python examples/embed_loss.py``. It needs nothing of the engine but ``vpo_kernels``.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from vpo_kernels import paired_dpo_loss


def predict(network: nn.Module, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the network's prediction for latents [P, 16] noised to time t [P, 1]; its target is latents - noise."""
    return network(torch.cat([(1 - t) * latents + t * noise, t], dim=1))


def train(steps: int = 200, refresh_every: int = 50) -> list[float]:
    """Train, and return the mean margin of every step. Winners are latents around +1, losers around -1."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(17, 64), nn.SiLU(), nn.Linear(64, 16))
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    margins = []
    for step in range(1, steps + 1):
        winner, loser = torch.randn(8, 16) * 0.3 + 1, torch.randn(8, 16) * 0.3 - 1
        noise, t = (
            torch.randn(8, 16),
            torch.rand(8, 1),
        )  # one noise and time per pair, shared by winner and loser
        out = paired_dpo_loss(
            predict(policy, winner, noise, t),
            predict(policy, loser, noise, t),
            predict(reference, winner, noise, t),
            predict(reference, loser, noise, t),
            winner - noise,
            loser - noise,
            beta=10.0,
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % refresh_every == 0:
            reference.load_state_dict(policy.state_dict())
        margins.append(out.margin.mean().item())
    return margins


if __name__ == "__main__":
    history = train()
    print(f"margin at the first step {history[0]:.3f}, just before the first refresh {history[49]:.3f}")
