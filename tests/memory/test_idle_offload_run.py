"""Test whole steps with idle parts offloaded: every part is on the device when used, and results are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from fake_device import FakeDevice
from step_case import candidates_of, step_on
from torch import Tensor, nn

from vpo_engine.build import build_held_out, build_model, build_reward
from vpo_engine.config import Config
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.idle_offload import IdleOffload, module_tensors, needs_of
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.reference.store import build_reference
from vpo_engine.rewards.builtin import Builtin
from vpo_engine.rewards.sprites import SpritesReward

PROMPTS = ("a red circle moving left", "a blue square moving up")
Make = Callable[..., Config]
SETTINGS = {
    "float32": (),
    "offline": ("rollout.source=reference", "reference.refresh_every=null"),
    "int8": ("reference.storage=int8",),
    "exact8": ("reference.storage=exact8", "memory.weights=fp32_master"),
    "stochastic rounding": (
        "reference.storage=bf16",
        "memory.weights=stochastic_rounding",
        "memory.optimizer_bits=8",
    ),
    "adapter": ("reference.storage=adapter", "model.lora.rank=2"),
    "adapter over 4 bits, averaged": (
        "reference.storage=adapter",
        "model.lora.rank=2",
        "memory.base_bits=4",
        "ema.decay=0.9",
    ),
    "fp32 masters, averaged": ("memory.weights=fp32_master", "ema.decay=0.9"),
    "in backward": ("memory.step_in_backward=true", "optimizer.clip=null"),
    "in backward, exact8": (
        "memory.step_in_backward=true",
        "optimizer.clip=null",
        "reference.storage=exact8",
        "memory.weights=stochastic_rounding",
    ),
}


class Run:
    """Two steps, an evaluation and a save, on a device of its own or (None) on none."""

    def __init__(self, config: Config, monkeypatch: pytest.MonkeyPatch, device: FakeDevice | None) -> None:
        torch.manual_seed(0)
        self.device, self.used = device, set[str]()
        idle_offload = IdleOffload(needs_of(config), device)
        monkeypatch.setattr(IdleOffload, "from_config", lambda *_: idle_offload)
        processes = Processes.start("cpu")
        self.model = build_model(config, processes, say=lambda _: None)
        assert self.model.idle_offload is idle_offload
        self.model.prepare(PROMPTS)
        reward = build_reward(config, processes.device, idle_offload)
        with idle_offload.phase("refresh"):
            self.reference = build_reference(config.reference.storage, self.model.network)
            self.algorithm = OnlineVPO(config, self.model, reward, self.reference, processes, idle_offload)
        self.held_out = build_held_out(config, self.model, PROMPTS, reward, processes)
        if device is not None:
            self._watch()

    def _watch(self) -> None:
        """Let every part say whether it is on the device whenever it is used."""
        network, vae, optimizer = self.model.network, self.model.vae, self.algorithm.optimizer
        self._watch_module("policy", network, lambda: module_tensors(network))
        self._watch_module("reference", self.reference.network, self.reference.tensors)
        self._watch_module("vae", vae.spatial_vae.module.decoder, lambda: module_tensors(vae))
        step_one = optimizer._step_one

        def watched(number: int, factor: Tensor | None) -> None:
            self._check("optimizer", [*optimizer.tensors(), *module_tensors(network)])
            step_one(number, factor)

        optimizer._step_one = watched  # type: ignore[method-assign]

    def _watch_module(self, name: str, module: nn.Module, tensors: Callable[[], Sequence[Tensor]]) -> None:
        module.register_forward_pre_hook(lambda *_: self._check(name, tensors()))

    def _check(self, name: str, tensors: Sequence[Tensor]) -> None:
        assert self.device is not None
        self.used.add(name)
        made = [tensor for tensor in tensors if id(tensor) in self.model.idle_offload._known]
        assert self.device.has(made), f"{name} is used while it is not on the device"

    def results(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for number in range(2):
            step = step_on(self.algorithm, PROMPTS, [2 * number, 2 * number + 1])
            found |= {f"{number}.{name}": torch.tensor(value) for name, value in step.metrics.items()}
            found[f"{number}.candidates"] = candidates_of(step)
        with self.algorithm.evaluated_weights():
            found |= self.held_out.evaluate(self.model.network, 1)
            found["clips"] = self.held_out.videos(self.model.network, [1])
        found |= {f"policy.{name}": value for name, value in self.model.network.state_dict().items()}
        found |= {f"reference.{name}": value for name, value in self.reference.state_dict().items()}
        found |= {f"optimizer.{name}": value for name, value in self.algorithm.optimizer.state_dict().items()}
        return found


@pytest.mark.parametrize(
    "name", [name if name == "exact8" else pytest.param(name, marks=pytest.mark.long) for name in SETTINGS]
)
def test_a_run_in_phases_is_the_same_run(small: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    config = small("optimizer.lr=1e-3", "reference.refresh_every=1", "evaluation.prompts=2", *SETTINGS[name])
    plain = Run(config, monkeypatch, None).results()
    device = FakeDevice()
    run = Run(config, monkeypatch, device)
    moved = run.results()
    assert plain.keys() == moved.keys()
    assert all(torch.equal(plain[key], moved[key]) for key in plain)
    assert run.used == {"policy", "reference", "vae", "optimizer"}
    idle_offload = run.model.idle_offload
    for phase in ("rollout", "decode", "update", "optimizer"):
        with idle_offload.phase(phase):
            assert device.live == idle_offload.nbytes(phase), f"{phase}: bytes that no phase gives back"
    assert device.peak < sum(idle_offload.nbytes(phase) for phase in ("decode", "update", "optimizer"))


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("judged", [False, True])
def test_every_part_is_registered_under_its_name(
    small: Make, monkeypatch: pytest.MonkeyPatch, on_host: bool, judged: bool
) -> None:
    """A moving average that lies on the host is no part; the network of the sprites reward is one, in either role."""
    judge = ("reward.kind=builtin", "reward.dimensions=global", "guards.reward.kind=sprites")
    averaged = ("memory.weights=fp32_master", "ema.decay=0.9", f"ema.on_host={on_host}")
    run = Run(small(*averaged, *(judge if judged else ())), monkeypatch, FakeDevice())
    algorithm = run.algorithm
    assert algorithm.average is not None
    policy, reference = module_tensors(run.model.network), run.reference.tensors()
    optimizer, average = algorithm.optimizer.tensors(), algorithm.average.tensors()
    stepped = [*policy, *optimizer]
    scorer = nbytes(module_tensors(SpritesReward().network))
    assert nbytes(stepped) > nbytes(policy)
    assert min(nbytes(reference), nbytes(average), scorer) > 0
    offload = run.model.idle_offload
    assert offload.nbytes("rollout") == nbytes(policy)
    assert offload.nbytes("update") == nbytes([*policy, *reference])
    assert offload.nbytes("optimizer") == nbytes(stepped if on_host else [*stepped, *average])
    assert (offload.nbytes("reward"), offload.nbytes("judge")) == ((0, scorer) if judged else (scorer, 0))


def builtin_scores(reward: Builtin, videos: Tensor, _: Sequence[str]) -> dict[str, Tensor]:
    return dict.fromkeys(reward.dimensions, torch.zeros(len(videos)))


@pytest.mark.parametrize("role", ["reward", "judge"])
def test_the_scorers_of_an_evaluation_are_on_the_device_when_they_score(
    small: Make, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    judge = ("reward.kind=builtin", "reward.dimensions=global", "guards.reward.kind=sprites")
    device, there, score = FakeDevice(), list[bool](), SpritesReward.score
    monkeypatch.setattr(Builtin, "score", builtin_scores)  # the frames are too small for the true ones
    run = Run(small(*(judge if role == "judge" else ())), monkeypatch, device)

    def watched(reward: SpritesReward, *given: object) -> object:
        there.append(device.has(module_tensors(reward.network)))
        return score(reward, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(SpritesReward, "score", watched)
    run.held_out.evaluate(run.model.network, 1)
    assert there == [True]


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of tensors, of which one that is there twice counts once."""
    return sum(each.nbytes for each in {id(one): one for one in tensors}.values())


