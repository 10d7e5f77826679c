"""Test the alarms of a run: when they are raised, that they survive a resume, and what a run does about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from smallest_run import SHIPPED
from step_case import places_of, scores_of, step_on
from torch import Tensor

from vpo_engine import train as entry
from vpo_engine.config import Config, GuardsConfig
from vpo_engine.config_file import load_config
from vpo_engine.data.sprites.damage import KINDS, damaged
from vpo_engine.data.sprites.world import Attributes
from vpo_engine.metrics.appearance import STATISTICS, appearance, style_distance
from vpo_engine.metrics.reward_monitor import RewardMonitor
from vpo_engine.metrics.step_watch import Alarm
from vpo_engine.rewards.guards import Shuffled, motion
from vpo_engine.rewards.sprites import DIMENSIONS, SpritesReward
from vpo_engine.runs.log import read_metrics
from vpo_engine.train import train

Make = Callable[..., Config]


def evaluation(
    training: float, held_out: float, spread: float = 0.0, clips: int = 12, **style: float
) -> dict[str, Tensor]:
    """Clips about these means; ``spread``: of the clips' own changes, by a fixed draw."""
    noise = torch.randn(2, clips, generator=torch.Generator().manual_seed(int(1000 * training)))
    place = torch.linspace(-1, 1, clips)
    found = {
        "reward/selected": training + place + spread * noise[0],
        "judge/selected": held_out - place + spread * noise[1],
    }
    return found | {f"style/{name}": 100 + style.get(name, 0.0) + 10 * place for name in STATISTICS}


class TestDivergenceOfEvaluations:
    def test_changes_since_the_base_clear_of_chance_raise_it_at_once(self) -> None:
        monitor, base = RewardMonitor(GuardsConfig(), 12), evaluation(2.0, 3.0)
        assert monitor.observe(0, base, base)[1] == []
        numbers, (alarm,) = monitor.observe(20, base, evaluation(2.5, 2.8, spread=0.05))
        assert (alarm.step, alarm.kind) == (20, "divergence")
        assert "on 12 held-out clips the training reward rose by 0." in alarm.text
        assert "while the held-out reward fell by 0.2" in alarm.text
        assert numbers["guards/training"] == pytest.approx(2.5, abs=0.05)
        assert monitor.observe(40, base, evaluation(3.0, 1.0))[1] == []  # once

    @pytest.mark.parametrize(
        ("training", "held_out", "spread"), [(2.5, 3.2, 0.05), (1.8, 2.5, 0.05), (2.02, 2.98, 1.0)]
    )
    def test_both_better_both_worse_and_chance_do_not(
        self, training: float, held_out: float, spread: float
    ) -> None:
        base = evaluation(2.0, 3.0)
        assert (
            RewardMonitor(GuardsConfig(), 12).observe(9, base, evaluation(training, held_out, spread))[1]
            == []
        )

    @staticmethod
    def alarms_of_lines(fall: float) -> list[Alarm]:
        """Clips vary by more than the change, and the means follow a line that rises, and one that falls."""
        monitor, base = RewardMonitor(GuardsConfig(window=4), 12), evaluation(2.0, 3.0)
        said = []
        for step in range(5):
            now = evaluation(2.0, 3.0, spread=2.0)
            for name, change in (("reward/selected", 0.1), ("judge/selected", -fall)):
                now[name] = now[name] - now[name].mean() + 2.5 + change * step
            said += monitor.observe(step, base, now)[1]
        return said

    def test_a_trend_that_no_single_change_shows(self) -> None:
        (alarm,) = self.alarms_of_lines(0.1)
        assert alarm.step == 3
        assert "from step 0 to 3 the training reward rose" in alarm.text

    def test_a_fall_too_small_to_notice_is_none_however_clear(self) -> None:
        """As at the end of long runs. The bound is a tenth of the base policy's deviation, through three steps."""
        bound = 0.1 * float(torch.linspace(-1, 1, 12).std()) / 3
        assert self.alarms_of_lines(0.98 * bound) == []
        assert len(self.alarms_of_lines(1.02 * bound)) == 1

    def test_only_clips_of_every_evaluation_are_compared(self) -> None:
        monitor, base = RewardMonitor(GuardsConfig(), 4), evaluation(2.0, 3.0, clips=12)
        now = {name: values[:4] for name, values in evaluation(2.0, 3.0, clips=12).items()}
        numbers, alarms = monitor.observe(1, base, now)
        assert alarms == []
        assert all(numbers[f"guards/style/{name}"] == 0 for name in STATISTICS)

    def test_a_resumed_watch_goes_on_as_if_never_stopped(self) -> None:
        base, whole = evaluation(2.0, 3.0), RewardMonitor(GuardsConfig(window=4), 12)
        nows = [evaluation(2.0 + 0.03 * step, 3.0 - 0.03 * step, brightness=4 * step) for step in range(6)]
        for now in nows:
            now["judge/selected"] = now["judge/selected"] + torch.linspace(
                -3, 3, 12
            )  # no change clear by itself
        expected = [whole.observe(step, base, now) for step, now in enumerate(nows)]
        assert [alarm.kind for _, alarms in expected for alarm in alarms] == ["style", "divergence"]
        for cut in range(6):
            first, second = (
                RewardMonitor(GuardsConfig(window=4), 12),
                RewardMonitor(GuardsConfig(window=4), 12),
            )
            for step in range(cut):
                first.observe(step, base, nows[step])
            second.load(json.loads(json.dumps(first.state())))
            assert [second.observe(step, base, nows[step]) for step in range(cut, 6)] == expected[cut:]
            assert second.alarms == whole.alarms

    def test_evaluations_of_other_clips_than_before_a_resume_are_not_compared(self) -> None:
        """evaluation.samples_between may change when a run goes on. Here the policy never does."""
        base = evaluation(2.0, 3.0)
        few, more = (RewardMonitor(GuardsConfig(window=4), clips) for clips in (4, 12))
        for step in (0, 2):
            few.observe(step, base, base)
        more.load(json.loads(json.dumps(few.state())))
        row = {"step": 3, "guards/training": 2.0, "guards/held_out": 3.0}
        more.recall([], row)
        assert not more.state()["observations"]
        assert [more.observe(step, base, base)[1] for step in (4, 6)] == [[], []]


