"""The text encoder and the tokenizer of a diffusers folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpo_engine.foreign_files import load_tokenizer
from vpo_engine.foreign_settings import check_settings, completed, described_by
from vpo_engine.model_values import TextEmbedding
from vpo_engine.models.diffusers_folder import AGAIN, CONFIG, Folder, load_text_encoder
from vpo_engine.models.rehearsal import META, check_tokens, once, rehearsing
from vpo_engine.texts import say


class FolderEncoder:
    """A text encoder of transformers with its tokenizer.

    max_tokens: every prompt is padded or cut to so many tokens. masked: the encoder gets the tokenizer's mask; else it
    attends to padding. attended: the model attends to padding too, so all tokens count.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int, *, masked: bool, attended: bool) -> None:
        self._model, self._tokenizer, self._max_tokens = model, tokenizer, max_tokens
        self._masked, self._attended = masked, attended
        self._noted = False

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextEmbedding:
        """Return embeddings [B, max_tokens, D] in the encoder's dtype and on its device.

        The first text that is cut is noted on stderr.
        """
        try:
            self._note_cuts(prompts)
            tokens = self._tokenizer(
                prompts,
                padding="max_length",
                max_length=self._max_tokens,
                truncation=True,
                add_special_tokens=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
        except Exception as error:  # a tokenizer can fail in any way on settings that it never had
            raise ValueError(
                self._unfit(f"cannot read a prompt ({type(error).__name__}: {error})")
            ) from error
        known, last = self._model.get_input_embeddings().num_embeddings, int(tokens["input_ids"].max())
        if last >= known:
            raise ValueError(self._unfit(f"gives the token {last}, and the text encoder has {known}"))
        device = next(self._model.parameters()).device
        ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].bool()
        given = {"attention_mask": mask.long().to(device)} if self._masked else {}
        hidden: Tensor = self._model(input_ids=ids, **given)[0]
        return TextEmbedding(hidden, torch.ones_like(mask) if self._attended else mask)

    def _unfit(self, what: str) -> str:
        return (
            f"the tokenizer in {self._tokenizer.name_or_path} {what}; fetch the folder of the pipeline again"
        )

    def _note_cuts(self, prompts: list[str]) -> None:
        lengths = [len(ids) for ids in self._tokenizer(prompts)["input_ids"]]
        longest = max(lengths)
        if longest > self._max_tokens and not self._noted:
            self._noted = True
            start = prompts[lengths.index(longest)][:60]
            say(
                f"note: of '{start}...' the model reads {self._max_tokens} of {longest} tokens; likewise of other long "
                "prompts",
                sys.stderr,
            )


def text_settings(name: str, where: Path | str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a text encoder with the defaults of its class, ``name`` in transformers.

    where: the file that they are from. Raise ValueError for settings of another class, and for values that the class
    cannot take.
    """
    kind = _text_class(name).config_class
    found = config.get("model_type", kind.model_type)
    if found != kind.model_type:
        raise ValueError(
            f"the text encoder is a {found}, and the model was trained with a {kind.model_type}; give the text "
            "encoder of its pipeline"
        )
    check_settings(config, kind, where, AGAIN)
    return completed(config, kind)


def text_model(name: str, settings: Mapping[str, Any], where: Path | str = CONFIG) -> nn.Module:
    """Build a text encoder of transformers by the name of its class, with ``text_settings``.

    Raise ValueError, which names ``where`` they are from, if it cannot be built by them.
    """
    family = _text_class(name)
    given = {key: value for key, value in settings.items() if key not in ("torch_dtype", "dtype")}
    with described_by(where, f"{name} that can be built", AGAIN):
        model: nn.Module = family(family.config_class(**given))
    return model


def _text_class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def rehearse_encoder(name: str, settings: Mapping[str, Any], tokens: int, where: Path | str) -> None:
    """Let a text encoder read a prompt of ``tokens`` without weights; name, settings: see ``text_settings``.

    Raise ValueError, which names ``where`` they are from, if it fails.
    """

    def rehearsal() -> None:
        with META, torch.no_grad():
            model = text_model(name, settings, where)
            ids = torch.zeros(1, tokens, dtype=torch.long)
            with rehearsing(where, name):
                model(input_ids=ids)

    once(rehearsal, name, settings, tokens)


def encoder_loader(
    name: str,
    folder: Folder,
    settings: Mapping[str, Any],
    max_tokens: int,
    *,
    masked: bool,
    attended: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[], FolderEncoder]:
    """Return a function that loads the encoder; see ``FolderEncoder``. name, settings: see ``text_settings``.

    Raise ValueError, now, for settings with which it cannot run.
    """
    check_tokens(max_tokens, folder.transformer / CONFIG)
    where = folder.text_encoder / CONFIG
    rehearse_encoder(name, settings, max_tokens, where)

    def load() -> FolderEncoder:
        build = partial(text_model, name, settings, where)
        model = load_text_encoder(build, folder.text_encoder, dtype, device)
        tokenizer = load_tokenizer(folder.tokenizer)
        return FolderEncoder(model, tokenizer, max_tokens, masked=masked, attended=attended)

    return load


class NoText:
    """The text of a model without weights: every prompt has embeddings of zeros."""

    def __init__(self, max_tokens: int, channels: int) -> None:
        self._shape = (max_tokens, channels)

    def prepare(self, prompts: Sequence[str]) -> None:
        raise AssertionError

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        shape = (len(prompts), *self._shape)
        return TextEmbedding(torch.zeros(shape), torch.ones(shape[:2], dtype=torch.bool))
