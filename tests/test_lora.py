"""Low-rank adapters: what they compute, where they start, and their files."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
from lora_case import LAYERS_PER_BLOCK, LORA, SETTINGS, TARGETS, Make, disturb, inputs, merged, same
from safetensors.torch import load_file, save_file
from small_policy import small_network

from vpo_engine import train as entry
from vpo_engine.build import build_model
from vpo_engine.config import LoraConfig
from vpo_engine.config_file import dump_config, load_config
from vpo_engine.data.sprites.assets import WEIGHTS
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.checkpointing import Activations
from vpo_engine.memory.optimizer import PolicyOptimizer
from vpo_engine.memory.quantised_base import block_linears
from vpo_engine.memory.rounding import hold_in_bfloat16
from vpo_engine.models.lora import (
    adapter_parameters,
    chosen_targets,
    inject_adapter,
    load_adapter,
    save_adapter,
)
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.models.policy import prepare_policy
from vpo_engine.runs.start import check_same_run

CARD = OpenSora.card


@pytest.fixture
def network() -> STDiT3:
    return small_network().eval()


# what it computes


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_policy_starts_as_the_base_bit_for_bit(weights: torch.dtype, autocast: bool) -> None:
    base, policy = small_network().eval().to(weights), small_network().eval().to(weights)
    inject_adapter(policy, SETTINGS, TARGETS, seed=0)
    assert {weight.dtype for weight in adapter_parameters(policy).values()} == {torch.float32}
    outputs = []
    for change in (lambda _: None, disturb):
        change(policy)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append((policy(**inputs()), base(**inputs())))
    assert torch.equal(*outputs[0])
    assert not torch.equal(*outputs[1])


def test_the_adapter_adds_its_scaled_product(network: STDiT3) -> None:
    inject_adapter(network, SETTINGS, TARGETS, seed=0)
    disturb(network)
    full = small_network().eval().double()
    full.load_state_dict(merged(network), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(network.double()(**inputs()), full(**inputs()), rtol=1e-10, atol=1e-10)


def test_only_the_adapter_is_trained_and_all_of_it(network: STDiT3) -> None:
    names = [name for name, _ in network.named_parameters()]
    layers = inject_adapter(network, SETTINGS, TARGETS, seed=0)
    assert len(layers) == 2 * network.settings.depth * LAYERS_PER_BLOCK
    linears = [network.get_submodule(name) for name in layers]
    assert network.num_trainable == sum(3 * (part.in_features + part.out_features) for part in linears)
    disturb(network)
    network(**inputs()).square().mean().backward()
    graded = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert graded == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(graded) == 2 * len(layers)
    assert all(".lora_" in name for name in graded)
    assert all(weight.grad.abs().sum() > 0 for weight in adapter_parameters(network).values())
    left = [
        name.replace(".base_layer.", ".") for name, _ in network.named_parameters() if ".lora_" not in name
    ]
    assert left == names


@pytest.mark.parametrize(
    "activations",
    [
        Activations("pointwise"),
        Activations("all_but_attention"),
        Activations("block"),
        Activations("block", offload=True),
    ],
    ids=str,
)
def test_recomputing_activations_gives_the_same_gradients(network: STDiT3, activations: Activations) -> None:
    inject_adapter(network, SETTINGS, TARGETS, seed=0)
    disturb(network)
    gradients = []
    for network.activations in (Activations(), activations):
        network.zero_grad(set_to_none=True)
        network(**inputs()).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in adapter_parameters(network).items()})
    assert same(gradients[0], gradients[1])


def test_an_mlp_in_parts_gives_its_adapter_the_same_gradients(network: STDiT3) -> None:
    inject_adapter(network, LoraConfig(rank=3), ("mlp.fc1", "mlp.fc2"), seed=0)
    disturb(network.double())
    gradients = []
    for network.activations in (Activations(), Activations("block", mlp_chunks=4)):
        network.zero_grad(set_to_none=True)
        network(**inputs()).square().mean().backward()
        gradients.append([weight.grad for weight in adapter_parameters(network).values()])
    for whole, parts in zip(*gradients, strict=True):
        assert (parts - whole).norm() <= 1e-12 * whole.norm()  # entries near zero are sums that cancel


@pytest.mark.parametrize("weights", ["fp32_master", "stochastic_rounding"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_rounded_and_the_adapter_never(small: Make, weights: str, dtype: str) -> None:
    """Over a rounded base the policy starts as that base, bit for bit, and its float32 weights are what is stepped."""
    config = small(*LORA, f"memory.weights={weights}", f"model.dtype={dtype}")
    policy, base = small_network().eval(), small_network().eval()
    prepare_policy(policy, config, OpenSora.card, getattr(torch, dtype))
    hold_in_bfloat16(base, config.memory.weights, getattr(torch, dtype))
    with torch.no_grad():
        assert torch.equal(policy(**inputs()), base(**inputs()))
    held = {name: weight for name, weight in policy.named_parameters() if ".lora_" not in name}
    assert {weight.dtype for weight in held.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(weight, weight.bfloat16().to(weight)) for weight in held.values())
    adapter = list(adapter_parameters(policy).values())
    assert {weight.dtype for weight in adapter} == {torch.float32}
    optimizer = PolicyOptimizer(
        adapter,
        config.optimizer,
        config.optimizer_memory,
        seed=0,
        preserve_reference=lambda _: nullcontext(),
    )
    optimizer.begin(1e-5)
    policy(**inputs()).square().mean().backward()
    optimizer.step()
    assert optimizer.nbytes()["fp32_master"] == 0
    ups = [weight for name, weight in adapter_parameters(policy).items() if ".lora_B." in name]
    assert all(bool(((weight - weight.bfloat16().float()) != 0).any()) for weight in ups)


def test_an_adapter_over_bfloat16_computes_in_bfloat16_and_learns_in_float32() -> None:
    policy = small_network().eval().bfloat16()
    inject_adapter(policy, SETTINGS, TARGETS, seed=0)
    disturb(policy)
    rounded = copy.deepcopy(policy)
    for weight in adapter_parameters(rounded).values():
        weight.data = weight.data.bfloat16()
    for one in (policy, rounded):
        one(**inputs()).square().mean().backward()
    gradients = [{name: w.grad for name, w in adapter_parameters(one).items()} for one in (policy, rounded)]
    with torch.no_grad():
        assert torch.equal(policy(**inputs()), rounded(**inputs()))
    for name, gradient in gradients[0].items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, gradients[1][name].float())


# where it starts


def test_the_start_depends_on_the_seed_and_on_nothing_else() -> None:
    starts = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 7)):
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        policy = small_network()
        torch.random.set_rng_state(before)
        inject_adapter(policy, SETTINGS, TARGETS, seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        starts.append({name: weight.detach() for name, weight in adapter_parameters(policy).items()})
    assert same(starts[0], starts[1])
    downs = [name for name in starts[0] if ".lora_A." in name]
    assert not any(torch.equal(starts[0][name], starts[2][name]) for name in downs)
    for name, weight in starts[0].items():
        if name in downs:
            bound = weight.shape[1] ** -0.5
            assert torch.equal(weight.bfloat16().float(), weight)
            assert 0.8 * bound < weight.abs().max() <= bound * (1 + 2**-8)
            assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.2)
        else:
            assert not weight.any()
    alike = [starts[0][name] for name in downs if starts[0][name].shape == starts[0][downs[0]].shape]
    assert len({weight.numpy().tobytes() for weight in alike}) == len(alike)


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (("attn.qkv", "attn.qvk"), r"'attn\.qvk' names no linear layer of STDiT3; did you mean attn\.qkv"),
        (("attn",), r"'attn' names no linear layer of STDiT3; did you mean attn\.qkv"),
        (
            ("to_q",),
            r"'to_q' names no linear layer of STDiT3; its linear layers end in attn\.proj, attn\.qkv",
        ),
        (
            ("proj",),
            r"'proj' also names x_embedder\.proj, a PatchProjection.*write attn\.proj, cross_attn\.proj",
        ),
        ((), r"model\.lora\.targets is empty"),
    ],
)
def test_a_target_of_no_use_is_named(network: STDiT3, targets: tuple[str, ...], text: str) -> None:
    state = list(network.state_dict())
    with pytest.raises(ValueError, match=text):
        inject_adapter(network, LoraConfig(), targets, seed=0)
    assert list(network.state_dict()) == state


@pytest.mark.parametrize(
    ("name", "endings"), [("attention", TARGETS), ("mlp", ("mlp.fc1", "mlp.fc2")), ("all", None)]
)
def test_a_named_set_gives_its_layers_an_adapter(
    small: Make, name: str, endings: tuple[str, ...] | None
) -> None:
    config = small(*LORA, f"model.lora.targets={name}")
    assert config.model.lora is not None
    found = inject_adapter(
        small_network(), config.model.lora, chosen_targets(config.model.lora, CARD), seed=0
    )
    assert found == sorted(
        layer for layer in block_linears(small_network()) if endings is None or layer.endswith(endings)
    )
    assert len(found) > 0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            "atention",
            r"model\.lora\.targets=atention is no set of layers of the sprites world .*did you mean attention\?",
        ),
        ("attn.qkv", r"its sets: attention, mlp, all.*or write \[attn\.qkv\]"),
        ("[attn.qkv, nothing]", r"'nothing' names no linear layer of STDiT3"),
    ],
)
def test_a_run_whose_targets_name_nothing_does_not_start(
    smallest: list[str], given: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*smallest, *LORA, f"model.lora.targets={given}", f"run_dir={tmp_path / 'run'}"]
    assert entry.main(arguments) == 1
    message = capsys.readouterr().err
    assert re.search(text, message)
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_file_that_binds_nothing_or_a_part_is_refused(network: STDiT3, tmp_path: Path) -> None:
    inject_adapter(network, SETTINGS, TARGETS, seed=0)
    save_adapter(network, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    saved = load_file(file)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = next(iter(adapter_parameters(network)))
    cases = {
        rf"holds 40 tensors, and 0 of this adapter's 40 .*begins with diffusion_model\..*where {first} is expected": {
            name.replace("base_model.model.", "diffusion_model."): value for name, value in saved.items()
        },
        rf"holds 39 tensors, and 39 of this adapter's 40 are among them, without {first}": {
            name: value for name, value in saved.items() if name != first
        },
        r"holds 0 tensors, and 0 of this adapter's 40 .*it is empty": {},
    }
    for text, content in cases.items():
        save_file(content, file)
        with pytest.raises(ValueError, match=text):
            load_adapter(network, tmp_path)
        assert same(dict(network.state_dict()), before)


def test_without_peft_the_remedy_is_one_clear_line(
    smallest: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert entry.main([*smallest, *LORA, f"run_dir={tmp_path / 'run'}"]) == 1
    message = capsys.readouterr().err
    assert 'pip install "vpo-engine[lora]"' in message
    assert message.count("\n") == 1


def test_peft_is_needed_for_adapters_only(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = build_model(small(), Processes.start("cpu"))
    assert all(
        parameter.requires_grad for name, parameter in model.network.named_parameters() if "rope" not in name
    )


# its files


def test_peft_loads_the_saved_adapter_on_a_fresh_published_policy(network: STDiT3, tmp_path: Path) -> None:
    layers = inject_adapter(network, SETTINGS, TARGETS, seed=0, base=WEIGHTS / "policy")
    disturb(network)
    save_adapter(network, tmp_path / "policy")
    assert {file.name for file in (tmp_path / "policy").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    saved = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    sides = [(layer, side) for layer in layers for side in "AB"]
    assert set(saved) == {f"base_model.model.{layer}.lora_{side}.weight" for layer, side in sides}
    config = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(WEIGHTS / "policy")
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 5.0, "LORA")
    assert config["target_modules"] == sorted(SETTINGS.targets)

    loaded = peft.PeftModel.from_pretrained(small_network().eval(), tmp_path / "policy")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs()), network(**inputs()))
    loaded.save_pretrained(tmp_path / "again")
    assert same(load_file(tmp_path / "again" / "adapter_model.safetensors"), saved)
    full = loaded.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(full(**inputs()), network(**inputs()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_an_adapter_comes_back_bit_for_bit(weights: torch.dtype, tmp_path: Path) -> None:
    one, other = small_network().to(weights), small_network().to(weights)
    for policy, seed in ((one, 0), (other, 1)):
        inject_adapter(policy, SETTINGS, TARGETS, seed)
    disturb(one)
    save_adapter(one, tmp_path)
    load_adapter(other, tmp_path)
    assert same(dict(one.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (SETTINGS.model_copy(update={"rank": 2}), r"is \[3, 32\], expected \[2, 32\].*model\.lora\.rank"),
        (
            SETTINGS.model_copy(update={"targets": ("attn.qkv",)}),
            r"holds 40 tensors, and 8 of this adapter's 8 are among them, beside them base_model.*lora\.targets",
        ),
    ],
)
def test_an_adapter_of_other_settings_is_refused_whole(
    network: STDiT3, tmp_path: Path, settings: LoraConfig, text: str
) -> None:
    inject_adapter(network, SETTINGS, TARGETS, seed=0)
    save_adapter(network, tmp_path)
    other = small_network()
    inject_adapter(other, settings, settings.targets, seed=1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=text):
        load_adapter(other, tmp_path)
    assert same(dict(other.state_dict()), before)
    with pytest.raises(FileNotFoundError, match=r"absent/adapter_model\.safetensors"):
        load_adapter(other, tmp_path / "absent")


def test_alpha_follows_the_rank_so_that_the_scale_stays(tmp_path):
    storage = "reference.storage=adapter"
    eight = load_config(None, ["model.lora.rank=8", storage]).model.lora
    whole = load_config(None, ["model.lora={}", storage]).model.lora
    given = load_config(None, ["model.lora.rank=8", "model.lora.alpha=128", storage]).model.lora
    assert (eight.alpha, eight.scale) == (16.0, 2.0)
    assert (whole.rank, whole.alpha, whole.scale) == (64, 128.0, 2.0)
    assert given.scale == 16.0


def test_an_older_run_whose_file_holds_alpha_goes_on_with_the_same_command(tmp_path):
    command = ["model.lora.rank=64", "reference.storage=adapter"]
    saved = tmp_path / "config.yaml"
    text = dump_config(load_config(None, command))
    assert "alpha: 128.0" in text
    saved.write_text(text)
    check_same_run(load_config(None, command), saved)
    saved.write_text(text.replace("rank: 64", "rank: 8"))  # an older run of rank 8 had the scale 16
    other = ["model.lora.rank=8", "reference.storage=adapter"]
    with pytest.raises(ValueError, match=r"model.lora.alpha: 128 -> 16"):
        check_same_run(load_config(None, other), saved)
    check_same_run(load_config(None, [*other, "model.lora.alpha=128"]), saved)