class TestStyle:
    @staticmethod
    def clips(**severities: float) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        rows = torch.tensor([severities.get(kind, 0.0) for kind in KINDS]).repeat(16, 1)
        return damaged(Attributes.draw(16, generator), rows, generator).videos

    def test_statistics_of_known_pictures(self) -> None:
        videos = torch.zeros(3, 2, 4, 6, 3, dtype=torch.uint8)
        videos[0] = 40
        videos[1, ..., 0] = 200
        videos[2, :, :, 3:] = 100
        found = appearance(videos)
        assert found["brightness"].tolist() == pytest.approx([40, 0.299 * 200, 50])
        assert found["contrast"].tolist() == pytest.approx([0, 0, 50], abs=1e-3)
        assert found["saturation"].tolist() == [0, 200, 0]
        assert found["sharpness"].tolist() == pytest.approx([0, 0, 50], abs=1e-3)

    @pytest.mark.parametrize(
        ("name", "change", "grows"),
        [
            ("brightness", lambda v: (v.float() + 60).clamp(0, 255), True),
            ("contrast", lambda v: v.float().mean() + 0.2 * (v.float() - v.float().mean()), False),
            ("saturation", lambda v: v.float().mean(dim=4, keepdim=True).expand_as(v), False),
            (
                "sharpness",
                lambda v: sum(v.roll(k % 5, 2).roll(k // 5, 3).float() for k in range(25)) / 25,
                False,
            ),
        ],
    )
    def test_each_drift_is_named_and_one_alone_raises_the_alarm(
        self, name: str, change: Callable[[Tensor], Tensor], grows: bool
    ) -> None:
        clips = self.clips()
        now = change(clips).round().to(torch.uint8)
        base, after = ({f"style/{key}": value for key, value in appearance(v).items()} for v in (clips, now))
        _, alarms = RewardMonitor(GuardsConfig(style_bound=1.0), 16).observe(7, base, after)
        assert [alarm.kind for alarm in alarms] == ["style"]
        assert f"{name} {'+' if grows else '-'}" in alarms[0].text
        assert RewardMonitor(GuardsConfig(style_bound=None), 16).observe(7, base, after)[1] == []

    def test_other_clips_of_the_same_world_are_within_the_bound(self) -> None:
        base = appearance(self.clips())
        other = appearance(self.clips(freeze=1.0))
        assert max(abs(value) for value in style_distance(base, other).values()) < 0.5

    def test_equal_clips_have_the_spread_of_rounding(self) -> None:
        same = dict.fromkeys(STATISTICS, torch.full((4,), 50.0))
        assert style_distance(same, {name: value + 1 for name, value in same.items()})["contrast"] == 2.0


class TestPrompts:
    def test_a_reward_that_does_not_read_them_is_named(self) -> None:
        found = dict.fromkeys(DIMENSIONS, Shuffled(0, 0, 16)) | {"text_alignment": Shuffled(9, 7, 16)}
        (alarm,) = RewardMonitor(GuardsConfig(), 4).prompts(found)
        assert (alarm.step, alarm.kind, alarm.stops) == (0, "prompt", False)
        assert "text_alignment 0.56" in alarm.text

    def test_one_dimension_that_reads_them_is_enough(self) -> None:
        found = dict.fromkeys(DIMENSIONS, Shuffled(0, 0, 16)) | {"text_alignment": Shuffled(15, 1, 16)}
        assert RewardMonitor(GuardsConfig(), 4).prompts(found) == []

    def test_few_clips_say_nothing(self) -> None:
        assert RewardMonitor(GuardsConfig(), 4).prompts(dict.fromkeys(DIMENSIONS, Shuffled(0, 0, 6))) == []


def test_the_held_out_reward_is_another_one(small: Make) -> None:
    with pytest.raises(ValueError, match=r"guards\.reward is the reward that is trained against \(sprites\)"):
        small("guards.reward.kind=sprites")


def test_a_noisy_reward_stops_the_run_with_its_numbers(
    smallest: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score, calls = SpritesReward.score, iter(range(10**6))

    def noisy(self: SpritesReward, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {name: values + 1e-3 * next(calls) for name, values in score(self, videos, prompts).items()}

    monkeypatch.setattr(SpritesReward, "score", noisy)
    assert entry.main([*smallest, f"run_dir={tmp_path / 'run'}"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: visual_quality of one clip (")
    assert "when scored again; rewards have to be deterministic" in last
    assert not (tmp_path / "run/summary.json").exists()


@pytest.fixture
def exploited(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second evaluation on clips score higher, the judge scores them lower, and they are washed out."""
    from vpo_engine.metrics import held_out

    evaluate, seen = held_out.HeldOut.evaluate, iter(range(100))

    def changed(self: held_out.HeldOut, *arguments: object) -> dict[str, Tensor]:
        found = evaluate(self, *arguments)  # type: ignore[arg-type]
        if next(seen):
            found["reward/selected"] = found["reward/selected"] + 100
            found["judge/selected"] = found["judge/selected"] - 100
            found["style/saturation"] = found["style/saturation"] - 500
        return found

    monkeypatch.setattr(held_out.HeldOut, "evaluate", changed)


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_alarms_reach_log_terminal_and_report_and_stop_a_run_that_goes_on_when_resumed(
    smallest: list[str], tmp_path: Path, exploited: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = [*smallest, "steps=3", f"run_dir={run}", "guards.on_alarm=stop"]
    assert entry.main(arguments) == 1
    shown = capsys.readouterr()
    assert "ALARM after step 2: on 2 held-out clips the training reward rose by 1" in shown.err
    assert (
        "ALARM after step 2: held-out clips look different from the base policy's: saturation -" in shown.err
    )
    assert "stopped by an alarm (guards.on_alarm=stop) after step 2, which is saved; go on with" in shown.out
    kinds = [json.loads(line)["kind"] for line in (run / "alarms.jsonl").read_text().splitlines()]
    assert kinds == ["divergence", "style"]
    report = (run / "report.html").read_text()
    assert "The training reward rises while the held-out reward falls" in report
    assert "The run raised 2 alarms, see below" in report
    (row,) = [
        row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "eval" and row["step"] == 2
    ]
    assert float(row["guards/style/saturation"]) < -1
    assert float(row["guards/training"]) > float(row["guards/held_out"])

    assert entry.main([*arguments, "checkpoint.resume=true"]) == 0  # each alarm is raised once
    assert "ALARM" not in capsys.readouterr().err
    assert [json.loads(line)["kind"] for line in (run / "alarms.jsonl").read_text().splitlines()] == kinds
    assert (run / "summary.json").is_file()


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_an_alarm_of_a_step_reaches_terminal_log_and_report_and_stops_the_run(
    smallest: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step counts as saturated, and two are enough."""
    monkeypatch.setattr("vpo_engine.metrics.step_watch.SATURATION_TOLERATED", -1.0)
    monkeypatch.setattr("vpo_engine.metrics.step_watch.SATURATION_EXPECTED", -2.0)
    monkeypatch.setattr("vpo_engine.metrics.cusum.threshold", lambda clearance: 1e-3)
    run = tmp_path / "run"
    rare = ("evaluation.every=null", "checkpoint.every=null", "guards.on_alarm=stop")
    assert entry.main([*smallest, *rare, f"run_dir={run}"]) == 1
    assert "ALARM after step 2: the log-sigmoid is saturated (by" in capsys.readouterr().err.replace(
        "\n", " "
    )
    (alarm,) = (json.loads(line) for line in (run / "alarms.jsonl").read_text().splitlines())
    assert (alarm["step"], alarm["kind"], alarm["metric"], alarm["limit"]) == (
        2,
        "saturation",
        "sigmoid_saturation",
        -1.0,
    )
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["guards/level/saturation"] for row in rows] == [0.5, 1.0]
    assert "The log-sigmoid is saturated</b>, step 2" in (run / "report.html").read_text()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.long
def test_another_held_out_reward_takes_the_judges_place(small: Make, tmp_path: Path) -> None:
    config = small("steps=1", "evaluation.every=null", "guards.reward.kind=brisque")
    assert train(config) == 0
    first, last = (row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row["kind"] == "eval")
    assert {name for name in first if name.startswith("held_out/judge/")} == {
        "held_out/judge/visual_quality",
        "held_out/judge/selected",
    }
    # Both are the mean of the same two clips' float32 scores. The guard's sum is in float64, which holds the sum of two
    # float32 numbers of like size exactly; the other's is that sum rounded to float32. Halving rounds neither.
    assert (
        torch.tensor(last["guards/held_out"], dtype=torch.float32).item() == last["held_out/judge/selected"]
    )
    assert (tmp_path / "run/alarms.jsonl").read_text() == ""
    assert (
        "No alarm was raised: there is no sign that the policy exploits the reward"
        in (tmp_path / "run/report.html").read_text()
    )


def test_a_motion_floor_keeps_still_videos_from_winning(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward prefers the video that moves least; some of either prompt move enough."""
    from test_online_vpo import PROMPTS, make_algorithm

    class PrefersStillness:
        dimensions = ("stillness",)

        def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
            return {"stillness": -motion(videos)}

    settings = (SHIPPED, "reward.dimensions=global", "rollout.candidates=4")
    steps = []
    for floor in ("null", "1.2"):
        algorithm = make_algorithm(small(*settings, f"guards.motion_floor={floor}"), PrefersStillness())
        steps.append(step_on(algorithm, PROMPTS, [0, 1]))
    free, guarded = steps
    moved = scores_of(guarded, "motion")
    assert torch.equal(scores_of(free, "stillness"), -moved)
    assert places_of(free.choices)[0] == moved.argmin(1).tolist()
    assert guarded.pairs
    assert all(pair.winner.scores["motion"] >= 1.2 for pair in guarded.pairs)
    still = (moved < 1.2).float().mean()
    assert 0 < still < 1
    assert guarded.metrics["guards/still"] == pytest.approx(float(still))
    assert (
        guarded.metrics["reward/selected"] == free.metrics["reward/selected"]
    )  # motion is no part of "global"
    assert "guards/still" not in free.metrics


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_a_reward_that_never_tells_candidates_apart_stops_the_run(
    small: Make, small_policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vpo_engine.rewards.sprites import SpritesReward

    score = SpritesReward.score

    def constant(self: SpritesReward, videos: torch.Tensor, prompts: object) -> dict[str, torch.Tensor]:
        return {name: torch.ones_like(value) for name, value in score(self, videos, prompts).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(SpritesReward, "score", constant)
    rare = ("evaluation.every=null", "checkpoint.every=null")
    with pytest.raises(ValueError, match=r"every pair of the last 20 steps .* was a tie"):
        train(small(small_policy, "steps=30", "pairs_per_step=1", *rare))


@pytest.mark.parametrize("method", ["vader", "t2v_turbo"])
def test_the_held_out_reward_is_not_the_second_one_either(method: str) -> None:
    second, judge = f"{method}.second={{kind: hpsv2, path: h}}", "guards.reward={kind: hpsv2, path: h}"
    with pytest.raises(ValueError, match=r"guards\.reward is .*hpsv2"):
        load_config(None, [f"method={method}", second, judge])
