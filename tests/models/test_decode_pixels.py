"""Decoding with gradients: the pixels of decoding without, of chosen frames, and gradients by finite differences."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_case import load_model
from flow_folders import ltx_folder, wan_folder
from safetensors.torch import load_file
from tiny_diffusers import cogvideox_pipeline, load, settings
from torch import Tensor

from vpo_engine.data.sprites.assets import load_sprites
from vpo_engine.distributed.processes import Processes
from vpo_engine.errors import NotFiniteError
from vpo_engine.models.opensora.vae import OpenSoraVAE
from vpo_engine.models.opensora.vae_gradient import decode_with_gradients
from vpo_engine.video_model import ModelCard

DATA = Path(__file__).parent.parent / "data" / "opensora"
FAMILIES = ("sprites", "cogvideox", "wan", "ltx")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("folders")
    cogvideox_pipeline().save_pretrained(root / "cogvideox")
    return {
        "sprites": load_sprites(Processes.start("cpu"), torch.float32),
        "cogvideox": load(settings(root / "cogvideox")),
        "wan": load_model("wan", wan_folder(root / "wan")),
        "ltx": load_model("ltx", ltx_folder(root / "ltx", timestep_conditioning=True)),
    }


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    return models[request.param]


def latents_of(model: Any, count: int = 2) -> Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(4))


def levels(pixels: Tensor) -> Tensor:
    """Pixels [B, F, 3, H, W] in 0..1 as levels 0..255, float [B, F, H, W, 3]."""
    return 255 * pixels.detach().movedim(2, 4)


def test_pixels_are_the_videos_before_they_are_rounded_to_bytes(model: Any) -> None:
    """A level is the nearest whole number, so it is at most half of one away; rounding adds less than a hundredth."""
    latents = latents_of(model)
    pixels, video = model.decode_pixels(latents.requires_grad_()), model.decode(latents)
    assert pixels.dtype == torch.float32
    assert pixels.requires_grad
    assert 0 <= pixels.min().item() < pixels.max().item() <= 1
    assert levels(pixels).shape == video.shape
    assert (levels(pixels) - video.float()).abs().max() <= 0.51
    assert video.float().std() > 5


def test_chosen_frames_are_those_of_the_whole_video(model: Any) -> None:
    latents = latents_of(model)
    whole = model.decode_pixels(latents)
    for frames in ([0], [1, 4], [5, 2, 5], [8]):
        found = model.decode_pixels(latents, frames)
        assert found.shape == (2, len(frames), *whole.shape[2:])
        torch.testing.assert_close(found, whole[:, frames], rtol=0, atol=2e-6)


def test_only_the_beginning_of_a_causal_video_is_decoded(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for family, frames, length in (("wan", [0], 1), ("wan", [3, 4], 2), ("cogvideox", [1], 3)):
        model, latents = models[family], latents_of(models[family], 1)
        decoded: list[int] = []

        def pixels(given: Tensor, model: Any = model, decoded: list[int] = decoded) -> Tensor:
            decoded.append(given.shape[2])
            return type(model).pixels(model, given)

        monkeypatch.setattr(model, "pixels", pixels)
        latents[:, :, length:] = float("nan")
        assert bool(model.decode_pixels(latents, frames).isfinite().all())
        assert decoded == [length]


def test_gradients_are_those_of_finite_differences(model: Any) -> None:
    """Before the clamp, in float64 but for layers that diffusers computes in float32.

    A step of 3e-3 is large against their rounding, 6e-8, and the third derivative counts with 1.5e-6.
    """
    precise = copy.copy(model)
    precise.vae, precise.dtype = copy.deepcopy(model.vae).double(), torch.float64
    frames = [2, 6]
    latents = latents_of(model, 1).double()
    inputs = latents.clone().requires_grad_()
    pixels = precise.to_pixels(inputs, frames)
    random = torch.Generator().manual_seed(2)
    weight, direction = (torch.randn(like.shape, generator=random).double() for like in (pixels, latents))
    (gradient,) = torch.autograd.grad((pixels * weight).sum(), inputs)
    ends = [
        (precise.to_pixels(latents + change * direction, frames) * weight).sum() for change in (3e-3, -3e-3)
    ]
    expected = float(ends[0] - ends[1]) / 6e-3
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=5e-3)


def test_no_gradient_reaches_the_decoders_parameters(model: Any) -> None:
    model.decode_pixels(latents_of(model, 1).requires_grad_(), [0]).sum().backward()
    assert all(parameter.grad is None for parameter in model.parts["vae"].parameters())
    assert all(not parameter.requires_grad for parameter in model.parts["vae"].parameters())


def test_decoded_values_beyond_the_range_are_clamped_and_get_no_gradient(models: dict[str, Any]) -> None:
    model = models["wan"]

    kept = model.to_pixels
    try:
        values = torch.tensor([-1.5, -0.5, 0.5, 1.5], requires_grad=True)
        model.to_pixels = lambda latents, frames: values.view(1, 1, 1, 1, 4).expand(1, 1, 3, 1, 4)
        pixels = model.decode_pixels(torch.zeros(1))
    finally:
        model.to_pixels = kept
    assert pixels[0, 0, 0, 0].tolist() == [0.0, 0.25, 0.75, 1.0]
    pixels.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 1.5, 1.5, 0.0]


def test_pixels_that_are_not_finite_end_the_step(model: Any) -> None:
    latents = latents_of(model, 1)
    latents[0, 0, 0, 0, 0] = float("inf")
    with pytest.raises(NotFiniteError, match="pixels that are not finite"):
        model.decode_pixels(latents, [0])


def test_a_family_that_does_not_decode_with_gradients_says_so(model: Any) -> None:
    class Silent(type(model)):  # type: ignore[misc]
        card = ModelCard(name="mine")

    silent = copy.copy(model)
    silent.__class__ = Silent
    with pytest.raises(ValueError, match="mine does not decode with gradients; define decode_pixels"):
        silent.decode_pixels(latents_of(model, 1))


# --- Open-Sora's VAE: chunks and micro-batches ---


@pytest.fixture(scope="module")
def vae() -> OpenSoraVAE:
    tiny = json.loads((DATA / "vae_tiny.json").read_text())
    config = {"spatial_config": tiny["spatial_config"], "temporal_config": tiny["temporal_config"]}
    constants = {name: tiny["constants"][name] for name in ("scale", "shift")}
    made = OpenSoraVAE.from_config({**config, **constants, "micro_frame_size": 17, "micro_batch_size": 4})
    made.load_state_dict(load_file(DATA / "vae_tiny_weights.safetensors"))
    return made.eval().requires_grad_(False)


def drawn(clips: int) -> Tensor:
    return torch.randn(clips, 4, 10, 4, 5, generator=torch.Generator().manual_seed(0))


def test_all_frames_are_those_of_decode_bit_for_bit(vae: OpenSoraVAE) -> None:
    found, expected = decode_with_gradients(vae, drawn(2), 34), vae.decode(drawn(2), 34)
    assert torch.equal(found, expected.transpose(1, 2))


def test_gradients_are_those_of_decode_without_checkpoints(vae: OpenSoraVAE) -> None:
    weight = torch.randn(1, 34, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    found, expected = (drawn(1).requires_grad_() for _ in range(2))
    (decode_with_gradients(vae, found, 34) * weight).sum().backward()
    (vae.decode(expected, 34).transpose(1, 2) * weight).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-5)


def test_only_the_chunks_and_images_of_wanted_frames_are_decoded(
    vae: OpenSoraVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[int]] = {"chunks": [], "images": []}
    temporal, image = vae.temporal_vae.decode, vae.spatial_vae.module.decode

    def decode_chunk(z: Tensor, length: int) -> Tensor:
        seen["chunks"].append(length)
        return temporal(z, length)

    def decode_image(z: Tensor) -> Any:
        seen["images"].append(len(z))
        return image(z)

    monkeypatch.setattr(vae.temporal_vae, "decode", decode_chunk)
    monkeypatch.setattr(vae.spatial_vae.module, "decode", decode_image)
    whole = vae.decode(drawn(2), 34).transpose(1, 2)
    seen["chunks"].clear()
    seen["images"].clear()
    found = decode_with_gradients(vae, drawn(2), 34, [33, 20], frames_at_once=3)
    assert seen == {"chunks": [17], "images": [3, 1]}
    torch.testing.assert_close(found, whole[:, [33, 20]], rtol=0, atol=1e-5)


def test_the_graph_keeps_no_activations_of_the_decoder(vae: OpenSoraVAE) -> None:
    """Only the inputs and outputs of chunks and micro-batches wait for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = drawn(1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = decode_with_gradients(vae, inputs, 34, frames_at_once=1)
    spatial_latents = 4 * found[:, :, :1, ::8, ::8].numel() * 4
    assert sum(kept.values()) < 3 * spatial_latents + 4 * inputs.numel() < 4 * found.numel() / 10
