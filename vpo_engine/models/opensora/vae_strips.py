"""Run the image decoder (diffusers' ``Decoder`` of AutoencoderKL) strip by strip, with the same result up to rounding.

Norm, activation and convolution go over strips of rows, each with the rows beside it that the convolution sees, so that
normalised and activated maps never exist whole; what a layer adds to is overwritten. Statistics of group norms are
those of the whole map. Shape letters: B frames, C channels, H x W pixels of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


class StripDecoder(nn.Module):
    """Runs a decoder with that decoder's weights; it has none of its own."""

    def forward(self, decoder: Decoder, z: Tensor, rows: int) -> Tensor:
        """Decode latents [B, C, h, w] to pixels [B, 3, H, W], ``rows`` rows of a map at a time, without gradients."""
        assert not torch.is_grad_enabled()
        x = decoder.mid_block(decoder.conv_in(z))
        for block in decoder.up_blocks:
            for layer in block.resnets:
                x = _residual(layer, x, rows)
            for layer in block.upsamplers or ():
                x = _enlarged(layer, x, rows)
        return _convolved(decoder.conv_out, _activated(decoder.conv_norm_out, x, rows), x.shape[2], rows)


def _residual(layer: ResnetBlock2D, x: Tensor, rows: int) -> Tensor:
    """Apply a residual block, [B, C, H, W] to [B, C', H, W]. Where C' <= C the result overwrites ``x``."""
    assert layer.time_emb_proj is None
    assert layer.upsample is None
    assert layer.downsample is None
    hidden = _convolved(layer.conv1, _activated(layer.norm1, x, rows), x.shape[2], rows)
    width = hidden.shape[1]
    out = x[:, :width] if width <= x.shape[1] else torch.empty_like(hidden)
    if layer.conv_shortcut is not None:
        for start, stop in _strips(x.shape[2], rows):
            out[:, :, start:stop] = layer.conv_shortcut(x[:, :, start:stop])
    activated = _activated(layer.norm2, hidden, rows)
    for (start, stop), strip in _convolved_strips(layer.conv2, activated, x.shape[2], rows):
        out[:, :, start:stop].add_(strip).div_(layer.output_scale_factor)
    return out


def _enlarged(layer: Upsample2D, x: Tensor, rows: int) -> Tensor:
    """Enlarge [B, C, H, W] to [B, C, 2H, 2W]: nearest, and then a convolution."""

    def enlarged(start: int, stop: int) -> Tensor:
        low, high = start // 2, -(-stop // 2)
        twice = F.interpolate(x[:, :, low:high], scale_factor=2.0, mode="nearest")
        return twice[:, :, start - 2 * low : stop - 2 * low]

    return _convolved(layer.conv, enlarged, 2 * x.shape[2], rows)


Rows = Callable[[int, int], Tensor]
"""Rows from ``start`` to ``stop`` of a map that does not exist whole."""


def _activated(norm: nn.GroupNorm, x: Tensor, rows: int) -> Rows:
    """Return a function that computes rows of SiLU(norm(x))."""
    mean, variance = _statistics(x, norm.num_groups, rows)
    channels = x.shape[1] // norm.num_groups
    scale = torch.rsqrt(variance + norm.eps).repeat_interleave(channels, 1) * norm.weight
    shift = norm.bias - mean.repeat_interleave(channels, 1) * scale
    scale, shift = scale[:, :, None, None], shift[:, :, None, None]

    def activated(start: int, stop: int) -> Tensor:
        return F.silu(torch.addcmul(shift, x[:, :, start:stop], scale).to(x.dtype))

    return activated


def _statistics(x: Tensor, groups: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance [B, groups] of [B, C, H, W], in float32 or better, strip by strip (Chan et al.)."""
    mean = deviations = torch.zeros((), device=x.device)
    count = 0
    for start, stop in _strips(x.shape[2], rows):
        strip = x[:, :, start:stop].unflatten(1, (groups, -1)).flatten(2)
        strip = strip if strip.dtype == torch.float64 else strip.float()
        variance, middle = torch.var_mean(strip, 2, correction=0)
        size = strip.shape[2]
        total, apart = count + size, middle - mean
        mean = mean + apart * (size / total)
        deviations = deviations + variance * size + apart.square() * (count * size / total)
        count = total
    return mean, deviations / count


def _convolved(convolution: nn.Conv2d, source: Rows, height: int, rows: int) -> Tensor:
    """Convolve a map that is given by its rows; return [B, C, height, W]."""
    out: Tensor | None = None
    for (start, stop), strip in _convolved_strips(convolution, source, height, rows):
        if out is None:
            out = strip.new_empty((*strip.shape[:2], height, strip.shape[3]))
        out[:, :, start:stop] = strip
    assert out is not None
    return out


def _convolved_strips(
    convolution: nn.Conv2d, source: Rows, height: int, rows: int
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Yield a convolution of stride 1 that keeps the size, by strips: ((start, stop), [B, C, stop - start, W])."""
    halo, side = (size // 2 for size in convolution.kernel_size)
    for start, stop in _strips(height, rows):
        low, high = max(start - halo, 0), min(stop + halo, height)
        seen = F.pad(source(low, high), (side, side, low - start + halo, stop + halo - high))
        yield (start, stop), F.conv2d(seen, convolution.weight, convolution.bias)


def _strips(height: int, rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, height, rows):
        yield start, min(start + rows, height)
