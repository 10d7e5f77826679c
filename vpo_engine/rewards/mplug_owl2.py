"""mPLUG-Owl2 (arXiv 2311.04257), the network of Q-Align: frames and a question in, logits of the next token out.

Each frame goes through a vision transformer and an abstractor, whose learnable queries and one end vector stand in
the language model's sequence for it. The language model is LLaMA-2 with two sets of norms, keys and values: the
first for text, the second for what is seen. The state dict has the published key names. Forward only: no dropout, no
cache, no padding. Written after Q-Future/Q-Align, q_align/model (commit 14dfdff).

Letters: B videos, f frames of each, N images, S pixels a side, Q queries, L tokens, D channels, K logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpo_engine.rewards.mplug_owl2_config import MplugOwl2Config, StackConfig


def _split(x: Tensor, heads: int) -> Tensor:
    """Split [N, L, D] into [N, heads, L, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    """Merge [N, heads, L, D / heads] into [N, L, D]."""
    return x.transpose(1, 2).flatten(2)


class _VisionAttention(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.dense = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within [N, L, D]; the projection's channels are ordered (head, query or key or value, channel)."""
        joint = self.query_key_value(x).unflatten(-1, (self.heads, 3, -1))
        query, key, value = joint.permute(3, 0, 2, 1, 4)
        return self.dense(_merge(F.scaled_dot_product_attention(query, key, value)))


class _VisionMlp(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.fc1(x)
        return self.fc2(wide * torch.sigmoid(1.702 * wide))


class _VisionLayer(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.width, eps=config.eps)
        self.self_attn = _VisionAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = _VisionMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class _VisionEmbeddings(nn.Module):
    def __init__(self, config: MplugOwl2Config) -> None:
        super().__init__()
        width, patch = config.vision.width, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(1, config.positions, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=config.vision.eps)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        whole = self.cls_token.expand(len(patches), -1, -1)
        return self.pre_layernorm(torch.cat((whole, patches), dim=1) + self.position_embedding)


class _Layers(nn.Module):
    """A list of layers, which the checkpoint calls an encoder."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class _VisionModel(nn.Module):
    def __init__(self, config: MplugOwl2Config) -> None:
        super().__init__()
        self.embeddings = _VisionEmbeddings(config)
        self.encoder = _Layers(*(_VisionLayer(config.vision) for _ in range(config.vision.depth)))
        self.post_layernorm = nn.LayerNorm(config.vision.width, eps=config.vision.eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels [N, 3, S, S] to [N, positions, D]."""
        x = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class _QueryAttention(nn.Module):
    q_pos_embed: Tensor
    k_pos_embed: Tensor

    def __init__(self, config: MplugOwl2Config) -> None:
        super().__init__()
        width, self.heads = config.abstractor.width, config.abstractor.heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.register_buffer("q_pos_embed", torch.zeros(config.queries, width))
        self.register_buffer("k_pos_embed", torch.zeros(config.positions, width))

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """Let queries [N, Q, D] attend to themselves and to the image [N, positions, D]; return [N, Q, D].

        Positions are added to queries and keys, not to values.
        """
        everything = torch.cat((queries, image), dim=1)
        query = self.query(queries + self.q_pos_embed)
        key = self.key(everything + torch.cat((self.q_pos_embed, self.k_pos_embed)))
        value = self.value(everything)
        query, key, value = (_split(part, self.heads) for part in (query, key, value))
        return _merge(F.scaled_dot_product_attention(query, key, value))


class _QueryMlp(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(config.width, config.hidden) for _ in range(2))
        self.ffn_ln = nn.LayerNorm(config.hidden, eps=config.eps)
        self.w2 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.ffn_ln(F.silu(self.w1(x)) * self.w3(x)))


class _QueryOutput(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.out_proj = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = _QueryMlp(config)

    def forward(self, attended: Tensor, x: Tensor) -> Tensor:
        x = x + self.out_proj(attended)
        return x + self.mlp(self.norm2(x))


class _CrossAttention(nn.Module):
    def __init__(self, config: MplugOwl2Config) -> None:
        super().__init__()
        self.attention = _QueryAttention(config)
        self.output = _QueryOutput(config.abstractor)
        self.norm1, self.normk = (nn.LayerNorm(config.abstractor.width) for _ in range(2))

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """Add the attention's output to the normalised queries: the residual path starts after the norm."""
        queries = self.norm1(queries)
        return self.output(self.attention(queries, self.normk(image)), queries)


class _QueryLayer(nn.Module):
    def __init__(self, config: MplugOwl2Config) -> None:
        super().__init__()
        self.crossattention = _CrossAttention(config)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        return self.crossattention(queries, image)


class _Abstractor(nn.Module):
    def __init__(self, config: MplugOwl2Config) -> None:
        super().__init__()
        width, language = config.abstractor.width, config.language.width
        self.encoder = _Layers(*(_QueryLayer(config) for _ in range(config.abstractor.depth)))
        self.query_embeds = nn.Parameter(torch.zeros(1, config.queries, width))
        self.visual_fc = nn.Linear(width, language)
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, language))

    def forward(self, image: Tensor) -> Tensor:
        """Turn [N, positions, D of the image] into [N, Q + 1, D of the language model]."""
        queries = self.query_embeds.expand(len(image), -1, -1)
        for layer in self.encoder.layers:
            queries = layer(queries, image)
        return torch.cat((self.visual_fc(queries), self.vit_eos.expand(len(image), -1, -1)), dim=1)


class _Multiway(nn.Module):
    """Two modules of one kind: the first for text, the second for frames."""

    def __init__(self, text: nn.Module, seen: nn.Module) -> None:
        super().__init__()
        self.multiway = nn.ModuleList((text, seen))

    def forward(self, x: Tensor, seen: slice) -> Tensor:
        """Apply both to x [B, L, D], in which the positions ``seen`` stand for frames."""
        text, visual = self.multiway
        parts = (text(x[:, : seen.start]), visual(x[:, seen]), text(x[:, seen.stop :]))
        return torch.cat(parts, dim=1)


def _rotary(length: int, width: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of LLaMA's rotary embedding, each [length, width], computed in float32."""
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=like.device) / width
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=like.device), theta**-steps)
    angles = torch.cat((angles, angles), dim=1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [B, heads, L, d], whose two halves are the two coordinates of planes."""
    first, second = x.chunk(2, dim=-1)
    return x * rotary[0] + torch.cat((-second, first), dim=-1) * rotary[1]


class _LanguageAttention(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.heads = config.heads
        linear = [nn.Linear(config.width, config.width, bias=False) for _ in range(6)]
        self.q_proj, self.o_proj = linear[0], linear[1]
        self.k_proj, self.v_proj = _Multiway(*linear[2:4]), _Multiway(*linear[4:6])

    def forward(self, x: Tensor, seen: slice, rotary: tuple[Tensor, Tensor]) -> Tensor:
        query, key = _split(self.q_proj(x), self.heads), _split(self.k_proj(x, seen), self.heads)
        value = _split(self.v_proj(x, seen), self.heads)
        attended = F.scaled_dot_product_attention(
            _rotate(query, rotary), _rotate(key, rotary), value, is_causal=True
        )
        return self.o_proj(_merge(attended))


class _LanguageMlp(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(config.width, config.hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _LanguageLayer(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        norms = [nn.RMSNorm(config.width, eps=config.eps) for _ in range(4)]
        self.input_layernorm = _Multiway(*norms[:2])
        self.self_attn = _LanguageAttention(config)
        self.post_attention_layernorm = _Multiway(*norms[2:])
        self.mlp = _LanguageMlp(config)

    def forward(self, x: Tensor, seen: slice, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x, seen), seen, rotary)
        return x + self.mlp(self.post_attention_layernorm(x, seen))


class _Model(nn.Module):
    def __init__(self, config: MplugOwl2Config) -> None:
        super().__init__()
        width = config.language.width
        self.embed_tokens = nn.Embedding(config.vocabulary, width)
        self.vision_model = _VisionModel(config)
        self.visual_abstractor = _Abstractor(config)
        self.layers = nn.ModuleList(_LanguageLayer(config.language) for _ in range(config.language.depth))
        self.norm = nn.RMSNorm(width, eps=config.language.eps)


class MplugOwl2(nn.Module):
    """The whole network."""

    def __init__(self, config: MplugOwl2Config) -> None:
        super().__init__()
        self.config = config
        self.model = _Model(config)
        self.lm_head = nn.Linear(config.language.width, config.vocabulary, bias=False)

    def see(self, pixels: Tensor) -> Tensor:
        """Turn normalised pixels [N, 3, S, S] into the vectors that stand for each image, [N, Q + 1, D]."""
        return self.model.visual_abstractor(self.model.vision_model(pixels.to(self.lm_head.weight.dtype)))

    def next_token_logits(self, before: Tensor, seen: Tensor, after: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits with which some tokens come next, float32 [B, K].

        before, after: ids, int64 [L], of the text on both sides of what is seen; the same for all videos. seen: the
        vectors of each video's frames in a row, [B, f (Q + 1), D]. tokens: ids, int64 [K]. The K rows of the head are
        applied in float32, whatever the rest is in.
        """
        model, config = self.model, self.config.language
        text = [model.embed_tokens(ids).expand(len(seen), -1, -1) for ids in (before, after)]
        x = torch.cat((text[0], seen, text[1]), dim=1)
        places = slice(len(before), len(before) + seen.shape[1])
        rotary = _rotary(x.shape[1], config.width // config.heads, self.config.rope_theta, x)
        for layer in model.layers:
            x = layer(x, places, rotary)
        return F.linear(model.norm(x[:, -1]).float(), self.lm_head.weight[tokens].float())
