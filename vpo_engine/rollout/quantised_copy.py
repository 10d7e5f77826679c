"""The sampling copy: the policy with the matrices of its blocks in fewer bits, for rollouts only."""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpo_engine.memory.quantised_base import block_linears

Bits = Literal["int8", "fp8"]
Kind = Literal["bf16"] | Bits
LARGEST = {"int8": 127.0, "fp8": 448.0}
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class SamplingCopy:
    """The policy's network with other linear layers in its blocks; all other parts are the policy's own objects.

    Embedders, the time's projection, modulation tables, norms, biases, the final layer and the weights of an adapter
    are not rounded. ``refresh`` has to be called whenever the policy has changed. It holds a byte for every weight of
    the blocks, beside the policy, or two in bfloat16.
    """

    def __init__(self, policy: nn.Module, kind: Kind) -> None:
        """Make the copy. Raise ValueError for a policy without linear layers in transformer blocks."""
        linears = block_linears(policy)
        if not linears:
            raise ValueError(
                f"rollout.weights={kind} rounds linear layers of transformer blocks, but the policy "
                f"({type(policy).__name__}) has none; use rollout.weights=policy"
            )
        self._layers: list[RoundedLinear] = [
            Bfloat16Linear(linear) if kind == "bf16" else QuantisedLinear(linear, kind)
            for linear in linears.values()
        ]
        memo: dict[int, object] = {id(one): one for one in (*policy.parameters(), *policy.buffers())}
        memo |= {id(linear): layer for linear, layer in zip(linears.values(), self._layers, strict=True)}
        self.network: nn.Module = copy.deepcopy(policy, memo).eval()

    def refresh(self) -> None:
        """Round the policy's weights as they are now into the copy."""
        for layer in self._layers:
            layer.refresh()

    @torch.no_grad()
    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        return self.network(*args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Return the bytes that the copy holds beside the policy."""
        return sum(buffer.nbytes for layer in self._layers for buffer in layer.buffers())


class RoundedLinear(nn.Module):
    """nn.Linear with the policy's bias, and with a rounded copy of its weight in buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._policy, self.bias = linear.weight, linear.bias

    def refresh(self) -> None:
        """Round the policy's weight as it is now."""
        raise NotImplementedError

    def multiply(self, x: Tensor) -> Tensor:
        """Map [rows, in] to [rows, out] without the bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], in the dtype that nn.Linear would return."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        out = self.multiply(x.flatten(0, -2)).to(dtype)
        if self.bias is not None:
            out = out + self.bias.to(dtype)
        return out.unflatten(0, x.shape[:-1])


class Bfloat16Linear(RoundedLinear):
    """nn.Linear whose weight, input and product are rounded to bfloat16.

    Sums are as precise as the device's product of bfloat16 matrices makes them: float32 on GPUs, and on processors that
    multiply bfloat16 (AMX, AVX512_BF16).
    """

    rounded_weight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.register_buffer("rounded_weight", linear.weight.detach().to(torch.bfloat16), persistent=False)

    @torch.no_grad()
    def refresh(self) -> None:
        self.rounded_weight.copy_(self._policy)

    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(x.to(torch.bfloat16), self.rounded_weight)


class QuantisedLinear(RoundedLinear):
    """nn.Linear whose weight and input are rounded to 8 bits, each row of either by its own largest magnitude.

    int8: whole numbers to 127; fp8: float8_e4m3fn to 448. On GPUs the product is one of 8-bit matrices where there is
    one for the layer (int8: sides divisible by 8; fp8: Hopper and later, sides divisible by 16). Everywhere else the
    same rounded factors are multiplied in float32: equal but for the rounding of the sums, and slower than the policy.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, bits: Bits) -> None:
        super().__init__(linear)
        self._bits: Bits = bits
        self.register_buffer("codes", torch.empty_like(linear.weight, dtype=DTYPES[bits]), persistent=False)
        scales = torch.empty(len(linear.weight), device=linear.weight.device)
        self.register_buffer("scales", scales, persistent=False)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        codes, scales = rounded(self._policy, self._bits)
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def multiply(self, x: Tensor) -> Tensor:
        codes, scales = rounded(x, self._bits)
        product = PRODUCTS[self._bits] if _has_8_bit_product(self._bits, codes, self.codes) else multiplied
        return product(codes, self.codes, scales, self.scales)


def rounded(x: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Return 8-bit codes of x [rows, n] and a scale for each row, float32 [rows]: x is about codes * scale.

    A row with a value that is not finite has a scale that is not finite.
    """
    x = x.float()
    scales = (x.abs().amax(1) / LARGEST[bits]).clamp_min(torch.finfo(torch.float32).tiny)
    codes = x / scales[:, None]
    if bits == "int8":
        codes = codes.round_().nan_to_num_(0)
    return codes.to(DTYPES[bits]), scales


def multiplied(x: Tensor, weight: Tensor, x_scales: Tensor, weight_scales: Tensor) -> Tensor:
    """Multiply codes x [rows, in], codes weight [out, in] and their scales in float32; return [rows, out]."""
    return F.linear(x.float(), weight.float()) * x_scales[:, None] * weight_scales


def int8_product(x: Tensor, weight: Tensor, x_scales: Tensor, weight_scales: Tensor) -> Tensor:
    """Do what ``multiplied`` does, for int8 codes; the sums are exact."""
    return torch._int_mm(x, weight.t()).float() * x_scales[:, None] * weight_scales


def fp8_product(x: Tensor, weight: Tensor, x_scales: Tensor, weight_scales: Tensor) -> Tensor:
    """Do what ``multiplied`` does, for float8_e4m3fn codes; the result is rounded to bfloat16."""
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scales[:, None],
        scale_b=weight_scales[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


PRODUCTS = {"int8": int8_product, "fp8": fp8_product}
"""The products of 8-bit matrices that GPUs have; a CPU computes them too, without gain."""


def _has_8_bit_product(bits: Bits, x: Tensor, weight: Tensor) -> bool:
    if not x.is_cuda:
        return False
    if bits == "int8":
        return len(x) > 16 and not any(side % 8 for side in weight.shape)
    return torch.cuda.get_device_capability(x.device) >= (9, 0) and not any(
        side % 16 for side in weight.shape
    )
