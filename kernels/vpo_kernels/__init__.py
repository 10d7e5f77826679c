"""Fused operations for video preference optimization. Importing this package loads torch and nothing heavier."""

from vpo_kernels.ordered_delta import OrderedDelta, decode_delta, encode_delta
from vpo_kernels.paired_dpo import (
    PairedDPOLoss,
    available_backends,
    batched_paired_dpo_loss,
    error_weight,
    paired_dpo_loss,
    sequential_backward,
    single_pair_backward,
)

__all__ = [
    "OrderedDelta",
    "PairedDPOLoss",
    "available_backends",
    "batched_paired_dpo_loss",
    "decode_delta",
    "encode_delta",
    "error_weight",
    "paired_dpo_loss",
    "sequential_backward",
    "single_pair_backward",
]
