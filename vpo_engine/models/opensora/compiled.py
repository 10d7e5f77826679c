"""Compile STDiT3's blocks with torch.compile, for sampling. Modules stay as they are; training computes as before."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental import _config as shapes
from vpo_kernels.attention import TextPlan

from vpo_engine.models.compiling import check_compiler, compiled
from vpo_engine.models.opensora.blocks import Block, KeysValues


class CompiledBlocks:
    """Runs a block without gradients as two compiled functions, before and after the attention to the text.

    All blocks share them, for every number of samples, frames, patches and text tokens. torch.compile makes three
    functions: the first for blocks over space, the first for blocks over time, and the second; and three more for a
    single sample, which it treats as a case of its own. The attention to the text is not compiled, because its layout
    depends on the lengths of the captions.
    """

    def __init__(self, device: torch.device, backend: str = "inductor") -> None:
        """Raise ValueError where torch.compile needs a C++ compiler and finds none."""
        if backend == "inductor":
            check_compiler(device)
        self._before = compiled(_before, backend)
        self._after = compiled(_after, backend)

    def __call__(
        self,
        block: Block,
        x: Tensor,
        text: Tensor | KeysValues,
        plan: TextPlan,
        time: Tensor,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Compute ``Block.forward``, up to rounding."""
        assert not torch.is_grad_enabled()
        # Sizes that happen to be equal must not be taken to be so always.
        with shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            mixed, q = self._before(block, x, time, rope)
            attended = block.cross_attn.attend(q, text, plan)
            # A view would be told apart by the layout of what it looks into, so as many functions as layouts.
            return self._after(block, mixed, attended.contiguous().data, time)


def _before(block: Block, x: Tensor, time: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return x [B, T, S, C] after self-attention, and its queries to the text, [B, T * S, C]."""
    x = block.mix(x, block.modulation(time)[:3], rope)
    return x, block.cross_attn.q_linear(x.flatten(1, 2))


def _after(block: Block, x: Tensor, attended: Tensor, time: Tensor) -> Tensor:
    x = x + block.cross_attn.proj(attended).view(x.shape)
    return block.feed_forward(x, *block.modulation(time)[3:])
