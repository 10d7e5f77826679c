"""HPSv2 and v2.1: how much people prefer an image for a prompt.

The model (tgxs002/HPSv2, arXiv 2306.09341) is open_clip's ViT-H-14 fine-tuned on human choices; its score is the plain
cosine of image and text, about 0.2 to 0.35. Checkpoints: HPS_v2_compressed.pt and HPS_v2.1_compressed.pt of
xswu/HPSv2. The package letterboxes images, as no other CLIP does; projects that train with HPSv2 squash or crop them,
see ``clip.CONVENTIONS``.

Letters: B images or texts, H x W an image's size, N the side that the model takes, L tokens, D channels of a tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vpo_engine.rewards.card import image_card
from vpo_engine.rewards.clip import (
    ClipScorer,
    ClipTokenizer,
    ImagePreprocessor,
    encode_once,
    paired_cosine,
)
from vpo_engine.rewards.loading import find_file, local_folder, read_under
from vpo_engine.rewards.open_clip import Transformer
from vpo_engine.weights import load_strict

NAME = "HPSv2"
REMEDY = (
    "HPSv2 needs a local folder with HPS_v2_compressed.pt or HPS_v2.1_compressed.pt of xswu/HPSv2 and tokenizer.json "
    "of laion/CLIP-ViT-H-14-laion2B-s32B-b79K (or bpe_simple_vocab_16e6.txt.gz of the hpsv2 repository)"
)
Version = Literal["v2", "v2.1"]

CARD = image_card(
    "hpsv2",
    (-1.0, 1.0),
    parameters=986_109_441,
    licence="Apache-2.0",
    source="xswu/HPSv2",
    resolution="224 x 224, letterbox",
)


@dataclass(frozen=True)
class ClipShape:
    """Sizes of an open_clip model; the defaults are ViT-H-14's. Its checkpoints do not hold them."""

    embed_dim: int = 1024
    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1280
    vision_layers: int = 32
    vision_heads: int = 16
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 1024
    text_layers: int = 24
    text_heads: int = 16


class _Vision(nn.Module):
    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        width, patch = shape.vision_width, shape.patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((shape.image_size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, shape.vision_layers, shape.vision_heads, nn.GELU)
        self.proj = nn.Parameter(torch.empty(width, shape.embed_dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)  # [B, (N / patch)^2, D]
        start = self.class_embedding.expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([start, patches], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP with an exact GELU; the state dict has the published key names."""

    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        self.visual = _Vision(shape)
        self.transformer = Transformer(shape.text_width, shape.text_layers, shape.text_heads, nn.GELU)
        self.token_embedding = nn.Embedding(shape.vocab_size, shape.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(shape.context_length, shape.text_width))
        self.ln_final = nn.LayerNorm(shape.text_width)
        self.text_projection = nn.Parameter(torch.empty(shape.text_width, shape.embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Return features [B, embed_dim], not normalised, of pixels [B, 3, N, N]."""
        return self.visual(pixel_values)

    def text_features(self, ids: Tensor) -> Tensor:
        """Return features [B, embed_dim], not normalised, of ids int64 [B, L], at the end token (the highest)."""
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        later = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        x = self.ln_final(self.transformer(x, later))
        return x[torch.arange(len(ids), device=ids.device), ids.argmax(1)] @ self.text_projection


class HPSv2(ClipScorer):
    """HPSv2 as a scorer of images."""

    name = NAME
    dimensions = tuple(CARD.dimensions)

    def __init__(self, network: OpenClip, tokenizer: ClipTokenizer, preprocess: ImagePreprocessor) -> None:
        super().__init__(network, preprocess)
        self.network: OpenClip
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        version: Version = "v2.1",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        preprocessing: str = "hpsv2",
        shape: ClipShape | None = None,
    ) -> HPSv2:
        """Load a local folder with HPS_{version}_compressed.pt (or .safetensors, first) and the tokenizer.

        ``dtype`` is the towers'; cosines are float32. ``preprocessing``: a name of ``clip.CONVENTIONS``. ``shape``: of
        models of another size than ViT-H-14. Nothing is downloaded. Raise FileNotFoundError for a missing file,
        ValueError for files of another model.
        """
        shape = shape or ClipShape()
        folder = local_folder(folder, REMEDY)
        preprocess = ImagePreprocessor.named(preprocessing, shape.image_size)
        tokenizer = ClipTokenizer.from_folder(folder, REMEDY, length=shape.context_length, pad=0, clean=True)
        tokenizer.check_rows(shape.vocab_size, folder, REMEDY)
        with torch.device("meta"):
            network = OpenClip(shape)
        path = _weight_file(folder, version)
        weights = read_under(path, "state_dict", REMEDY)
        load_strict(network, weights, where=path, model=NAME, remedy=REMEDY, dtype=dtype, device=device)
        return cls(network, tokenizer, preprocess)

    @torch.no_grad()
    def score_images(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score as ``ClipScorer`` does, with the letterbox on the network's device."""
        return super().score_images(images.to(self.network.logit_scale.device), prompts)

    def _check_prompt(self, prompt: str) -> None:
        super()._check_prompt(prompt)
        self.tokenizer.text_of(prompt)

    def _run(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raise ValueError for pixels of another size, which preprocessing "instructvideo" makes of oblong images."""
        side = self.preprocess.size
        if tuple(pixel_values.shape[1:]) != (3, side, side):
            raise ValueError(
                f"preprocessed pixels have shape {tuple(pixel_values.shape)}, expected [B, 3, {side}, {side}]; "
                "where frames are not square choose another preprocessing"
            )
        pixels = pixel_values.to(self.network.logit_scale)
        return paired_cosine(self.network.image_features(pixels), encode_once(prompts, self._encode))

    def _encode(self, texts: list[str]) -> Tensor:
        """Return text features [len(texts), embed_dim]."""
        return self.network.text_features(self.tokenizer(texts).to(self.network.logit_scale.device))


def _weight_file(folder: Path, version: str) -> Path:
    if version not in get_args(Version):
        raise ValueError(f"version is {version!r}, expected one of {', '.join(get_args(Version))}")
    return find_file(folder, [f"HPS_{version}_compressed.{end}" for end in ("safetensors", "pt")], REMEDY)
