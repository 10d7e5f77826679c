"""The fused ops' kernels compiled for A100 and Hopper at the sizes of STDiT3-XL/2: no spills, 16-byte accesses.

No GPU is needed. What is compiled is what the launchers would launch: they run on meta tensors.
"""

from __future__ import annotations

import pytest
import torch
from compile_only import A100, H100, compiled, recorded
from torch import Tensor
from vpo_kernels import triton_parts
from vpo_kernels.gated_residual import triton as gated_residual
from vpo_kernels.modulated_norm import triton as modulated_norm
from vpo_kernels.qk_norm_rope import triton as qk_norm_rope
from vpo_kernels.temporal_attention import triton as temporal_attention

CHANNELS, HEADS, D = 1152, 16, 72
SIZES = {"240p x 17": (2, 5, 15 * 27), "720p x 68": (1, 20, 45 * 80)}  # samples, latent frames, patches


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def launch_modulated_norm(samples: int, frames: int, patches: int) -> None:
    x, modulation = meta(samples, frames, patches, CHANNELS), meta(samples, 1, 1, CHANNELS)
    modulated_norm.forward(x, modulation, modulation, 1e-6)
    modulated_norm.backward(x, x, modulation, modulation, 1e-6)


def launch_gated_residual(samples: int, frames: int, patches: int) -> None:
    x, gate = meta(samples, frames, patches, CHANNELS), meta(samples, 1, 1, CHANNELS)
    y = meta(samples, patches, frames, CHANNELS).transpose(1, 2)
    gated_residual.forward(x, gate, y)
    gated_residual.backward(x, gate, y)


def launch_qk_norm_rope(samples: int, frames: int, patches: int) -> None:
    q = meta(samples, frames, patches, 3, HEADS, D).transpose(1, 2).unbind(3)[0]
    angles = meta(frames, 1, D // 2)
    qk_norm_rope.forward(q, meta(D), angles, angles, 1e-6)
    qk_norm_rope.backward(torch.empty_like(q), q, meta(D), angles, angles, 1e-6)


def launch_temporal_attention(samples: int, frames: int, patches: int) -> None:
    q, k, v = meta(samples * patches, frames, 3, HEADS, D).unbind(2)
    temporal_attention.forward(q, k, v)
    temporal_attention.backward(torch.empty_like(q), q, k, v)


LAUNCHERS = [launch_modulated_norm, launch_gated_residual, launch_qk_norm_rope, launch_temporal_attention]


@pytest.mark.parametrize(
    ("size", "capability"),
    [
        ("720p x 68", H100),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("720p x 68", A100), ("240p x 17", H100), ("240p x 17", A100))
        ),
    ],
)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_compiles_without_spills_and_with_whole_vectors(launcher, size: str, capability: int) -> None:
    modules = (modulated_norm, gated_residual, qk_norm_rope, temporal_attention, triton_parts)
    with recorded(*modules) as launches:
        launcher(*SIZES[size])
    assert {launch.kernel.__name__ for launch in launches} >= {"forward_kernel", "backward_kernel"}
    for launch in launches:
        binary = compiled(launch, capability)
        assert binary.local_bytes == 0, f"{launch.kernel.__name__} spills: {binary}"
        assert binary.vector_loads > 0, f"{launch.kernel.__name__} loads piecemeal: {binary}"
        if launch.kernel.__name__ in ("forward_kernel", "backward_kernel"):
            assert binary.vector_stores > 0, f"{launch.kernel.__name__} stores piecemeal: {binary}"
        assert launch.grid[0] < 2**31


def test_the_gate_sees_piecemeal_loads() -> None:
    """Tokens that start at odd elements cannot be read in vectors, and the count must say so."""
    x, modulation = meta(1, 2, 40, CHANNELS + 1)[..., :CHANNELS], meta(1, 1, 1, CHANNELS)
    with recorded(modulated_norm, triton_parts) as launches:
        modulated_norm.forward(x, modulation, modulation, 1e-6)
    (odd,) = launches
    first, _, last = odd.arguments["x_strides"]
    assert last == CHANNELS + 1
    even = odd._replace(arguments={**odd.arguments, "x_strides": (first, 40 * CHANNELS, CHANNELS)})
    assert compiled(odd, H100).vector_loads < compiled(even, H100).vector_loads
