"""Names of modules in Wan's own repository, which ComfyUI uses too, for those of diffusers' transformer."""

from __future__ import annotations

import re

_BLOCK = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}


def original_name(name: str) -> str | None:
    """Return the original name of a linear layer; None for a layer that has none.

    Source: Wan-Video/Wan2.1, wan/modules/model.py, and diffusers' scripts/convert_wan_to_diffusers.py.
    """
    inside = re.fullmatch(r"(blocks\.[0-9]+)\.(.+)", name)
    if inside is None:
        return _OUTSIDE.get(name)
    found = _BLOCK.get(inside[2])
    return None if found is None else f"{inside[1]}.{found}"
