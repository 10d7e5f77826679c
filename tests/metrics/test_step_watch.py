"""Replay logs of runs that went wrong, and of honest ones, and see which alarms the watch raises and when."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vpo_engine.config import GuardsConfig
from vpo_engine.config_file import load_config
from vpo_engine.metrics.reward_monitor import RewardMonitor
from vpo_engine.metrics.step_watch import Alarm, StepWatch
from vpo_engine.rewards.guards import DivergenceAlarm, Shuffled

DATA = Path(__file__).parents[1] / "data/watch"
SOON = 5
"""An alarm comes within so many rollouts of the onset."""
LATER = ["honest_seed7", "honest_eight", "honest_lora"]
"""Other seeds; eight candidates and a refresh at every second step; LoRA. They took no part in setting thresholds."""
LONG = ["honest_long_0", "honest_long_2"]
HONEST = ["honest_1", "honest_2", "honest_3", "bold", *LONG, *LATER]
"""Three of the recipe, one with four times the rate and a tenth of beta from step 9 on, and two that are three times as
long as usual; and ``LATER``."""
EXPLOITED: list[tuple[str, str, set[str]]] = [
    # name, the alarm, and others that are right later on
    ("still", "motion", {"style"}),
    ("red", "prompt_blind", {"style"}),
    ("colourful", "style", set()),
]
"""Real failures: a reward of stillness, one of red beside one of the caption, and one of strong colours."""
WRONG: list[tuple[str, int, str, set[str]]] = [
    # name, onset, the alarm, and others that are right too
    # A hundred times beta from step 9 on.
    ("beta", 9, "saturation", set()),
    # Pairs of the base policy, four times the rate from step 9 on.
    ("offline", 9, "shortcut", {"saturation"}),
    # Twenty times the rate from step 9 on; the loss stays above 1 from step 12 on.
    ("rate", 12, "saturation", set()),
]
Row = dict[str, Any]
Alarms = list[Alarm]


def monitor_of(rows: Sequence[Row]) -> RewardMonitor:
    """Return the monitor of a run that begins with these rows; its check of prompts is in the first one."""
    config = load_config(None, [])
    monitor = RewardMonitor(config.guards, 2, StepWatch(config))
    read = [
        (name, share) for row in rows[:1] for name, share in row.items() if name.startswith("guards/prompt/")
    ]
    if read:
        monitor.prompts({name.rpartition("/")[2]: Shuffled(round(16 * share), 0, 16) for name, share in read})
    return monitor


def replay(rows: Sequence[Row], evaluations: bool = False) -> Alarms:
    """Return the alarms of the rows; those of looks at evaluations only if they are wanted."""
    monitor, alarms = monitor_of(rows), []
    for row in rows:
        if row["kind"] == "train":
            alarms += monitor.step(row["step"], row)[1]
        elif evaluations:
            alarms += monitor.observe(row["step"], *looks_of(row))[1]
    return alarms


def looks_of(row: Row) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return looks of two clips before and now that are as far apart as the row of an evaluation says."""
    distances = {name.removeprefix("guards/"): row[name] for name in row if name.startswith("guards/style/")}
    before = 10 * torch.tensor([-1.0, 1.0])
    return dict.fromkeys(distances, before), {
        name: before + before.std() * far for name, far in distances.items()
    }


def recorded(name: str) -> list[Row]:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


