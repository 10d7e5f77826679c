"""Gated residual: x + gate * y."""

from vpo_kernels.gated_residual.op import gated_residual

__all__ = ["gated_residual"]
