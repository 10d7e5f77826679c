"""Exact storage of bfloat16 weights as 8-bit differences from other weights that are near them."""

from vpo_kernels.ordered_delta.contract import OrderedDelta
from vpo_kernels.ordered_delta.op import decode_delta, encode_delta

__all__ = ["OrderedDelta", "decode_delta", "encode_delta"]
