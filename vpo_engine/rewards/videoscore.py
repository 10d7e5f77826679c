"""VideoScore v1 and v1.1: five regressed quality dimensions of a generated video and its prompt.

The model (TIGER-AI-Lab/VideoScore, arXiv 2406.15252) is Idefics2 with a linear head of five outputs on the
last token. Its trunk is transformers' ``Idefics2Model``; sampling of frames, resizing, the question and the
head are here. Raw outputs are the scores: trained on 1..4, neither clamped nor squashed. They depend on the
frames and the prompt only, never on fps. Checkpoints: TIGER-Lab/VideoScore (16 frames) and
TIGER-Lab/VideoScore-v1.1 (48).

Letters: B videos, F frames of a video, f frames that are scored, L text tokens, D text channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Idefics2Config, Idefics2Model

from vpo_engine.foreign_settings import check_settings
from vpo_engine.rewards.card import RewardCard
from vpo_engine.rewards.frames import (
    batches,
    by_dimension,
    check_moving,
    check_prompt,
    check_prompts,
    check_special_tokens,
    check_video_pixels,
    check_videos,
)
from vpo_engine.rewards.loading import (
    CONFIG,
    build,
    parse_config,
    read_config,
    read_json,
    read_tokenizer,
    special_tokens,
)
from vpo_engine.rewards.quantize import Bits, check_bits, quantise
from vpo_engine.rewards.refusals import refusal
from vpo_engine.rewards.videos import Videos
from vpo_engine.weights import WHOLE, check_weights, load_strict, read_files, weight_files

DIMENSIONS = (
    "visual_quality",
    "temporal_consistency",
    "dynamic_degree",
    "text_alignment",
    "factual_consistency",
)
"""The dimensions, in the order of the model's outputs."""

QUESTION = (
    "\nSuppose you are an expert in judging and evaluating the quality of AI-generated videos,\n"
    "please watch the following frames of a given video and see the text prompt for generating the video,\n"
    "then give scores from 5 different dimensions:\n"
    "(1) visual quality: the quality of the video in terms of clearness, resolution, brightness, and color\n"
    "(2) temporal consistency, both the consistency of objects or humans and the smoothness of motion"
    " or movements\n"
    "(3) dynamic degree, the degree of dynamic changes\n"
    "(4) text-to-video alignment, the alignment between the text prompt and the video content\n"
    "(5) factual consistency, the consistency of the video content with the common-sense and factual"
    " knowledge\n"
    "\nfor each dimension, output a float number from 1.0 to 4.0,\n"
    "the higher the number is, the better the video performs in that sub-score, \n"
    "the lowest 1.0 means Bad, the highest 4.0 means Perfect/Real (the video is like a real video)\n"
    "Here is an output example:\n"
    "visual quality: 3.2\n"
    "temporal consistency: 2.7\n"
    "dynamic degree: 4.0\n"
    "text-to-video alignment: 2.3\n"
    "factual consistency: 1.8\n"
    '\nFor this video, the text prompt is "{text_prompt}",\n'
    "all the frames of video are as follows:\n"
)
"""The text the model was trained with, byte for byte (VideoScore, examples/run_videoscore.py)."""

CARD = RewardCard(
    name="videoscore",
    dimensions=dict.fromkeys(DIMENSIONS, (None, None)),
    frames="16 at equal steps from the first",
    resolution="own, each side between 378 and 980",
    reads_prompt=True,
    differentiable=True,
    parameters=8_270_000_000,
    licence="Apache-2.0; code MIT",
    source="TIGER-Lab/VideoScore",
)
CARD_V1_1 = replace(
    CARD,
    name="videoscore_v1_1",
    frames="48 at equal steps from the first",
    source="TIGER-Lab/VideoScore-v1.1",
)

IMAGE, IMAGE_BOUNDARY = "<image>", "<fake_token_around_image>"
NAME = "VideoScore"
REMEDY = "VideoScore needs a whole local copy of TIGER-Lab/VideoScore or TIGER-Lab/VideoScore-v1.1"


