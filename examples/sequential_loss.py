"""The paired loss where memory holds one graph, but not two: winner and loser one after the other.

Run it as ``python examples/sequential_loss.py``. ``sequential_backward`` and ``single_pair_backward`` take functions
that run the policy in the place of its predictions, call backward themselves, and leave the gradients that the joint
loss would leave. The first needs one more forward pass, the second does not; but the second is for one pair per
process, and nothing else may add to the gradients.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from vpo_kernels import PairedDPOLoss, paired_dpo_loss, sequential_backward, single_pair_backward

Mode = Literal["joint", "sequential", "single pair"]
BETA = 10.0


class Denoiser(nn.Module):
    """A toy deep enough for its activations to outweigh its weights. Latents [P, tokens, 16] and time t [P, 1, 1]."""

    def __init__(self, width: int = 64, depth: int = 6) -> None:
        super().__init__()
        self.inside = nn.Linear(17, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)
        )
        self.outside = nn.Linear(width, 16)

    def forward(self, latents: Tensor, t: Tensor) -> Tensor:
        hidden = self.inside(torch.cat([latents, t.expand(-1, latents.shape[1], 1)], dim=2))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.outside(hidden)


def backward(
    mode: Mode, policy: nn.Module, reference: nn.Module, winner: Tensor, loser: Tensor
) -> PairedDPOLoss:
    """Add the gradients of the loss of P pairs of latents [P, tokens, 16] to the policy's parameters."""
    noise, t = torch.randn_like(winner), torch.rand(winner.shape[0], 1, 1)
    noisy_winner, noisy_loser = torch.lerp(winner, noise, t), torch.lerp(loser, noise, t)
    with torch.no_grad():
        constants = (reference(noisy_winner, t), reference(noisy_loser, t), winner - noise, loser - noise)
    predict_winner, predict_loser = partial(policy, noisy_winner, t), partial(policy, noisy_loser, t)
    if mode == "sequential":
        return sequential_backward(predict_winner, predict_loser, *constants, beta=BETA)
    if mode == "single pair":
        return single_pair_backward(policy.parameters(), predict_winner, predict_loser, *constants, beta=BETA)
    out = paired_dpo_loss(predict_winner(), predict_loser(), *constants, beta=BETA)
    out.loss.backward()
    return out


def train(mode: Mode, steps: int = 20, pairs: int = 1, tokens: int = 256) -> tuple[nn.Module, list[float]]:
    """Train, and return the policy and the loss of every step; random numbers are the same in all modes."""
    torch.manual_seed(0)
    policy = Denoiser()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        winner, loser = torch.randn(2, pairs, tokens, 16) * 0.3
        losses.append(backward(mode, policy, reference, winner + 1, loser - 1).loss.item())
        optimizer.step()
    return policy, losses


if __name__ == "__main__":
    for name in ("joint", "sequential", "single pair"):
        history = train(name)[1]
        print(f"{name}: loss {history[0]:.6f} at the first step, {history[-1]:.6f} at the last")
