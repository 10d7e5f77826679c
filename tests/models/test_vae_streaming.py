"""Decoding straight to bytes: the published result, without a whole video in floating point."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vpo_engine.models.opensora.vae import OpenSoraVAE, to_uint8
from vpo_engine.models.opensora.vae_strips import _statistics

DATA = Path(__file__).parent.parent / "data" / "opensora"
TINY = json.loads((DATA / "vae_tiny.json").read_text())
GIB = 2**30


@pytest.fixture(scope="module")
def tiny() -> OpenSoraVAE:
    config = {"spatial_config": TINY["spatial_config"], "temporal_config": TINY["temporal_config"]}
    constants = {name: TINY["constants"][name] for name in ("scale", "shift")}
    vae = OpenSoraVAE.from_config({**config, **constants, "micro_frame_size": 17, "micro_batch_size": 4})
    vae.load_state_dict(load_file(DATA / "vae_tiny_weights.safetensors"))
    return vae.eval()


def latents(clips: int, frames: int = 10, height: int = 4, width: int = 5) -> Tensor:
    return torch.randn(clips, 4, frames, height, width, generator=torch.Generator().manual_seed(0))


class LiveBytes(TorchDispatchMode):
    """Bytes of storages made within, now and at most, and the largest storage of a floating-point tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest_float = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return
        self._seen[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        if tensor.is_floating_point():
            self.largest_float = max(self.largest_float, storage.nbytes())
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.live -= self._seen.pop(key)


@contextmanager
def published(dtype: torch.dtype) -> Iterator[OpenSoraVAE]:
    """The published VAE as fake tensors."""
    before = torch.get_default_dtype()
    config = json.loads((DATA / "vae_v1_2_config.json").read_text())
    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(dtype)
        try:
            vae = OpenSoraVAE.from_config(config).eval()
        finally:
            torch.set_default_dtype(before)
        for name in ("scale", "shift"):
            setattr(vae, name, getattr(vae, name).to(dtype))
        yield vae


@pytest.mark.parametrize(
    ("clips", "latent_frames", "frames"), [(1, 10, 34), (3, 10, 34), (2, 6, 19), (2, 1, 1)]
)
@pytest.mark.parametrize("micro_batch", [4, 3, None])
@torch.no_grad()
def test_streaming_is_decode_and_then_bytes_bit_for_bit(
    tiny: OpenSoraVAE,
    monkeypatch: pytest.MonkeyPatch,
    micro_batch: int | None,
    clips: int,
    latent_frames: int,
    frames: int,
) -> None:
    monkeypatch.setattr(tiny.spatial_vae, "micro_batch_size", micro_batch)
    z = latents(clips, latent_frames)
    video = tiny.decode_uint8(z, frames)
    assert torch.equal(video, to_uint8(tiny.decode(z, frames)))
    assert video.is_contiguous()
    assert 0 < float((video > 0).float().mean()) < 1, "not one colour"


@pytest.mark.parametrize("frames_at_once", [1, 2, 3, 100])
@torch.no_grad()
def test_other_micro_batches_change_rounding_only(tiny: OpenSoraVAE, frames_at_once: int) -> None:
    """A byte differs only where float rounding crosses a level: one level, in at most one pixel of ten thousand."""
    z = latents(2)
    exact = tiny.decode_uint8(z, 34)
    video = tiny.decode_uint8(z, 34, frames_at_once)
    off = (video.int() - exact.int()).abs()
    assert int(off.max()) <= 1
    assert int(off.sum()) <= exact.numel() // 10_000, (int(off.sum()), exact.numel())


@torch.no_grad()
def test_other_micro_batches_in_float64_give_the_same_bytes(tiny: OpenSoraVAE) -> None:
    vae, z = copy.deepcopy(tiny).double(), latents(2)
    assert torch.equal(vae.decode_uint8(z, 34, 1), vae.decode_uint8(z, 34))


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
@torch.no_grad()
def test_strips_of_rows_give_the_published_pixels(tiny: OpenSoraVAE, rows: int) -> None:
    """Maps of 4 to 32 rows, odd strips, the recorded output of the public code, and in float64 next to nothing."""
    recorded = load_file(DATA / "vae_tiny_outputs.safetensors")
    x_z, expected = recorded["f20.x_z_dec"] / tiny.spatial_scaling, recorded["f20.decoded"]
    found = torch.cat(list(tiny.spatial_vae.decode_parts(x_z, None, rows)))
    found = found.unflatten(0, (len(x_z), -1)).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    exact = copy.deepcopy(tiny.spatial_vae).double()
    z = latents(1, 2).double()
    whole, strips = (torch.cat(list(exact.decode_parts(z, None, count))) for count in (None, rows))
    torch.testing.assert_close(strips, whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_group_norms_of_strips_hold_far_from_zero(tiny: OpenSoraVAE) -> None:
    """Statistics over a map whose mean is a thousand times its spread, strip by strip."""
    x = 1000 + torch.randn(2, 16, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, variance = _statistics(x.float(), 4, 2)
    groups = x.float().double().unflatten(1, (4, -1)).flatten(2)
    torch.testing.assert_close(mean.double(), groups.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), groups.var(2, correction=0), rtol=1e-3, atol=0)


@torch.no_grad()
def test_no_float_video_is_ever_made(tiny: OpenSoraVAE) -> None:
    z = latents(2)
    with LiveBytes() as whole:
        video = to_uint8(tiny.decode(z, 34))
    with LiveBytes() as streamed:
        tiny.decode_uint8(z, 34)
    with LiveBytes() as one:
        tiny.decode_uint8(z, 34, 1)
    assert whole.largest_float >= 4 * video.numel(), "the float32 video"
    assert streamed.largest_float < 2 * video.numel()
    assert one.largest_float < streamed.largest_float
    assert one.peak < streamed.peak < whole.peak


@torch.no_grad()
def test_faults(tiny: OpenSoraVAE) -> None:
    with pytest.raises(
        ValueError, match="frames_at_once is 0; it counts frames: 1 or more, or None as published"
    ):
        tiny.decode_uint8(latents(1), 34, 0)
    with pytest.raises(ValueError, match=r"shape \(4, 10, 4, 5\); 34 frames need \[B, 4, 10, h, w\]"):
        tiny.decode_uint8(latents(1)[0], 34)
    with pytest.raises(ValueError, match="rows_at_once is 0; it counts rows: 1 or more, or None for all"):
        tiny.decode_uint8(latents(1), 34, None, 0)
    z = latents(1)
    z[0, 0, 7] = float("nan")
    with pytest.raises(ValueError, match="values that are not finite; check the latents and the VAE"):
        tiny.decode_uint8(z, 34, 1)


@pytest.mark.long
def test_peak_at_720p() -> None:
    """Activations of the published VAE in bfloat16, GiB, for 68 frames of 720 x 1280: the widest place is the last
    block of the image decoder, 256 channels at full size, held three times, with its normalised and activated forms."""
    with published(torch.bfloat16) as vae:
        z = torch.zeros(1, 4, 20, 90, 160, dtype=torch.bfloat16)
        peaks = {}
        for frames in (4, 2, 1):
            with LiveBytes() as count:
                for pixels in vae.spatial_vae.decode_parts(vae.decode_temporal(z, 68), frames):
                    del pixels
            peaks[frames] = count.peak / GIB
    widest = 256 * 720 * 1280 * 2 / GIB
    for frames, peak in peaks.items():
        assert peak == pytest.approx(3 * frames * widest, rel=0.02), peaks


@pytest.mark.long
def test_peak_at_720p_in_strips() -> None:
    """One frame: a map of 256 channels, one of 128, and the strips."""
    widest = 256 * 720 * 1280 * 2 / GIB
    with published(torch.bfloat16) as vae:
        z = torch.zeros(1, 4, 1, 90, 160, dtype=torch.bfloat16)
        peaks = {}
        for rows in (16, 8):
            with LiveBytes() as count:
                for pixels in vae.spatial_vae.decode_parts(z, 1, rows):
                    assert pixels.shape == (1, 3, 720, 1280)
            peaks[rows] = count.peak / GIB
    assert 1.5 * widest < peaks[8] < peaks[16] < 0.72, peaks
