"""Test the reference: equality with the policy after a refresh, sharing, saving, and refusals."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from vpo_kernels import paired_dpo_loss

sys.path.insert(0, str(Path(__file__).parent))
from policies import (
    POLICIES,
    inputs,
    on_grid,
    sprites_policy,
    tiny_policy,
)  # a spawned process has no conftest

from vpo_engine.memory.rounding import hold_in_bfloat16
from vpo_engine.models.opensora.blocks import Backends
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.reference.network import block_matrices
from vpo_engine.reference.store import HeldReference, Storage, build_reference
from vpo_engine.reference.weights import Scratch

STORAGES = get_args(Storage)
EXACT = ("copy", "bf16", "exact8", "adapter")
HELD = ("bf16", "int8", "exact8")


def policy_for(storage: str, name: str = "tiny", dtype: torch.dtype = torch.float32) -> STDiT3:
    """A policy that the storage fits, with weights on bfloat16's grid."""
    policy = POLICIES[name](dtype)
    on_grid(policy)
    if storage == "adapter":
        add_adapter(policy)
    return policy


def add_adapter(policy: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["attn.qkv", "attn.proj"], lora_dropout=0.0)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(settings, policy)
    move(policy, 0.05)
    policy.eval()


@torch.no_grad()
def move(policy: nn.Module, size: float = 1e-3, seed: int = 1) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=random).to(parameter.dtype))


def move_followed(policy: nn.Module, reference: HeldReference) -> None:
    """The policy goes on by a bfloat16 step, as an optimizer takes it."""
    with reference.preserve(list(policy.parameters())):
        move(policy, seed=2)
        on_grid(policy)


