"""Videos whose number of frames is no multiple of 17, through every part that counts frames."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from vpo_engine.data.embeddings import EmbeddingCache
from vpo_engine.data.sprites.assets import FLOW, GEOMETRY, load_policy, load_text_encoder, load_vae
from vpo_engine.data.text_source import TextSource
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.opensora.model import Geometry, OpenSora
from vpo_engine.seeding import normal

PROMPTS = ("a red circle moving left", "a yellow triangle moving up")
LATENTS = {18: 6, 20: 6, 21: 6, 30: 9, 34: 10, 35: 11, 51: 15}
"""Latent frames: 5 for every whole chunk of 17 frames, and a quarter of the rest, rounded up."""


@functools.cache
def parts() -> tuple[object, ...]:
    text = TextSource(EmbeddingCache(None, "sprites"), load_text_encoder, Processes.start("cpu"))
    text.prepare(PROMPTS)
    return load_policy(), load_vae(), text


def model_of(frames: int) -> OpenSora:
    policy, vae, text = parts()
    geometry = Geometry(GEOMETRY.height, GEOMETRY.width, frames, GEOMETRY.fps)
    return OpenSora(policy, vae, text, geometry, FLOW, device=torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("frames", [18, 20, 35])
def test_a_video_is_sampled_and_decoded_to_its_own_number_of_frames(frames: int) -> None:
    model = model_of(frames)
    assert model.num_frames == frames
    assert model.latent_shape[1] == LATENTS[frames]
    noise = normal((2, *model.latent_shape), 0, "rollout", 3)
    text = model.embed(PROMPTS)
    latents = model.sample(model.network, noise, text, steps=2, guidance=2.0)
    videos = model.decode(latents)
    assert videos.shape == (2, frames, GEOMETRY.height, GEOMETRY.width, 3)
    assert torch.isfinite(latents).all()
    assert not torch.equal(videos[:, -1], videos[:, 0]), "the last frames are decoded, too"


@pytest.mark.parametrize("frames", [18, 20, 35])
def test_the_last_frames_of_a_video_come_from_the_last_latents(frames: int) -> None:
    """Chunks are decoded one by one: frames before the last chunk do not change with the last latents."""
    model = model_of(frames)
    latents = normal((1, *model.latent_shape), 0, "rollout", 3)
    whole = frames // 17
    other = latents.clone()
    other[:, :, 5 * whole :] += 1.0
    first, second = model.decode(latents), model.decode(other)
    assert torch.equal(first[:, : 17 * whole], second[:, : 17 * whole])
    rest = first[:, 17 * whole :].float() - second[:, 17 * whole :].float()
    assert rest.shape[1] == frames - 17 * whole
    assert (rest.abs().mean(dim=(0, 2, 3, 4)) > 0).all(), "each of the frames after the last whole chunk"


@pytest.mark.parametrize("frames", [*LATENTS])
def test_latents_have_a_frame_for_every_four_of_the_last_chunk(frames: int) -> None:
    assert model_of(frames).latent_shape[1] == LATENTS[frames]


@pytest.mark.parametrize("frames", [18, 33, 34, 51])
def test_times_are_shifted_by_the_whole_chunks_alone(frames: int) -> None:
    """As published, floor(frames / 17) * 5 latent frames count, the unfinished chunk does not."""
    u = torch.tensor([0.1, 0.5, 0.9])
    found = model_of(frames).draw_timesteps(u)
    ratio = math.sqrt(frames // 17 * 5)  # at the world's own resolution the shift by size is 1
    t = torch.sigmoid(torch.special.ndtri(u.double()))
    expected = 1000 * ratio * t / (1 + (ratio - 1) * t)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)


def test_a_clip_survives_encoding_and_decoding_at_such_a_length() -> None:
    model = model_of(20)
    clip = moving_square(20)
    with torch.no_grad():
        latents = model.vae.encode(clip, sample=False)
    assert latents.shape[2] == LATENTS[20]
    video = model.decode(latents)[0].float() / 127.5 - 1
    source = clip[0].permute(1, 2, 3, 0)
    per_frame = (video - source).square().mean(dim=(1, 2, 3))
    assert per_frame.shape == (20,)
    assert per_frame[17:].mean() < 3 * per_frame[:17].mean() + 0.02


def moving_square(frames: int) -> Tensor:
    """float [1, 3, F, H, W] in -1..1."""
    clip = torch.full((1, 3, frames, GEOMETRY.height, GEOMETRY.width), -0.6)
    for frame in range(frames):
        place = 2 + frame // 2
        clip[0, 0, frame, 8:18, place : place + 8] = 0.8
    return clip
