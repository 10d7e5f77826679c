"""ViCLIP: how well a video fits its prompt.

The model (OpenGVLab/InternVideo, Data/InternVid; arXiv 2307.06942) is a CLIP whose ViT attends over the patches of
eight frames jointly; the score is the cosine of video and text, as T2V-Turbo (arXiv 2405.18750) is rewarded with.
T2V-Turbo crops its frames, and picks the first of them, at random at every call. Here the crop is the middle and
the first frame the video's, so that a score is reproducible; ``score_pixels`` with a generator draws both.

Letters: B videos or texts, F frames of a video, T frames that are scored (8), S side of the squares, L text tokens, D
channels of a tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vpo_engine.rewards.card import RewardCard
from vpo_engine.rewards.clip import ClipTokenizer, encode_once, paired_cosine
from vpo_engine.rewards.frames import (
    batches,
    check_enough_frames,
    check_finite,
    check_prompts,
    check_video_pixels,
    check_videos,
)
from vpo_engine.rewards.imagenet import square_clips
from vpo_engine.rewards.loading import find_file, local_folder, read_under
from vpo_engine.rewards.open_clip import Transformer
from vpo_engine.rewards.refusals import refusal
from vpo_engine.rewards.videos import Videos
from vpo_engine.weights import load_strict

NAME = "ViCLIP"
REMEDY = (
    "ViCLIP needs a local folder with ViClip-InternVid-10M-FLT.pth and bpe_simple_vocab_16e6.txt.gz of "
    "OpenGVLab/ViCLIP"
)
FILES = ("ViClip-InternVid-10M-FLT.safetensors", "model.safetensors", "ViClip-InternVid-10M-FLT.pth")

CARD = RewardCard(
    name="viclip",
    dimensions={"viclip": (-1.0, 1.0)},
    frames="8 at equal steps from the first",
    resolution="short side 224, centre crop",
    reads_prompt=True,
    differentiable=True,
    parameters=427_590_145,
    licence="code Apache-2.0; for the weights see their page",
    source="OpenGVLab/ViCLIP",
)


@dataclass(frozen=True, kw_only=True)
class ViCLIPShape:
    """Sizes of a ViCLIP; the defaults are ViCLIP-L's. Its checkpoints do not hold them."""

    embed_dim: int = 768
    image_size: int = 224
    patch_size: int = 14
    num_frames: int = 8
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    context_length: int = 32
    vocab_size: int = 49408
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class VisionEncoder(nn.Module):
    def __init__(self, shape: ViCLIPShape) -> None:
        super().__init__()
        width, kernel = shape.vision_width, (1, shape.patch_size, shape.patch_size)
        places = (shape.image_size // shape.patch_size) ** 2 + 1
        self.conv1 = nn.Conv3d(3, width, kernel, kernel, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(places, width))
        self.temporal_positional_embedding = nn.Parameter(torch.empty(1, shape.num_frames, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, shape.vision_layers, shape.vision_heads, QuickGELU)
        self.proj = nn.Parameter(torch.empty(width, shape.embed_dim))

    def forward(self, clips: Tensor) -> Tensor:
        """Return features [B, embed_dim] of normalised clips [B, T, 3, S, S]; T is num_frames, or 1 for images.

        The class token has no place in time; an image has the mean of all.
        """
        patches = self.conv1(clips.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)  # [B, T, places - 1, D]
        times: Tensor = self.temporal_positional_embedding
        if patches.shape[1] == 1:
            times = times.mean(1, keepdim=True)
        patches = patches + self.positional_embedding[1:] + times.unsqueeze(2)
        start = (self.class_embedding + self.positional_embedding[0]).expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([start, patches.flatten(1, 2)], dim=1))
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class TextEncoder(nn.Module):
    def __init__(self, shape: ViCLIPShape) -> None:
        super().__init__()
        width = shape.text_width
        self.token_embedding = nn.Embedding(shape.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(shape.context_length, width))
        self.transformer = Transformer(width, shape.text_layers, shape.text_heads, QuickGELU)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, shape.embed_dim))

    def forward(self, ids: Tensor) -> Tensor:
        """Return features [B, embed_dim] of ids [B, L]: those at the highest id, the end token."""
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, later))
        return x[torch.arange(len(ids), device=ids.device), ids.argmax(1)] @ self.text_projection


class ViCLIPNetwork(nn.Module):
    """The two encoders; the state dict has the published key names. ``temp`` is of the training loss only."""

    def __init__(self, shape: ViCLIPShape) -> None:
        super().__init__()
        self.shape = shape
        self.vision_encoder = VisionEncoder(shape)
        self.text_encoder = TextEncoder(shape)
        self.temp = nn.Parameter(torch.empty(()))