class Synthetic:
    """Rows of an honest run whose statistics are drawn about constant means."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._about = self._random.gauss

    def row(self, step: int, **changes: float) -> Row:
        """Return the row of a step. ``changes``: what is added to its numbers."""
        pairs, age = 16, (step - 1) % 10
        row: Row = {"step": step, "kind": "train", "pairs": pairs}
        looks = {
            "brightness": (60, 10),
            "contrast": (25, 10),
            "saturation": (13, 4),
            "sharpness": (5, 2),
            "motion": (1.3, 0.3),
        }
        for name, (mean, deviation) in looks.items():
            error = deviation / math.sqrt(2 * pairs)
            row |= {
                f"watch/{name}": self._about(mean, error),
                f"watch/sd/{name}": deviation,
                f"watch/se/{name}": error,
            }
        row |= {"watch/prompt_share": self._about(0.4, 0.06), "watch/se/prompt_share": 0.08}
        for name, mean in {"blind": 0.02, "reading": 0.11}.items():
            row |= {
                f"reward/{name}": self._about(mean, 0.008),
                f"watch/sd/reward/{name}": 0.04,
                f"watch/se/reward/{name}": 0.008,
            }
        scale = 0.15
        row["sigmoid_saturation"] = max(0.0, self._about(0.05 * age, 0.08)) if age else 0.0
        row |= {"reference_winner_error": scale, "reference_loser_error": scale}
        row |= {
            "winner_error_change": self._about(0.0, 0.001) if age else 0.0,
            "watch/se/winner_error_change": 0.001 * (age > 0),
        }
        row["loser_error_change"] = row["winner_error_change"] + 0.0003 * age
        for name, change in changes.items():
            row[name] += change
        return row


def synthetic(onset: int, steps: int, seed: int = 0, **slopes: Callable[[int], float]) -> list[Row]:
    """Return rows whose numbers are changed from ``onset`` on by functions of the steps since then."""
    source = Synthetic(seed)
    rows: list[Row] = [{"step": 0, "kind": "eval", "guards/prompt/blind": 0.0, "guards/prompt/reading": 1.0}]
    for step in range(1, steps + 1):
        since = step - onset + 1
        rows.append(source.row(step, **{name: change(since) for name, change in slopes.items() if since > 0}))
    return rows


def first_of(alarms: Alarms, kind: str) -> Alarm:
    (found,) = [alarm for alarm in alarms if alarm.kind == kind]
    return found


def towards(change: float, steps: float) -> Callable[[int], float]:
    """Return a function of the steps since the onset that goes to ``change`` as an exponential does."""
    return lambda since: change * (1 - math.exp(-since / steps))


# UniRL issues 411 and 418 give the means, .02 to .35 for what does not see the prompt and .11 to .06 for what does, and
# noise at rollout 20; the spread of single videos and the shape of the curves are ours.
UNIRL = {"reward/blind": towards(0.33, 4), "reward/reading": towards(-0.05, 4)}
ONSET = 12


@pytest.mark.parametrize(
    ("kind", "says", "changes"),
    [
        ("prompt_blind", "more weight in reward.dimensions", UNIRL),
        (
            "prompt_blind",
            "videos of different prompts have become alike",
            {"watch/prompt_share": towards(-0.4, 1)},
        ),
        ("saturation", "Lower objective.beta=250", {"sigmoid_saturation": lambda since: 0.9}),
        (
            "shortcut",
            "lower optimizer.lr=0.0001",
            # sprites, learning rate doubled: errors .15, winners +.017, losers +.047 when the reference was old
            {
                "winner_error_change": lambda since: 0.0034 * since,
                "loser_error_change": lambda since: 0.0094 * since,
            },
        ),
        ("motion", "set guards.motion_floor=", {"watch/motion": lambda since: -0.1 * min(since, 8)}),
        ("style", "saturation is +", {"watch/saturation": lambda since: 1.0 * since}),
        ("style", "sharpness is -", {"watch/sharpness": lambda since: -0.5 * since}),
    ],
)
def test_each_failure_raises_its_own_alarm_soon_and_no_other(
    kind: str, says: str, changes: dict[str, Callable[[int], float]]
) -> None:
    alarms = replay(synthetic(ONSET, ONSET + 8, **changes))
    assert {alarm.kind for alarm in alarms} == {kind}
    alarm = first_of(alarms, kind)
    assert ONSET <= alarm.step <= ONSET + SOON
    assert says in alarm.text
    assert alarm.metric in changes
    assert alarm.limit is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"reward/blind": towards(0.33, 6)},  # what does not read the prompt rises, and nothing falls
        {"reward/blind": towards(0.33, 6), "reward/reading": towards(0.1, 6)},  # both rise
        {  # what reads the prompt falls with a rise for two steps only, and later on without one
            "reward/reading": lambda since: -0.05 * (since < 3 or since > 8),
            "reward/blind": lambda since: 0.33 if since < 3 else -0.01,
        },
        {
            "winner_error_change": lambda since: -0.01 * since,
            "loser_error_change": lambda since: 0.01 * since,
        },
        {
            "winner_error_change": lambda since: 0.01 * since,
            "loser_error_change": lambda since: -0.01 * since,
        },
        {"watch/motion": lambda since: 0.1 * since},  # more motion
        # Less of a change than is tolerated: 3 % of the reference's error, 15 % of the motion.
        {"winner_error_change": lambda since: 0.0045, "loser_error_change": lambda since: 0.0045},
        {"watch/motion": lambda since: -0.15 * 1.3},
        {"watch/prompt_share": towards(0.4, 3)},  # prompts are told apart better
    ],
)
def test_what_is_no_failure_raises_no_alarm(changes: dict[str, Callable[[int], float]]) -> None:
    assert replay(synthetic(ONSET, 40, **changes)) == []


@pytest.mark.parametrize("name", HONEST)
def test_recorded_runs_that_go_well_raise_no_alarm(name: str) -> None:
    assert replay(recorded(name)) == []


@pytest.mark.parametrize(("least", "steps"), [(0.04, []), (0.0, [42])])
def test_the_end_of_a_long_run_is_no_divergence(least: float, steps: list[int]) -> None:
    """The last evaluations of ``honest_long_0``: the judge falls by 0.002, and a tenth of its deviation is 0.04."""
    training = 3.9699056, 3.9722426, 3.9733804, 3.9738699, 3.9741958
    judge = 3.9704139, 3.9713569, 3.9705681, 3.9693026, 3.9692832
    alarm = DivergenceAlarm(GuardsConfig().window)
    said = [alarm(*seen, least) for seen in zip((28, 32, 36, 40, 42), training, judge, strict=True)]
    assert [step for step, text in zip((28, 32, 36, 40, 42), said, strict=True) if text] == steps


@pytest.mark.parametrize(("name", "onset", "kind", "beside"), WRONG)
def test_recorded_runs_that_go_wrong_raise_their_alarm_soon(
    name: str, onset: int, kind: str, beside: set[str]
) -> None:
    alarms = replay(recorded(name))
    assert onset <= first_of(alarms, kind).step <= onset + SOON
    assert {alarm.kind for alarm in alarms} <= {kind, *beside}


def onset(rows: Sequence[Row], metric: str) -> int:
    """Return the first step from which on a number stays outside of what is normal.

    Normal is the mean of the first four steps, give or take two standard errors of the difference.
    """
    steps = [row for row in rows if row["kind"] == "train"]
    error = "watch/se/" + metric.removeprefix("watch/")
    mean = statistics.fmean(row[metric] for row in steps[:4])
    noise = math.sqrt(statistics.fmean(row[error] ** 2 for row in steps[:4]) * (1 + 1 / 4))
    return 1 + max(row["step"] for row in steps if abs(row[metric] - mean) <= 2 * noise)


def damage(rows: Sequence[Row]) -> int:
    """Return the step of the first evaluation at which the judge's score has lost a quarter of what it can lose.

    It cannot fall below 1.
    """
    scores = {row["step"]: row["guards/held_out"] for row in rows if row["kind"] == "eval"}
    return next(step for step, score in scores.items() if score - 1 < 0.75 * (scores[0] - 1))


@pytest.mark.parametrize(("name", "kind", "later"), EXPLOITED)
def test_an_exploited_reward_raises_its_alarm_before_the_judge_sees_the_damage(
    name: str, kind: str, later: set[str]
) -> None:
    rows = recorded(name)
    alarms = replay(rows, evaluations=True)
    assert alarms[0].kind == kind
    assert alarms[0].step < damage(rows)
    assert {alarm.kind for alarm in alarms} <= {kind, *later}


@pytest.mark.parametrize(("name", "kind", "later"), EXPLOITED)
def test_steps_alone_raise_the_alarm_of_an_exploited_reward_soon(
    name: str, kind: str, later: set[str]
) -> None:
    rows = recorded(name)
    alarms = replay(rows)
    assert alarms[0].kind == kind
    assert 0 <= alarms[0].step - onset(rows, alarms[0].metric) <= SOON
    assert {alarm.kind for alarm in alarms} <= {kind, *later}


def test_an_honest_run_of_thousands_of_steps_raises_no_alarm() -> None:
    assert replay(synthetic(1, 3000)) == []


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 4))
def test_honest_runs_of_ten_thousand_steps_raise_no_alarm(seed: int) -> None:
    assert replay(synthetic(1, 10_000, seed=seed)) == []


def test_a_run_of_two_prompts_a_step_learns_for_longer_what_is_normal() -> None:
    """What changes at step 9 belongs to what such a run still calls normal; with eight prompts it is an alarm."""
    fall = {"watch/brightness": towards(-20.0, 5), "watch/motion": towards(-1.0, 5)}
    rows = synthetic(9, 27, **fall)
    levels = {}
    for prompts in (2, 8):
        watch = StepWatch(load_config(None, [f"pairs_per_step={prompts}"]))
        found = [watch.observe(row["step"], row)[0] for row in rows if row["kind"] == "train"]
        for kind in ("style", "motion"):
            levels[prompts, kind] = max(row[f"guards/level/{kind}"] for row in found)
    assert (levels[2, "style"], levels[2, "motion"]) == (0.0, 0.0)
    assert min(levels[8, "style"], levels[8, "motion"]) >= 1.0


def test_a_resumed_watch_goes_on_as_if_never_stopped() -> None:
    """The state goes through JSON, as a checkpoint's does."""
    rows = synthetic(6, 20, **UNIRL, sigmoid_saturation=lambda since: 0.9)
    whole = monitor_of(rows)
    expected = [whole.step(row["step"], row) for row in rows[1:]]
    assert {alarm.kind for _, alarms in expected for alarm in alarms} == {"prompt_blind", "saturation"}
    for cut in range(1, 20, 3):
        first, second = monitor_of(rows), monitor_of([])
        for row in rows[1:cut]:
            first.step(row["step"], row)
        second.load(json.loads(json.dumps(first.state())))
        assert [second.step(row["step"], row) for row in rows[cut:]] == expected[cut - 1 :]
        assert second.state() == whole.state()


