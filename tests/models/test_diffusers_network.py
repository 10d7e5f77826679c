"""Transformers of diffusers under the engine's options: the same predictions and gradients, computed in other ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from tiny_diffusers import cogvideox_pipeline, randomise
from torch import Tensor, nn
from vpo_kernels.attention import Choice

from vpo_engine.config import ActivationCheckpointing
from vpo_engine.memory.checkpointing import Activations
from vpo_engine.models.cogvideox.attention import JointAttention
from vpo_engine.models.diffusers_network import (
    CROSS_ATTENTION_LAYERS,
    CompiledBlocks,
    Loop,
    TextLayers,
    prepare_network,
    set_activations,
)
from vpo_engine.reference.store import Storage, build_reference
from vpo_engine.rollout.quantised_copy import SamplingCopy

ROWS, SAMPLES = 4, 2


def wan() -> Any:
    import diffusers

    network = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=40,
        num_layers=3,
        rope_max_seq_len=32,
    )
    return randomise(network, 3)


def prepared(name: str) -> Any:
    if name == "wan":
        network, layers = wan(), [TextLayers("attn2", CROSS_ATTENTION_LAYERS)]
        layers.append(TextLayers("condition_embedder", (("text_embedder", None),)))
    else:
        network = cogvideox_pipeline().transformer
        layers = [TextLayers("patch_embed", (("text_proj", None),))]
        for block in network.transformer_blocks:
            block.attn1.set_processor(JointAttention())
    prepare_network(network, layers)
    return network


@pytest.fixture(params=["wan", "cogvideox"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def arguments(name: str, time: float = 500.0, seed: int = 0) -> dict[str, Any]:
    """Arguments for two prompts with two samples each, which stand next to each other."""
    random = torch.Generator().manual_seed(seed)
    shape = (ROWS, 4, 3, 8, 12) if name == "wan" else (ROWS, 3, 4, 8, 12)
    text = (ROWS // SAMPLES, 10, 16) if name == "wan" else (ROWS // SAMPLES, 12, 32)
    return {
        "hidden_states": torch.randn(shape, generator=random),
        "timestep": torch.full((ROWS,), time),
        "encoder_hidden_states": torch.randn(
            text, generator=torch.Generator().manual_seed(9)
        ).repeat_interleave(SAMPLES, 0),
        "return_dict": False,
    }


def gradients(network: nn.Module, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    out = network(**arguments(name))[0]
    network.zero_grad()
    out.square().mean().backward()
    return out.detach(), {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-9))


def test_a_prepared_network_is_the_network_of_diffusers(name: str) -> None:
    original = wan() if name == "wan" else cogvideox_pipeline().transformer
    network = prepared(name)
    assert isinstance(network, type(original))
    assert type(network).__name__ == type(original).__name__
    assert list(network.state_dict()) == list(original.state_dict())
    with torch.no_grad():
        assert relative(network(**arguments(name))[0], original(**arguments(name))[0]) < 1e-6
        assert torch.equal(network(**arguments(name))[0], network(**arguments(name), loop=None)[0])


@pytest.mark.parametrize("mode", get_args(ActivationCheckpointing))
def test_checkpointing_changes_no_bit(name: str, mode: ActivationCheckpointing) -> None:
    network = prepared(name)
    out, expected = gradients(network, name)
    set_activations(network, Activations(mode))
    again, found = gradients(network, name)
    assert torch.equal(again, out)
    assert all(torch.equal(found[key], grad) for key, grad in expected.items())


def test_checkpointed_blocks_are_computed_again(name: str) -> None:
    network = prepared(name)
    blocks = network.blocks if name == "wan" else network.transformer_blocks
    calls: list[int] = []
    layer = blocks[1].attn1.to_q
    layer.register_forward_hook(lambda *_: calls.append(1))
    for mode, expected in (("none", 1), ("block", 2)):
        set_activations(network, Activations(mode))
        calls.clear()
        gradients(network, name)
        assert len(calls) == expected


def test_offloaded_inputs_of_blocks_change_no_bit_and_leave_the_device(name: str) -> None:
    network = prepared(name)
    out, expected = gradients(network, name)
    set_activations(network, Activations("block", offload=True))
    sent: list[tuple[int, ...]] = []
    send = network.offloaded.send

    def counting(tensor: Tensor, previous: Any) -> Any:
        sent.append(tuple(tensor.shape))
        return send(tensor, previous)

    network.offloaded.send = counting
    again, found = gradients(network, name)
    assert torch.equal(again, out)
    assert all(torch.equal(found[key], grad) for key, grad in expected.items())
    tokens = 3 * 4 * 6
    assert sent == [(ROWS, tokens, 24 if name == "wan" else 32)] * 3


@pytest.mark.parametrize("mode", ["none", "pointwise", "block"])
def test_the_mlp_in_parts_changes_rounding_only_and_alike_with_and_without_gradients(
    name: str, mode: ActivationCheckpointing
) -> None:
    network = prepared(name)
    out, expected = gradients(network, name)
    set_activations(network, Activations(mode, mlp_chunks=3))
    again, found = gradients(network, name)
    assert relative(again, out) < 1e-5
    assert max(relative(found[key], grad) for key, grad in expected.items() if grad.norm() > 1e-6) < 1e-4
    with torch.no_grad():
        assert torch.equal(network(**arguments(name))[0], again)


def test_parts_of_the_mlp_are_what_the_layer_sees(name: str) -> None:
    network = prepared(name)
    set_activations(network, Activations(mlp_chunks=3))
    blocks = network.blocks if name == "wan" else network.transformer_blocks
    seen: list[int] = []
    layer = (blocks[0].ffn if name == "wan" else blocks[0].ff).net[2]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        network(**arguments(name))
    assert seen == ([24, 24, 24] if name == "wan" else [28, 28, 28])


# --- sampling loops ----------------------------------------------------------------------------------------


def text_calls(network: nn.Module, name: str) -> dict[str, list[int]]:
    """Record how many rows each layer that sees only the text is called with."""
    calls: dict[str, list[int]] = {}
    ends = ("attn2.to_k", "attn2.to_v", "attn2.norm_k", "text_embedder") if name == "wan" else ("text_proj",)
    for key, module in network.named_modules():
        if key.endswith(ends):
            rows = calls.setdefault(key, [])
            module.register_forward_hook(lambda _, args, out, rows=rows: rows.append(len(args[0])))
    assert calls
    return calls


@torch.no_grad()
def test_a_loop_computes_what_the_text_gives_once_for_each_prompt(name: str) -> None:
    network = prepared(name)
    steps = [arguments(name, time, seed) for seed, time in enumerate((900.0, 500.0, 100.0))]
    expected = [network(**step)[0] for step in steps]
    calls, loop = text_calls(network, name), Loop(SAMPLES)
    assert not loop.filled
    for step, out in zip(steps, expected, strict=True):
        assert relative(network(**step, loop=loop)[0], out) < 1e-5
        assert loop.filled
    assert all(rows == [ROWS // SAMPLES] for rows in calls.values())
    if name == "wan":
        assert len(calls) == 3 * 3 + 1


@torch.no_grad()
def test_what_a_loop_keeps_is_not_seen_by_other_calls(name: str) -> None:
    network = prepared(name)
    given = arguments(name)
    other = {**given, "encoder_hidden_states": given["encoder_hidden_states"] + 1}
    expected = network(**other)[0]
    network(**given, loop=Loop(SAMPLES))
    assert torch.equal(network(**other)[0], expected)
    assert relative(network(**other, loop=Loop(SAMPLES))[0], expected) < 1e-5


@torch.no_grad()
def test_a_copy_of_the_network_keeps_results_of_its_own(name: str) -> None:
    network = prepared(name)
    twin = copy.deepcopy(network)
    for parameter in twin.parameters():
        parameter.add_(0.05)
    given, loop = arguments(name), Loop(SAMPLES)
    network(**given, loop=loop)
    assert relative(twin(**given, loop=loop)[0], twin(**given)[0]) < 1e-5


@torch.no_grad()
def test_the_step_cache_skips_later_blocks_and_adds_what_they_added(name: str) -> None:
    network = prepared(name)
    blocks = network.blocks if name == "wan" else network.transformer_blocks
    calls = [0] * len(blocks)
    for number, block in enumerate(blocks):

        def count(*_: Any, number: int = number) -> None:
            calls[number] += 1

        block.attn1.register_forward_hook(count)
    given = arguments(name)
    exact = network(**given)[0]
    calls[:] = [0] * len(blocks)
    loop = Loop(SAMPLES, cache=1e-3)
    assert relative(network(**given, loop=loop)[0], exact) < 1e-5
    assert calls == [1, 1, 1]
    near = {**given, "hidden_states": given["hidden_states"] * (1 + 1e-6)}
    assert relative(network(**near, loop=loop)[0], exact) < 1e-4
    assert calls == [2, 1, 1]
    far = arguments(name, 100.0, 5)
    assert relative(network(**far, loop=loop)[0], network(**far)[0]) < 1e-5
    assert calls == [4, 3, 3]
    assert loop.blocks is not None
    assert (loop.blocks.computed, loop.blocks.reused) == (2, 1)


@torch.no_grad()
@pytest.mark.long
def test_compiled_blocks_predict_the_same(name: str) -> None:
    """Two functions serve all blocks: one before and one behind the attention to the text, or else one for the first
    block, whose inputs are views of one tensor, and one for the others."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = prepared(name)
    run = CompiledBlocks(network, torch.device("cpu"), backend="eager")
    for seed in (0, 1):
        given = arguments(name, seed=seed)
        loop = Loop(SAMPLES, run=run)
        for _ in range(2):
            assert relative(network(**given, loop=loop)[0], network(**given)[0]) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


