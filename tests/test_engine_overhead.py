"""Test what a step of Algorithm 1 does outside of model, VAE and reward: operators, bytes, a bound on its time.

Operators are counted below autograd, on the CPU. Outside is what runs neither in a forward pass of policy, reference,
decoder or reward, nor in the policy's backward pass; the optimizer and the refresh are outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from step_case import step_on
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vpo_engine.build import build_model, build_reward
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.method import embed_prompts
from vpo_engine.metrics.candidate_statistics import WatchedReward, video_statistics
from vpo_engine.metrics.throughput import count_row_flops
from vpo_engine.models.opensora.geometry import pixel_size
from vpo_engine.models.opensora.model import Geometry, OpenSora
from vpo_engine.models.opensora.rectified_flow import RectifiedFlow
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.planning.estimate import TRAFFIC_EFFICIENCY
from vpo_engine.planning.gpus import GPUS
from vpo_engine.protocols import TextEmbedding
from vpo_engine.reference.store import build_reference
from vpo_engine.values import Prompt

PROMPTS = ("a red circle moving left", "a blue square moving up")
LAUNCH = 10e-6
"""Seconds that an operator takes however small it is: more than twice what eager torch takes to issue one."""
RANDOM_RATE = 50e6
"""Normal numbers per second of one CPU core; measured: 100 to 200 million."""
WEIGHTS, TENSORS = 1_207_643_972, 973
"""Of STDiT3-XL/2 (tests/models/test_real_size.py)."""


class Outside(TorchDispatchMode):
    """Operators while no part is inside; ``per_weight`` ones are kept apart, since they grow with the network."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.per_weight = False
        self.operators: list[tuple[str, int]] = []
        self.weight_operators: list[tuple[str, int]] = []
        self.random = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self.inside and not function.is_view:
            tensors = [leaf for leaf in tree_iter((args, kwargs, result)) if isinstance(leaf, Tensor)]
            found = (str(function), sum(tensor.numel() * tensor.element_size() for tensor in tensors))
            (self.weight_operators if self.per_weight else self.operators).append(found)
            if "randn" in found[0] or "normal" in found[0]:
                self.random += result.numel()
        return result

    def during(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, as a part that does not count."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            self.inside += 1
            try:
                return call(*args, **kwargs)
            finally:
                self.inside -= 1

        return inside

    def growing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, as one whose work is proportional to the network's weights."""

        def apart(*args: Any, **kwargs: Any) -> Any:
            self.per_weight = True
            try:
                return call(*args, **kwargs)
            finally:
                self.per_weight = False

        return apart


@contextmanager
def counting(algorithm: OnlineVPO, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    outside = Outside()
    network = algorithm.model.network
    for owner, name in (
        (network, "forward"),
        (algorithm.reference.network, "forward"),
        (algorithm.model.vae, "decode_uint8"),
        (algorithm.reward, "score"),
    ):
        monkeypatch.setattr(owner, name, outside.during(getattr(owner, name)))
    for owner, name in (
        (algorithm.optimizer, "begin"),
        (algorithm.optimizer, "step"),
        (algorithm.reference, "refresh"),
    ):
        monkeypatch.setattr(owner, name, outside.growing(getattr(owner, name)))

    def enter(*_: Any) -> None:
        outside.inside = 1

    backward = torch.Tensor.backward

    def leave(*args: Any, **kwargs: Any) -> None:
        """The engine's part of a backward pass ends where the network's begins."""
        backward(*args, **kwargs)
        outside.inside = 0

    monkeypatch.setattr(torch.Tensor, "backward", leave)
    handle = network.register_full_backward_pre_hook(enter)
    with outside:
        yield outside
    handle.remove()


def operators(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Outside:
    """Of a second step on the sprites world, with everything that is made once made already."""
    config = load_config(
        None,
        ["rollout.guidance=7", "objective.timesteps_per_pair=1", "reference.refresh_every=1", *overrides],
    )
    processes = Processes.start("cpu")
    model = build_model(config, processes, lambda _: None)
    model.prepare(PROMPTS)
    algorithm = OnlineVPO(
        config,
        model,
        build_reward(config, processes.device),
        build_reference("copy", model.network),
        processes,
    )
    step_on(algorithm, PROMPTS, [0, 1])
    prompts = embed_prompts(model, PROMPTS, [2, 3])
    with monkeypatch.context() as patch, counting(algorithm, patch) as outside:
        algorithm.step(prompts)
    return outside


@pytest.mark.long
def test_a_sampling_step_issues_few_operators_and_as_many_for_any_number_of_candidates(monkeypatch) -> None:
    few = operators(monkeypatch, "rollout.steps=1", "rollout.candidates=2")
    more_steps = operators(monkeypatch, "rollout.steps=3", "rollout.candidates=2")
    more_candidates = operators(monkeypatch, "rollout.steps=1", "rollout.candidates=4")
    each = (len(more_steps.operators) - len(few.operators)) / 2
    assert each <= 10, [name for name, _ in more_steps.operators]
    assert len(more_candidates.operators) == len(few.operators)
    with Outside() as watched:  # what the watch measures of a group of videos, whatever their number
        video_statistics(torch.zeros(4, 17, 32, 32, 3, dtype=torch.uint8))
    assert len(watched.operators) < 700
    monkeypatch.setattr(WatchedReward, "take", lambda *_: {})
    unwatched = operators(monkeypatch, "rollout.steps=1", "rollout.candidates=2")
    assert 0 < len(few.operators) - len(unwatched.operators) < 120  # its sums over a step's candidates
    assert len(unwatched.operators) - 2 * each - len(watched.operators) < 170


class Hollow(nn.Module):
    """A network that predicts without computing, with weights to be updated."""

    def __init__(self, network: STDiT3, weights: int) -> None:
        super().__init__()
        self.config, self.dtype, self.sequence = network.config, torch.float32, network.sequence
        self.weight = nn.Parameter(torch.zeros(weights))
        self.y_embedder = SimpleNamespace(y_embedding=torch.zeros(300, network.settings.caption_channels))

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        return torch.cat([x, x], dim=1) * (1 + self.weight[0])


class HollowVAE(nn.Module):
    spatial_factor = 8

    def __init__(self, size: tuple[int, int, int], geometry: Geometry) -> None:
        super().__init__()
        self._size, self._geometry = size, geometry

    def latent_size(self, *_: int) -> tuple[int, int, int]:
        return self._size

    def decode_uint8(self, latents: Tensor, *_: object) -> Tensor:
        size = self._geometry
        video = torch.zeros(1, 1, 1, 1, 1, dtype=torch.uint8)
        return video.expand(len(latents), size.num_frames, size.height, size.width, 3)


class CountingUp:
    dimensions = ("temporal_consistency",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"temporal_consistency": torch.arange(float(len(prompts)))}


def hollow_step(config: Config, size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> Outside:
    """A step at full size in which model, VAE and reward do nothing."""
    settings, weights = config.model, 1_000_000
    geometry = Geometry(*pixel_size(settings.resolution, settings.aspect), settings.num_frames, settings.fps)
    with torch.device("meta"):
        network = STDiT3.from_config({})
    model = OpenSora(
        Hollow(network, weights),  # type: ignore[arg-type]
        HollowVAE(size, geometry),  # type: ignore[arg-type]
        text=None,  # type: ignore[arg-type]
        geometry=geometry,
        flow=RectifiedFlow(),
        device=torch.device("cpu"),
    )
    processes = Processes.start("cpu")
    algorithm = OnlineVPO(config, model, CountingUp(), build_reference("copy", model.network), processes)
    pairs = config.pairs_per_step
    text = TextEmbedding(torch.zeros(pairs, 300, 4096), torch.ones(pairs, 300, dtype=torch.bool))
    prompts = [Prompt("a prompt", text[row : row + 1], row) for row in range(pairs)]
    with counting(algorithm, monkeypatch) as outside:
        algorithm.step(prompts)
    return outside


def seconds_of_the_engine(outside: Outside, gpu: str) -> float:
    """From above: every operator waits for its launch and for its bytes, random numbers for one CPU core.

    The reference is refreshed in the step, and the optimizer updates one tensor after the other.
    """
    rate = GPUS[gpu].bandwidth
    assert rate is not None
    bandwidth = TRAFFIC_EFFICIENCY * rate
    moved = sum(size for _, size in outside.operators) / bandwidth
    grown = sum(size for _, size in outside.weight_operators) / 1_000_000 * WEIGHTS / bandwidth
    launches = LAUNCH * (len(outside.operators) + TENSORS * len(outside.weight_operators))
    return moved + grown + launches + outside.random / RANDOM_RATE


def seconds_of_the_model(config: Config, size: tuple[int, int, int], gpu: str) -> float:
    """From below: rollout and update alone, without decoder and reward, faster than the planner takes them to be."""
    with torch.device("meta"):
        network = STDiT3.from_config({"freeze_y_embedder": True})

    def predict(network: Any, latents: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        return network(latents, t, text.embeddings[:, None], text.mask, fps=24.0, height=720, width=1280)

    shape = (4, *size)
    model: Any = SimpleNamespace(
        network=network, latent_shape=shape, predict=predict, row_flops=lambda _: None
    )
    text = TextEmbedding(torch.zeros(1, 1, 4096), torch.ones(1, 1, dtype=torch.bool))
    row = count_row_flops(model, text)
    rollout = 2 * config.rollout.candidates * config.rollout.steps * row.forward
    rate = GPUS[gpu].flops
    assert rate is not None
    return config.pairs_per_step * (rollout + 2 * (row.forward + row.training)) / rate


@pytest.mark.parametrize("gpu", ["a100-80g", "h200"])
@pytest.mark.long
def test_the_engine_takes_less_than_three_per_cent_of_a_step_of_the_paper(gpu: str, monkeypatch) -> None:
    """240p x 34 frames: the smallest step that the paper makes, hence the largest share."""
    config = load_config("opensora_v1_2_240p.yaml", ["rollout.batch_size=null", "reference.storage=copy"])
    config = config.model_copy(update={"reference": config.reference.model_copy(update={"refresh_every": 1})})
    size = (10, 30, 53)
    engine = seconds_of_the_engine(hollow_step(config, size, monkeypatch), gpu)
    assert engine < 0.03 * seconds_of_the_model(config, size, gpu)


@pytest.mark.long
def test_of_a_step_at_720p_it_takes_less_than_one_per_cent(monkeypatch) -> None:
    config = load_config("opensora_v1_2_240p.yaml", ["pairs_per_step=1", "rollout.batch_size=1"])
    size = (20, 90, 160)
    engine = seconds_of_the_engine(hollow_step(config, size, monkeypatch), "h200")
    assert engine < 0.01 * seconds_of_the_model(config, size, "h200")