def test_a_checkpoint_from_before_the_watch_is_taken_up() -> None:
    monitor = monitor_of([])
    monitor.load({"observations": [], "alarms": [{"step": 3, "kind": "style", "text": "an old one"}]})
    rows = synthetic(ONSET, ONSET + 8, sigmoid_saturation=lambda since: 0.9)
    assert [alarm.kind for row in rows[1:] for alarm in monitor.step(row["step"], row)[1]] == ["saturation"]
    assert monitor.alarms[0].text == "an old one"


def test_a_row_without_candidates_is_watched_for_what_it_has() -> None:
    """Offline DPO samples nothing; reward-gradient methods have no pairs either."""
    (row,) = synthetic(1, 1)[1:]
    offline = {name: value for name, value in row.items() if not name.startswith("watch/") or "error" in name}
    assert set(monitor_of([]).step(1, offline)[0]) == {"guards/level/saturation", "guards/level/shortcut"}
    assert monitor_of([]).step(1, {"loss": 1.0, "reward/selected": 2.0}) == ({}, [])
    tied = {name: value for name, value in row.items() if name.startswith(("watch/", "reward/", "pairs"))}
    del tied["watch/se/winner_error_change"]
    assert "guards/level/style" in monitor_of([]).step(1, tied | {"pairs": 0})[0]
