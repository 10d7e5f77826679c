"""Test the offload of idle parts: where tensors are in each phase, what is copied, and that values do not change.

A second region of CPU memory is treated as the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from fake_device import FakeDevice
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vpo_engine.config import Config
from vpo_engine.data.embeddings import EmbeddingCache
from vpo_engine.data.text_source import TextSource
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.idle_offload import (
    CudaMover,
    IdleOffload,
    Needs,
    PartName,
    Phase,
    module_tensors,
    needs_of,
)
from vpo_engine.protocols import TextEmbedding

Make = Callable[..., Config]
STEP: tuple[Phase, ...] = ("rollout", "decode", "reward", "update", "optimizer")


class Toy:
    """A step with all five parts, in phases: every part is used where, and only where, it is needed."""

    def __init__(self, needs: dict[PartName, Needs] | None = None) -> None:
        torch.manual_seed(0)
        self.policy = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, affine=False), nn.Linear(16, 8))
        self.policy.eval()
        self.reference = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.vae, self.reward = nn.Linear(8, 32), nn.Linear(32, 3)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-2)
        modules: dict[PartName, nn.Module] = {
            "policy": self.policy,
            "reference": self.reference,
            "vae": self.vae,
            "reward": self.reward,
        }
        self.sizes = {name: nbytes(module_tensors(part)) for name, part in modules.items()}
        self.device = FakeDevice()
        self.idle_offload = IdleOffload(needs or {}, self.device if needs else None)
        for name, part in modules.items():
            self.idle_offload.register(name, lambda part=part: module_tensors(part))
        self.idle_offload.register("optimizer", lambda: optimizer_tensors(self.optimizer))

    def step(self, number: int) -> Tensor:
        phase = self.idle_offload.phase
        noise = torch.randn(6, 8, generator=torch.Generator().manual_seed(number))
        with phase("rollout"), torch.no_grad():
            latents = self.policy(noise)
        with phase("decode"), torch.no_grad():
            videos = self.vae(latents)
        with phase("reward"), torch.no_grad():
            scores = self.reward(videos)
        with phase("update"):
            loss = (self.policy(noise) - self.reference(latents) * scores.mean()).square().mean()
            loss.backward()
        with phase("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        if number % 2:
            with phase("refresh"), torch.no_grad():
                self.reference.weight.copy_(self.policy[0].weight[:8])
        return loss.detach()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of an optimizer's state without the step counters, which torch keeps on the host."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in values if torch.is_tensor(value) and value.dim() > 0]


def nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def default_needs(small: Make, *overrides: str) -> dict[PartName, Needs]:
    return needs_of(small(*overrides))


def test_a_run_in_phases_equals_one_without_bit_for_bit(small: Make) -> None:
    plain, moved = Toy(), Toy(default_needs(small))
    objects = [id(tensor) for tensor in module_tensors(moved.policy)]
    for number in range(5):
        assert torch.equal(plain.step(number), moved.step(number))
    pairs = zip(module_tensors(plain.policy), module_tensors(moved.policy), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert objects == [id(tensor) for tensor in module_tensors(moved.policy)]
    assert all(
        torch.equal(a, b)
        for a, b in zip(optimizer_tensors(plain.optimizer), optimizer_tensors(moved.optimizer), strict=True)
    )
    assert plain.device.loaded == plain.device.stored == 0


def test_live_bytes_of_every_phase_are_those_of_its_parts(small: Make) -> None:
    toy = Toy(default_needs(small))
    sizes, device = toy.sizes, toy.device
    assert device.live == 0, "registered, and needed by no phase yet"
    toy.step(0)
    moments = nbytes(optimizer_tensors(toy.optimizer))
    expected = {
        "rollout": sizes["policy"],
        "evaluation": sizes["policy"],
        "decode": sizes["vae"],
        "reward": sizes["reward"],
        "update": sizes["policy"] + sizes["reference"],
        "optimizer": sizes["policy"] + moments,
        "refresh": sizes["policy"] + sizes["reference"],
    }
    device.peak = 0
    phases: tuple[Phase, ...] = (
        "rollout",
        "evaluation",
        "decode",
        "reward",
        "update",
        "optimizer",
        "refresh",
        "decode",
    )
    for phase in phases:
        with toy.idle_offload.phase(phase):
            assert device.live == toy.idle_offload.nbytes(phase) == expected[phase], phase
    assert device.peak == max(expected.values()), "the largest phase, also while parts change places"


def test_what_did_not_change_is_not_copied_back(small: Make) -> None:
    toy = Toy(default_needs(small))
    sizes, device = toy.sizes, toy.device
    assert device.stored == sum(sizes.values()), "once, when registered"
    toy.step(0)
    assert device.stored == sum(sizes.values()), "all but the optimizer change nothing"
    moments = nbytes(optimizer_tensors(toy.optimizer))
    for _ in range(2):
        before = device.stored, device.loaded
        toy.step(2)
        moved = device.stored - before[0], device.loaded - before[1]
        stored = moments + sizes["policy"]
        loaded = sizes["vae"] + sizes["reward"] + sizes["policy"] + sizes["reference"] + moments
        assert moved == (stored, loaded), "the policy stays from the optimizer's step through the rollout"


def test_repeated_and_nested_phases_cost_nothing(small: Make) -> None:
    toy = Toy(default_needs(small))
    with toy.idle_offload.phase("decode"):
        moves = toy.device.loaded, toy.device.stored, toy.device.waits
        with toy.idle_offload.phase("decode"):
            pass
    with toy.idle_offload.phase("decode"):
        assert (toy.device.loaded, toy.device.stored, toy.device.waits) == moves


def test_an_enclosing_phase_gets_back_what_it_needs(small: Make) -> None:
    toy = Toy(default_needs(small))
    with toy.idle_offload.phase("update"):
        with toy.idle_offload.phase("decode"):
            assert toy.device.live == toy.idle_offload.nbytes("decode")
        assert toy.device.live == toy.idle_offload.nbytes("update")
        with pytest.raises(RuntimeError, match="out of luck"), toy.idle_offload.phase("rollout"):
            raise RuntimeError("out of luck")
        assert toy.device.live == toy.idle_offload.nbytes("update")


def test_one_wait_a_phase_and_none_where_nothing_is_copied(small: Make) -> None:
    toy = Toy(default_needs(small))
    waits = toy.device.waits
    for phase in STEP[:4]:
        with toy.idle_offload.phase(phase):
            assert toy.device.waits == waits
    with toy.idle_offload.phase("optimizer"):
        pass
    with toy.idle_offload.phase("decode"):
        assert toy.device.waits == waits + 1


def test_views_of_one_storage_move_once_and_stay_views() -> None:
    flat = torch.arange(40, dtype=torch.float32)
    first, second = flat[:16].view(4, 4).t(), flat[8:24].detach()
    del flat
    own = nn.Parameter(torch.arange(3.0))
    device = FakeDevice()
    both = Needs(frozenset({"update"}))
    idle_offload = IdleOffload({"policy": both, "reference": both}, device)
    idle_offload.register("policy", lambda: [first, second, own])
    idle_offload.register("reference", lambda: [second, own, own])
    assert device.stored == 172
    with idle_offload.phase("update"):
        assert device.loaded == device.live == idle_offload.nbytes("update") == 172
        first[0, 2] = -1
        assert (float(second[0]), first.stride()) == (-1, (1, 4))
        assert first.untyped_storage()._cdata == second.untyped_storage()._cdata
        assert own.tolist() == [0, 1, 2]
        assert own.requires_grad


def test_an_alias_made_on_the_host_follows_the_original() -> None:
    weights = [torch.full((3,), float(number)) for number in range(3)]
    device = FakeDevice()
    idle_offload = IdleOffload(
        {"policy": Needs(frozenset({"update"})), "reference": Needs(frozenset({"update"}))}, device
    )
    idle_offload.register("policy", lambda: weights)
    alias = weights[1].detach()
    idle_offload.register("reference", lambda: [alias])
    with idle_offload.phase("update"):
        assert device.loaded == 36
        weights[1].zero_()
        assert alias.tolist() == [0, 0, 0]


def test_a_write_in_a_phase_that_is_said_to_change_nothing_is_not_lost(small: Make) -> None:
    toy = Toy(default_needs(small))
    with toy.idle_offload.phase("rollout"):
        state = {name: torch.full_like(value, 2) for name, value in toy.policy.state_dict().items()}
        toy.policy.load_state_dict(state)
    with toy.idle_offload.phase("decode"):
        assert all(bool((tensor == 2).all()) for tensor in module_tensors(toy.policy))


def test_a_write_on_the_host_reaches_the_device(small: Make) -> None:
    toy = Toy(default_needs(small))
    with toy.idle_offload.phase("decode"), torch.no_grad():
        toy.policy[0].weight.fill_(3)
    with toy.idle_offload.phase("update"):
        assert bool((toy.policy[0].weight == 3).all())


def test_tensors_that_are_exchanged_for_others_are_followed() -> None:
    """As the outliers of an 8-bit reference are at every optimizer step."""
    held: dict[str, Tensor] = {"values": torch.zeros(4), "outliers": torch.arange(10.0)}
    device = FakeDevice()
    idle_offload = IdleOffload({"reference": Needs(frozenset({"update"}), frozenset({"update"}))}, device)
    idle_offload.register("reference", lambda: list(held.values()))
    parameter = held["values"]
    for count in (7, 12):
        with idle_offload.phase("update"):
            held["outliers"] = torch.arange(float(count))
            parameter.data = torch.full((4,), float(count))
        with idle_offload.phase("decode"):
            assert idle_offload.nbytes("update") == 16 + 4 * count
            assert held["outliers"].tolist() == list(range(count))
            assert parameter.tolist() == [count] * 4
            assert device.live == 0


def test_small_tensors_share_host_memory_and_large_ones_have_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slab = 4096
    monkeypatch.setattr("vpo_engine.memory.idle_offload.SLAB_BYTES", slab)
    sizes = [1000, 2048, 1000, 300, slab + 1, 100, 17]
    parts = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    device = FakeDevice()
    idle_offload = IdleOffload({"vae": Needs(frozenset({"decode"}))}, device)
    idle_offload.register("vae", lambda: parts)
    assert device.allocated == [slab, slab, slab + 256, 512], "never more than a slab beyond what is held"
    for _ in range(3):
        with idle_offload.phase("decode"):
            assert device.live == sum(sizes)
        with idle_offload.phase("rollout"):
            assert device.live == 0
    assert len(device.allocated) == 4, "reused"


def test_weights_can_be_saved_from_the_host(small: Make, tmp_path: object) -> None:
    toy = Toy(default_needs(small))
    expected = Toy().policy.state_dict()
    with toy.idle_offload.phase("decode"):
        save_file(toy.policy.state_dict(), f"{tmp_path}/policy.safetensors")
    found = load_file(f"{tmp_path}/policy.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_each_part_needs(small: Make) -> None:
    base = default_needs(small)
    assert base["policy"].phases == {"rollout", "evaluation", "update", "optimizer", "refresh"}
    assert base["reference"].phases == {"update", "refresh"}
    assert base["optimizer"].phases == base["policy"].changed == {"optimizer"}
    assert base["vae"].changed == base["reward"].changed == set()
    offline = default_needs(small, "rollout.source=reference")
    assert "rollout" in offline["policy"].phases, "guidance takes the policy's embedding of no caption"
    assert "rollout" in offline["reference"].phases
    exact = default_needs(
        small, "rollout.source=reference", "reference.storage=exact8", "memory.weights=fp32_master"
    )
    assert "optimizer" in exact["reference"].changed & exact["reference"].phases
    unused = ("rollout.candidates=4", "objective.timesteps_per_pair=1", "reference.refresh_every=200")
    followed = default_needs(small, "method=refl", *unused)
    assert all("reward_gradient" in followed[name].phases for name in ("policy", "vae", "reward"))
    fused = default_needs(small, "memory.step_in_backward=true", "optimizer.clip=null")
    assert "update" in fused["optimizer"].phases & fused["policy"].changed


def test_on_a_cpu_and_without_offload_nothing_moves(small: Make) -> None:
    for idle_offload in (
        IdleOffload.from_config(small("memory.offload_idle=true"), torch.device("cpu")),
        IdleOffload.from_config(small(), torch.device("cuda")),
        IdleOffload.disabled(),
    ):
        weight = torch.zeros(3)
        pointer = weight.data_ptr()
        idle_offload.register("policy", lambda weight=weight: [weight])
        with idle_offload.phase("decode"):
            assert weight.data_ptr() == pointer
        with pytest.raises(ValueError, match=r"memory.offload_idle=false.*set memory.offload_idle=true"):
            idle_offload.nbytes("decode")


def test_the_text_encoder_is_gone_after_the_text_is_prepared() -> None:
    class Encoder:
        def encode(self, prompts: list[str]) -> TextEmbedding:
            return TextEmbedding(
                torch.zeros(len(prompts), 2, 3), torch.ones(len(prompts), 2, dtype=torch.bool)
            )

    alive: list[weakref.ref[Encoder]] = []

    def load() -> Encoder:
        encoder = Encoder()
        alive.append(weakref.ref(encoder))
        return encoder

    source = TextSource(EmbeddingCache(None, "test"), load, Processes.start("cpu"))
    source.prepare(["one", "two"])
    assert len(alive) == 1
    assert alive[0]() is None
    source.prepare(["two"])
    assert len(alive) == 1, "nothing missing, nothing loaded"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(small: Make) -> None:
    device = torch.device("cuda")
    big = nn.Linear(2048, 2048, device=device)
    expected = big.weight.detach().cpu()
    idle_offload = IdleOffload(default_needs(small), CudaMover(device))
    idle_offload.register("vae", lambda: module_tensors(big))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    assert big.weight.device.type == "cpu"
    assert big.weight.is_pinned()
    for _ in range(2):
        with idle_offload.phase("decode"):
            assert big.weight.device.type == "cuda"
            assert torch.cuda.memory_allocated() - before >= idle_offload.nbytes("decode")
            assert torch.equal(big.weight.cpu(), expected)
        with idle_offload.phase("rollout"):
            assert torch.cuda.memory_allocated() == before
            assert torch.equal(big.weight, expected)


def test_the_teacher_is_there_while_the_gradient_of_the_reward_is_made(small: Make) -> None:
    """T2V-Turbo asks its frozen reference for the target in that phase."""
    unused = ("rollout.candidates=4", "objective.timesteps_per_pair=1", "reference.refresh_every=200")
    needs = default_needs(small, "method=t2v_turbo", *unused)
    there = {name for name, part in needs.items() if "reward_gradient" in part.phases}
    assert there == {"policy", "reference", "vae", "reward"}


def test_the_optimizers_tensors_are_copied_back_wherever_it_steps(small: Make) -> None:
    """bitsandbytes' kernels write moments of 8 bits without telling torch, which then sees no change."""
    early = default_needs(small, "memory.step_in_backward=true", "optimizer.clip=null")
    for needs, phases in ((default_needs(small), {"optimizer"}), (early, {"optimizer", "update"})):
        assert needs["optimizer"].changed == needs["optimizer"].phases == phases
