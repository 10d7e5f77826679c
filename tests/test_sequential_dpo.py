"""DPO with winner and loser one after the other: the gradient and metrics of the joint batch, one graph at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from step_case import pairs_of
from torch import Tensor

from vpo_engine.config import ObjectiveConfig
from vpo_engine.memory.checkpointing import Activations
from vpo_engine.models.opensora.rectified_flow import RectifiedFlow, guided_velocity
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.objectives.dpo import DPO
from vpo_engine.protocols import Network, TextEmbedding
from vpo_engine.reference.store import HeldReference, build_reference
from vpo_engine.values import Pair

MANIFEST = json.loads((Path(__file__).parent / "data" / "opensora" / "stdit3_tiny.json").read_text())
LATENT = (4, 2, 6, 4)
PAIRS = 3
SIZE = {"fps": 24.0, "height": 48, "width": 32}


class Video:
    """The tiny STDiT3 as a video model of any dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.network = STDiT3.from_config(MANIFEST["config"]).to(dtype)
        self.latent_shape = LATENT
        self.calls: list[tuple[bool, list[Any]]] = []
        flow = RectifiedFlow()
        self.draw_timesteps = lambda u: 1000 * u
        self.add_noise, self.noising_scales = flow.add_noise, flow.noising_scales
        self.target_scales = lambda t: flow.TARGET_SCALES

    def predict(
        self, network: Network, latents: Tensor, t: Tensor, text: TextEmbedding, guidance: float = 1.0
    ) -> Tensor:
        self.calls.append((network is self.network, [latents, t, text.embeddings, text.mask]))
        null = self.network.y_embedder.y_embedding
        return guided_velocity(network, latents, t, text.embeddings, text.mask, null, guidance, **SIZE)


def problem(dtype: torch.dtype) -> tuple[Video, HeldReference, list[Pair]]:
    """Return a policy that differs from its reference, and pairs with captions of several lengths."""
    model = Video(dtype)
    reference = build_reference("copy", model.network)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    winner, loser = torch.randn(2, PAIRS, *LATENT, dtype=dtype)
    mask = torch.arange(7) < torch.tensor([[7], [4], [5]])
    text = TextEmbedding(torch.randn(PAIRS, 7, 32, dtype=dtype), mask)
    return model, reference, pairs_of(winner, loser, text, [4, 9, 2])


def run(
    dtype: torch.dtype, sequential: bool, world: int = 1, **options: Any
) -> tuple[dict[str, float], dict[str, Tensor], Video]:
    model, reference, batch = problem(dtype)
    objective = DPO(model, ObjectiveConfig(**options), 3.0, 0, sequential)  # type: ignore[arg-type]
    metrics = objective.backward(batch, reference, processes=world)
    named = model.network.named_parameters()
    return metrics, {name: p.grad for name, p in named if p.grad is not None}, model


OPTIONS: list[dict[str, Any]] = [
    {"beta": 5.0},
    {"beta": 5.0, "timesteps_per_pair": 2},
    {"beta": 5.0, "timesteps_per_pair": 3, "micro_batch_size": 2},
    {"beta": 5.0, "micro_batch_size": 1, "weighting": "epsilon"},
    {"beta": 5.0, "weighting": "x0"},
    {"beta": 5.0, "winner_anchor": 0.5, "loser_scaling": 0.3},
    {"beta": 5.0, "branch": "guided", "timesteps_per_pair": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_and_metrics_are_the_joint_ones(options: dict[str, Any]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        metrics, expected, _ = run(dtype, sequential=False, **options)
        found_metrics, found, _ = run(dtype, sequential=True, **options)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.norm() > 0
            assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name
        assert found_metrics == pytest.approx(metrics, rel=tolerance, abs=tolerance)
        assert found_metrics["samples"] == metrics["samples"] == PAIRS * options.get("timesteps_per_pair", 1)


def test_the_share_of_several_processes_scales_the_gradient() -> None:
    _, one, _ = run(torch.float64, sequential=True, beta=5.0)
    _, four, _ = run(torch.float64, sequential=True, beta=5.0, world=4)
    for name, gradient in one.items():
        assert torch.allclose(four[name], 4 * gradient, rtol=1e-12, atol=0), name


def test_policy_and_reference_see_the_same_members_in_the_same_geometry() -> None:
    _, _, model = run(
        torch.float32, sequential=True, beta=5.0, timesteps_per_pair=2, micro_batch_size=4, branch="guided"
    )
    first = model.calls[:5]
    assert [is_policy for is_policy, _ in first] == [False, False, True, True, True]
    reference_winner, reference_loser, winner, loser, again = [inputs for _, inputs in first]
    for one, other in ((reference_winner, winner), (reference_loser, loser), (winner, again)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(winner[0], loser[0])
    assert all(torch.equal(a, b) for a, b in zip(winner[1:], loser[1:], strict=True))  # t and the text
    assert len(winner[0]) == 4
    assert len(model.calls[5][1][0]) == 2  # what is left of a batch of six


def test_the_margin_is_exactly_zero_at_the_reference() -> None:
    model, _, batch = problem(torch.float32)
    objective = DPO(model, ObjectiveConfig(), 3.0, 0, sequential=True)  # type: ignore[arg-type]
    metrics = objective.backward(batch, build_reference("copy", model.network))
    assert metrics["margin"] == metrics["winner_error_change"] == metrics["loser_error_change"] == 0.0


class Saved:
    """Counts the bytes that graphs hold; a tensor counts each time that it is saved."""

    def __init__(self) -> None:
        self.now = self.most = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor):
            yield

    def _pack(self, tensor: Tensor) -> _Held:
        return _Held(tensor, self)


class _Held:
    def __init__(self, tensor: Tensor, saved: Saved) -> None:
        self.tensor, self._saved, self._size = tensor.detach(), saved, tensor.nbytes
        saved.now += self._size
        saved.most = max(saved.most, saved.now)

    def __del__(self) -> None:
        self._saved.now -= self._size


def saved_by_batch(checkpointing: Any, size: int) -> int:
    """Return the bytes in the graph of one forward pass of a batch of this size."""
    model, _, pairs = problem(torch.float32)
    model.network.activations = Activations(checkpointing)
    winners = torch.stack([pair.winner.latents for pair in pairs])
    text = TextEmbedding.cat([pair.prompt.embedding for pair in pairs])
    index = torch.arange(size) % PAIRS
    saved = Saved()
    with saved.counting():
        model.predict(model.network, winners[index], torch.full((size,), 500.0), text[index])
    return saved.most


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_one_members_graph_exists_at_a_time(checkpointing: Any) -> None:
    of_the_loss = 8 * PAIRS * torch.Size(LATENT).numel() * 4
    for sequential, size in ((False, 2 * PAIRS), (True, PAIRS)):
        model, reference, batch = problem(torch.float32)
        model.network.activations = Activations(checkpointing)
        saved = Saved()
        with saved.counting():
            DPO(model, ObjectiveConfig(), 3.0, 0, sequential).backward(batch, reference)  # type: ignore[arg-type]
        network = saved_by_batch(checkpointing, size)
        assert network < saved.most <= network + of_the_loss
        assert saved.now == 0
