"""Evaluations, the summary and the held-out gallery say what the policy of their step samples from the fixed noise."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import engine
import gradient_toy
import pytest
import torch
from oracle import Oracle
from torch import Tensor
from toy import ToyNetwork, ToyReward, scores_of, video_of

from vpo_engine import trainer as loop
from vpo_engine.build import build_model
from vpo_engine.distributed.processes import Processes
from vpo_engine.errors import NotFiniteError
from vpo_engine.metrics.appearance import appearance, style_distance
from vpo_engine.metrics.held_out import HeldOut, HeldOutScorers
from vpo_engine.rewards.guards import Shuffled
from vpo_engine.seeding import normal
from vpo_engine.video_model import VideoModel

SETTINGS = (
    "steps=5",
    "optimizer.lr=3e-2",
    "optimizer.warmup_steps=0",
    "rollout.guidance=2.0",
    "evaluation.every=2",
    "evaluation.steps=3",
    "evaluation.samples_per_prompt=2",
    "evaluation.samples_between=1",
    "checkpoint.every=2",
    "rollout.batch_size=3",
)
WEIGHTS = {"visual_quality": 3.0, "temporal_consistency": 0.2, "text_alignment": 1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    engine.train(engine.make_config(folder, *SETTINGS))
    return folder / "run"


def clips_after(run: Path, step: int, count: int) -> list[tuple[str, Tensor]]:
    """Return the first clips with their prompts: clip c is of prompt c modulo the number of prompts."""
    config = engine.load_config(None, [*engine.SETTINGS, *SETTINGS])
    judge = Oracle(config, engine.PROMPTS)
    judge.policy.load_state_dict(engine.policy_of(run, step) if step else ToyNetwork().state_dict())
    found = []
    for clip in range(count):
        noise = normal(engine.SHAPE, config.seed, "held-out", clip).double()
        prompt = engine.HELD_OUT[clip % len(engine.HELD_OUT)]
        latents, _ = judge.sampled(noise, prompt, 3, config.rollout)
        found.append((prompt, video_of(latents[None].float())[0]))
    return found


def measured(clips: list[tuple[str, Tensor]]) -> dict[str, float]:
    """Return the means over clips, as the log names them."""
    scores = [dict(zip(WEIGHTS, scores_of(video, prompt), strict=True)) for prompt, video in clips]
    means = {f"reward/{name}": sum(one[name] for one in scores) / len(scores) for name in WEIGHTS}
    selected = sum(weight * means[f"reward/{name}"] for name, weight in WEIGHTS.items()) / 4.2
    levels = sum(float(video.float().mean()) for _, video in clips) / len(clips)
    return {**means, "reward/selected": selected, "pixels/levels": levels}


def close(values: dict[str, float]) -> object:
    return pytest.approx(values, rel=1e-3, abs=2e-3)


def test_every_evaluation_measures_the_policy_of_its_step(run: Path) -> None:
    rows = engine.metrics_of(run, "eval")
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    for row, count in zip(rows, (4, 2, 2, 4), strict=True):
        expected = measured(clips_after(run, row["step"], count))
        assert {name: row[f"held_out/{name}"] for name in expected} == close(expected), row["step"]
    brightness = [row["held_out/reward/visual_quality"] for row in rows]
    assert len({round(value, 2) for value in brightness}) > 2, (
        "the policies must differ for this test to prove anything"
    )


def test_the_summary_compares_the_end_with_the_start(run: Path) -> None:
    summary = engine.summary_of(run)
    before, after = (measured(clips_after(run, step, 4)) for step in (0, 5))
    assert {name: summary[name]["before"] for name in before} == close(before)
    assert {name: summary[name]["after"] for name in after} == close(after)


def test_the_held_out_gallery_shows_the_clips_before_and_after(run: Path) -> None:
    shown = engine.held_out_gallery(run)
    sides = ((0, shown.before, shown.before_scores), (5, shown.after, shown.after_scores))
    for step, clips, scores in sides:
        expected = clips_after(run, step, 4)
        assert shown.prompts == [prompt for prompt, _ in expected]
        for clip, found, (prompt, video) in zip(clips, scores, expected, strict=True):
            assert (clip.int() - video.int()).abs().max() <= 1
            assert found == close(dict(zip(WEIGHTS, scores_of(video, prompt), strict=True)))


def test_the_look_of_an_evaluation_is_told_as_its_distance_from_the_base(run: Path) -> None:
    base, *later = engine.metrics_of(run, "eval")
    names = [name for name in base if name.startswith("guards/style/")]
    assert names
    assert [base[name] for name in names] == [0.0] * len(names)
    before, after = (
        appearance(torch.stack([video for _, video in clips_after(run, step, 2)])) for step in (0, 5)
    )
    expected = {f"guards/style/{name}": value for name, value in style_distance(before, after).items()}
    assert {name: later[-1][name] for name in names} == pytest.approx(expected, rel=2e-2, abs=2e-2)
    assert max(map(abs, expected.values())) > 0.5


def make_held_out(
    reward: ToyReward, *more: str, processes: Processes | None = None
) -> tuple[HeldOut, VideoModel]:
    config = engine.load_config(None, [*engine.SETTINGS, *SETTINGS, *more])
    alone = Processes.start("cpu")
    scorers = HeldOutScorers(reward, lambda videos, _: {})
    model = build_model(config, alone)
    return HeldOut(config, model, engine.HELD_OUT, scorers, processes or alone), model


def test_an_evaluation_says_that_latents_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number is enough, and the decoder is not blamed for it."""
    held_out, model = make_held_out(ToyReward())
    model.prepare(engine.HELD_OUT)
    latents = torch.zeros(2, *engine.SHAPE)
    monkeypatch.setattr(model, "sample", lambda *_, **__: latents)
    assert held_out.evaluate(model.network, 1)
    latents[1, 0, -1, 0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="the policy samples latents that are not finite"):
        held_out.evaluate(model.network, 1)


