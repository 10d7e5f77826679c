"""The sampling loop with any solver: cut, chosen from, gathered and resumed, it is the uninterrupted loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from small_policy import shipped_policy_is_small
from torch import Tensor

from vpo_engine.data.sprites.assets import load_sprites
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.models.solvers import EulerFlow
from vpo_engine.protocols import SamplerSettings, SamplerState, TextEmbedding

STEPS = 6
PROMPTS = ["a red circle moving left", "a yellow triangle moving up"]


@dataclass(frozen=True)
class AdamsBashforth:
    """A solver of two steps: it follows the last two velocities. The first step is Euler's."""

    euler: EulerFlow

    @property
    def times(self) -> Sequence[float]:
        return self.euler.times

    def noise_level(self, step: int) -> float:
        return self.euler.noise_level(step)

    def advance(
        self, step: int, latents: Tensor, prediction: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        velocity = prediction
        if memory:
            (before,) = memory
            ratio = self.euler.lengths[step] / self.euler.lengths[step - 1] / 2
            velocity = (1 + ratio) * prediction - ratio * before
        return latents + velocity * self.euler.lengths[step], (prediction,)

    def preview(self, step: int, before: Tensor, after: Tensor, prediction: Tensor) -> Tensor:
        return self.euler.preview(step, before, after, prediction)


class Multistep(OpenSora):
    def solver(self, steps: int) -> AdamsBashforth:  # type: ignore[override]
        return AdamsBashforth(super().solver(steps))


@pytest.fixture(scope="module")
def model() -> OpenSora:
    with shipped_policy_is_small():
        model = load_sprites(Processes.start("cpu"), torch.float32)
    model.prepare(PROMPTS)
    return model


def start(model: OpenSora) -> tuple[SamplerState, TextEmbedding]:
    random = torch.Generator().manual_seed(3)
    noise = torch.randn(4, *model.latent_shape, generator=random)
    return model.start(noise), model.embed(PROMPTS)


@pytest.mark.parametrize("solver", ["one step", "two steps"])
@pytest.mark.parametrize("interval", [None, (0.3, 0.9)])
def test_a_loop_that_is_cut_and_resumed_is_the_uninterrupted_loop(
    model: OpenSora, solver: str, interval: tuple[float, float] | None
) -> None:
    state, text = start(model)
    settings = SamplerSettings(STEPS, 3.0, interval)
    sampling = model if solver == "one step" else _with_memory(model)
    whole = sampling.denoise(model.network, state, text, settings)
    assert (whole.step, len(whole.memory)) == (STEPS, 0 if solver == "one step" else 1)
    for stops in ((1, 2, 3, 4, 5, 6), (3, 6), (2, 2, 6)):
        found = state
        for stop in stops:
            found = sampling.denoise(model.network, found, text, settings, stop)
            assert found.step == stop
        assert torch.equal(found.latents, whole.latents)
        assert torch.equal(found.preview, whole.preview)
        assert all(map(torch.equal, found.memory, whole.memory))


def test_without_its_memory_a_solver_of_two_steps_goes_elsewhere(model: OpenSora) -> None:
    sampling, (state, text), settings = _with_memory(model), start(model), SamplerSettings(STEPS)
    half = sampling.denoise(model.network, state, text, settings, 3)
    whole = sampling.denoise(model.network, half, text, settings)
    forgotten = sampling.denoise(model.network, replace(half, memory=()), text, settings)
    assert not torch.equal(whole.latents, forgotten.latents)


def test_chosen_and_gathered_samples_go_on_as_they_would_have(model: OpenSora) -> None:
    """Samples 3 and 0 of two batches of two: the memory goes with them."""
    sampling, (state, text), settings = _with_memory(model), start(model), SamplerSettings(STEPS, 3.0)
    whole = sampling.denoise(model.network, state, text, settings)
    halves = [
        sampling.denoise(model.network, state[2 * n : 2 * n + 2], text[n : n + 1], settings, 3)
        for n in (0, 1)
    ]
    gathered = SamplerState.cat(halves)
    assert len(gathered) == 4
    chosen, prompts = gathered[torch.tensor([3, 0])], text[torch.tensor([1, 0])]
    found = sampling.denoise(model.network, chosen, prompts, settings)
    difference = found.latents - whole.latents[[3, 0]]
    assert difference.abs().max() <= 2e-5  # batches of other sizes round otherwise
    with pytest.raises(AssertionError, match=r"different numbers of steps: \[3, 6\]"):
        SamplerState.cat([halves[0], whole])


def test_a_preview_is_given_wherever_the_loop_is_cut(model: OpenSora) -> None:
    state, text = start(model)
    assert torch.equal(state.preview, state.latents)
    settings = SamplerSettings(STEPS, 3.0)
    half = model.denoise(model.network, state, text, settings, 3)
    assert (half.preview - half.latents).abs().max() > 0.1
    end = model.denoise(model.network, half, text, settings)
    torch.testing.assert_close(end.preview, end.latents, rtol=0, atol=1e-5)


def _with_memory(model: OpenSora) -> Multistep:
    twin = object.__new__(Multistep)
    twin.__dict__.update(model.__dict__)
    return twin
