"""A guided sampling loop in two halves, which exchange their predictions, is the whole loop."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_policy import shipped_policy_is_small
from tiny_diffusers import PROMPTS, cogvideox_pipeline, load, settings
from torch import Tensor

from vpo_engine.data.sprites.assets import load_sprites
from vpo_engine.distributed.processes import Processes
from vpo_engine.protocols import SamplerSettings

CAPTIONS = ("a red circle moving left", "a blue square moving up")
ROUNDING = 1e-5
"""Relative differences of float32 latents after some steps: a pass of B rows multiplies matrices of other shapes than
one of 2 B does, and each product rounds by about 1e-7 of it."""


class Half:
    """One of two threads that stand for two processes."""

    def __init__(self, half: int, halves: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.half, self._halves, self._barrier = half, halves, barrier
        self.rows: list[int] = []

    def exchange(self, prediction: Tensor) -> Tensor:
        self._halves[self.half] = prediction
        self.rows.append(len(prediction))
        self._barrier.wait(30)
        whole = torch.cat([half for half in self._halves if half is not None])
        self._barrier.wait(30)
        return whole


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Models that put the branch with the prompt first, and last."""
    folder = tmp_path_factory.mktemp("cogvideox")
    cogvideox_pipeline().save_pretrained(folder)
    with shipped_policy_is_small():
        sprites = load_sprites(Processes.start("cpu"), torch.float32)
    sprites.prepare(CAPTIONS)
    return {"sprites": sprites, "cogvideox": load(settings(folder))}


@pytest.mark.parametrize("kind", ["sprites", "cogvideox"])
def test_a_loop_in_halves_makes_the_latents_of_a_whole_one(families: dict[str, Any], kind: str) -> None:
    """Guidance is used at some of the steps only; at the others nothing is exchanged."""
    model = families[kind]
    sampling = SamplerSettings(4, 5.0, (model.solver(4).noise_level(2), 1.0))
    noise = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    text = model.embed(CAPTIONS if kind == "sprites" else PROMPTS)

    def run(split: Half | None) -> Tensor:
        begun = model.start(noise)
        return model.denoise(model.network, begun, text, replace(sampling, split=split)).latents

    halves: list[Tensor | None] = [None, None]
    barrier = threading.Barrier(2)
    members = [Half(half, halves, barrier) for half in range(2)]
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(run, members)
    assert torch.equal(one, other)
    whole = run(None)
    assert float((one - whole).norm()) <= ROUNDING * float(whole.norm())
    assert [member.rows for member in members] == [[4] * 3] * 2, "the last step is not guided"
