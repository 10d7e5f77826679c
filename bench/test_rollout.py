"""Measure seconds per prompt of the engine's rollout and of a plain sampler, like those of public scripts.

The plain sampler makes one candidate after the other, calls the network separately for the prompt and for the null
caption, and reuses nothing from step to step. Both run the same network on the same noise and give the same latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from candidates import sample_candidates, stacked
from measure import device, on_gpu
from side_by_side import compare
from torch import Tensor, nn

from vpo_engine.build import build_model, build_prompts
from vpo_engine.config import Config, RolloutConfig
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.opensora.geometry import pixel_size
from vpo_engine.models.opensora.model import Geometry, OpenSora
from vpo_engine.models.opensora.rectified_flow import RectifiedFlow
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.protocols import TextEmbedding
from vpo_engine.seeding import normal

SPRITES_PROMPTS = 8
TEXT_TOKENS = 120
"""Tokens of a caption of about 80 words, the longest of WebVid and of its rewritten captions."""
FULL_SIZE = {("240p", 34): (30, (10, 30, 53)), ("720p", 68): (3, (20, 90, 160))}
"""{(resolution, frames): (number of sampling steps, latent size)}. All steps take the same time, so few are enough."""


@torch.no_grad()
def plain_rollout(
    model: OpenSora, text: TextEmbedding, positions: Sequence[int], config: RolloutConfig, seed: int
) -> Tensor:
    """Sample latents [P, N, C, T, H, W] from the same noise as ``sample_candidates``."""
    size = model._geometry
    times, lengths = model._flow.sampling_timesteps(config.steps, size.height, size.width, size.num_frames)
    null = model.network.y_embedder.y_embedding[: text.embeddings.shape[1]].to(text.embeddings.dtype)
    made = []
    for row, position in enumerate(positions):
        prompted = text[slice(row, row + 1)]
        unprompted = TextEmbedding(null[None], prompted.mask)
        for noise in normal((config.candidates, *model.latent_shape), seed, "rollout", position):
            z = noise[None].to(text.embeddings.device)
            for moment, length in zip(times.tolist(), lengths.tolist(), strict=True):
                t = torch.full((1,), moment, device=z.device)
                velocity = model.predict(model.network, z, t, prompted)
                if config.guidance != 1.0:
                    without = model.predict(model.network, z, t, unprompted)
                    velocity = without + config.guidance * (velocity - without)
                z = z + velocity * length
            made.append(z)
    return torch.cat(made).unflatten(0, (len(positions), config.candidates))


def compare_with_plain(
    model: OpenSora, text: TextEmbedding, config: RolloutConfig, tolerance: float, benchmark
) -> dict[str, float]:
    """Run both samplers in turn; return their seconds per prompt."""
    positions, where = range(len(text)), text.embeddings.device

    def engine() -> Tensor:
        networks = model.network, model.network
        return stacked(sample_candidates(model, networks, text, positions, config, 0, where))

    def plain() -> Tensor:
        return plain_rollout(model, text, positions, config, 0)

    return compare(engine, plain, len(positions), tolerance, benchmark, "plain")


def case_of(world: str, config: RolloutConfig, prompts: int) -> dict[str, str]:
    return {
        "world": world,
        "guidance": f"{config.guidance:g}",
        "steps": str(config.steps),
        "prompts": str(prompts),
        "candidates": str(config.candidates),
    }


@pytest.mark.benchmark(group="rollout per prompt")
@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_sprites_rollout(guidance: float, benchmark, add_row) -> None:
    prompts = 2 if benchmark.disabled else SPRITES_PROMPTS
    config: Config = load_config(None, [f"rollout.guidance={guidance}", "model.device=cpu"])
    model = build_model(config, Processes.start("cpu"))
    train, _ = build_prompts(config)
    captions = [train[index] for index in range(prompts)]
    model.prepare(captions)
    numbers = compare_with_plain(model, model.embed(captions), config.rollout, 1e-3, benchmark)
    if not benchmark.disabled:
        add_row("rollout", case_of("sprites", config.rollout, prompts), numbers, torch.device("cpu"))


class LatentSize(nn.Module):
    """A replacement for the VAE, which a rollout does not need."""

    spatial_factor = 8

    def __init__(self, size: tuple[int, int, int]) -> None:
        super().__init__()
        self._size = size

    def latent_size(self, *_: int) -> tuple[int, int, int]:
        return self._size


def full_size_model(resolution: str, frames: int, size: tuple[int, int, int]) -> OpenSora:
    """Build STDiT3-XL/2 in bfloat16 with random weights."""
    with device():
        network = STDiT3.from_config({"freeze_y_embedder": True}).to(torch.bfloat16)
    geometry = Geometry(*pixel_size(resolution, "9:16"), frames, 24)
    model = OpenSora(
        network,
        LatentSize(size),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        geometry,
        RectifiedFlow(),
        device=device(),
        dtype=torch.bfloat16,
    )
    model.network.choose_backends(dtype=torch.bfloat16)
    return model


@pytest.mark.gpu
@pytest.mark.skipif(not on_gpu(), reason="the full-size network needs a GPU")
@pytest.mark.benchmark(group="rollout per prompt")
@pytest.mark.parametrize(("resolution", "frames"), FULL_SIZE)
def test_full_size_rollout(resolution: str, frames: int, benchmark, add_row) -> None:
    steps, size = FULL_SIZE[resolution, frames]
    config = RolloutConfig(steps=2 if benchmark.disabled else steps)
    model = full_size_model(resolution, frames, size)
    random = torch.Generator(device()).manual_seed(0)
    states = torch.randn(1, TEXT_TOKENS, 4096, generator=random, device=device()).to(torch.bfloat16)
    text = TextEmbedding(states, torch.ones(1, TEXT_TOKENS, dtype=torch.bool))
    numbers = compare_with_plain(model, text, config, 0.1, benchmark)
    if not benchmark.disabled:
        case = case_of(f"STDiT3-XL/2, {resolution} x {frames} frames, bfloat16", config, 1)
        add_row("rollout", case, numbers, device())
