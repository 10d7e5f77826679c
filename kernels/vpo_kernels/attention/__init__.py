"""Attention for video transformers: the one place that knows all backends and chooses between them.

All tensors are [B, N, heads, D] (samples, tokens, heads, channels of a head). A fused projection's output has views of
that shape, and FlashAttention and xFormers take it as it is.
"""

from vpo_kernels.attention.choose import AttentionName, BackendName, Choice, choose_attention
from vpo_kernels.attention.op import attention, attention_dtype, text_attention
from vpo_kernels.attention.text import TextPlan, plan_text, text_places

__all__ = [
    "AttentionName",
    "BackendName",
    "Choice",
    "TextPlan",
    "attention",
    "attention_dtype",
    "choose_attention",
    "plan_text",
    "text_attention",
    "text_places",
]
