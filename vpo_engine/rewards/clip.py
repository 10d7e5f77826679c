"""The base of scorers built on CLIP: images and texts are turned into what a CLIP takes, and weights are loaded.

Public code prepares images for CLIP in ways that differ by more than the differences between candidates (0.5 to 0.8
of a normalised level between letterbox and crop), so each has a name here. Results equal torchvision's, which
need not be installed.

Letters: B images, H x W their size, N the side that the model takes, L text tokens.
"""

from __future__ import annotations

import gzip
import html
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar, Literal

import ftfy
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPTokenizer

from vpo_engine.rewards.frames import check_finite, check_image_pixels, check_images, check_prompts
from vpo_engine.rewards.refusals import refusal
from vpo_engine.weights import load_strict

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of RGB levels in 0..1, for every CLIP by OpenAI and by LAION."""

START, END = "<|startoftext|>", "<|endoftext|>"
_BPE = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2
"""The number of the file's merges that are in the vocabulary."""


@dataclass(frozen=True)
class Convention:
    """A way of bringing an image to N x N pixels.

    fit: what becomes of an aspect ratio other than 1. letterbox: the longer side is scaled to N, black around.
    crop: the shorter side is scaled to N, the middle is kept. squash: lost. short_side: the shorter side is scaled to
    N and nothing else is done, so that a model of N x N takes square images only.
    pil: bytes are resized by PIL, and rounded to bytes again, as in most public code; otherwise in float.
    hf_crop: an odd margin is split as transformers' processors split it, not as torchvision does.
    """

    fit: Literal["letterbox", "crop", "squash", "short_side"]
    mode: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = True
    pil: bool = False
    hf_crop: bool = False


CONVENTIONS = {
    "clip": Convention("crop", pil=True),
    "clip_hf": Convention("crop", pil=True, hf_crop=True),
    "clip_tensor": Convention("crop"),
    "hpsv2": Convention("letterbox"),
    "hpsv2_no_antialias": Convention("letterbox", antialias=False),
    "vader": Convention("squash", "bilinear"),
    "videox_fun": Convention("squash"),
    "instructvideo": Convention("short_side", "bilinear"),
}
"""clip: OpenAI's own, LAION aesthetic, ImageReward. clip_hf: transformers' processors, so PickScore and MPS.
clip_tensor: clip without PIL. hpsv2: the hpsv2 package under today's torchvision; hpsv2_no_antialias: under the one of
its time. vader, videox_fun (also T2V-Turbo), instructvideo: as those projects train with HPSv2 and PickScore."""


