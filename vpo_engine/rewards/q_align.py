"""Q-Align / OneAlign in video mode: technical quality and aesthetics of a video, whatever its prompt.

The model (Q-Future/Q-Align, arXiv 2312.17090; weights: q-future/one-align) is asked how it would rate the video, and
the five levels it was taught to answer with are weighed by their probabilities. Frames are padded to squares and
resized; all stand in one sequence. Scores are 0..1 as in the authors' scorer.py; their ``AutoModel.score`` gives
1 + 4 times as much, for a question that ends in other words (``swapped_words``).

Published is one frame a second. Of OnlineVPO's clips that is next to nothing: 34 frames at 24 fps give one frame, 51
give two, and 16 none at all. ``frames`` sets a number instead, evenly spread.

Letters: B videos, F frames of a video, f frames that are scored, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vpo_engine.foreign_settings import check_settings
from vpo_engine.rewards.card import RewardCard
from vpo_engine.rewards.frames import (
    batches,
    by_dimension,
    check_video_pixels,
    check_videos,
    counted_frames,
    spread_frames,
)
from vpo_engine.rewards.loading import CONFIG, build, read_json, read_plain_tokenizer, read_weights
from vpo_engine.rewards.mplug_owl2 import MplugOwl2
from vpo_engine.rewards.mplug_owl2_config import MplugOwl2Config
from vpo_engine.rewards.refusals import refusal
from vpo_engine.rewards.videos import Videos, frame_rate
from vpo_engine.weights import load_strict

DIMENSIONS = ("quality", "aesthetics")
CARD = RewardCard(
    name="q_align",
    dimensions=dict.fromkeys(DIMENSIONS, (0.0, 1.0)),
    frames="one a second, or a number evenly spread",
    resolution="448 x 448, padded to a square",
    reads_prompt=False,
    differentiable=True,
    parameters=8_204_550_144,
    licence="S-Lab License 1.0 (non-commercial)",
    source="q-future/one-align",
)
LEVELS = {"excellent": 1.0, "good": 0.75, "fair": 0.5, "poor": 0.25, "bad": 0.0}
"""The answers, of which only the first token is read, and the score of each."""
IMAGE = "<|image|>"
REMEDY = "Q-Align needs a whole local copy of q-future/one-align"


def question(dimension: str, medium: str = "video", *, swapped_words: bool = False) -> str:
    """Return the model's question, with ``IMAGE`` for all the frames (scorer.py; ``AutoModel.score`` swaps two words).

    ``medium``: "video" or "image". ``swapped_words``: end in "The video of the quality is", as ``AutoModel.score``
    does by mistake, not in the words of the training.
    """
    first, second = (medium, dimension) if swapped_words else (dimension, medium)
    return (
        f"USER: How would you rate the {dimension} of this {medium}?\n{IMAGE}\n"
        f"ASSISTANT: The {first} of the {second} is"
    )


def frames_of_seconds(num_frames: int, fps: float) -> list[int]:
    """Return the numbers of the first frame of each whole second (scorer.py); refuse a video shorter than one."""
    indices = [int(fps * second) for second in range(int(num_frames / fps))]
    if not indices:
        raise ValueError(
            f"videos have {counted_frames(num_frames)}, less than a second at {fps:g} fps, and Q-Align looks at one "
            "frame a second; give longer videos, or in training set reward.frames"
        )
    return indices


@dataclass(frozen=True)
class SquareFrames:
    """Frames padded to squares about their middle with the mean colour, resized to S x S, normalised."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def colour(self) -> tuple[int, ...]:
        """Return the colour of the padding, levels 0..255, rounded down."""
        return tuple(int(255 * channel) for channel in self.mean)

    def __call__(self, frames: Tensor) -> Tensor:
        """Turn uint8 [n, H, W, 3] on the CPU into float32 [n, 3, S, S], by PIL's bicubic resize as the authors do."""
        count, height, width, _ = frames.shape
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        squares = torch.tensor(self.colour, dtype=torch.uint8).repeat(count, side, side, 1)
        squares[:, top : top + height, left : left + width] = frames
        resized = [
            np.asarray(Image.fromarray(square).resize((self.size, self.size), Image.Resampling.BICUBIC))
            for square in squares.numpy()
        ]
        return self._normalise(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255)

    def of_pixels(self, frames: Tensor) -> Tensor:
        """Turn float [n, 3, H, W] in 0..1 into [n, 3, S, S], differentiably, within a rounded level of PIL's result."""
        height, width = frames.shape[2:]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        colour = frames.new_tensor(self.colour).div(255).view(3, 1, 1)
        padding = (left, side - width - left, top, side - height - top)
        squares = F.pad(frames - colour, padding) + colour
        resized = F.interpolate(squares, size=(self.size, self.size), mode="bicubic", antialias=True)
        return self._normalise(resized.clamp(0, 1))

    def _normalise(self, pixels: Tensor) -> Tensor:
        mean, std = (pixels.new_tensor(channel).view(3, 1, 1) for channel in (self.mean, self.std))
        return (pixels - mean) / std