def frame_indices(num_frames: int, max_frames: int) -> list[int]:
    """Return which of ``num_frames`` frames are scored: all, or ``max_frames`` at equal steps from 0, rounded down.

    The steps are ``num_frames / max_frames``, so the last frame is left out when there are more than
    ``max_frames`` (run_videoscore.py; the authors' benchmark script samples differently).
    """
    if num_frames <= max_frames:
        return list(range(num_frames))
    step = num_frames / max_frames
    return [int(index * step) for index in range(max_frames)]


def question(prompt: str, num_frames: int) -> str:
    """Return the model's whole input text with one image placeholder per frame, before placeholders are expanded."""
    return QUESTION.format(text_prompt=prompt) + f"{IMAGE} " * num_frames


@dataclass(frozen=True)
class FrameProcessor:
    """Idefics2's resize and normalisation, equal to transformers' PIL processor without image splitting."""

    shortest_edge: int
    longest_edge: int

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) after the resize.

        The longer side is capped at ``longest_edge`` with the aspect kept; then each side is raised to
        ``shortest_edge`` on its own, so that small clips lose their aspect ratio (240 x 426 -> 378 x 426).
        """
        aspect = width / height
        if width >= height and width > self.longest_edge:
            height, width = int(self.longest_edge / aspect), self.longest_edge
        elif height > width and height > self.longest_edge:
            height, width = self.longest_edge, int(self.longest_edge * aspect)
        return max(height, self.shortest_edge), max(width, self.shortest_edge)

    def __call__(self, frames: Tensor) -> Tensor:
        """Turn RGB frames, uint8 [f, H, W, 3] on the CPU, into float32 [f, 3, h, w] in -1..1."""
        height, width = self.output_size(frames.shape[1], frames.shape[2])
        resized = [
            np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
            for frame in frames.contiguous().numpy()
        ]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()
        return pixels.float().div_(255).sub_(0.5).div_(0.5)

    def pixels(self, frames: Tensor) -> Tensor:
        """Turn float frames [f, 3, H, W] in 0..1 into [f, 3, h, w] in -1..1 on their device, with gradients.

        PIL's rounding to bytes after each of its two passes is left out: of frames of bytes the result differs from
        ``__call__`` by no more than a level, 2 / 255, because the weights of a bilinear resize add up to 1.
        """
        size = self.output_size(frames.shape[2], frames.shape[3])
        if size != tuple(frames.shape[2:]):
            frames = F.interpolate(frames, size, mode="bilinear", antialias=True, align_corners=False)
        return (frames - 0.5) / 0.5


class VideoScoreNetwork(nn.Module):
    """``Idefics2Model`` and the head; the state dict has the published key names.

    The head is kept and applied in float32 whatever the trunk's type: bfloat16 outputs between 2 and 4 come
    in steps of 1/64, and candidates of one prompt would often tie.
    """

    def __init__(self, config: Idefics2Config) -> None:
        super().__init__()
        self.model = Idefics2Model(config)
        self.score = nn.Linear(config.text_config.hidden_size, len(DIMENSIONS), dtype=torch.float32)

    def forward(self, input_ids: Tensor, lengths: Tensor, pixel_values: Tensor) -> Tensor:
        """Return float32 [B, 5] of ids int64 [B, L], right-padded after ``lengths`` [B], and pixels [B, f, 3, h, w].

        Every frame counts, a flat grey one too; ``Idefics2Model.forward`` takes a frame of normalised zeros
        for padding and drops it. Pixels that do not fill a patch are left out at the right and at the bottom.
        """
        trunk = self.model
        patch = trunk.config.vision_config.patch_size
        images = pixel_values.flatten(0, 1).to(trunk.dtype)
        rows, columns = images.shape[2] // patch, images.shape[3] // patch
        whole = torch.ones(len(images), rows, columns, dtype=torch.bool, device=images.device)
        seen = trunk.vision_model(pixel_values=images, patch_attention_mask=whole).last_hidden_state
        seen = trunk.connector(seen, attention_mask=whole.flatten(1))  # [B f, latents, D]
        embeddings = trunk.text_model.embed_tokens(input_ids)  # [B, L, D]
        places = input_ids == trunk.config.image_token_id
        assert int(places.sum()) == seen.shape[0] * seen.shape[1], (places.sum(), seen.shape)
        embeddings = embeddings.masked_scatter(places.unsqueeze(-1), seen.to(embeddings.dtype))
        mask = torch.arange(input_ids.shape[1], device=lengths.device) < lengths.unsqueeze(1)
        hidden = trunk.text_model(inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False)
        last = hidden.last_hidden_state[torch.arange(len(lengths), device=lengths.device), lengths - 1]
        return self.score(last.float())


class VideoScore:
    """VideoScore as a ``Reward``. Its weights take no gradient; ``score_pixels`` passes one to the pixels."""

    dimensions = DIMENSIONS

    def __init__(
        self,
        network: VideoScoreNetwork,
        tokenizer: Tokenizer,
        processor: FrameProcessor,
        *,
        max_frames: int = 16,
        batch_size: int = 4,
    ) -> None:
        """``max_frames``: 16 for VideoScore, 48 for v1.1. ``batch_size``: videos per forward."""
        for name, value in (("max_frames", max_frames), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.network = network.eval().requires_grad_(False)
        self.tokenizer, self.processor = tokenizer, processor
        self.max_frames, self.batch_size = max_frames, batch_size
        self._special = special_tokens(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        max_frames: int = 16,
        batch_size: int = 4,
        bits: Bits = 16,
    ) -> VideoScore:
        """Load a local folder in the published layout; nothing is downloaded.

        Read are config.json, preprocessor_config.json, tokenizer.json and model.safetensors, or the shards
        that model.safetensors.index.json names. ``dtype`` is the trunk's. ``bits`` 8 or 4 quantises the matrices of
        the language model and of the connector as they are read; the vision tower, in front of everything and a
        twentieth of the weights, the embeddings and the head stay as they are. Raise FileNotFoundError for a
        missing file, ValueError for files of another model.
        """
        check_bits(bits)
        folder = Path(folder)
        config = parse_config(Idefics2Config, read_config(folder, "idefics2", REMEDY), folder, REMEDY)
        processor = _read_processor(folder)
        tokenizer = _read_tokenizer(folder, config)
        network = _read_network(folder, config, dtype, torch.device(device), bits)
        return cls(network, tokenizer, processor, max_frames=max_frames, batch_size=batch_size)

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why videos of this size, in frames and pixels, get no score, if there is a reason."""
        return refusal(check_moving, frames, NAME)

    def refuse_prompt(self, prompt: str) -> str | None:
        """Return why there is no score for this prompt: it has no text, or a special token of the tokenizer in it."""
        return refusal(check_prompt, prompt, self._special, NAME)

    @torch.no_grad()
    def score(self, videos: Videos, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score uint8 videos [B, F, H, W, 3] and B prompts; return {dimension: float32 [B]}, on the CPU.

        Videos come at their own size. Deterministic. Raise ValueError for a wrong shape or type, for videos of one
        frame (which the authors' code scores, motion and all), for a prompt without text or with a special token
        of the tokenizer (such as "<image>") in it, and for a score that is not finite.
        """
        check_videos(videos, prompts)
        check_moving(videos.shape[1], NAME)
        check_prompts(prompts, NAME)
        indices = frame_indices(videos.shape[1], self.max_frames)
        parts = [
            self.logits(self._pixels(videos[rows, indices]), prompts[rows]).cpu()
            for rows in batches(len(prompts), self.batch_size)
        ]
        return by_dimension(torch.cat(parts), DIMENSIONS, prompts, NAME)

    def score_pixels(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score float videos [B, F, 3, H, W] in 0..1.

        Return {dimension: float32 [B]} on the network's device, with gradients. The scores are near those of ``score``,
        which rounds to bytes after resizing. Raise ValueError as ``score`` does.
        """
        check_video_pixels(videos, prompts)
        check_moving(videos.shape[1], NAME)
        check_prompts(prompts, NAME)
        frames = videos[:, frame_indices(videos.shape[1], self.max_frames)]
        pixels = self.processor.pixels(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        parts = [self.logits(pixels[rows], prompts[rows]) for rows in batches(len(prompts), self.batch_size)]
        return by_dimension(torch.cat(parts), DIMENSIONS, prompts, NAME)

    def preprocess(self, videos: Tensor) -> Tensor:
        """Return the frames of uint8 [B, F, H, W, 3] that are scored, float32 [B, f, 3, h, w] on the CPU."""
        return self._pixels(videos[:, frame_indices(videos.shape[1], self.max_frames)])

    def _pixels(self, frames: Tensor) -> Tensor:
        """Return chosen frames, uint8 [B, f, H, W, 3], as float32 [B, f, 3, h, w] on the CPU."""
        return self.processor(frames.cpu().flatten(0, 1)).unflatten(0, frames.shape[:2])

    def logits(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores, float32 [B, 5], of ``preprocess``ed pixels [B, f, 3, h, w], of one size, and B prompts.

        Differentiable in the pixels. Raise ValueError for a special token in a prompt.
        """
        device = self.network.score.weight.device
        ids = [self.encode(prompt, pixel_values.shape[1]) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in ids], device=device)
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        return self.network(padded, lengths, pixel_values.to(device))

    def encode(self, prompt: str, num_frames: int) -> Tensor:
        """Return the ids, int64 [L], of the question with every placeholder expanded and one start token in front."""
        check_special_tokens(prompt, self._special, NAME)
        config = self.network.model.config
        slots = IMAGE_BOUNDARY + IMAGE * config.perceiver_config.resampler_n_latents + IMAGE_BOUNDARY
        ids = self.tokenizer.encode(question(prompt, num_frames).replace(IMAGE, slots)).ids
        start = config.text_config.bos_token_id
        return torch.tensor(ids if ids[0] == start else [start, *ids])


@dataclass(frozen=True)
class _Edges:
    shortest_edge: int
    longest_edge: int


@dataclass(frozen=True)
class _Processor:
    size: _Edges


def _read_processor(folder: Path) -> FrameProcessor:
    name = "preprocessor_config.json"
    fields = read_json(folder, name, REMEDY)
    expected = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": int(Image.Resampling.BILINEAR)}
    for key, value in expected.items():
        if fields.get(key, value) != value:
            raise ValueError(f"{folder / name} has {key} {fields[key]}, expected {value}; {REMEDY}")
    check_settings(fields, _Processor, folder / name, REMEDY)
    size = fields.get("size", {})
    if not {"shortest_edge", "longest_edge"} <= set(size):
        raise ValueError(
            f"{folder / name} has size {size}, expected shortest_edge and longest_edge; {REMEDY}"
        )
    return FrameProcessor(size["shortest_edge"], size["longest_edge"])


def _read_tokenizer(folder: Path, config: Idefics2Config) -> Tokenizer:
    """Read the tokenizer exactly as tokenizer.json has it: transformers' Llama class loses the start token."""
    special = {IMAGE: config.image_token_id, IMAGE_BOUNDARY: None}
    return read_tokenizer(folder / "tokenizer.json", special, config.text_config.vocab_size, REMEDY)


def _read_network(
    folder: Path, config: Idefics2Config, dtype: torch.dtype, device: torch.device, bits: Bits
) -> VideoScoreNetwork:
    """Read the network straight onto the device: the trunk in ``dtype`` or in fewer bits, the head in float32."""
    if not (paths := weight_files(folder)):
        raise FileNotFoundError(f"no weight file {WHOLE[0]} in {folder}; {REMEDY}")
    weights = read_files(paths)
    network = build(lambda: VideoScoreNetwork(config), folder / CONFIG, NAME, REMEDY)
    errors: dict[str, Any] = {"where": folder, "model": NAME, "remedy": REMEDY}
    check_weights(network, weights, **errors)
    for key, layer in (_quantised_layers(network) if bits != 16 else {}).items():
        quantise(network, layer, weights.pop(key).to(device, dtype, copy=True), bits)
    load_strict(network, weights, dtype=dtype, device=device, float32=("score.",), **errors)
    rotary = network.model.text_model.rotary_emb  # its frequencies are computed, not stored
    network.model.text_model.rotary_emb = type(rotary)(config.text_config).to(device)
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    return network


def _quantised_layers(network: VideoScoreNetwork) -> dict[str, str]:
    """Return {name of a weight: name of its layer} of what is held in fewer bits."""
    return {
        f"{name}.weight": name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("model.text_model.", "model.connector."))
    }
