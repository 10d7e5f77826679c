"""Candidates given up on the way: which, on what grounds, and what Algorithm 1 makes of the rest."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from rollout_case import CPU, PROMPTS, Counting, batched, noise_of, sampled, schedule, settings, sprites
from step_case import candidates_of, scores_of, step_on
from torch import Tensor

from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.batches import Batches
from vpo_engine.method import Step
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.protocols import SamplerSettings, SamplerState
from vpo_engine.reference.store import build_reference
from vpo_engine.rollout.sampler import Denoiser, Pass
from vpo_engine.run_state import capture, restore
from vpo_engine.seeding import normal
from vpo_engine.selection import extremes

Make = Callable[..., Config]
HALF = {"after": 0.5, "keep": 2}
SCORES = torch.tensor([[0.3, 0.9, 0.1, 0.5], [2.0, 5.0, 4.0, 3.0]])


@pytest.mark.parametrize(
    ("scores", "keep", "expected"),
    [
        ([0.3, 0.9, 0.1, 0.5], 2, [1, 2]),
        ([0.3, 0.9, 0.1, 0.5], 3, [1, 2, 3]),  # two of the best, the worst
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 4, [0, 1, 4, 5]),
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 3]),
        ([2.0, 1.0, 2.0, 1.0], 2, [0, 3]),
        ([1.0, 2.0], 2, [0, 1]),
    ],
)
def test_the_extremes_are_kept_in_their_order(scores: list[float], keep: int, expected: list[int]) -> None:
    assert extremes(torch.tensor([scores, scores]), keep).tolist() == [expected, expected]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_preview_without_a_finite_score_stops_the_step(bad: float) -> None:
    scores = SCORES.clone()
    scores[1, 2] = bad
    with pytest.raises(ValueError, match=r"prompt 1, candidate 2 of this step is .* on its preview"):
        extremes(scores, 2)


def test_finished_candidates_are_those_of_a_rollout_without_pruning() -> None:
    whole, network = sampled(settings()), Counting(sprites()[0].network)
    pruned = sampled(settings(prune=HALF), network, lambda _: SCORES)
    assert network.rows == [16, 16, 8, 8]  # half of the candidates for half of the steps
    assert pruned.shape == (2, 2, *whole.shape[2:])
    for prompt, kept in ((0, [1, 2]), (1, [0, 1])):
        assert (pruned[prompt] - whole[prompt, kept]).abs().max() <= 2e-5


def started(noise: Tensor) -> SamplerState:
    return SamplerState(noise, noise)


def test_previews_are_where_the_last_prediction_points_to() -> None:
    model, text = sprites()
    config = settings(prune=HALF)
    denoise, steps = Denoiser(model, Batches(None), CPU), schedule(4)
    given = SamplerSettings(config.steps, config.guidance)
    begun = denoise(Pass(model.network, given, 2), started(noise_of(config)), text)
    before = batched(noise_of(config), 3.0, steps[:1])
    reached = batched(noise_of(config), 3.0, steps[:2])
    assert torch.equal(begun.latents, reached)
    velocity = (reached - before) / steps[1][1]
    assert torch.allclose(begun.preview, before + steps[1][0] / 1000 * velocity, atol=1e-5)
    whole = denoise(Pass(model.network, given), started(noise_of(config)), text)
    assert torch.allclose(whole.preview, whole.latents, atol=1e-5)


def test_pruning_in_groups_of_rows_is_the_same() -> None:
    found = [sampled(settings(prune=HALF, batch_size=rows), None, lambda _: SCORES) for rows in (None, 3)]
    assert (found[0] - found[1]).abs().max() <= 2e-5


# --- Algorithm 1 ---


class Script:
    """Scores videos by a script, a row of numbers per call."""

    dimensions = ("first", "second")

    def __init__(self, *rows: Sequence[float]) -> None:
        self.rows = rows
        self.videos: list[Tensor] = []
        self.prompts: list[list[str]] = []

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        row = self.rows[len(self.videos) % len(self.rows)]
        self.videos.append(videos)
        self.prompts.append(list(prompts))
        assert len(row) == len(videos) == len(prompts)
        return {"first": torch.tensor(row), "second": -torch.tensor(row)}


PREVIEWS = [0.3, 0.9, 0.1, 0.5, 2.0, 5.0, 4.0, 3.0]
FINISHED = [1.0, 4.0, 7.0, 7.0]


def make(config: Config, reward: Script) -> OnlineVPO:
    processes = Processes.start("cpu")
    model = build_model(config, processes, lambda _: None)
    model.prepare(PROMPTS)
    return OnlineVPO(config, model, reward, build_reference("copy", model.network), processes)


def step(algorithm: OnlineVPO, number: int = 0) -> Step:
    return step_on(algorithm, PROMPTS, [2 * number, 2 * number + 1])


@pytest.fixture
def pruning(small: Make) -> Config:
    return small(
        "rollout.candidates=4",
        "rollout.steps=4",
        "rollout.prune={after: 0.5, keep: 2}",
        "reward.dimensions=first",
    )


def test_pairs_and_metrics_are_of_finished_candidates_only(pruning: Config) -> None:
    reward = Script(PREVIEWS, FINISHED)
    result = step(make(pruning, reward))
    assert [len(videos) for videos in reward.videos] == [8, 4]
    assert reward.prompts == [[p for p in PROMPTS for _ in range(count)] for count in (4, 2)]
    latents = candidates_of(result)
    assert latents.shape[:2] == (2, 2)
    assert scores_of(result, "first").tolist() == [[1.0, 4.0], [7.0, 7.0]]
    assert [(pair.winner.number, pair.loser.number) for pair in result.pairs] == [(2, 1)]
    metrics = result.metrics
    assert metrics["reward/first"] == metrics["reward/selected"] == pytest.approx(4.75)
    assert metrics["reward/second"] == pytest.approx(-4.75)
    assert metrics["reward/gap"] == pytest.approx(1.5)
    assert (metrics["tie_rate"], metrics["pairs"]) == (0.5, 1)
    assert set(result.seconds) == {"rollout", "decode", "reward", "update", "refresh"}
    # What is judged first are previews; what is trained on, the latents of candidates 1 and 2 of the first prompt.
    fresh = make(pruning, reward)
    noise = torch.stack([normal((4, *latents.shape[2:]), 0, "rollout", position) for position in (0, 1)])
    text, given = fresh.model.embed(PROMPTS), SamplerSettings(4, 1.0)
    denoise = Denoiser(fresh.model, Batches(None), CPU)
    begun = denoise(Pass(fresh.model.network, given, 2), started(noise), text)
    assert torch.equal(reward.videos[0], fresh.model.decode(begun.preview.flatten(0, 1)))
    assert not torch.equal(reward.videos[0], fresh.model.decode(begun.latents.flatten(0, 1)))
    every = denoise(Pass(fresh.model.network, given), started(noise), text).latents
    assert (latents[0] - every[0, [1, 2]]).abs().max() <= 2e-5


def test_a_bad_preview_score_leaves_the_policy_alone(pruning: Config) -> None:
    algorithm = make(pruning, Script([math.nan, *PREVIEWS[1:]]))
    before = [parameter.clone() for parameter in algorithm.parameters]
    with pytest.raises(ValueError, match="prompt 0, candidate 0 of this step is nan on its preview"):
        step(algorithm)
    assert all(torch.equal(old, new) for old, new in zip(before, algorithm.parameters, strict=True))


@pytest.mark.long
def test_approximate_runs_resume_bit_for_bit(small: Make, small_policy: str, tmp_path: Path) -> None:
    config = small(
        small_policy,
        "rollout.candidates=4",
        "rollout.steps=4",
        "rollout.guidance=3.0",
        "rollout.guidance_interval=[0.3,0.9]",
        "rollout.prune={after: 0.5, keep: 2}",
        "rollout.cache=0.3",
        "reward.dimensions=first",
        "optimizer.lr=1e-4",
    )
    whole, resumed = (make(config, Script(PREVIEWS, [1.0, 4.0, 7.0, 6.0])) for _ in range(2))
    step(whole, 0)
    saved = copy.deepcopy(capture(whole, 1, {}))
    whole.model.save_policy(tmp_path)
    assert restore(resumed, saved["tensors"], saved["state"], tmp_path) == (1, {})
    one, other = step(whole, 1), step(resumed, 1)
    assert torch.equal(candidates_of(one), candidates_of(other))
    assert one.metrics == other.metrics


def test_a_decoder_that_runs_out_of_memory_gets_half_of_the_videos(
    small: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small("reward.dimensions=first")
    reward = Script([0.0, 1.0], [2.0, 0.0])
    algorithm = make(config, reward)
    decode, seen = algorithm.model.decode, []

    def failing(latents: Tensor) -> Tensor:
        seen.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents)

    monkeypatch.setattr(algorithm.model, "decode", failing)
    result = step(algorithm)
    assert seen == [4, 2, 2]
    assert scores_of(result, "first").tolist() == [[0.0, 1.0], [2.0, 0.0]]
    assert capsys.readouterr().out.count("set rollout.batch_size=2 to start so") == 1
