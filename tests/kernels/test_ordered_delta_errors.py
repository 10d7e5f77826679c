"""The errors of ``encode_delta`` and ``decode_delta`` for wrong arguments: value, constraint, remedy."""

import re

import pytest
import torch
from torch import Tensor
from vpo_kernels import OrderedDelta, decode_delta, encode_delta

W = torch.zeros(4, 6, dtype=torch.bfloat16)
DELTA = encode_delta(W, W)
BYTES = DELTA.difference
TWO = torch.zeros(2, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("reference", "policy", "options", "text"),
    [
        (W, W.float(), {}, "policy has dtype torch.float32, but must be torch.bfloat16; .* convert before"),
        (W.half(), W, {}, "reference has dtype torch.float16, but must be torch.bfloat16; .* convert before"),
        (W, [1.0], {}, "policy is list, but must be a tensor"),
        (None, W, {}, "reference is NoneType, but must be a tensor"),
        (
            W[:3],
            W,
            {},
            r"reference has shape \[3, 6\], but must have that of policy, \[4, 6\]; .*one parameter",
        ),
        (W.to("meta"), W, {}, r"reference is on meta, but must be where policy is, on cpu; .*to\('cpu'\)"),
        (W, W, {"backend": "fast"}, "backend='fast' is unknown; it must be one of: auto, reference, native"),
        (W, W, {"backend": "triton"}, "backend='triton' is not available for tensors on cpu"),
        (
            W,
            W,
            {"out": BYTES.int()},
            "out has dtype torch.int32, but must be torch.int8; pass what encode_delta",
        ),
        (W, W, {"out": BYTES[:2]}, r"out has shape \[2, 6\], but must have that of policy, \[4, 6\]"),
        (W, W, {"out": BYTES.to("meta")}, "out is on meta, but must be where policy is, on cpu"),
        (
            W,
            W,
            {"out": BYTES.mT.contiguous().mT},
            r"out has strides \[1, 4\], but must be contiguous; .*torch.empty",
        ),
    ],
)
def test_encoding(reference: Tensor, policy: Tensor, options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        encode_delta(reference, policy, **options)


@pytest.mark.parametrize(
    ("changes", "policy", "options", "text"),
    [
        ({}, W.double(), {}, "policy has dtype torch.float64, but must be torch.bfloat16"),
        ({}, W[:, :3], {}, r"delta.difference has shape \[4, 6\], but must have that of policy, \[4, 3\]"),
        ({}, W.to("meta"), {}, "delta.difference is on cpu, but must be where policy is, on meta"),
        (
            {"difference": BYTES.short()},
            W,
            {},
            "delta.difference has dtype torch.int16, but must be torch.int8; pass",
        ),
        (
            {"index": DELTA.index.long()},
            W,
            {},
            "delta.index has dtype torch.int64, but must be torch.int32; pass what",
        ),
        (
            {"index": DELTA.index[None]},
            W,
            {},
            r"delta.index and delta.value have shapes \[1, 0\] and \[0\], but must both",
        ),
        (
            {"value": TWO},
            W,
            {},
            r"have shapes \[0\] and \[2\], but must both be \[k\]; pass what encode_delta",
        ),
        ({"value": TWO.float()}, W, {}, "delta.value has dtype torch.float32, but must be torch.bfloat16"),
        ({}, W, {"backend": "cuda"}, "backend='cuda' is unknown"),
        ({}, W, {"out": BYTES.clone()}, "out has dtype torch.int8, but must be torch.bfloat16"),
        ({}, W, {"out": W[0]}, r"out has shape \[6\], but must have that of policy, \[4, 6\]"),
        ({}, W, {"out": W.mT.contiguous().mT}, r"out has strides \[1, 4\], but must be contiguous"),
    ],
)
def test_decoding(changes: dict, policy: Tensor, options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        decode_delta(DELTA._replace(**changes), policy, **options)


def test_more_elements_than_int32_counts() -> None:
    whole = torch.empty(2**31, dtype=torch.bfloat16, device="meta")
    text = re.escape(
        "policy has 2147483648 elements, but must have at most 2147483647, which int32 counts; encode it in parts"
    )
    with pytest.raises(ValueError, match=text):
        encode_delta(whole, whole)
    with pytest.raises(ValueError, match=text):
        decode_delta(OrderedDelta(whole, whole, whole), whole)
