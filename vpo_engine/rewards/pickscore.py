"""PickScore: how likely people are to pick an image for a prompt.

The model (yuvalkirstain/PickScore, arXiv 2305.01569) is a CLIP ViT-H/14 fine-tuned on Pick-a-Pic; its score is
exp(logit_scale) times the cosine of image and text, about 18 to 24. Checkpoint: yuvalkirstain/PickScore_v1, with the
tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K.

Letters: B images, H x W their size, N the side that the model takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from vpo_engine.rewards.card import RewardCard
from vpo_engine.rewards.clip import (
    ClipTokenizer,
    ImagePreprocessor,
    PreprocessedImages,
    encode_once,
    fill_position_ids,
    paired_cosine,
    without_position_ids,
)
from vpo_engine.rewards.frames import check_finite, check_prompts
from vpo_engine.rewards.loading import load_strict, read_config, read_weights

NAME = "PickScore"
REMEDY = (
    "PickScore needs a local folder with config.json and model.safetensors of yuvalkirstain/PickScore_v1 and "
    "tokenizer.json of laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
)

CARD = RewardCard(
    name="pickscore",
    dimensions={"pickscore": (-100.0, 100.0)},
    frames="one at a time",
    resolution="224 x 224, centre crop",
    reads_prompt=True,
    differentiable=True,
    parameters=986_109_441,
    licence="MIT",
    source="yuvalkirstain/PickScore_v1",
)


class PickScore(PreprocessedImages):
    """PickScore as an ``ImageScorer``; ``VideoOfFrames`` makes a ``Reward`` of it. Its weights take no gradient."""

    dimensions = tuple(CARD.dimensions)

    def __init__(self, network: CLIPModel, tokenizer: ClipTokenizer, preprocess: ImagePreprocessor) -> None:
        self.network = network.eval().requires_grad_(False)
        self.tokenizer, self.preprocess = tokenizer, preprocess

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        preprocessing: str = "clip_hf",
    ) -> PickScore:
        """Load a local folder: config.json, weights (safetensors first) and the tokenizer; nothing is downloaded.

        ``dtype`` is the towers'; cosines are float32. ``preprocessing``: a name of ``clip.CONVENTIONS``.
        FileNotFoundError for a missing file, ValueError for files of another model.
        """
        config = CLIPConfig.from_dict(read_config(folder, "clip", REMEDY))
        tokenizer = ClipTokenizer.of_config(folder, config, REMEDY)
        preprocess = ImagePreprocessor.named(preprocessing, config.vision_config.image_size)
        with torch.device("meta"):
            network = CLIPModel(config)
        weights = without_position_ids(read_weights(folder, REMEDY))
        load_strict(
            network,
            weights,
            where=folder,
            model=NAME,
            remedy=REMEDY,
            dtype=dtype,
            device=device,
            float32=("logit_scale",),
        )
        fill_position_ids(network, device)
        return cls(network, tokenizer, preprocess)

    def scores(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        """Preprocessed pixels [B, 3, N, N] and their B prompts to scores, float32 [B], differentiable in the pixels."""
        check_prompts(prompts, NAME)
        network = self.network
        images = network.get_image_features(pixel_values.to(network.device)).pooler_output
        scores = network.logit_scale.exp() * paired_cosine(images, encode_once(prompts, self._encode))
        check_finite(scores, prompts, NAME)
        return scores

    def _encode(self, texts: list[str]) -> Tensor:
        """Text features [len(texts), D]. Padding is behind the token that is read, and unseen by it."""
        ids = self.tokenizer(texts).to(self.network.device)
        return self.network.get_text_features(ids).pooler_output