def test_a_reward_is_checked_on_clips_with_their_own_prompts_and_then_with_others() -> None:
    reward = ToyReward()
    held_out, _ = make_held_out(reward)
    videos = torch.randint(256, (2, 3, 4, 4, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert held_out.check_reward(videos, range(2), exchange=False) == {}
    assert [prompt for _, prompt in reward.seen] == [engine.HELD_OUT[0]] * len(reward.seen)
    assert all(torch.equal(video, videos[0]) for video, _ in reward.seen)
    found = held_out.check_reward(videos, range(2), exchange=True)
    assert found.keys() == WEIGHTS.keys()
    assert {one.clips for one in found.values()} == {2}
    assert held_out.check_reward(videos[:1], range(1), exchange=True) == {}


def test_the_time_of_the_last_evaluation_is_in_the_summary(run: Path) -> None:
    """It is in no row, since no step comes after it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = json.loads((run / "summary.json").read_text())["timings"]
    for stage in ("evaluate", "step"):
        assert timings[stage] > sum(row.get(f"seconds/{stage}", 0.0) for row in rows) + 1e-5, stage


def test_the_gallery_shows_the_average_that_was_evaluated(tmp_path: Path) -> None:
    engine.train(engine.make_config(tmp_path, *SETTINGS, "ema.decay=0.9"))
    run = tmp_path / "run"
    saved = engine.saved_tensors(run, 5)
    policy, average = (saved[f"{name}/model.safetensors/blocks.0.weight"] for name in ("policy", "ema"))
    assert not torch.equal(policy, average)
    last, shown = engine.metrics_of(run, "eval")[-1], engine.held_out_gallery(run).after_scores
    assert len(shown) == 4
    for name in WEIGHTS:
        mean = sum(scores[name] for scores in shown) / 4
        assert mean == pytest.approx(last[f"held_out/reward/{name}"], rel=1e-5), name


def record_sizes(monkeypatch: pytest.MonkeyPatch, model: VideoModel) -> list[int]:
    """Let the model return the noise as its samples, and return the list that will hold how many were asked for."""
    sizes: list[int] = []

    def sample(_: object, noise: Tensor, *__: object, **___: object) -> Tensor:
        sizes.append(len(noise))
        return noise

    model.prepare(engine.HELD_OUT)
    monkeypatch.setattr(model, "sample", sample)
    return sizes


def test_an_evaluation_samples_in_batches_of_the_rollout_and_keeps_four_videos(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held_out, model = make_held_out(ToyReward())
    sizes = record_sizes(monkeypatch, model)
    held_out.evaluate(model.network, 3)
    assert sizes == [3, 3]
    assert len(held_out.kept) == 4


class Full(ToyReward):
    """A reward whose memory holds ``most`` videos."""

    most = 100

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        if len(videos) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().score(videos, prompts)


def test_clips_that_do_not_fit_in_memory_are_evaluated_in_halves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The batch of 4 that fails has left nothing behind, and later evaluations begin with batches of 2."""
    reward = Full()
    held_out, model = make_held_out(reward, "rollout.batch_size=4")
    sizes = record_sizes(monkeypatch, model)
    whole = held_out.evaluate(model.network, 3)
    kept = torch.stack(held_out.kept)
    assert sizes == [4, 2]
    reward.most = 2
    sizes.clear()
    halved = held_out.evaluate(model.network, 3)
    assert torch.equal(torch.stack(held_out.kept), kept)
    assert halved.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(halved[name], value, msg=name)
    assert "with a batch of 4 candidates: going on with 2" in capsys.readouterr().out
    held_out.evaluate(model.network, 2)
    held_out.videos(model.network, range(3))
    assert sizes == [4, 2, 2, 2, 2, 2, 2, 1]


def test_processes_that_hold_slices_of_the_same_clips_do_not_halve_their_batches() -> None:
    """A process cannot do it alone, and the others do not know of it."""
    reward = Full()
    reward.most = 2
    alone = Processes.start("cpu")
    held_out, model = make_held_out(reward, processes=replace(alone, _sequence=replace(alone, count=2)))
    model.prepare(engine.HELD_OUT)
    with pytest.raises(torch.OutOfMemoryError, match="a batch of 3 candidates does not fit"):
        held_out.evaluate(model.network, 2)


@pytest.mark.parametrize(
    ("number", "where"), [(1, "before the first step"), (2, "after step 2"), (4, "after step 5")]
)
def test_a_policy_that_diverges_in_an_evaluation_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    evaluate, calls = HeldOut.evaluate, []

    def failing(*arguments: Any) -> dict[str, Tensor]:
        calls.append(arguments)
        if len(calls) == number:
            raise NotFiniteError("the policy samples latents that are not finite")
        return evaluate(*arguments)

    monkeypatch.setattr(HeldOut, "evaluate", failing)
    with pytest.raises(
        ValueError, match=rf"the policy has diverged (in the evaluation )?{where}: the policy samples"
    ):
        engine.train(engine.make_config(tmp_path, *SETTINGS, "evaluation.every=2", "steps=5"))


@pytest.mark.parametrize(("size", "most"), [("auto", 12), ("null", 12), ("5", 5)])
def test_no_more_clips_are_sampled_at_once_than_a_step_makes_videos(
    size: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out, model = make_held_out(ToyReward(), f"rollout.batch_size={size}")
    sizes = record_sizes(monkeypatch, model)
    held_out.evaluate(model.network, 20)
    assert (max(sizes), sum(sizes)) == (most, 40)


def test_a_method_without_candidates_evaluates_no_more_clips_at_once_than_its_micro_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = ("method=refl", *gradient_toy.SETTINGS, "rollout.batch_size=auto", "objective.micro_batch_size=2")
    held_out, model = make_held_out(ToyReward(), *more)
    sizes = record_sizes(monkeypatch, model)
    held_out.videos(model.network, range(5))
    assert sizes == [2, 2, 1]


class Blind(ToyReward):
    reads_prompt = False


@pytest.mark.parametrize(("kind", "reward"), [("toy:ToyReward", ToyReward), ("test_evaluation:Blind", Blind)])
def test_prompts_are_exchanged_only_for_a_reward_that_reads_them(
    tmp_path: Path, kind: str, reward: type[ToyReward]
) -> None:
    engine.train(engine.make_config(tmp_path, "steps=1", f"reward.kind={kind}"), reward())
    first, *_ = engine.metrics_of(tmp_path / "run", "eval")
    assert any(name.startswith("guards/prompt/") for name in first) == (reward is ToyReward)


def test_measuring_the_device_is_charged_to_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes half a second here, and the step with all that is around it far less than the rest of that."""

    def count(*given: Any) -> Any:
        time.sleep(0.5)
        return flops(*given)

    flops = loop.count_row_flops
    monkeypatch.setattr(loop, "count_row_flops", count)
    engine.train(engine.make_config(tmp_path, "steps=1"))
    rows = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    row = next(row for row in rows if row["kind"] == "train")
    stages = ("text", "evaluate", "rollout", "update", "checkpoint")
    assert row["seconds/step"] - sum(row.get(f"seconds/{name}", 0.0) for name in stages) < 0.4


def test_what_fits_is_told_by_a_setting_that_the_method_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = Full()
    reward.most = 2
    more = ("method=refl", *gradient_toy.SETTINGS, "rollout.batch_size=auto", "objective.micro_batch_size=4")
    held_out, model = make_held_out(reward, *more)
    record_sizes(monkeypatch, model)
    held_out.evaluate(model.network, 2)
    said = capsys.readouterr().out
    assert "objective.micro_batch_size=2" in said
    assert "rollout.batch_size" not in said


def test_what_the_first_process_finds_of_the_reward_counts_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another kind of GPU may round otherwise, and what is found decides which alarms may stop the run."""
    held_out, _ = make_held_out(ToyReward())
    said: list[str] = []
    first = {name: Shuffled(8, 0, 8) for name in WEIGHTS}

    def broadcast(self: Processes, text: str) -> str:
        said.append(text)
        return json.dumps({name: asdict(each) for name, each in first.items()})

    monkeypatch.setattr(Processes, "broadcast_text", broadcast)
    videos = torch.zeros(2, 3, 4, 4, 3, dtype=torch.uint8)
    assert held_out.check_reward(videos, range(2), exchange=True) == first
    assert {each["clips"] for each in json.loads(said[0]).values()} == {2}