# --- the reference -----------------------------------------------------------------------------------------


def with_adapter(network: nn.Module) -> None:
    import peft

    config = peft.LoraConfig(
        r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
    )
    peft.inject_adapter_in_model(config, network)
    network.eval()


STORAGES: tuple[Storage, ...] = ("copy", "bf16", "exact8", "adapter")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("activations", [Activations(), Activations("block", mlp_chunks=3)])
def test_a_reference_computes_what_the_policy_does(
    name: str, storage: Storage, activations: Activations
) -> None:
    """Bit for bit, with gradients in the policy's pass, whatever was set after the reference was built."""
    network = prepared(name)
    if storage == "adapter":
        with_adapter(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.bfloat16())
    reference = build_reference(storage, network)
    set_activations(network, activations)
    given = arguments(name)
    assert torch.equal(network(**given)[0], reference(**given)[0])
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.0625).copy_(parameter.bfloat16())
    run: Callable[..., Any] = network
    if storage != "exact8":  # which stores the difference from the policy
        assert not torch.equal(run(**given)[0], reference(**given)[0])
    reference.refresh(network)
    assert torch.equal(run(**given)[0], reference(**given)[0])


@torch.no_grad()
def test_a_sampling_copy_in_8_bits_takes_part_in_loops(name: str) -> None:
    network = prepared(name)
    rounded, given, loop = SamplingCopy(network, "int8"), arguments(name), Loop(SAMPLES)
    exact = network(**given)[0]
    for _ in range(2):
        assert 0 < relative(rounded(**given, loop=loop)[0], exact) < 0.1


