"""LAION's aesthetic predictor v2: how much people like the look of an image, whatever it shows.

The model (christophschuhmann/improved-aesthetic-predictor) is OpenAI's CLIP ViT-L/14 and five linear layers on the
normalised image feature, without activations between them; trained on ratings of 1 to 10, mostly 4 to 7. Weights:
sac+logos+ava1-l14-linearMSE.pth of that repository beside openai/clip-vit-large-patch14.

Letters: B images, H x W their size, N the side that the model takes, D channels of an image feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPVisionModelWithProjection

from vpo_engine.rewards.card import image_card
from vpo_engine.rewards.clip import (
    ClipScorer,
    ImagePreprocessor,
    load_clip,
)
from vpo_engine.rewards.loading import CONFIG, build, find_file, parse_config, read_config, read_weights
from vpo_engine.weights import load_strict, read_file

NAME = "LAION's aesthetic predictor"
HEAD = "sac+logos+ava1-l14-linearMSE"
REMEDY = (
    "the aesthetic score needs a local folder with config.json and model.safetensors of openai/clip-vit-large-patch14 "
    f"and {HEAD}.pth of christophschuhmann/improved-aesthetic-predictor"
)
_LAYERS = (0, 2, 4, 6, 7)
"""Places of the linear layers in the published head; between them it had dropout."""

CARD = replace(
    image_card(
        "laion_aesthetic",
        (None, None),
        parameters=304_894_177,
        licence="Apache-2.0 (head), MIT (CLIP)",
        source="christophschuhmann/improved-aesthetic-predictor, openai/clip-vit-large-patch14",
        reads_prompt=False,
    ),
    dimensions={"aesthetic": (None, None)},
)


class AestheticHead(nn.Module):
    """Linear layers one after the other; the state dict has the published key names."""

    def __init__(self, widths: Sequence[int]) -> None:
        """``widths``: of the input and of each layer's output; published are 768, 1024, 128, 64, 16, 1."""
        super().__init__()
        assert len(widths) == len(_LAYERS) + 1, widths
        self.layers = nn.ModuleDict(
            {
                str(place): nn.Linear(width, after)
                for place, width, after in zip(_LAYERS, widths, widths[1:], strict=False)
            }
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return scores [B] of normalised features [B, D]."""
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(1)


class AestheticNetwork(nn.Module):
    """The image tower and the head, which is kept and applied in float32."""

    def __init__(self, clip: CLIPVisionModelWithProjection, mlp: AestheticHead) -> None:
        super().__init__()
        self.clip, self.mlp = clip, mlp

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return scores, float32 [B], of pixels [B, 3, N, N]."""
        return self.mlp(F.normalize(self.clip(pixel_values).image_embeds.float(), dim=1))


class LaionAesthetic(ClipScorer):
    """The predictor as a scorer of images."""

    name = NAME
    dimensions = tuple(CARD.dimensions)
    reads_prompt = False

    def __init__(self, network: AestheticNetwork, preprocess: ImagePreprocessor) -> None:
        super().__init__(network, preprocess)
        self.network: AestheticNetwork

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        preprocessing: str = "clip",
    ) -> LaionAesthetic:
        """Load a local folder: config.json and weights of the CLIP, and the head (.safetensors first, or .pth).

        ``dtype`` is the image tower's. The CLIP's text tower is left out. ``preprocessing``: a name of
        ``clip.CONVENTIONS``. Nothing is downloaded. Raise FileNotFoundError for a missing file, ValueError for
        files of another model.
        """
        folder = Path(folder)
        fields = read_config(folder, "clip", REMEDY)
        config = parse_config(CLIPConfig, fields, folder, REMEDY).vision_config
        config.projection_dim = fields.get("projection_dim") or config.projection_dim
        preprocess = ImagePreprocessor.named(preprocessing, config.image_size)
        clip = build(lambda: CLIPVisionModelWithProjection(config), folder / CONFIG, "CLIP", REMEDY)
        load_clip(
            clip,
            read_weights(folder, REMEDY),
            where=folder,
            model="CLIP",
            remedy=REMEDY,
            dtype=dtype,
            device=device,
            unused=("text_model.", "text_projection.", "logit_scale"),
        )
        head = read_head(folder, config.projection_dim, device)
        return cls(AestheticNetwork(clip, head), preprocess)

    def _run(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score the pixels; the prompts are not read."""
        return self.network(pixel_values.to(self.network.clip.device))


def read_head(folder: Path, features: int, device: torch.device | str = "cpu") -> AestheticHead:
    """Read the published head for features [B, ``features``], float32; raise what ``from_pretrained`` does.

    The repository's other file, of a head with ReLUs between other layers, is refused.
    """
    path = find_file(folder, [f"{HEAD}.safetensors", f"{HEAD}.pth"], REMEDY)
    weights = read_file(path)
    with torch.device("meta"):
        head = AestheticHead([features, *_widths(weights)])
    load_strict(head, weights, where=path, model=NAME, remedy=REMEDY, dtype=torch.float32, device=device)
    return head


def _widths(weights: Mapping[str, Tensor]) -> list[int]:
    """Return how many outputs each layer has; as published where a bias is missing, for the loader to name it."""
    published = (1024, 128, 64, 16, 1)
    biases = [weights.get(f"layers.{place}.bias") for place in _LAYERS]
    return [default if bias is None else len(bias) for bias, default in zip(biases, published, strict=True)]
