"""Motion between two pictures, without a network: Lucas and Kanade's least squares, coarse to fine.

Letters: n pairs of pictures, H x W rows and columns. Motion is in pixels, (right, down). Differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vpo_engine.rewards.natural_scenes import normalise_locally

_LEVELS = (4, 2, 1)
"""The sides, in pixels, of the squares that become one pixel at each level, coarsest first."""
_WINDOW = 9
_RIDGE = 0.01
"""A number added to the squared gradients: where there is no texture, there is no motion."""
_FLOOR = 0.03
"""A number added to the local deviation of luminance."""


def flow_between(before: Tensor, after: Tensor) -> Tensor:
    """Return the motion [n, 2, H, W] from one luminance [n, 1, H, W] in 0..1 to the other, at the places midway.

    Both are normalised locally, so that a change of brightness or contrast is no motion. The result is right up to
    about a tenth of the shorter side.
    """
    flow = before.new_zeros(before.shape[0], 2, 1, 1)
    for factor in _LEVELS:
        x, y = (normalise_locally(F.avg_pool2d(maps, factor), _FLOOR) for maps in (before, after))
        grown = x.new_tensor([x.shape[3] / flow.shape[3], x.shape[2] / flow.shape[2]]).view(2, 1, 1)
        flow = F.interpolate(flow, size=x.shape[2:], mode="bilinear", align_corners=False) * grown
        for _ in range(2):
            flow = flow + _step(displace(x, -flow / 2), displace(y, flow / 2))
    return flow


def displace(maps: Tensor, flow: Tensor) -> Tensor:
    """Return the values of maps [n, 1, H, W] at each place plus flow [n, 2, H, W], bilinear, clamped to the border."""
    height, width = maps.shape[2:]
    right = torch.arange(width, device=maps.device, dtype=maps.dtype) + flow[:, 0]
    down = torch.arange(height, device=maps.device, dtype=maps.dtype).unsqueeze(1) + flow[:, 1]
    grid = torch.stack(((2 * right + 1) / width - 1, (2 * down + 1) / height - 1), dim=3)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _step(x: Tensor, y: Tensor) -> Tensor:
    """Return the small motion [n, 2, H, W] that best explains y - x [n, 1, H, W] in each window."""
    mean = (x + y) / 2
    padded = F.pad(mean, (1, 1, 1, 1), mode="replicate")
    right = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    down = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    change = y - x
    xx, yy, xy, xt, yt = (
        F.avg_pool2d(products, _WINDOW, stride=1, padding=_WINDOW // 2, count_include_pad=False)
        for products in (right * right, down * down, right * down, right * change, down * change)
    )
    determinant = (xx + _RIDGE) * (yy + _RIDGE) - xy * xy
    along = (xy * yt - (yy + _RIDGE) * xt) / determinant
    across = (xy * xt - (xx + _RIDGE) * yt) / determinant
    return torch.cat((along, across), dim=1)