# --- attention ---------------------------------------------------------------------------------------------


def test_attention_is_chosen_by_the_names_of_the_engine(name: str) -> None:
    network = prepared(name)
    with torch.no_grad():
        expected = network(**arguments(name))[0]
        choice = network.choose_backends("auto", dtype=torch.float32)
        assert choice.name == "sdpa"
        assert relative(network(**arguments(name))[0], expected) < 1e-6
    with pytest.raises(ValueError, match="flash2"):
        network.choose_backends("flash2", dtype=torch.float32)


def test_backends_reach_the_processors_of_the_network_and_of_its_copies(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that diffusers does not offer is refused where its own processors attend, and only there."""

    def chosen(attention: str, **_: Any) -> Choice:
        return Choice("flash2" if attention == "auto" else attention, "because")  # type: ignore[arg-type]

    monkeypatch.setattr("vpo_engine.models.diffusers_network.choose_attention", chosen)
    network = prepared(name)
    network.choose_backends("auto", dtype=torch.float32)
    for module in (network, copy.deepcopy(network)):
        blocks = module.blocks if name == "wan" else module.transformer_blocks
        processor = blocks[0].attn1.processor
        assert (processor._attention_backend if name == "wan" else processor.backend).startswith("flash")
    if name == "wan":
        with pytest.raises(ValueError, match=r"model\.attention=flash4 is not offered by diffusers for this"):
            network.choose_backends("flash4", dtype=torch.float32)
    else:
        assert network.choose_backends("flash4", dtype=torch.float32).name == "flash4"