def frame_indices(num_frames: int, count: int, generator: torch.Generator | None = None) -> list[int]:
    """Return ``count`` frames ``num_frames // count`` apart, from frame 0 or a first one that ``generator`` draws.

    Raise ValueError for fewer frames than ``count``.
    """
    check_enough_frames(num_frames, count, NAME)
    step = num_frames // count
    first = 0 if generator is None else int(torch.randint(step, (), generator=generator))
    return [first + step * index for index in range(count)]


class ViCLIP:
    """ViCLIP as a ``Reward``. Its weights take no gradient; ``score_pixels`` passes one to the pixels."""

    dimensions = tuple(CARD.dimensions)

    def __init__(self, network: ViCLIPNetwork, tokenizer: ClipTokenizer, *, batch_size: int = 8) -> None:
        """``batch_size``: videos per forward."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.network = network.eval().requires_grad_(False)
        self.tokenizer, self.batch_size = tokenizer, batch_size

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        batch_size: int = 8,
        shape: ViCLIPShape | None = None,
    ) -> ViCLIP:
        """Load a local folder with one of FILES and bpe_simple_vocab_16e6.txt.gz (or tokenizer.json).

        ``dtype`` is the encoders'; cosines are float32. ``shape``: of models of another size than ViCLIP-L. Nothing
        is downloaded. Raise FileNotFoundError for a missing file, ValueError for files of another model.
        """
        shape = shape or ViCLIPShape()
        folder = local_folder(folder, REMEDY)
        tokenizer = ClipTokenizer.from_folder(folder, REMEDY, length=shape.context_length, pad=0, clean=True)
        tokenizer.check_rows(shape.vocab_size, folder, REMEDY)
        path = find_file(folder, FILES, REMEDY)
        with torch.device("meta"):
            network = ViCLIPNetwork(shape)
        weights = read_under(path, "model", REMEDY)
        load_strict(network, weights, where=path, model=NAME, remedy=REMEDY, dtype=dtype, device=device)
        return cls(network, tokenizer, batch_size=batch_size)

    def refuse_prompt(self, prompt: str) -> str | None:
        """Return why there is no score for this prompt: it has no text, or a special token of the tokenizer in it."""
        return refusal(self._check_prompt, prompt)

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why videos of this size, in frames and pixels, get no score, if there is a reason."""
        return refusal(frame_indices, frames, self.network.shape.num_frames)

    def _check_prompt(self, prompt: str) -> None:
        check_prompts([prompt], NAME)
        self.tokenizer.text_of(prompt)

    @torch.no_grad()
    def score(self, videos: Videos, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score uint8 videos [B, F, H, W, 3] and B prompts; return {"viclip": float32 [B]}, on the CPU.

        Deterministic. Raise ValueError for a wrong shape or type, for fewer than 8 frames, for a prompt without
        text or with a special token of the tokenizer in it, and for a score that is not finite.
        """
        check_videos(videos, prompts)
        check_prompts(prompts, NAME)
        indices = frame_indices(videos.shape[1], self.network.shape.num_frames)
        parts = []
        for rows in batches(len(prompts), self.batch_size):
            frames = videos[rows, indices].to(self.network.temp.device).permute(0, 1, 4, 2, 3).float() / 255
            parts.append(self.scores(self.preprocess(frames), prompts[rows]).cpu())
        scores = torch.cat(parts)
        check_finite(scores, prompts, NAME)
        return {self.dimensions[0]: scores}

    def score_pixels(
        self, videos: Tensor, prompts: Sequence[str], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Score float videos [B, F, 3, H, W] in 0..1.

        Return {"viclip": float32 [B]} on the network's device, with gradients.

        For uint8 levels / 255 it equals ``score``, unless ``generator`` (on the CPU) draws the first frame and the
        crop, once per call, as T2V-Turbo does in training. Errors are those of ``score``.
        """
        check_video_pixels(videos, prompts)
        check_prompts(prompts, NAME)
        frames = videos[:, frame_indices(videos.shape[1], self.network.shape.num_frames, generator)]
        clips = self.preprocess(frames.to(self.network.temp.device), generator)
        rows = batches(len(prompts), self.batch_size)
        scores = torch.cat([self.scores(clips[part], prompts[part]) for part in rows])
        check_finite(scores, prompts, NAME)
        return {self.dimensions[0]: scores}

    def preprocess(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Turn frames [B, T, 3, H, W] in 0..1 into clips [B, T, 3, S, S]: resized, cropped, normalised."""
        return square_clips(frames, self.network.shape.image_size, "bicubic", generator)

    def scores(self, clips: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return cosines, float32 [B], of ``preprocess``ed clips [B, T, 3, S, S] with B prompts, with gradients."""
        features = self.network.vision_encoder(clips.to(self.network.temp))
        return paired_cosine(features, encode_once(prompts, self._encode))

    def _encode(self, texts: list[str]) -> Tensor:
        """Return text features [len(texts), embed_dim]."""
        return self.network.text_encoder(self.tokenizer(texts).to(self.network.temp.device))
