"""ImageReward: how people rate an image made for a prompt.

The model (THUDM/ImageReward, arXiv 2304.05977) is BLIP, a ViT-L/16 whose image a BERT reads by cross-attention, and
five linear layers on the state at the text's first token; rewards are standardised, about -2.5 to 2.5. The text
encoder is transformers' ``BlipTextModel``, run as an encoder. Files: ImageReward.pt and med_config.json of
THUDM/ImageReward, and the tokenizer of bert-base-uncased.

Letters: B images or texts, H x W an image's size, N the side that the model takes, L tokens, D channels, P patches + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel

from vpo_engine.foreign_settings import check_settings, described_by
from vpo_engine.rewards.card import image_card
from vpo_engine.rewards.clip import (
    ClipScorer,
    ImagePreprocessor,
    load_clip,
)
from vpo_engine.rewards.frames import check_special_tokens
from vpo_engine.rewards.laion_aesthetic import AestheticHead
from vpo_engine.rewards.loading import build, find_file, read_json, read_plain_tokenizer
from vpo_engine.rewards.vit import Block
from vpo_engine.weights import read_file

NAME = "ImageReward"
_SIZES = "med_config.json"
REMEDY = (
    "ImageReward needs a local folder with ImageReward.pt and med_config.json of THUDM/ImageReward and tokenizer.json "
    "or vocab.txt of bert-base-uncased"
)
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the raw outputs (ImageReward/ImageReward.py)."""
TOKENS = 35
"""All texts have this length; longer ones are cut off."""
_SPECIAL = ("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]")
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")
"""Weights of BLIP's contrastive loss, which the checkpoint holds and nothing reads."""

CARD = image_card(
    "imagereward", (None, None), parameters=446_206_689, licence="Apache-2.0", source="THUDM/ImageReward"
)


@dataclass(frozen=True)
class VisionShape:
    """Sizes of the image tower and of the head. The defaults are the published ones, which no file holds."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    head: tuple[int, ...] = (1024, 128, 64, 16, 1)


class _Patches(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class _Vision(nn.Module):
    """BLIP's ViT."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        width, patch = shape.width, shape.patch_size
        self.patch_embed = _Patches(width, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, (shape.image_size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, shape.heads) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return states [B, P, D] of pixels [B, 3, N, N]."""
        patches = self.patch_embed(pixel_values)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))


class _Blip(nn.Module):
    def __init__(self, shape: VisionShape, text: BlipTextConfig) -> None:
        super().__init__()
        self.visual_encoder = _Vision(shape)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)

    def forward(self, pixel_values: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return states of the text's tokens, [B, L, D]."""
        return self.text_encoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=self.visual_encoder(pixel_values),
            is_decoder=False,  # reads the text in both directions
        ).last_hidden_state


