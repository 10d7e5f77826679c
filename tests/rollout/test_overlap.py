"""Groups that are decoded and scored while others are sampled: the same scores, in the same order, errors at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rollout_case import CPU, PROMPTS, settings, sprites
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.batches import Batches
from vpo_engine.rewards.sprites import SpritesReward
from vpo_engine.rollout.sampler import CandidateSampler, Denoiser, VideoScorer
from vpo_engine.selection import extremes
from vpo_engine.values import Prompt

PRUNED = {"after": 0.5, "keep": 2}


class Watched:
    """The sprites reward; notes the threads, the prompts and the number of videos of each call, and may fail in one."""

    def __init__(self, failing: int | None = None) -> None:
        self._reward = SpritesReward()
        self.dimensions = self._reward.dimensions
        self.failing = failing
        self.calls: list[tuple[str, list[str]]] = []

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        self.calls.append((threading.current_thread().name, list(prompts)))
        if len(self.calls) == self.failing:
            raise RuntimeError("the scorer broke")
        return self._reward.score(videos, prompts)


class Heard:
    """Stands before the network and notes how many groups were scored when it was called."""

    def __init__(self, reward: Watched) -> None:
        self.reward, self.scored = reward, [0][:0]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.scored.append(len(self.reward.calls))
        return sprites()[0].network(x, *args, **kwargs)


def run(
    reward: Watched,
    overlap: bool,
    threaded: bool,
    network: Callable[..., Tensor] | None = None,
    **changes: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return candidates and their scores, with prune also those of the previews."""
    model, text = sprites()
    config = settings(steps=2, guidance=1.0, **{"batch_size": 4, **changes})
    batches, previews = Batches(config.batch_limit), list[Tensor]()

    def keep_extremes(scores: dict[str, Tensor], keep: int) -> Tensor:
        previews.append(scores["visual_quality"])
        return extremes(scores["visual_quality"], keep)

    scorer = VideoScorer(
        lambda latents: model.decode(latents),
        reward.score,
        reward.dimensions,
        batches,
        overlap=overlap,
        threaded=threaded,
    )
    sampler = CandidateSampler(
        config,
        0,
        model.latent_shape,
        (network or model.network,) * 2,
        lambda: None,
        model.start,
        Denoiser(model, batches, CPU),
        scorer.overlapped,
        scorer,
        keep_extremes,
        Processes(0, 1, CPU),
    )
    found = sampler.sample([Prompt(PROMPTS[row], text[row : row + 1], 7 + row) for row in range(2)])
    scores = {
        name: torch.tensor([[candidate.scores[name] for candidate in each] for each in found])
        for name in reward.dimensions
    }
    latents = torch.stack([torch.stack([candidate.latents for candidate in each]) for each in found])
    return latents, scores | {f"previews {number}": each for number, each in enumerate(previews)}


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"batch_size": 3}, {"prune": PRUNED}], ids=["prompts", "parts", "pruned"]
)
def test_scores_and_candidates_are_bit_for_bit_those_of_one_after_the_other(
    threaded: bool, changes: dict[str, Any]
) -> None:
    one, other = Watched(), Watched()
    latents, scores = run(one, False, threaded, **changes)
    overlapped, found = run(other, True, threaded, **changes)
    assert torch.equal(latents, overlapped)
    assert set(scores) == set(found)
    assert all(torch.equal(scores[name], found[name]) for name in scores)
    assert [prompts for _, prompts in one.calls] == [prompts for _, prompts in other.calls]
    assert {name for name, _ in one.calls} == {threading.current_thread().name}
    assert all(name.startswith("scoring") == threaded for name, _ in other.calls)


def test_a_group_is_scored_before_the_next_is_sampled_without_a_thread() -> None:
    reward = Watched()
    network = Heard(reward)
    run(reward, True, False, network)
    assert network.scored == [0, 0, 1, 1]
    reward = Watched()
    network = Heard(reward)
    run(reward, False, False, network)
    assert network.scored == [0, 0, 0, 0]


