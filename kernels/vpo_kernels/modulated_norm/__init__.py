"""Modulated LayerNorm: normalise, times (1 + scale), plus shift."""

from vpo_kernels.modulated_norm.op import modulated_norm

__all__ = ["modulated_norm"]