def margin_and_loss(policy: Tensor, reference: Tensor) -> tuple[float, float]:
    winner, loser = (torch.randn_like(policy[:1]) for _ in "wl")
    out = paired_dpo_loss(*policy.chunk(2), *reference.chunk(2), winner, loser, beta=5000.0)
    return float(out.margin), float(out.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("storage", EXACT)
def test_right_after_a_refresh_the_margin_is_zero(storage: Storage, name: str, dtype: torch.dtype) -> None:
    policy = policy_for(storage, name, dtype)
    reference = build_reference(storage, policy)
    arguments = inputs(policy)
    for _ in range(2):
        predicted, frozen = policy(**arguments), reference(**arguments)
        assert predicted.requires_grad
        assert not frozen.requires_grad
        assert torch.equal(predicted, frozen)
        margin, loss = margin_and_loss(predicted.detach(), frozen)
        assert margin == 0.0
        assert loss == float(torch.tensor(2.0).log())
        move(policy)
        on_grid(policy)
        assert not torch.equal(policy(**arguments), reference(**arguments))
        reference.refresh(policy)


@pytest.mark.parametrize("storage", EXACT)
def test_a_sample_alone_has_a_margin_of_zero_too(storage: Storage) -> None:
    """In a batch of one, tensors that change their axes are not contiguous unless they are copied, and torch multiplies
    those by trained weights in another order than by frozen ones."""
    policy = policy_for(storage, "sprites", torch.float32)
    reference, arguments = build_reference(storage, policy), inputs(policy, rows=1)
    assert torch.equal(policy(**arguments), reference(**arguments))


@pytest.mark.parametrize("storage", ["copy", "bf16", "int8", "exact8"])
def test_layers_that_are_kept_in_float32_are_copied_by_every_storage(storage: Storage) -> None:
    """Their weights are no bfloat16 values, so an encoded copy would differ from the policy, or be refused."""
    policy = sprites_policy()
    move(policy)
    hold_in_bfloat16(policy, "stochastic_rounding", torch.float32, ["mlp"])
    reference, own = build_reference(storage, policy), policy.state_dict()
    stored = reference.state_dict()
    kept = [name for name in own if ".mlp." in name]
    assert kept
    assert all(torch.equal(stored[name], own[name]) for name in kept)
    if storage in EXACT:
        arguments = inputs(policy)
        assert torch.equal(policy(**arguments), reference(**arguments))


@pytest.mark.parametrize("storage", ["copy", "bf16"])
def test_under_autocast_weights_off_the_grid_are_exact_too(storage: Storage) -> None:
    """Autocast rounds the policy's weights as the storage has done."""
    policy = sprites_policy()
    move(policy)
    reference = build_reference(storage, policy)
    arguments = inputs(policy)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(policy(**arguments), reference(**arguments))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("storage", HELD)
def test_predictions_are_those_of_the_policy_with_the_decoded_weights(
    storage: Storage, autocast: bool
) -> None:
    policy = sprites_policy()
    move(policy)
    if storage == "exact8":
        on_grid(policy)
    reference = build_reference(storage, policy)
    other = copy.deepcopy(policy)
    move_followed(policy, reference)
    with torch.no_grad():
        for name, weight in decoded(reference).items():
            other.get_parameter(name).copy_(weight)
    arguments = inputs(policy)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(other(**arguments), reference(**arguments))


def decoded(reference: HeldReference) -> dict[str, Tensor]:
    """The reference's matrices in float32."""
    scratch = Scratch()
    scratch.numel = max(weight.scratch_numel for weight in reference._held.values())
    return {name: weight.decode(torch.float32, scratch).clone() for name, weight in reference._held.items()}


def test_block_matrices_are_what_the_blocks_multiply_by() -> None:
    names = set(block_matrices(tiny_policy()))
    layers = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
    assert names == {
        f"{kind}_blocks.{number}.{layer}"
        for kind in ("spatial", "temporal")
        for number in range(2)
        for layer in (*layers, "mlp.fc1", "mlp.fc2")
    }


@pytest.mark.parametrize(
    ("storage", "per_weight"), [("copy", 4), ("bf16", 2), ("int8", 1 + 2 / 64), ("exact8", 1)]
)
def test_bytes_are_those_of_the_format(storage: Storage, per_weight: float) -> None:
    policy = on_grid(sprites_policy())
    frozen = sum(p.nbytes for p in policy.parameters() if not p.requires_grad)
    assert frozen > 0
    matrices = sum(layer.weight.numel() for layer in block_matrices(policy).values())
    everything = sum(tensor.nbytes for tensor in policy.state_dict().values())
    reference = build_reference(storage, policy)
    assert reference.nbytes == everything - frozen - round((4 - per_weight) * matrices)
    assert reference.nbytes == sum(tensor.nbytes for tensor in reference.state_dict().values())
    assert reference.bytes_per_weight == per_weight


def test_an_adapter_costs_the_adapter_only() -> None:
    policy = policy_for("adapter")
    trained = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    buffers = sum(buffer.nbytes for buffer in policy.buffers())
    reference = build_reference("adapter", policy)
    assert reference.nbytes == trained + buffers
    shared = {id(p) for p in policy.parameters() if not p.requires_grad}
    assert shared < {id(tensor) for tensor in reference.tensors()}


@pytest.mark.parametrize("storage", EXACT)
def test_the_policy_moves_to_other_storages_and_leaves_none_alive(storage: Storage) -> None:
    policy = policy_for(storage)
    reference = build_reference(storage, policy)
    arguments = inputs(policy)
    before = reference(**arguments)
    old = [weakref.ref(parameter.untyped_storage()) for parameter in policy.parameters()]
    for parameter in policy.parameters():
        parameter.data = parameter.data.clone()
    gc.collect()
    assert not any(storage() for storage in old)
    assert torch.equal(reference(**arguments), before)


@pytest.mark.parametrize("storage", STORAGES)
def test_everything_that_a_forward_reads_is_named(storage: Storage) -> None:
    """The same objects each time; their data may go elsewhere and come back, as the offload of idle parts has it."""
    policy = policy_for(storage)
    reference = build_reference(storage, policy)
    arguments = inputs(policy)
    before = reference(**arguments)
    tensors = reference.tensors()
    assert all(one is other for one, other in zip(tensors, reference.tensors(), strict=True))
    shared = [p for p in policy.parameters() if not p.requires_grad]
    if storage == "exact8":
        shared += [layer.weight for layer in block_matrices(policy).values()]
    assert sum(t.nbytes for t in tensors) == reference.nbytes + sum(t.nbytes for t in shared)
    kept = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = torch.zeros_like(tensor)
    assert not torch.equal(reference(**arguments), before)
    for tensor, data in zip(tensors, kept, strict=True):
        tensor.data = data.clone()
    assert torch.equal(reference(**arguments), before)


@pytest.mark.parametrize("storage", HELD)
def test_one_buffer_serves_all_layers_and_lives_for_a_call(storage: Storage, monkeypatch) -> None:
    taken: list[Tensor] = []
    take = Scratch.take

    def watched(self, *args):
        taken.append(take(self, *args))
        return taken[-1]

    monkeypatch.setattr(Scratch, "take", watched)
    policy = policy_for(storage)
    reference = build_reference(storage, policy)
    reference(**inputs(policy))
    assert len(taken) == len(block_matrices(policy))
    assert {tensor.data_ptr() for tensor in taken} == {taken[0].data_ptr()}
    storages = weakref.ref(taken[0].untyped_storage())
    assert storages().nbytes() == 4 * max(layer.weight.numel() for layer in block_matrices(policy).values())
    taken.clear()
    assert storages() is None


def test_settings_that_the_policy_is_given_later_apply_to_the_reference() -> None:
    policy = policy_for("int8")
    reference = build_reference("int8", policy)
    policy.choose_backends("sdpa", "reference", dtype=torch.float32)
    policy.gradient_checkpointing = True
    policy.train()
    reference(**inputs(policy))
    mirror = reference.network
    block = mirror.get_submodule("spatial_blocks.0")
    assert block.backends == Backends("sdpa", "reference")
    assert mirror.gradient_checkpointing
    assert not mirror.training


@pytest.mark.parametrize("storage", STORAGES)
def test_saved_and_put_back_it_is_the_same_bit_for_bit(storage: Storage) -> None:
    policy = policy_for(storage)
    reference = build_reference(storage, policy)
    saved = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    arguments = inputs(policy)
    before = reference(**arguments)
    again_policy = policy_for(storage)
    move(again_policy)
    on_grid(again_policy)
    again = build_reference(storage, again_policy)
    again_policy.load_state_dict(policy.state_dict())
    again.load_state_dict(saved)
    assert torch.equal(again(**arguments), before)
    found = again.state_dict()
    assert found.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in found.items())