@dataclass(frozen=True)
class ImagePreprocessor:
    """Turns images into the normalised pixels of a CLIP that takes ``size`` x ``size``."""

    size: int
    convention: Convention

    @staticmethod
    def named(name: str, size: int) -> ImagePreprocessor:
        """Return the preprocessor of a name in CONVENTIONS. Raise ValueError for another name."""
        if name not in CONVENTIONS:
            raise ValueError(f"preprocessing is {name!r}, expected one of {', '.join(CONVENTIONS)}")
        return ImagePreprocessor(size, CONVENTIONS[name])

    def __call__(self, images: Tensor) -> Tensor:
        """Turn RGB bytes, uint8 [B, H, W, 3], into float32 [B, 3, N, N], as the public code does."""
        channels_first = images.permute(0, 3, 1, 2)
        if not self.convention.pil:
            return self.pixels(channels_first.float() / 255)
        height, width = self._resized(images.shape[1], images.shape[2])
        resample = Image.Resampling[self.convention.mode.upper()]
        resized = [
            np.asarray(Image.fromarray(image).resize((width, height), resample))
            for image in images.cpu().contiguous().numpy()
        ]
        bytes_ = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
        return self._normalise(self._fitted(bytes_).contiguous().float() / 255)

    def pixels(self, images: Tensor) -> Tensor:
        """Turn float images [B, 3, H, W] in 0..1 into float32 [B, 3, N, N] on their device, with gradients.

        float64 stays float64.
        PIL and its rounding to bytes are left out also where the convention has them, and nothing is clamped.
        """
        size = self._resized(images.shape[2], images.shape[3])
        images = images if images.dtype == torch.float64 else images.float()
        if size != tuple(images.shape[2:]):
            images = F.interpolate(
                images,
                size,
                mode=self.convention.mode,
                antialias=self.convention.antialias,
                align_corners=False,
            )
        return self._normalise(self._fitted(images))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of an image after the resize."""
        fit = self.convention.fit
        if fit == "squash":
            return self.size, self.size
        if fit == "letterbox":
            scale = self.size / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        short, long = min(height, width), max(height, width)
        long = int(self.size * long / short)
        return (self.size, long) if height <= width else (long, self.size)

    def _fitted(self, images: Tensor) -> Tensor:
        """Pad or crop resized images [B, 3, h, w] to the final size."""
        fit = self.convention.fit
        rows, columns = self.size - images.shape[2], self.size - images.shape[3]
        if fit == "letterbox":
            padding = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
            return F.pad(images, padding)
        if fit == "crop":
            top, left = self._margin(-rows), self._margin(-columns)
            return images[:, :, top : top + self.size, left : left + self.size]
        return images

    def _margin(self, excess: int) -> int:
        """Return how many pixels are cut off before what is kept."""
        return excess // 2 if self.convention.hf_crop else round(excess / 2)

    @staticmethod
    def _normalise(images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return (images - mean) / std


class ClipTokenizer:
    """Turns texts into CLIP's byte pairs between a start and an end token, padded to one length."""

    def __init__(
        self, tokenizer: Tokenizer, *, length: int = 77, pad: int | None = None, clean: bool = False
    ) -> None:
        """``pad`` is the id after the end token; without it the end token's own id is used, as transformers does.

        With ``clean``, first mend mis-decoded Unicode and HTML entities, as the tokenizers of OpenAI, open_clip,
        HPSv2 and ViCLIP do and transformers' does not.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
        if start is None or end is None:
            raise ValueError(f"the tokenizer has no {START} and {END}; expected a CLIP tokenizer")
        self.tokenizer, self.length, self.clean = tokenizer, length, clean
        self.start, self.end, self.pad = start, end, end if pad is None else pad

    @staticmethod
    def from_folder(
        folder: str | Path, remedy: str, *, length: int = 77, pad: int | None = None, clean: bool = False
    ) -> ClipTokenizer:
        """Read tokenizer.json (transformers) or bpe_simple_vocab_16e6.txt.gz (OpenAI, open_clip, hpsv2, ViCLIP).

        ``remedy``: the sentence that ends an error. Raise FileNotFoundError where both are missing, ValueError for
        a file that cannot be read or is no CLIP tokenizer.
        """
        folder = Path(folder)
        for name, read in (("tokenizer.json", _read_json_tokenizer), (_BPE, _read_bpe)):
            path = folder / name
            if path.is_file():
                try:
                    return ClipTokenizer(read(path), length=length, pad=pad, clean=clean)
                except Exception as error:  # tokenizers raises plain Exception
                    raise ValueError(f"{path} cannot be used ({error}); {remedy}") from error
        raise FileNotFoundError(f"no tokenizer.json or {_BPE} in {folder}; {remedy}")

    @staticmethod
    def of_config(folder: str | Path, config: CLIPConfig, remedy: str) -> ClipTokenizer:
        """Read the tokenizer of transformers' CLIP: texts of the model's length, padded with end tokens.

        Raise what ``from_folder`` and ``check_rows`` do, and ValueError for another end token than the model reads at.
        """
        text = config.text_config
        tokenizer = ClipTokenizer.from_folder(folder, remedy, length=text.max_position_embeddings)
        tokenizer.check_rows(text.vocab_size, folder, remedy)
        if text.eos_token_id not in (
            2,
            tokenizer.end,
        ):  # 2: configurations before 2023-07, read as the highest id
            raise ValueError(
                f"the tokenizer in {folder} ends texts with {tokenizer.end}, config.json with {text.eos_token_id}; "
                f"{remedy}"
            )
        return tokenizer

    def check_rows(self, rows: int, folder: str | Path, remedy: str) -> None:
        """Raise ValueError for more tokens than the model has embeddings."""
        if len(self) > rows:
            raise ValueError(
                f"the tokenizer in {folder} has {len(self)} tokens for {rows} embeddings; {remedy}"
            )

    def __len__(self) -> int:
        """Return how many embeddings a model needs for these tokens."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def text_of(self, prompt: str) -> str:
        """Return the text that is encoded. Raise ValueError for a prompt with a special token in it."""
        text = _cleaned(prompt) if self.clean else prompt
        for token in (START, END):
            if token in prompt.lower() or token in text.lower():
                raise ValueError(
                    f"prompt {prompt!r} contains {token!r}, which CLIP's tokenizer reads as a special token; "
                    "remove it from the prompt"
                )
        return text

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the ids of B prompts, int64 [B, L] on the CPU; what is too long is cut off in front of the end token.

        Raise ValueError for a prompt with a special token in it.
        """
        rows = torch.full((len(prompts), self.length), self.pad, dtype=torch.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            ids = self.tokenizer.encode(self.text_of(prompt), add_special_tokens=False).ids[: self.length - 2]
            row[: len(ids) + 2] = torch.tensor([self.start, *ids, self.end])
        return rows


def _cleaned(text: str) -> str:
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _read_json_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def _read_bpe(path: Path) -> Tokenizer:
    """Make the tokenizer of OpenAI's list of merges: bytes, bytes that end words, merges, start, end, in this order."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : _MERGES + 1] if line]
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    letters = [chr(code) for code in printable]
    letters += [
        chr(256 + place) for place in range(256 - len(printable))
    ]  # stand for the other bytes, in order
    tokens = chain(letters, (f"{letter}</w>" for letter in letters), map("".join, merges), (START, END))
    vocabulary = {token: place for place, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges).backend_tokenizer