@pytest.mark.parametrize("moved", [False, True])
def test_decoder_and_reward_take_turns_where_parts_are_moved(
    small: Make, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    calls: list[str] = []
    run = Run(small("rollout.batch_size=2"), monkeypatch, FakeDevice() if moved else None)

    def noted(name: str, method: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object) -> object:
            calls.append(name)
            return method(*given)

        return call

    monkeypatch.setattr(run.model, "decode", noted("decode", run.model.decode))
    monkeypatch.setattr(SpritesReward, "score", noted("score", SpritesReward.score))
    step_on(run.algorithm, PROMPTS, [0, 1])
    assert calls == (["decode"] * 2 + ["score"] * 2 if moved else ["decode", "score"] * 2)


def test_videos_are_encoded_with_the_vae_on_the_device(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(small(), monkeypatch, FakeDevice())
    vae = run.model.vae
    run._watch_module("encoder", vae.spatial_vae.module.encoder, lambda: module_tensors(vae))
    with run.model.idle_offload.phase("rollout"):
        run.model.encode(torch.zeros(1, *run.model.video_size, 3, dtype=torch.uint8))
    assert "encoder" in run.used


def test_a_text_encoder_has_the_device_to_itself(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a plan says, also after policy and reference were made there."""
    device = FakeDevice()
    run = Run(small(), monkeypatch, device)
    network, reference = run.model.network, run.reference
    assert device.has(module_tensors(network)), "policy and reference were made last"
    there: list[bool] = []

    def prepare(prompts: Sequence[str]) -> None:
        there.extend(device.has([tensor]) for tensor in (*module_tensors(network), *reference.tensors()))

    monkeypatch.setattr(run.model._text, "prepare", prepare)
    run.model.prepare(PROMPTS)
    assert there
    assert not any(there)
