"""The rollout engine against the sampler of public scripts: what is sampled, and what is computed for it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from rollout_case import (
    CPU,
    PROMPTS,
    SIZE,
    STEPS,
    Counting,
    alone,
    batched,
    noise_of,
    sampled,
    schedule,
    settings,
    sprites,
)
from step_case import sample_candidates
from torch import Tensor, nn

from vpo_engine.memory.batches import Batch
from vpo_engine.models.opensora.reuse import Reuse
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.protocols import TextEmbedding
from vpo_engine.reference.store import build_reference
from vpo_engine.rewards.combine import combine
from vpo_engine.rewards.sprites import SpritesReward
from vpo_engine.selection import select_pairs


def pairs_of(candidates: Tensor) -> tuple[list[int], list[int]]:
    model, _ = sprites()
    captions = [prompt for prompt in PROMPTS for _ in range(candidates.shape[1])]
    scores = SpritesReward().score(model.decode(candidates.flatten(0, 1)), captions)
    pairs = select_pairs(combine(scores, "global").unflatten(0, candidates.shape[:2]))
    assert bool((pairs.gap > 0.01).all()), "a pair that rounding could turn round"
    return pairs.winner.tolist(), pairs.loser.tolist()


def test_candidates_are_those_of_a_sampler_that_takes_one_at_a_time() -> None:
    config = settings()
    noise = noise_of(config)
    expected = torch.stack(
        [torch.stack([alone(z, prompt, 3.0, schedule(STEPS)) for z in noise[prompt]]) for prompt in (0, 1)]
    )
    found = sampled(config)
    assert (found - expected).abs().max() <= 2e-5  # batches of other sizes round otherwise
    assert pairs_of(found) == pairs_of(expected)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_shared_text_changes_no_bit_of_a_batch_of_equal_size(guidance: float) -> None:
    config = settings(guidance=guidance)
    assert torch.equal(sampled(config), batched(noise_of(config), guidance, schedule(STEPS)))


@functools.cache
def all_rows_at_once() -> tuple[Tensor, tuple[list[int], list[int]]]:
    whole = sampled(settings(steps=2))
    return whole, pairs_of(whole)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_rows_at_once_change_neither_candidates_nor_pairs(rows: int) -> None:
    """One row, a part of a prompt's four that leaves a rest, and more than a prompt's."""
    whole, pairs = all_rows_at_once()
    cut = sampled(settings(steps=2, batch_size=rows))
    assert (whole - cut).abs().max() <= 2e-5
    assert pairs_of(cut) == pairs


@contextmanager
def counted(network: nn.Module) -> Iterator[dict[str, list[int]]]:
    """Rows that each linear layer of the text, and the embedder of the frame rate, is given, call by call."""
    calls: dict[str, list[int]] = {}
    handles = []
    for name, module in network.named_modules():
        if name.endswith(("kv_linear", "y_proj.fc1", "fps_embedder.mlp.0", "q_linear")):
            seen = calls.setdefault(name, [])
            handles.append(
                module.register_forward_hook(
                    lambda _module, given, _out, seen=seen: seen.append(given[0].shape[:-1].numel())
                )
            )
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def test_text_is_projected_once_for_all_steps_and_candidates() -> None:
    model, text = sprites()
    tokens = int(text.mask.sum())
    with counted(model.network) as calls:
        sampled(settings())
    keys = [seen for name, seen in calls.items() if name.endswith("kv_linear")]
    assert len(keys) == 2 * model.network.settings.depth
    assert all(seen == [2 * tokens] for seen in keys)  # two prompts and their null captions
    assert calls["y_embedder.y_proj.fc1"] == [2 * tokens]
    assert calls["fps_embedder.mlp.0"] == [16]
    assert all(len(seen) == STEPS for name, seen in calls.items() if name.endswith("q_linear"))


def test_each_group_of_rows_projects_its_own_prompts() -> None:
    model, text = sprites()
    with counted(model.network) as calls:
        sampled(settings(batch_size=4, guidance=1.0, steps=2))
    assert calls["spatial_blocks.0.cross_attn.kv_linear"] == text.mask.sum(1).tolist()


def test_every_step_is_one_call_for_candidates_prompts_and_branches() -> None:
    for changes, expected in (
        ({}, [16] * STEPS),
        ({"guidance": 1.0}, [8] * STEPS),
        ({"batch_size": 4}, [8] * STEPS * 2),
        ({"batch_size": 3}, [4] * STEPS * 4),
    ):
        network = Counting(sprites()[0].network)
        sampled(settings(**changes), network)
        assert network.rows == expected, changes


@pytest.mark.parametrize("storage", ["copy", "int8"])
def test_a_reference_samples_with_shared_text_too(storage: Any) -> None:
    model, text = sprites()
    reference = build_reference(storage, model.network)
    config = settings(steps=2)
    found = sampled(config, reference)
    rows, texts = noise_of(config).flatten(0, 1), text.repeat_interleave(4)
    for time, size in schedule(2):
        rows = rows + model.predict(reference, rows, torch.full((8,), time), texts, 3.0) * size
    assert torch.equal(found.flatten(0, 1), rows)
    assert torch.equal(found, sampled(config)) == (storage == "copy")


def test_a_changed_policy_is_not_sampled_with_old_keys() -> None:
    model, _ = sprites()
    config = settings(steps=2)
    before = sampled(config)
    changed = copy.deepcopy(model.network)
    with torch.no_grad():
        for block in changed.spatial_blocks:
            block.cross_attn.kv_linear.weight.mul_(0.5)
    assert not torch.equal(sampled(config, changed), before)
    assert torch.equal(sampled(config), before)


def test_a_sampling_loop_with_shared_text_never_reads_from_the_device() -> None:
    """Tensors on the meta device hold no values: whatever waited for one would raise."""
    model, text = sprites()
    with torch.device("meta"):
        network = STDiT3.from_config(model.network.config)
    meta = TextEmbedding(text.embeddings, text.mask).to("meta")
    twin = copy.copy(model)
    twin.network = network
    noise = torch.zeros(8, *model.latent_shape, device="meta")
    assert twin.sample(network, noise, meta, steps=3, guidance=3.0).device.type == "meta"


def test_captions_may_be_fewer_than_samples_with_gradients_too() -> None:
    model, text = sprites()
    network = copy.deepcopy(model.network).double()
    x = torch.randn(4, *model.latent_shape, dtype=torch.float64)
    t, y = torch.full((4,), 500.0), text.embeddings.double()[:, None]
    found = []
    for captions, mask in ((y, text.mask), (y.repeat_interleave(2, 0), text.mask.repeat_interleave(2, 0))):
        network.zero_grad()
        out = network(x, t, captions, mask, **SIZE)
        out.square().mean().backward()
        weight = network.spatial_blocks[0].cross_attn.kv_linear.weight
        assert weight.grad is not None
        found.append((out.detach(), weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_what_is_shared_has_one_network_one_text_and_no_gradient() -> None:
    model, text = sprites()
    x, t, y = torch.zeros(4, *model.latent_shape), torch.zeros(4), text.embeddings[:, None]
    reuse = Reuse()
    with pytest.raises(AssertionError, match="no gradient"):
        model.network(x, t, y, text.mask, reuse=reuse, **SIZE)
    with torch.no_grad():
        model.network(x, t, y, text.mask, reuse=reuse, **SIZE)
        for network, text_of, rows, message in (
            (copy.deepcopy(model.network), y, 4, "the network that made them"),
            (model.network, y.clone(), 4, "the text that they were made of"),
            (model.network, y, 2, "keeps its batch size"),
        ):
            with pytest.raises(AssertionError, match=message):
                network(x[:rows], t[:rows], text_of, text.mask, reuse=reuse, **SIZE)


def test_samples_that_captions_do_not_divide_are_refused() -> None:
    model, text = sprites()
    with pytest.raises(
        ValueError, match=r"expected text states \[captions, 1, L, 32\] with captions dividing 3"
    ):
        model.network(torch.zeros(3, *model.latent_shape), torch.zeros(3), text.embeddings[:, None], **SIZE)


@pytest.mark.parametrize("prompts", [1, 3, 8])
@pytest.mark.parametrize("candidates", [1, 2, 4, 5])
@pytest.mark.parametrize("rows", [None, 1, 2, 3, 4, 7, 9, 100])
def test_groups_hold_every_candidate_once_in_order(prompts: int, candidates: int, rows: int | None) -> None:
    whole = Batch(range(prompts), range(candidates))
    groups = whole.split(rows)
    found = [
        (prompt, candidate) for group in groups for prompt in group.prompts for candidate in group.candidates
    ]
    assert found == [(prompt, candidate) for prompt in range(prompts) for candidate in range(candidates)]
    assert all(len(group) <= (rows or len(whole)) for group in groups)
    assert all(len(group.prompts) == 1 or group.candidates == range(candidates) for group in groups)


def test_a_candidate_depends_on_seed_position_and_number_alone() -> None:
    many, few = sampled(settings(steps=2)), sampled(settings(steps=2, candidates=2))
    assert (many[:, :2] - few).abs().max() <= 2e-5
    model, text = sprites()
    config = settings(steps=2, candidates=2)
    alone = sample_candidates(model, model.network, text[1:], [8], config, 0, CPU)
    assert (alone[0] - few[1]).abs().max() <= 2e-5
    other = sample_candidates(model, model.network, text[1:], [8], config, 1, CPU)
    assert (alone - other).abs().max() > 0.1
