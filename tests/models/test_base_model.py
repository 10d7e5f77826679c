"""Test what all families share: text rules, guidance, policies on disk, the cost of a sample."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vpo_engine.data.sprites.assets import Sprites, load_sprites
from vpo_engine.distributed.processes import Processes
from vpo_engine.metrics.throughput import count_row_flops
from vpo_engine.model_values import RowFlops, TextEmbedding
from vpo_engine.models.guidance import guided
from vpo_engine.video_model import Padding

PROMPTS = ["a red circle moving left", "a yellow triangle moving up"]


@pytest.fixture(scope="module")
def model() -> Sprites:
    model = load_sprites(Processes.start("cpu"), torch.float32)
    model.prepare(PROMPTS)
    return model


def with_padding(model: Sprites, padding: Padding) -> TextEmbedding:
    twin = copy.copy(model)
    twin.text_rule = replace(model.text_rule, padding=padding)
    return twin.embed(PROMPTS)


def test_masked_padding_is_cut_and_zeros_are_filled_in(model: Sprites) -> None:
    masked, zeros = with_padding(model, "masked"), with_padding(model, "zeros")
    lengths = masked.mask.sum(1)
    assert masked.embeddings.shape[1] == lengths.max() < model.text_rule.max_tokens
    assert not masked.mask.all()
    assert zeros.embeddings.shape[1:] == (model.text_rule.max_tokens, model.text_rule.channels)
    assert zeros.mask.all()
    for row, length in enumerate(lengths):
        assert torch.equal(zeros.embeddings[row, :length], masked.embeddings[row, :length])
        assert not zeros.embeddings[row, length:].any()


def test_guidance_sets_each_prompt_against_its_null_text_in_one_pass() -> None:
    """Two prompts with two samples each; the branch adds latents, time and the mean of the text."""
    latents, t = torch.randn(4, 3, 2, 2, 2), torch.rand(4)
    text = TextEmbedding(torch.randn(2, 5, 7), torch.ones(2, 5, dtype=torch.bool))
    calls = []

    def branch(latents: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        calls.append(len(latents))
        return latents + (t + text.embeddings.mean((1, 2)))[:, None, None, None, None]

    def null_text(text: TextEmbedding) -> TextEmbedding:
        return TextEmbedding(torch.zeros_like(text.embeddings), text.mask)

    each = text.embeddings.mean((1, 2)).repeat_interleave(2)[:, None, None, None, None]
    bare = latents + t[:, None, None, None, None]
    found = guided(branch, latents, t, text, null_text, 5.0)
    torch.testing.assert_close(found, bare + 5.0 * each)
    torch.testing.assert_close(guided(branch, latents, t, text, null_text, 1.0), bare + each)
    assert calls == [8, 4]


def test_a_saved_policy_comes_back_bit_for_bit(model: Sprites, tmp_path: Path) -> None:
    model.save_policy(tmp_path)
    saved = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(1)
    model.load_policy(tmp_path)
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.network.state_dict().items())


def test_a_family_may_know_the_cost_of_a_row(model: Sprites, monkeypatch: pytest.MonkeyPatch) -> None:
    known = RowFlops(1.0, 3.0)
    monkeypatch.setattr(model, "row_flops", lambda _: known)
    assert count_row_flops(model, model.embed(PROMPTS)) is known
