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

from vpo_engine.rewards.card import image_card
from vpo_engine.rewards.clip import (
    ClipScorer,
    ClipTokenizer,
    ImagePreprocessor,
    encode_once,
    load_clip,
    paired_cosine,
)
from vpo_engine.rewards.loading import CONFIG, build, parse_config, read_config, read_weights

NAME = "PickScore"
REMEDY = (
    "PickScore needs a local folder with config.json and model.safetensors of yuvalkirstain/PickScore_v1 and "
    "tokenizer.json of laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
)

CARD = image_card(
    "pickscore",
    (-100.0, 100.0),
    parameters=986_109_441,
    licence="MIT",
    source="yuvalkirstain/PickScore_v1",
)


class PickScore(ClipScorer):
    """PickScore as a scorer of images."""

    name = NAME
    dimensions = tuple(CARD.dimensions)

    def __init__(self, network: CLIPModel, tokenizer: ClipTokenizer, preprocess: ImagePreprocessor) -> None:
        super().__init__(network, preprocess)
        self.network: CLIPModel
        self.tokenizer = tokenizer

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
        Raise FileNotFoundError for a missing file, ValueError for files of another model.
        """
        config = parse_config(CLIPConfig, read_config(folder, "clip", REMEDY), folder, REMEDY)
        tokenizer = ClipTokenizer.of_config(folder, config, REMEDY)
        preprocess = ImagePreprocessor.named(preprocessing, config.vision_config.image_size)
        network = build(lambda: CLIPModel(config), Path(folder) / CONFIG, NAME, REMEDY)
        load_clip(
            network,
            read_weights(folder, REMEDY),
            where=folder,
            model=NAME,
            remedy=REMEDY,
            dtype=dtype,
            device=device,
            float32=("logit_scale",),
        )
        return cls(network, tokenizer, preprocess)

    def _check_prompt(self, prompt: str) -> None:
        super()._check_prompt(prompt)
        self.tokenizer.text_of(prompt)

    def _run(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        network = self.network
        images = network.get_image_features(pixel_values.to(network.device)).pooler_output
        return network.logit_scale.exp() * paired_cosine(images, encode_once(prompts, self._encode))

    def _encode(self, texts: list[str]) -> Tensor:
        """Return text features [len(texts), D]. Padding is behind the token that is read, and unseen by it."""
        ids = self.tokenizer(texts).to(self.network.device)
        return self.network.get_text_features(ids).pooler_output
