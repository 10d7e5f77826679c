"""The paired diffusion-DPO loss."""

from vpo_kernels.backends import available_backends
from vpo_kernels.paired_dpo.contract import PairedDPOLoss
from vpo_kernels.paired_dpo.op import batched_paired_dpo_loss, paired_dpo_loss
from vpo_kernels.paired_dpo.sequential import sequential_backward, single_pair_backward
from vpo_kernels.paired_dpo.weighting import error_weight

__all__ = [
    "PairedDPOLoss",
    "available_backends",
    "batched_paired_dpo_loss",
    "error_weight",
    "paired_dpo_loss",
    "sequential_backward",
    "single_pair_backward",
]
