"""MPS: overall human preference for an image of a prompt.

The model (Kwai-Kolors/MPS, arXiv 2405.14705) is a CLIP ViT-H whose image tokens attend to the prompt's tokens, four
times, before their first is compared with the prompt. Which prompt tokens take part is decided by their similarity to
a condition, a list of what preference is about. Only the condition "overall" was published. CLIP is transformers'
``CLIPModel``; what comes after it is here.

Letters: B images, L text tokens, C condition tokens, N image tokens, D channels, U different prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from vpo_engine.foreign_settings import check_settings, completed
from vpo_engine.rewards.card import image_card
from vpo_engine.rewards.clip import (
    ClipScorer,
    ClipTokenizer,
    ImagePreprocessor,
    load_clip,
    paired_cosine,
)
from vpo_engine.rewards.loading import CONFIG, build, parse_config, read_config, read_weights
from vpo_engine.weights import read_file

NAME = "MPS"
CARD = image_card(
    "mps",
    (-100.0, 100.0),
    parameters=1_104_606_721,
    licence="MIT",
    source="MPS_overall.pth of aigc-apps/VideoX-Fun; config and tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
)
REMEDY = (
    "MPS needs a local folder with VideoX-Fun's MPS_overall.pth and with config.json and tokenizer.json of "
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
)
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
"""The condition that the overall preference was trained with (README of Kwai-Kolors/MPS)."""
THRESHOLD = 0.01
"""The threshold of the README and of the network's forward; the authors' two evaluation scripts have 0.3."""
FILES = ("MPS_overall.safetensors", "MPS_overall.pth")
FREQUENCIES = ".rotary_emb.inv_freq"
"""Keys of the checkpoint that hold no weights; ``rotate`` makes them, in float32."""


class Norm(nn.Module):
    """Layer normalisation whose bias is zero, but stored."""

    bias: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.register_buffer("bias", torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.fn(x, *others) + x


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, kept: Tensor | None = None) -> Tensor:
    """Attend with queries [B, N, heads * d] to keys and values [B, L, d] of a single head; ``kept``: bool [B, L]."""
    query = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    key, value = (part.unsqueeze(1).expand(-1, heads, -1, -1) for part in (key, value))
    mask = None if kept is None else kept[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def rotate(x: Tensor, dim_head: int) -> Tensor:
    """Apply the rotary position embedding to x [B, N, heads * dim_head], in float32."""
    places = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
    powers = torch.arange(0, dim_head, 2, device=x.device, dtype=torch.float32) / dim_head
    angles = torch.outer(places, 10000.0**-powers).repeat(1, 2).unsqueeze(1)  # [N, 1, dim_head]
    heads = x.float().unflatten(-1, (-1, dim_head))
    first, second = heads.chunk(2, dim=-1)
    rotated = heads * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
    return rotated.flatten(2).to(x.dtype)


class CrossAttention(nn.Module):
    """Image tokens attend to text tokens, with a feed-forward branch beside it."""

    def __init__(self, dim: int, dim_head: int, heads: int, ff_mult: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        width = ff_mult * dim
        self.ff = nn.Sequential(
            nn.Linear(dim, 2 * width, bias=False), SwiGLU(), nn.Linear(width, dim, bias=False)
        )

    def forward(self, x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
        x = self.norm(x)
        key, value = self.to_kv(context).chunk(2, dim=-1)
        return self.to_out(attention(self.to_q(x), key, value, self.heads, kept)) + self.ff(x)


class ParallelBlock(nn.Module):
    """Image tokens attend to each other, with a feed-forward branch beside it."""

    def __init__(self, dim: int, dim_head: int, heads: int, ff_mult: int) -> None:
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.widths = (heads * dim_head, dim_head, dim_head, 2 * ff_mult * dim)
        self.norm = Norm(dim)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.attn_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(ff_mult * dim, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, hidden = self.fused_attn_ff_proj(self.norm(x)).split(self.widths, dim=-1)
        query, key = rotate(query, self.dim_head), rotate(key, self.dim_head)
        return self.attn_out(attention(query, key, value, self.heads)) + self.ff_out(hidden)


class CrossModel(nn.Module):
    def __init__(self, *, dim: int, layer_num: int, dim_head: int, heads: int, ff_mult: int) -> None:
        super().__init__()
        sizes = (dim, dim_head, heads, ff_mult)
        self.layers = nn.ModuleList(
            nn.ModuleList([Residual(CrossAttention(*sizes)), Residual(ParallelBlock(*sizes))])
            for _ in range(layer_num)
        )

    def forward(self, tokens: Tensor, context: Tensor, kept: Tensor) -> Tensor:
        """Return image tokens [B, N, D] that have read those text tokens [B, L, D] that are ``kept``, bool [B, L]."""
        for layer in self.layers:
            cross, block = layer.children()
            tokens = block(cross(tokens, context, kept))
        return tokens


class MPSNetwork(nn.Module):
    """The network; its state dict has the published key names, without those of FREQUENCIES."""

    def __init__(self, config: CLIPConfig, cross_model: Mapping[str, int]) -> None:
        super().__init__()
        self.model = CLIPModel(config)
        self.cross_model = CrossModel(**cross_model)

    def texts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of all tokens [U, L, D] and of the end token [U, D] of ids int64 [U, L].

        Padding counts as text: the authors give no attention mask.
        """
        states = self.model.text_model(input_ids=ids)
        project = self.model.text_projection
        return project(states.last_hidden_state), project(states.pooler_output)

    def forward(self, pixel_values: Tensor, text: Tensor, end: Tensor, kept: Tensor) -> Tensor:
        """Return scores, float32 [B], of normalised pixels [B, 3, H, W] and each image's text from ``texts``.

        ``kept``: the text tokens that count, bool [B, L].
        """
        states = self.model.vision_model(pixel_values=pixel_values.to(text.dtype)).last_hidden_state
        images = self.cross_model(self.model.visual_projection(states), text, kept)[:, 0]
        return self.model.logit_scale.float().exp() * paired_cosine(images, end)


