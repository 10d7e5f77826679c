"""The paired diffusion-DPO loss."""

from vpo_kernels.paired_dpo.op import paired_dpo_loss
from vpo_kernels.paired_dpo.reference import PairedDPOLoss

__all__ = ["PairedDPOLoss", "paired_dpo_loss"]
