"""Train the sprites world's text encoder: a small T5 over bytes, frozen afterwards as T5 is in Open-Sora."""

from __future__ import annotations

import torch
from torch import nn

from vpo_engine.data.sprites.assets import MAX_LENGTH
from vpo_engine.data.sprites.world import COLOURS, DIRECTIONS, SHAPES, Attributes, all_captions
from vpo_engine.models.opensora.text import ByteTokenizer, T5Encoder

CONFIG = {
    "vocab_size": 259,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-6,
}


def train_text_encoder(seed: int, steps: int = 300) -> T5Encoder:
    """Train an encoder so that colour, shape, direction and the token's own byte can be read off every token."""
    torch.manual_seed(seed)
    encoder = T5Encoder.from_config(CONFIG, ByteTokenizer(MAX_LENGTH))
    sizes = (len(COLOURS), len(SHAPES), len(DIRECTIONS), CONFIG["vocab_size"])
    heads = nn.ModuleList(nn.Linear(CONFIG["d_model"], size) for size in sizes)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=3e-3)
    captions = all_captions()
    attributes = Attributes.of(captions)
    ids, mask = encoder.tokenizer(captions)
    said = (attributes.colour, attributes.shape, attributes.direction)
    wanted = [*(index[:, None].expand_as(ids) for index in said), ids]
    encoder.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        hidden = encoder.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        embeddings = hidden[mask]
        losses = [
            nn.functional.cross_entropy(head(embeddings), target[mask])
            for head, target in zip(heads, wanted, strict=True)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    return encoder.eval().requires_grad_(False)