def kept_tokens(text: Tensor, condition: Tensor, threshold: float) -> Tensor:
    """Return which tokens of texts [U, L, D] are close to one of the condition [C, D], bool [U, L].

    Close is a best product above ``threshold`` times the best of the same text. The authors take the best of the
    whole batch, which is the same for the single prompts of their scripts.
    """
    best = (text.float() @ condition.float().T).amax(2)
    return best / best.amax(1, keepdim=True) > threshold


class MPS(ClipScorer):
    """MPS as a scorer of images."""

    name = NAME
    dimensions = tuple(CARD.dimensions)

    def __init__(
        self,
        network: MPSNetwork,
        tokenizer: ClipTokenizer,
        preprocess: ImagePreprocessor,
        *,
        threshold: float = THRESHOLD,
    ) -> None:
        """``threshold`` decides which prompt tokens count; see ``kept_tokens``."""
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is {threshold}, expected at least 0 and less than 1")
        super().__init__(network, preprocess)
        self.network: MPSNetwork
        self.tokenizer, self.threshold = tokenizer, threshold

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        threshold: float = THRESHOLD,
        preprocessing: str = "clip_hf",
    ) -> MPS:
        """Load a local folder; nothing is downloaded.

        Read are MPS_overall.safetensors or .pth (or else model.safetensors) and, of the CLIP that it was trained
        from, config.json and tokenizer.json; "cross_model" in config.json describes sizes other than the published
        ones. ``preprocessing``: one of clip.CONVENTIONS; the default is the authors', VideoX-Fun has "videox_fun".
        Raise FileNotFoundError for a missing file, ValueError for files of another model.
        """
        folder = Path(folder)
        fields = read_config(folder, "clip", REMEDY)
        config = parse_config(CLIPConfig, fields, folder, REMEDY)
        preprocess = ImagePreprocessor.named(preprocessing, config.vision_config.image_size)
        tokenizer = ClipTokenizer.of_config(folder, config, REMEDY)
        network = _read_network(folder, config, _cross_sizes(fields, folder), dtype, device)
        return cls(network, tokenizer, preprocess, threshold=threshold)

    def _check_prompt(self, prompt: str) -> None:
        super()._check_prompt(prompt)
        self.tokenizer.text_of(prompt)

    def _run(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        device = self.network.model.logit_scale.device
        texts = list(dict.fromkeys(prompts))
        rows = torch.tensor([texts.index(prompt) for prompt in prompts], device=device)
        with torch.no_grad():
            tokens, ends = self.network.texts(self.tokenizer([CONDITION, *texts]).to(device))
            kept = kept_tokens(tokens[1:], tokens[0], self.threshold)
        return self.network(pixel_values.to(device), tokens[1:][rows], ends[1:][rows], kept[rows])


@dataclass(frozen=True, kw_only=True)
class CrossSizes:
    """The sizes of the cross model; the defaults are the published ones."""

    dim: int = 1024
    layer_num: int = 4
    dim_head: int = 64
    heads: int = 16
    ff_mult: int = 4


@dataclass(frozen=True)
class _Fields:
    cross_model: CrossSizes


def _cross_sizes(fields: Mapping[str, Any], folder: Path) -> Mapping[str, int]:
    """Return the sizes of the cross model. ValueError for values that it cannot have."""
    check_settings(fields, _Fields, folder / CONFIG, REMEDY)
    return completed(fields.get("cross_model", {}), CrossSizes)


def _read_network(
    folder: Path,
    config: CLIPConfig,
    cross_model: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> MPSNetwork:
    """Read all weights in ``dtype`` but the scale: rounding it to 8 bits would change its exponential by 2 %."""
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    weights: dict[str, Any]
    if path is None:
        weights = read_weights(folder, REMEDY)
    else:
        try:
            weights = read_file(path)
        except ValueError as error:
            raise ValueError(
                f"{error}; the authors' own file, a whole pickled module, is not read: {REMEDY}"
            ) from error
    weights = {key: weight for key, weight in weights.items() if not key.endswith(FREQUENCIES)}
    network = build(lambda: MPSNetwork(config, cross_model), folder / CONFIG, NAME, REMEDY)
    load_clip(
        network,
        weights,
        where=path or folder,
        model=NAME,
        remedy=REMEDY,
        dtype=dtype,
        device=device,
        float32=("model.logit_scale",),
    )
    return network
