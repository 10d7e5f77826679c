"""Joint attention of text and video, through the engine's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpo_engine.models.diffusers_network import Processor


class JointAttention(Processor):
    """A processor of diffusers for CogVideoX-2B's attention, which has neither masks nor rotary embeddings."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: None = None,
    ) -> tuple[Tensor, Tensor]:
        """Let the tokens of text [B, L, D] and video [B, N, D] attend to all of them; return video and text."""
        assert attention_mask is None
        assert image_rotary_emb is None
        length = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        del tokens
        q, k, v = (part.unflatten(-1, (attn.heads, -1)) for part in (q, k, v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        out = self.attend(q, k, v).flatten(2)
        del q, k, v
        out = attn.to_out[0](out)
        return out[:, length:], out[:, :length]
