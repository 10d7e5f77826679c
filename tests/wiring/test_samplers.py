"""Test which network samples candidates, and with which settings: first and second pass of every kind of rollout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import engine
import pytest
import torch
from toy import ToyReward, toy_change, video_of

from vpo_engine.build import build_model
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.stopping import StopPoints
from vpo_engine.method import embed_prompts
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.protocols import SamplerSettings
from vpo_engine.reference.store import build_reference

BASE = (
    "steps=1",
    "optimizer.warmup_steps=0",
    "rollout.guidance=2.0",
    "rollout.candidates=4",
    "rollout.steps=6",
    "pairs.resample=1",
)
EXACT = SamplerSettings(6, 2.0)
CASES = {
    "plain": ((), {("policy", EXACT, None, None)}),
    "pruned, from the reference": (
        ("rollout.prune.after=0.34", "rollout.prune.keep=2", "rollout.source=reference"),
        {("reference", EXACT, first, last) for first, last in ((0, 2), (2, None))},
    ),
    "own settings": (
        ("rollout.guidance_interval=[0.2, 0.7]", "rollout.cache=0.2"),
        {("policy", SamplerSettings(6, 2.0, (0.2, 0.7), 0.2), None, None)},
    ),
    "pruned, compiled": (
        ("rollout.prune.after=0.34", "rollout.prune.keep=2", "rollout.compile=blocks"),
        {
            ("policy", SamplerSettings(6, 2.0, compile="blocks"), first, last)
            for first, last in ((0, 2), (2, None))
        },
    ),
    "pruned": (
        ("rollout.prune.after=0.34", "rollout.prune.keep=2", "rollout.cache=0.2"),
        {("policy", SamplerSettings(6, 2.0, None, 0.2), first, last) for first, last in ((0, 2), (2, None))},
    ),
    "explored with fewer steps": (
        ("rollout.explore.steps=2", "rollout.guidance_interval=[0.2, 0.7]", "rollout.cache=0.2"),
        {
            ("policy", SamplerSettings(2, 2.0), None, None),
            ("policy", SamplerSettings(6, 2.0, (0.2, 0.7), 0.2), 0, None),
        },
    ),
    "explored with a cache": (
        ("rollout.explore.cache=0.4", "rollout.explore.guidance_interval=[0.5, 1.0]"),
        {
            ("policy", SamplerSettings(6, 2.0, (0.5, 1.0), 0.4), None, None),
            ("policy", EXACT, 0, None),
        },
    ),
    "explored in 8 bits": (
        ("rollout.explore.weights=int8",),
        {("copy", EXACT, None, None), ("policy", EXACT, 0, None)},
    ),
    "in bfloat16": (("rollout.weights=bf16",), {("copy", EXACT, None, None)}),
    "in 8 bits": (("rollout.weights=int8",), {("copy", EXACT, None, None)}),
    "from the reference": (("rollout.source=reference",), {("reference", EXACT, None, None)}),
}


@pytest.mark.parametrize("case", CASES)
def test_who_samples_how(tmp_path: Path, case: str) -> None:
    overrides, expected = CASES[case]
    found = {
        (who, settings, part.start or 0, part.stop if part.stop != settings.steps else None)
        for who, settings, part, latents in recorded(tmp_path, *overrides)
    }
    assert found == {(who, settings, first or 0, last) for who, settings, first, last in expected}


def recorded(folder: Path, *overrides: str) -> list[tuple[str, SamplerSettings, slice, torch.Tensor]]:
    """Return what a run sampled, without the two evaluations and their clips."""
    run = engine.train(engine.make_config(folder, *BASE, *overrides))
    sampled = run.sampled
    held_out = sampled[0][3]
    return [one for one in sampled if not torch.equal(one[3], held_out)]


def test_held_out_videos_are_sampled_by_the_policy_without_approximations(tmp_path: Path) -> None:
    for number, (overrides, _) in enumerate(CASES.values()):
        config = engine.make_config(tmp_path / str(number), *BASE, *overrides, "evaluation.steps=3")
        sampled = engine.train(config).sampled
        held_out = sampled[0][3]
        calls = [
            (who, settings, part)
            for who, settings, part, latents in sampled
            if torch.equal(latents, held_out)
        ]
        assert len(calls) == 4  # measures and clips, before and after
        assert all(call == ("policy", SamplerSettings(3, 2.0), slice(0, None)) for call in calls)


def test_the_copy_in_8_bits_follows_the_policy(tmp_path: Path) -> None:
    """After large steps candidates of the copy are near those of the policy of that step, not of an earlier one."""
    settings = (*BASE, "steps=3", "optimizer.lr=0.05", "optimizer.warmup_steps=0", "rollout.weights=int8")
    engine.train(engine.make_config(tmp_path, *settings))
    run = tmp_path / "run"
    lines = [line for line in engine.lines_of(run) if line.step == 3 and line.kept]
    for line in lines:
        errors = []
        for step in (0, 1, 2):
            latents = engine.sampled_alone(run, step, line.prompt, line.position, line.winner, 4, 6, 2.0)
            errors.append(float((latents - line.latents()[0]).norm()))
        assert errors[2] < 0.2 * min(errors[:2])


class Places(ToyReward):
    """Notes how many batches were sampled whenever prompts of the training are scored."""

    def __init__(self) -> None:
        super().__init__()
        self.sampled: list[int] = []

    def score(self, videos: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        if prompts[0] in engine.PROMPTS:
            self.sampled.append(len(engine.RecordingModel.recording.sampled))
        return super().score(videos, prompts)


@pytest.mark.parametrize("overlap", [False, True])
def test_batches_are_scored_between_others_only_with_overlap(tmp_path: Path, overlap: bool) -> None:
    reward, batches = Places(), ("pairs.resample=0", "rollout.batch_size=4")
    engine.train(engine.make_config(tmp_path, *BASE, *batches, f"rollout.overlap={overlap}"), reward)
    last = max(reward.sampled)
    assert reward.sampled == ([last - 3, last - 2, last - 1, last] if overlap else [last] * 4)


def test_every_pass_batch_and_micro_batch_follows_a_look_for_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches go half of the way and two to the end, two steps each; the watchdog hears of it there, too."""
    seen: list[str] = []

    class Noted(ToyReward):
        def score(self, videos: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
            seen.append("score")
            return super().score(videos, prompts)

    def decode(self: object, latents: torch.Tensor) -> torch.Tensor:
        seen.append("decode")
        return video_of(latents)

    monkeypatch.setattr(StopPoints, "check", lambda self: seen.append("look"))
    monkeypatch.setattr(engine.RecordingModel, "to_video", decode)
    monkeypatch.setattr("vpo_engine.metrics.candidate_statistics.motion", toy_change)
    pruned = ("rollout.candidates=4", "rollout.prune={after: 0.5, keep: 2}", "rollout.batch_size=2")
    config = engine.make_config(tmp_path, *pruned, "objective.micro_batch_size=1")
    processes = Processes.start("cpu")
    model = build_model(config, processes, lambda _: None)
    model.prepare(engine.PROMPTS[:2])
    algorithm = OnlineVPO(config, model, Noted(), build_reference("copy", model.network), processes)
    model.network.register_forward_pre_hook(lambda *_: seen.append("predict"))
    choices = algorithm._choose(embed_prompts(model, engine.PROMPTS[:2], [0, 1]))
    assert [seen.count(name) for name in ("predict", "decode", "score", "look")] == [12, 6, 6, 24]
    assert seen[::2] == ["look"] * 24
    seen.clear()
    pairs = algorithm.selector.pairs(choices)
    algorithm.objective.backward(pairs, algorithm.reference)
    assert seen.count("look") == len(pairs) > 0
