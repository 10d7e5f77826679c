"""The context of a model family's loader: where the model goes, and how its text is encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from vpo_engine.memory.quantised_base import HeldBase
from vpo_engine.model_values import TextEmbedding


class TextSource(Protocol):
    """Text embeddings of prompts: the encoder is loaded to ``prepare`` them, and dropped afterwards."""

    def prepare(self, prompts: Sequence[str]) -> None: ...

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding: ...


class Encoder(Protocol):
    """A text encoder with its tokenizer."""

    def encode(self, prompts: list[str]) -> TextEmbedding: ...


class MakeTextSource(Protocol):
    """Makes a ``TextSource`` that encodes every prompt once."""

    def __call__(
        self,
        load_encoder: Callable[[], Encoder],
        encoder_id: str,
        rewrite: Callable[[str], str] = str,
        *,
        on_disk: bool = True,
    ) -> TextSource:
        """Make it from an encoder that is loaded when prompts are prepared.

        encoder_id: names encoder, length and dtype; embeddings on disk are found by it. rewrite: turns a prompt into
        the text that is encoded. on_disk: keep embeddings for later runs; else in memory.
        """
        ...


@dataclass(frozen=True)
class LoadContext:
    """The place that a model is loaded to. dtype: that of its arithmetic. text_source: see ``MakeTextSource``.

    base: how the base of an adapter is held. A family with large policies calls ``base.hold(network)`` itself, before
    it moves the network to the device, and lets its loader map the weights of ``base.mapped(network)`` instead of
    copying them (see ``weights.load_strict``). The engine calls ``hold`` once more for families that do not.
    """

    device: torch.device
    dtype: torch.dtype
    text_source: MakeTextSource
    base: HeldBase = field(default_factory=HeldBase)


ReadConfig = Callable[[Path | None, Mapping[str, Any], str], dict[str, Any]]
"""A function of (folder, published sizes, name) that returns the folder's config.json, or else the published sizes."""
