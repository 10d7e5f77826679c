"""Fused operations of video preference optimization. Importing this loads torch and nothing heavier."""

from vpo_kernels.paired_dpo import PairedDPOLoss, paired_dpo_loss

__all__ = ["PairedDPOLoss", "paired_dpo_loss"]