def encode_once(prompts: Sequence[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
    """Return features [B, D] of B prompts.

    Each different text is encoded once: frames of a video share their prompt.
    """
    texts = list(dict.fromkeys(prompts))
    place = {text: index for index, text in enumerate(texts)}
    features = encode(texts)
    return features[torch.tensor([place[prompt] for prompt in prompts], device=features.device)]


def paired_cosine(images: Tensor, texts: Tensor) -> Tensor:
    """Return the cosine of each row [B, D] with its partner, in float32, [B]."""
    return F.cosine_similarity(images.float(), texts.float(), dim=1)


def load_clip(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    where: str | Path,
    model: str,
    remedy: str,
    dtype: torch.dtype,
    device: torch.device | str,
    float32: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
) -> None:
    """Load weights into a network from the meta device that has a CLIP or a BLIP of transformers in it.

    Left out are the tables 0, 1, 2, ... that transformers saved until 2023, and keys that begin with one of ``unused``;
    such tables are made anew. Otherwise as ``load_strict``.
    """
    kept = {
        key: weight
        for key, weight in weights.items()
        if not key.endswith("embeddings.position_ids") and not key.startswith(unused)
    }
    load_strict(
        network, kept, where=where, model=model, remedy=remedy, dtype=dtype, device=device, float32=float32
    )
    for module in network.modules():
        ids = dict(module.named_buffers(recurse=False)).get("position_ids")
        if ids is not None:
            module.register_buffer(
                "position_ids", torch.arange(ids.shape[-1], device=device).expand(1, -1), persistent=False
            )


class ClipScorer(ABC):
    """The base of scorers of images that are built like CLIP, as ``ImageScorer``s.

    A subclass says what its network makes of pixels and prompts; here images are prepared, and prompts and scores
    checked. The network's weights take no gradient; ``score_image_pixels`` passes one to the pixels.
    """

    name: ClassVar[str]
    """Return the model's name, for errors."""
    reads_prompt: ClassVar[bool] = True

    def __init__(self, network: nn.Module, preprocess: ImagePreprocessor) -> None:
        self.network = network.eval().requires_grad_(False)
        self.preprocess = preprocess

    def refuse_prompt(self, prompt: str) -> str | None:
        """Return why there is no score for this prompt, if there is a reason."""
        return refusal(self._check_prompt, prompt) if self.reads_prompt else None

    def _check_prompt(self, prompt: str) -> None:
        """Raise ValueError for a prompt without text; a scorer with a tokenizer adds what that refuses."""
        check_prompts([prompt], self.name)

    @torch.no_grad()
    def score_images(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score uint8 images [B, H, W, 3] with B prompts, float32 [B] on the CPU, in one forward.

        Deterministic. Raise ValueError for a wrong shape or type, for a score that is not finite and, where the
        prompt is read, for one without text or with a special token of the tokenizer in it.
        """
        check_images(images, prompts)
        return self.scores(self.preprocess(images), prompts).cpu()

    def score_image_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score float images [B, 3, H, W] in 0..1 with B prompts, float32 [B] on the network's device, with gradients.

        The scores are near those of ``score_images``, which rounds to bytes after resizing. Errors are the same.
        """
        check_image_pixels(images, prompts)
        return self.scores(self.preprocess.pixels(images), prompts)

    def scores(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score preprocessed pixels [B, 3, N, N] with B prompts, float32 [B], differentiable in the pixels."""
        if self.reads_prompt:
            check_prompts(prompts, self.name)
        scores = self._run(pixel_values, prompts)
        check_finite(scores, prompts, self.name)
        return scores

    @abstractmethod
    def _run(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        """Run the network on preprocessed pixels and prompts; return scores, float32 [B]."""
