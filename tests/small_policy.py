"""A policy of the sprites world whose weights are few and random, for tests that compare one way to run with another.

The shipped policy takes most of the time of a small run, and what it has learnt tells nothing where two ways to make
the same steps are compared. This one has two pairs of blocks of a quarter of the width, and no weight that is zero.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from vpo_engine.data.sprites.assets import WEIGHTS
from vpo_engine.models.opensora.checkpoint import save_pretrained_layout
from vpo_engine.models.opensora.stdit3 import STDiT3

SIZES = {"hidden_size": 32, "depth": 2}


def small_network(_: object = None) -> STDiT3:
    """Return the network; a call of it gives the same weights in every process."""
    config = json.loads((WEIGHTS / "policy" / "config.json").read_text(encoding="utf-8")) | SIZES
    network, random = STDiT3.from_config(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in network.state_dict().values():  # the empty caption is none of the parameters
            scale = 0.3 if tensor.dim() < 2 else tensor[0].numel() ** -0.5
            tensor.copy_(scale * torch.randn(tensor.shape, generator=random))
    return network


def write_small_policy(folder: Path) -> str:
    """Write the policy as a folder, and return the setting that names it."""
    network = small_network()
    save_pretrained_layout(network.state_dict(), network.config, folder)
    return f"model.policy={folder}"


@contextmanager
def shipped_policy_is_small() -> Iterator[None]:
    """Let models that are built inside have this policy in place of the shipped one."""
    with mock.patch("vpo_engine.data.sprites.assets.load_policy", small_network):
        yield
