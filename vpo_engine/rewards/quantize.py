"""Linear layers with weights of 8 or 4 bits, for networks that are only evaluated.

bitsandbytes quantises the weights (8 bits: one scale a row; 4 bits: NF4 of QLoRA, arXiv 2305.14314, one scale for
each 64 weights), and they are dequantised to the input's type for an ordinary matrix product. bitsandbytes' own layers
would quantise activations as well in 8 bits, by other rules on CPUs than on GPUs, which moves scores twice as far.
bitsandbytes is imported when a layer is made, not before.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpo_engine.memory.quantised_base import decoded, encoded

Bits = Literal[16, 8, 4]


class QuantisedLinear(nn.Module):
    """An ``nn.Linear`` of input [..., K] and output [..., M] over quantised weights; the bias stays as it is.

    codes: int8 [M, K], or uint8, two codes a byte. scales: float32 [M], or one per 64 weights.
    Weights get no gradient; where the input needs one, the dequantised weights are kept for the backward pass.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, bits: Bits) -> None:
        """``weight`` [M, K] in float32, bfloat16 or float16, where the layer is to be."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if bits == 8:
            from bitsandbytes import functional as bnb

            codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        else:
            assert bits == 4, bits
            codes, scales, _ = encoded(weight, bits)
        for name, tensor in (("codes", codes), ("scales", scales)):
            self.register_buffer(name, tensor, persistent=False)
        self.bias = bias

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantised weights, [M, K]."""
        if self.codes.dtype == torch.int8:
            from bitsandbytes import functional as bnb

            return bnb.int8_vectorwise_dequant(self.codes, self.scales).to(dtype)
        return decoded(self.codes, self.scales, None, (self.out_features, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(x.dtype), self.bias)


def check_bits(bits: int) -> None:
    """Raise ValueError for a number of bits that there is no quantisation for."""
    if bits not in get_args(Bits):
        raise ValueError(f"bits is {bits}, expected 16, 8 or 4")


def quantise(network: nn.Module, name: str, weight: Tensor, bits: Bits) -> None:
    """Put a quantised layer in the place of the nn.Linear ``name`` of the network, with ``weight`` for its weights."""
    linear = network.get_submodule(name)
    assert isinstance(linear, nn.Linear), name
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, QuantisedLinear(weight, linear.bias, bits))