def test_with_a_thread_the_next_group_is_sampled_while_one_is_scored() -> None:
    """The scorer of the first group waits for the sampler to ask the network for the second: one would deadlock."""
    reward, sampling = Watched(), threading.Event()
    score = reward.score

    def waiting(videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        assert sampling.wait(60)
        return score(videos, prompts)

    calls: list[int] = []

    def network(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(x))
        if len(calls) == 3:
            sampling.set()
        return sprites()[0].network(x, *args, **kwargs)

    reward.score = waiting  # type: ignore[method-assign]
    _, scores = run(reward, True, True, network)
    expected = run(Watched(), False, False)[1]
    assert all(torch.equal(scores[name], expected[name]) for name in expected)


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("failing", [1, 2])
def test_an_error_of_the_scorer_is_raised(threaded: bool, failing: int) -> None:
    with pytest.raises(RuntimeError, match="the scorer broke"):
        run(Watched(failing), True, threaded)


def test_an_error_stops_the_sampling_of_the_groups_after() -> None:
    reward = Watched(failing=1)
    network = Heard(reward)
    with pytest.raises(RuntimeError, match="the scorer broke"):
        run(reward, True, False, network, batch_size=1)
    assert len(network.scored) == 2


def test_a_decoder_that_runs_out_of_memory_in_the_thread_gets_half(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = sprites()
    decode = model.decode

    def failing(latents: Tensor) -> Tensor:
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents)

    latents, expected = run(Watched(), False, False)
    monkeypatch.setattr(model, "decode", failing)
    found, scores = run(Watched(), True, True)
    assert (latents - found).abs().max() <= 2e-5
    # Rounding moves a few pixels by one of 255 levels.
    assert all((expected[name] - scores[name]).abs().max() <= 0.01 for name in expected)
    assert capsys.readouterr().out.count("set rollout.batch_size=2 to start so") == 1


@pytest.mark.long
def test_a_run_with_overlap_makes_the_same_step(small: Callable[..., Config]) -> None:
    from test_prune import make, step

    common = ("rollout.candidates=2", "rollout.batch_size=2", "optimizer.lr=1e-4")
    reward = Watched()
    whole, overlapped = (
        step(make(small(*common, *more), reward)) for more in ((), ("rollout.overlap=true",))
    )
    assert whole.metrics == overlapped.metrics


@pytest.mark.parametrize("take_turns", [False, True])
def test_parts_that_take_turns_do_so_once(take_turns: bool) -> None:
    """All videos are decoded before the first is scored, so that neither part comes to the device twice."""
    calls: list[str] = []

    def decode(latents: Tensor) -> Tensor:
        calls.append("decode")
        return torch.zeros(len(latents), 2, 4, 4, 3, dtype=torch.uint8)

    def score(videos: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        calls.append("score")
        return {"quality": torch.zeros(len(videos))}

    scorer = VideoScorer(decode, score, ("quality",), Batches(2), take_turns=take_turns)
    scorer(torch.zeros(2, 2, 1, 1, 1, 1), ["one", "two"])
    assert calls == (["decode"] * 2 + ["score"] * 2 if take_turns else ["decode", "score"] * 2)


def test_parts_that_take_turns_cannot_overlap() -> None:
    with pytest.raises(
        ValueError, match=r"rollout\.overlap=true .* set rollout\.overlap=false, or memory\.offload_idle"
    ):
        load_config(None, ["rollout.overlap=true", "memory.offload_idle=true"])


class OnThirdGpu(Tensor):
    """A tensor that says it is on a GPU that is not the first."""

    is_cuda = True  # type: ignore[assignment]
    device = torch.device("cuda", 2)  # type: ignore[assignment]


def test_the_thread_works_on_the_gpu_of_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread is on the first GPU, where every process would then have a context of half a GiB."""
    taken: list[tuple[str, torch.device]] = []
    stream = SimpleNamespace(
        wait_event=lambda event: None, synchronize=lambda: None, record_event=lambda: None
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: taken.append((threading.current_thread().name, device))
    )
    scorer = VideoScorer(
        lambda latents: torch.zeros(len(latents), 2, 4, 4, 3, dtype=torch.uint8),
        lambda videos, texts: {"quality": torch.zeros(len(videos))},
        ("quality",),
        Batches(2),
        overlap=True,
    )
    latents = torch.zeros(1, 2, 1, 1, 1, 1).as_subclass(OnThirdGpu)
    for _ in range(2):
        assert len(scorer.submit(latents, ["one"]).result()["quality"]) == 2
    [(thread, device)] = taken
    assert thread.startswith("scoring")
    assert device == torch.device("cuda", 2)
