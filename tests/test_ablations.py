"""Changes of the algorithm that are off by default: a soft refresh of the reference, and the sampler's own noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from smallest_run import SMALL
from test_online_vpo import PROMPTS, ScriptedReward, make_algorithm, run_step
from torch import Tensor, nn

from vpo_engine.config import Config, ObjectiveConfig
from vpo_engine.config.notes import notes
from vpo_engine.config_file import load_config
from vpo_engine.method import embed_prompts
from vpo_engine.objectives.dpo import DPO, MicroBatch, _sums
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.protocols import Network, TextEmbedding
from vpo_engine.reference.store import build_reference
from vpo_engine.train import train
from vpo_engine.values import Candidate, Pair

Make = Callable[..., Config]
TRAJECTORY = ("objective.noise=trajectory", "reward.dimensions=global", "optimizer.lr=1e-3")


class Block(nn.Module):
    """A network with a weight, a frozen weight and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(3, 2)
        self.register_buffer("count", torch.tensor(4))


def test_a_soft_refresh_moves_the_reference_a_share_of_the_way() -> None:
    policy = Block()
    reference = build_reference("copy", policy, 0.25)
    before = policy.trained.weight.detach().clone()
    with torch.no_grad():
        policy.trained.weight.add_(1.0)
    reference.refresh(policy)
    assert torch.allclose(reference.state_dict()["trained.weight"], before + 0.25)
    reference.refresh(policy)
    assert torch.allclose(reference.state_dict()["trained.weight"], before + 0.4375)
    hard = build_reference("copy", policy)
    with torch.no_grad():
        policy.trained.weight.add_(1.0)
    hard.refresh(policy)
    assert torch.equal(hard.state_dict()["trained.weight"], policy.trained.weight)


@pytest.mark.parametrize(
    "words",
    [
        ("reference.storage=int8",),
        ("memory.weights=fp32_master",),
        ("reference.storage=exact8", "memory.weights=fp32_master"),
    ],
)
def test_a_soft_refresh_that_would_be_rounded_away_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"reference.refresh_share=0.5 .* reference.storage=copy"):
        load_config(None, ["reference.refresh_share=0.5", *words])


@pytest.mark.parametrize(
    "words", [("reference.refresh_every=null",), ("method=offline_dpo",), ("method=t2v_turbo",)]
)
def test_a_share_of_a_refresh_that_never_comes_is_noted(words: tuple[str, ...]) -> None:
    def said(share: float, *more: str) -> bool:
        found = notes(load_config(None, [f"reference.refresh_share={share}", *words, *more]))
        return any(note.startswith("reference.refresh_share=0.5 is not used") for note in found)

    assert said(0.5)
    assert not said(1)
    assert words != ("method=offline_dpo",) or not said(0.5, "offline_dpo.refresh_every=3")


@pytest.mark.parametrize("words", [("method=offline_dpo",), ("method=refl",)])
def test_trajectory_noise_needs_pairs_that_are_sampled_in_every_step(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"objective\.noise"):
        load_config(None, ["objective.noise=trajectory", *words])


def test_the_noise_of_a_candidate_leads_the_sampler_to_it(small: Make) -> None:
    """Also of candidates that were sampled because the first ones were a tie."""
    tie, gap = [1.0] * 4, [1.0, 0.0, 1.0, 3.0]
    algorithm = make_algorithm(small("pairs.resample=1", *TRAJECTORY), ScriptedReward(tie, gap))
    model = algorithm.model
    choices = algorithm._choose(embed_prompts(model, PROMPTS, [4, 7]))
    candidates = [each for choice in choices for each in choice.candidates]
    assert {each.number for each in candidates} == {0, 1, 2, 3}
    text = torch.stack([algorithm.sampler.sampled_from(each) for each in candidates])
    for each, noise in zip(candidates, text, strict=True):
        found = model.sample(model.network, noise[None], each.prompt.embedding, steps=2, guidance=1.0)
        assert torch.allclose(found[0], each.latents, atol=1e-4)