class ImageRewardNetwork(nn.Module):
    """BLIP and the head, which is kept and applied in float32; the state dict has the published key names."""

    def __init__(self, shape: VisionShape, text: BlipTextConfig) -> None:
        super().__init__()
        self.blip = _Blip(shape, text)
        self.mlp = AestheticHead((text.hidden_size, *shape.head))

    def forward(self, pixel_values: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return standardised rewards, float32 [B], of pixels [B, 3, N, N], ids and their mask, int64 [B, L]."""
        states = self.blip(pixel_values, ids, mask)
        return (self.mlp(states[:, 0].float()) - REWARD_MEAN) / REWARD_STD


class ImageReward(ClipScorer):
    """ImageReward as a scorer of images."""

    name = NAME
    dimensions = tuple(CARD.dimensions)

    def __init__(
        self, network: ImageRewardNetwork, tokenizer: Tokenizer, preprocess: ImagePreprocessor
    ) -> None:
        super().__init__(network, preprocess)
        self.network: ImageRewardNetwork
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        preprocessing: str = "clip",
        shape: VisionShape | None = None,
    ) -> ImageReward:
        """Load a local folder: med_config.json, ImageReward.safetensors (first) or .pt, and the tokenizer.

        ``dtype`` is BLIP's. ``preprocessing``: a name of ``clip.CONVENTIONS``. ``shape``: of a model of other sizes
        than the published one. Nothing is downloaded. Raise FileNotFoundError for a missing file, ValueError for
        files of another model.
        """
        folder, shape = Path(folder), shape or VisionShape()
        text = _read_text_config(folder, shape)
        tokenizer = _read_tokenizer(folder, text)
        preprocess = ImagePreprocessor.named(preprocessing, shape.image_size)
        network = build(lambda: ImageRewardNetwork(shape, text), folder / _SIZES, NAME, REMEDY)
        path = find_file(folder, ["ImageReward.safetensors", "ImageReward.pt"], REMEDY)
        load_clip(
            network,
            read_file(path),
            where=path,
            model=NAME,
            remedy=REMEDY,
            dtype=dtype,
            device=device,
            float32=("mlp.",),
            unused=_UNUSED,
        )
        return cls(network, tokenizer, preprocess)

    def _check_prompt(self, prompt: str) -> None:
        super()._check_prompt(prompt)
        check_special_tokens(prompt, _SPECIAL, "BERT")

    def _run(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        ids, mask = self.encode(prompts)
        table = self.network.blip.visual_encoder.pos_embed
        pixels = pixel_values.to(table)
        return self.network(pixels, ids.to(table.device), mask.to(table.device))

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and attention mask of B prompts, int64 [B, TOKENS] on the CPU; refuse special tokens."""
        ids = torch.zeros(len(prompts), TOKENS, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        start, end = self.tokenizer.token_to_id("[CLS]"), self.tokenizer.token_to_id("[SEP]")
        for row, prompt in enumerate(prompts):
            check_special_tokens(prompt, _SPECIAL, "BERT")
            words = self.tokenizer.encode(prompt, add_special_tokens=False).ids[: TOKENS - 2]
            ids[row, : len(words) + 2] = torch.tensor([start, *words, end])
            mask[row, : len(words) + 2] = 1
        return ids, mask


def _read_text_config(folder: Path, shape: VisionShape) -> BlipTextConfig:
    """Read BERT's sizes from med_config.json; the width of what it attends to is the image tower's."""
    fields: dict[str, Any] = read_json(folder, _SIZES, REMEDY)
    check_settings(fields, BlipTextConfig, folder / _SIZES, REMEDY)
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "hidden_act",
        "layer_norm_eps",
    )
    missing = [name for name in names if name not in fields]
    if missing:
        raise ValueError(f"{folder / _SIZES} has no {', '.join(missing)}; {REMEDY}")
    sizes = {name: fields[name] for name in names}
    special = {"bos_token_id": None, "eos_token_id": None, "sep_token_id": None, "pad_token_id": 0}
    with described_by(folder / _SIZES, "BERT", REMEDY):
        return BlipTextConfig(**sizes, **special, encoder_hidden_size=shape.width, is_decoder=True)


def _read_tokenizer(folder: Path, config: BlipTextConfig) -> Tokenizer:
    """Read a tokenizer of lower-cased word pieces, from tokenizer.json or else from vocab.txt."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_plain_tokenizer(folder / "tokenizer.json", REMEDY)
    elif (folder / "vocab.txt").is_file():
        try:
            words = models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]")
        except Exception as error:  # the only class it raises
            raise ValueError(f"{folder / 'vocab.txt'} cannot be read ({error}); {REMEDY}") from error
        tokenizer = Tokenizer(words)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        raise FileNotFoundError(f"no tokenizer.json or vocab.txt in {folder}; {REMEDY}")
    if None in (tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")):
        raise ValueError(f"the tokenizer in {folder} has no [CLS] and [SEP]; {REMEDY}")
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {tokenizer.get_vocab_size()} tokens for {config.vocab_size} embeddings; "
            f"{REMEDY}"
        )
    return tokenizer