class QAlign:
    """Q-Align as a ``Reward``. Its weights take no gradient; ``score_pixels`` passes one to the pixels."""

    dimensions = DIMENSIONS

    def __init__(
        self,
        network: MplugOwl2,
        encode: Callable[[str], list[int]],
        bos: int,
        processor: SquareFrames,
        *,
        fps: float = 24.0,
        frames: int | None = None,
        swapped_words: bool = False,
        batch_size: int = 4,
    ) -> None:
        """``encode`` turns text into ids and adds nothing; ``bos`` is the start's id. See ``from_pretrained`` for the
        rest."""
        for name, value in (("fps", fps), ("frames", frames), ("batch_size", batch_size)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}, expected a number above 0")
        self.network = network.eval().requires_grad_(False)
        self.processor, self.fps, self.frames, self.batch_size = processor, fps, frames, batch_size
        self._encode, self._bos = encode, bos
        self._levels = [encode(level)[0] for level in LEVELS]
        if len(set(self._levels)) < len(LEVELS):
            raise ValueError(f"the tokenizer begins {', '.join(LEVELS)} with ids {self._levels}; {REMEDY}")
        self.questions = {name: question(name, swapped_words=swapped_words) for name in DIMENSIONS}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        fps: float = 24.0,
        frames: int | None = None,
        swapped_words: bool = False,
        batch_size: int = 4,
    ) -> QAlign:
        """Load a local folder in the published layout; nothing is downloaded.

        Read are config.json, preprocessor_config.json, tokenizer.model (or tokenizer.json) and the weights, shards of
        pytorch_model.bin or of model.safetensors. ``fps``: of the videos, for one frame a second; ``frames``: that
        many instead, evenly spread. ``swapped_words``: ask as ``AutoModel.score`` does. ``batch_size``: videos per
        forward. Raise FileNotFoundError for a missing file, ValueError for files of another model.
        """
        fields = read_json(path, "config.json", REMEDY)
        config = MplugOwl2Config.from_dict(fields, Path(path) / CONFIG)
        processor = _read_processor(path, config.image_size)
        encode = _read_tokenizer(Path(path), config.vocabulary)
        weights = {
            key: weight
            for key, weight in read_weights(path, REMEDY).items()
            if not key.endswith("rotary_emb.inv_freq")  # old versions of transformers stored what is computed
        }
        network = build(lambda: MplugOwl2(config), Path(path) / CONFIG, "Q-Align", REMEDY)
        load_strict(network, weights, where=path, model="Q-Align", remedy=REMEDY, dtype=dtype, device=device)
        return cls(
            network,
            encode,
            fields.get("bos_token_id", 1),
            processor,
            fps=fps,
            frames=frames,
            swapped_words=swapped_words,
            batch_size=batch_size,
        )

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why videos of this size, in frames and pixels, get no score, if there is a reason."""
        return refusal(self.frame_indices, frames)

    @torch.no_grad()
    def score(self, videos: Videos, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score uint8 videos [B, F, H, W, 3] and B prompts, which are not read.

        Return {dimension: float32 [B]} on the CPU.

        Raise ValueError for a wrong shape or type, for videos shorter than a second where ``frames`` is None, and
        for a score that is not finite. With ``frames`` set, a single frame is scored as the published code scores
        it.
        """
        check_videos(videos, prompts)
        indices = self._indices(videos.shape[1], frame_rate(videos, self.fps))
        parts = []
        for rows in batches(len(prompts), self.batch_size):
            frames = videos[rows, indices].cpu()
            pixels = self.processor(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
            parts.append(self._scores(pixels).cpu())
        return by_dimension(torch.cat(parts), DIMENSIONS, prompts, "Q-Align")

    def score_pixels(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score float videos [B, F, 3, H, W] in 0..1; return {dimension: float32 [B]} on the device, with gradients.

        All in one forward. Differs from ``score`` by the rounding of the resized frames to 256 levels; errors are the
        same.
        """
        check_video_pixels(videos, prompts)
        frames = videos[:, self.frame_indices(videos.shape[1])].to(self.network.lm_head.weight.device)
        seen = self.processor.of_pixels(frames.flatten(0, 1).float()).unflatten(0, frames.shape[:2])
        return by_dimension(self._scores(seen), DIMENSIONS, prompts, "Q-Align")

    def frame_indices(self, num_frames: int) -> list[int]:
        """Return the numbers of the frames of a video that are scored."""
        return self._indices(num_frames, self.fps)

    def _indices(self, num_frames: int, fps: float) -> list[int]:
        if self.frames is None:
            return frames_of_seconds(num_frames, fps)
        return spread_frames(num_frames, self.frames)

    def level_logits(self, seen: Tensor, text: str) -> Tensor:
        """Return the logits of the ``LEVELS``, float32 [B, 5], for the frames' vectors [B, f, n, D] and a question."""
        before, after = self.ids(text)
        levels = torch.tensor(self._levels, device=seen.device)
        return self.network.next_token_logits(
            before.to(seen.device), seen.flatten(1, 2), after.to(seen.device), levels
        )

    def see(self, pixels: Tensor) -> Tensor:
        """Turn frames of the processor, [B, f, 3, S, S], into the vectors that stand for them, [B, f, n, D]."""
        device = self.network.lm_head.weight.device
        return self.network.see(pixels.flatten(0, 1).to(device)).unflatten(0, pixels.shape[:2])

    def ids(self, text: str) -> tuple[Tensor, Tensor]:
        """Return the ids, int64 [L], of a question before and after its ``IMAGE``, with the start in front.

        The two sides are tokenized apart, so that the second begins with SentencePiece's word mark too.
        """
        before, after = text.split(IMAGE)
        return torch.tensor([self._bos, *self._encode(before)]), torch.tensor(self._encode(after))

    def _scores(self, pixels: Tensor) -> Tensor:
        """Return the score of each of the DIMENSIONS, [B, D]."""
        seen = self.see(pixels)
        worth = torch.tensor(list(LEVELS.values()), device=seen.device)
        answers = [self.level_logits(seen, self.questions[name]).softmax(-1) for name in DIMENSIONS]
        return torch.stack(answers, dim=1) @ worth


@dataclass(frozen=True)
class _Processor:
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


def _read_processor(folder: str | Path, size: int) -> SquareFrames:
    """Read preprocessor_config.json, which has to agree with the network's image size."""
    name = "preprocessor_config.json"
    fields = read_json(folder, name, REMEDY)
    check_settings(fields, _Processor, Path(folder) / name, REMEDY)
    sides = fields.get("crop_size")
    found = list(sides.values()) if isinstance(sides, Mapping) else [sides]
    if not found or any(side != size for side in found):
        raise ValueError(f"{Path(folder) / name} has crop_size {sides}, but the model sees {size}; {REMEDY}")
    channels: list[Any] = [fields.get(key) for key in ("image_mean", "image_std")]
    if not all(isinstance(value, list) and len(value) == 3 for value in channels):
        raise ValueError(f"{Path(folder) / name} lacks image_mean or image_std of three channels; {REMEDY}")
    return SquareFrames(size, tuple(channels[0]), tuple(channels[1]))


def _read_tokenizer(folder: Path, vocabulary: int) -> Callable[[str], list[int]]:
    """Read LLaMA's tokenizer exactly as its file has it: transformers' classes differ in what they put in front."""
    encode: Callable[[str], list[int]]
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        try:
            pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except Exception as error:  # a damaged file can raise nearly anything
            raise ValueError(f"{folder / 'tokenizer.model'} cannot be read ({error}); {REMEDY}") from error
        size, encode = pieces.get_piece_size(), pieces.encode
    elif (folder / "tokenizer.json").is_file():
        tokenizer = read_plain_tokenizer(folder / "tokenizer.json", REMEDY)
        size = tokenizer.get_vocab_size()

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids
    else:
        raise FileNotFoundError(f"no tokenizer.model in {folder}; {REMEDY}")
    if size > vocabulary:
        raise ValueError(f"{folder} has a tokenizer of {size} for {vocabulary} embeddings; {REMEDY}")
    return encode
