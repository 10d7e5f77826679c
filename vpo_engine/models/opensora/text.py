"""Open-Sora 1.2's text path: score suffixes, caption cleaning, tokens, the T5 encoder.

Behaviour follows ``opensora/utils/inference_utils.py`` and ``opensora/models/text_encoder/t5.py`` of
Open-Sora v1.2.0. B prompts, L tokens, D channels.
"""

from __future__ import annotations

import html
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ftfy
import torch
from bs4 import BeautifulSoup
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from vpo_engine.foreign_files import load_tokenizer
from vpo_engine.models.diffusers_text import rehearse_encoder, text_model, text_settings
from vpo_engine.models.opensora.checkpoint import config_file, load_config, read_weights
from vpo_engine.protocols import TextEmbedding
from vpo_engine.weights import move_in_order

MAX_LENGTH = 300
"""Tokens per prompt, as published."""

_EXTENSIONS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_HOST = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)

_Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*rules: tuple[str, str]) -> _Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


_ADDRESSES = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_HOST})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_HOST})", ""),
)
_CHARACTERS = _rules(
    (r"@\w+\b", ""),  # nicknames
    ("[\u31c0-\u9fff]+", ""),  # CJK strokes to CJK ideographs
    (f"[{_DASHES}]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a written-out line break
    (r"#(?:\d{1,3}|\d{5,})\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_EXTENSIONS})", ""),  # file names
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_JOINERS = re.compile("[-_]")
_WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article codes, four shapes
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_EXTENSIONS})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # sizes: a Latin x, a Cyrillic one or a cross
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)

_SCORES = re.compile(r"(?:(?:aesthetic|motion)\s*)?score:\s*[\d.]*|camera motion:[^.]*\.?")


def append_scores(
    prompt: str, aes: float | None = None, flow: float | None = None, camera_motion: str | None = None
) -> str:
    """Append the score sentences that the model was trained on; one that is there already is not repeated."""
    suffixes = (
        ("aesthetic score:", None if aes is None else f"{aes:.1f}"),
        ("motion score:", None if flow is None else f"{flow:.1f}"),
        ("camera motion:", camera_motion),
    )
    added = [f" {label} {value}." for label, value in suffixes if value is not None and label not in prompt]
    return prompt + "".join(added)


def clean_caption(text: str) -> str:
    """Clean once as published: lower case; no links, markup, CJK, codes, sizes, sales words."""
    text = _apply(_ADDRESSES, urllib.parse.unquote_plus(text).strip().lower())
    text = _apply(_CHARACTERS, BeautifulSoup(text, features="html.parser").text)
    if len(_JOINERS.findall(text)) > 3:
        text = _JOINERS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _apply(_WORDS, text).strip()


def prepare_prompt(
    prompt: str, aes: float | None = None, flow: float | None = None, camera_motion: str | None = None
) -> str:
    """Return what the tokenizer sees: the prompt with scores appended, cleaned twice."""
    return clean_caption(clean_caption(append_scores(prompt, aes, flow, camera_motion)))


def without_scores(prepared: str) -> str:
    """Return a prepared prompt without score sentences, which say nothing of what is to be seen."""
    return _SCORES.sub("", prepared)


def _apply(rules: _Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


class Tokenizer(Protocol):
    """Turns strings into token ids, int64 [B, L], and a mask, bool [B, L], padded and truncated to a fixed L."""

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]: ...


class ByteTokenizer:
    """UTF-8 bytes as tokens, numbered as in ByT5: 0 pads, 1 ends, 2 is unused, byte b is b + 3."""

    vocab_size = 259

    def __init__(self, max_length: int):
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; the end token alone needs 1")
        self.max_length = max_length

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(texts), self.max_length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            tokens = [byte + 3 for byte in text.encode("utf-8")[: self.max_length - 1]] + [1]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids, ids != 0


class PieceTokenizer:
    """The SentencePiece tokenizer of a local T5 folder (``spiece.model``, or ``tokenizer.json``)."""

    def __init__(self, folder: Path, max_length: int = MAX_LENGTH):
        if not any((folder / name).is_file() for name in ("spiece.model", "tokenizer.json")):
            raise FileNotFoundError(
                f"{folder} has neither spiece.model nor tokenizer.json; copy spiece.model of "
                "DeepFloyd/t5-v1_1-xxl into it"
            )
        self._tokenizer = load_tokenizer(folder)
        self.max_length = max_length

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = self._tokenizer(
            list(texts),
            max_length=self.max_length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return tokens["input_ids"], tokens["attention_mask"].bool()


class T5Encoder(nn.Module):
    """A T5 encoder with its tokenizer. State-dict keys are the published ones of transformers, under ``model.``"""

    def __init__(self, model: T5EncoderModel, tokenizer: Tokenizer):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tokenizer: Tokenizer) -> T5Encoder:
        """Build an encoder with random weights; ``config`` holds the arguments of T5Config."""
        return cls(T5EncoderModel(T5Config(**config)).eval(), tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_length: int = MAX_LENGTH,
    ) -> T5Encoder:
        """Load a local copy of DeepFloyd/t5-v1_1-xxl: config.json, spiece.model, and .bin or .safetensors weights.

        Open-Sora encodes in float32 at inference and in bfloat16 in training. Nothing is downloaded. Weights go to
        ``device`` shard by shard in ``dtype``, so loading takes the memory of the encoder and of one shard.
        """
        folder = Path(folder)
        where = config_file(folder)
        settings = text_settings("T5EncoderModel", where, load_config(folder))
        rehearse_encoder("T5EncoderModel", settings, max_length, where)
        tokenizer = PieceTokenizer(folder, max_length)
        with torch.device("meta"):
            model: Any = text_model("T5EncoderModel", settings, where)
        _load_tied(model, folder, dtype, device)
        return cls(model.eval(), tokenizer)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        """Encode prepared prompts to embeddings [B, L, D], in the module's dtype and on its device."""
        ids, mask = self.tokenizer(prompts)
        device = self.model.shared.weight.device
        mask = mask.to(device)
        hidden = self.model(input_ids=ids.to(device), attention_mask=mask.long()).last_hidden_state
        return TextEmbedding(hidden, mask)


def _load_tied(model: T5EncoderModel, folder: Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Load published weights into a model on the meta device; the token table may be stored once or twice."""
    table, tied = "shared.weight", "encoder.embed_tokens.weight"
    state = read_weights(folder)
    if table in state and tied in state:
        if not torch.equal(state[tied], state[table]):
            raise ValueError(
                f"{folder} holds two different token tables, {table} and {tied}; T5 has one: check the copy"
            )
        del state[tied]
    moved = move_in_order(state, dtype, device)
    for name, other in ((table, tied), (tied, table)):
        if name not in moved and other in moved:
            moved[name] = moved[other]
    try:
        model.load_state_dict(moved, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {folder} do not fit its config.json as a T5 encoder: {error}"
        ) from error
    model.encoder.embed_tokens = model.shared