def test_trajectory_noise_gives_each_member_the_noise_that_it_was_sampled_from(small: Make) -> None:
    algorithm = make_algorithm(
        small("reference.refresh_every=null", "objective.timesteps_per_pair=2", *TRAJECTORY),
        ScriptedReward([0.0, 1.0, 2.0, 0.0]),
    )
    run_step(algorithm)
    pairs = algorithm.selector.pairs(algorithm._choose(embed_prompts(algorithm.model, PROMPTS, [2, 3])))
    found = algorithm.objective.backward(pairs, algorithm.reference)
    times = algorithm.objective.timesteps(pairs, 0, range(4))
    winner, loser = (
        torch.stack([_error_change(algorithm, pairs[n // 2], side, times[n : n + 1]) for n in range(4)])
        for side in ("winner", "loser")
    )
    assert winner.abs().min() > 1e-6
    assert found["winner_error_change"] == pytest.approx(float(winner.sum()), rel=1e-3)
    assert found["loser_error_change"] == pytest.approx(float(loser.sum()), rel=1e-3)


@torch.no_grad()
def _error_change(algorithm: OnlineVPO, pair: Pair, side: str, time: Tensor) -> Tensor:
    """Return by how much the policy's error on a member of a pair differs from the reference's, by the definition."""
    model, member = algorithm.model, getattr(pair, side)
    assert isinstance(member, Candidate)
    noise = algorithm.sampler.sampled_from(member)
    inputs = model.add_noise(member.latents[None], noise[None], time)

    def error(network: Network) -> Tensor:
        prediction = model.predict(network, inputs, time, pair.prompt.embedding, 1.0)
        return (prediction - (member.latents - noise)).double().square().mean()

    return error(model.network) - error(algorithm.reference)


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_the_reference_of_a_run_is_moved_by_its_share(small_policy: str, tmp_path: Path) -> None:
    """After one step the policies are equal, and the soft reference lies half-way from the first to the refreshed."""
    found = {}
    for name, words in {
        "never": ["reference.refresh_every=null"],
        "soft": ["reference.refresh_every=1", "reference.refresh_share=0.5"],
        "hard": ["reference.refresh_every=1"],
    }.items():
        shared = [*SMALL, small_policy, "steps=1", "evaluation.every=null"]
        run = [*shared, f"run_dir={tmp_path / name}", *words]
        assert train(load_config(None, run)) == 0
        saved = tmp_path / name / "checkpoints" / "step_00000001" / "reference.safetensors"
        found[name] = safetensors.torch.load_file(saved)
    moved = 0
    for name, soft in found["soft"].items():
        assert torch.allclose(soft, (found["never"][name] + found["hard"][name]) / 2, rtol=1e-6, atol=1e-8)
        moved += not torch.equal(soft, found["never"][name])
    assert moved > 10


def test_whole_targets_have_the_scales_of_their_own_samples() -> None:
    """Those of v-prediction depend on the time. There are as many samples as columns, so no wrong shape tells."""
    model = SimpleNamespace(target_scales=lambda times: (times / 1000, 1 - times / 500))
    settings = ObjectiveConfig(noise="trajectory")
    objective = DPO(model, settings, 1.0, 0, sampled_from=lambda candidate: torch.zeros(1))  # type: ignore[arg-type]
    drawn = torch.Generator().manual_seed(0)
    winner, loser, noise, other = torch.randn(4, 2, 3, 1, 1, 2, generator=drawn)
    text = TextEmbedding(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool))
    times = torch.tensor([250.0, 750.0])
    found = objective._targets(MicroBatch(winner, loser, text, times, noise, None, other))
    for name, clean, own in (("winner", winner, noise), ("loser", loser, other)):
        for row, share in enumerate((0.25, 0.75)):
            expected = share * clean[row] + (1 - 2 * share) * own[row]
            torch.testing.assert_close(found[f"target_{name}"][row], expected)


def test_a_margin_of_zero_is_not_counted_as_right() -> None:
    """It is that of a policy which is still the reference."""
    others = ("winner_error_change", "loser_error_change", "reference_winner_error", "reference_loser_error")
    found: Any = SimpleNamespace(margin=torch.tensor([0.0, 2.0, -1.0]), loss=torch.tensor(0.5))
    for name in others:
        setattr(found, name, torch.zeros(3))
    assert _sums(found, 3)["implicit_accuracy"] == 1