@pytest.mark.parametrize("here", STORAGES[:4])
@pytest.mark.parametrize("saved", STORAGES[:4])
def test_another_storages_state_is_refused_by_name(saved: Storage, here: Storage) -> None:
    if saved == here:
        return
    policy = policy_for(here)
    state = build_reference(saved, policy).state_dict()
    reference = build_reference(here, policy)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    named = saved if saved in ("int8", "exact8") else "copy or bf16"
    with pytest.raises(
        ValueError, match=f"does not fit reference.storage={here}: .*reference.storage={named}"
    ):
        reference.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference.state_dict().items())


@pytest.mark.parametrize("storage", ["copy", "int8"])
def test_a_state_with_a_missing_an_unknown_or_a_misshapen_tensor_is_refused(storage: Storage) -> None:
    policy = policy_for(storage)
    reference = build_reference(storage, policy)
    state = reference.state_dict()
    name = "final_layer.linear.bias"
    with pytest.raises(ValueError, match=f"{name} is missing"):
        reference.load_state_dict({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(ValueError, match=r"x\.y is not stored here"):
        reference.load_state_dict({**state, "x.y": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=rf"{name}: part '' is torch.float32 \[3\], expected torch.float32 \[32\]"
    ):
        reference.load_state_dict({**state, name: torch.zeros(3)})
    with pytest.raises(ValueError, match=r"part '' is torch.float64 \[32\], expected torch.float32 \[32\]"):
        reference.load_state_dict({**state, name: state[name].double()})


def test_an_adapter_needs_a_frozen_base() -> None:
    policy = tiny_policy().requires_grad_(True)
    with pytest.raises(ValueError, match=r"all parameters of this policy are trained; set model\.lora"):
        build_reference("adapter", policy)


def test_a_policy_without_blocks_is_refused_where_blocks_are_encoded() -> None:
    with pytest.raises(ValueError, match=r"storage=int8 .* \(Sequential\) has none"):
        build_reference("int8", nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("storage", STORAGES)
def test_it_runs_under_fake_tensors(storage: Storage) -> None:
    """Refresh, forward, a step of the policy: with the shapes of a plan, and the bytes of the real store."""
    policy = policy_for(storage)
    nbytes = build_reference(storage, policy).nbytes
    mode = FakeTensorMode()
    faked(policy, mode)
    with mode:
        reference = build_reference(storage, policy)
        assert reference.nbytes == nbytes
        arguments = inputs_under_fake(policy)
        assert reference(**arguments).shape == policy(**arguments).shape
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        with reference.preserve(parameters):
            move(policy)
        reference.refresh(policy)
        assert reference.nbytes == nbytes


def faked(policy: nn.Module, mode: FakeTensorMode) -> None:
    for module in policy.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                fake = None if tensor is None else mode.from_tensor(tensor.detach())
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, tensor.requires_grad)
                tensors[name] = fake


def inputs_under_fake(policy: STDiT3) -> dict[str, Tensor | float]:
    settings = policy.settings
    return {
        "x": torch.randn(2, settings.in_channels, 2, 6, 4),
        "timestep": torch.rand(2),
        "y": torch.randn(2, 1, 5, settings.caption_channels),
        "fps": 24.0,
        "height": 48.0,
        "width": 32.0,
    }


def test_a_buffer_of_the_policy_that_changes_reaches_the_reference_at_a_refresh_only() -> None:
    policy = torch.nn.Linear(2, 2)
    policy.register_buffer("scale", torch.ones(2))
    reference = build_reference("copy", policy)
    policy.scale.mul_(3)
    assert torch.equal(reference.state_dict()["scale"], torch.ones(2))
    reference.refresh(policy)
    assert torch.equal(reference.state_dict()["scale"], policy.scale)
