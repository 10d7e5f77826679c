"""Mistakes in the watch of the steps: sums, thresholds, what is compared with what, and its state."""

CUSUM, WATCH = "vpo_engine/metrics/cusum.py", "vpo_engine/metrics/step_watch.py"
STATISTICS, MONITOR = "vpo_engine/metrics/candidate_statistics.py", "vpo_engine/metrics/reward_monitor.py"
SUMS = ("tests/metrics/test_cusum.py",)
REPLAYS = ("tests/metrics/test_step_watch.py",)
MEASURES = ("tests/metrics/test_candidate_statistics.py",)
GUARDS = "vpo_engine/rewards/guards.py"
TRENDS = (
    "tests/rewards/test_guards.py::TestDivergence",
    "tests/test_reward_monitor.py::TestDivergenceOfEvaluations",
)
REPORTS = ("tests/runs/test_alarms.py",)
STOPS = (
    "tests/test_reward_monitor.py::test_an_alarm_of_a_step_reaches_terminal_log_and_report_and_stops_the_run",
)

MUTATIONS = [
    ("the sum falls below zero", CUSUM, "max(0.0, self.total + min(", "(self.total + min(", SUMS),
    ("one step raises an alarm", CUSUM, "/ error, limit / 2)", "/ error, limit)", SUMS),
    (
        "noise does not widen the tolerance",
        CUSUM,
        "self.tolerance + max(_LEAST",
        "self.tolerance + 0 * max(_LEAST",
        SUMS,
    ),
    (
        "the threshold is half as high",
        CUSUM,
        "math.log(steps) / (2 * clearance)",
        "math.log(steps) / (4 * clearance)",
        SUMS,
    ),
    (
        "two prompts a step are learned from for four steps",
        CUSUM,
        "max(FIRST, math.ceil(_FREEDOM / (prompts - 1)))",
        "FIRST",
        SUMS,
    ),
    (
        "the spread of many steps says nothing about their noise",
        CUSUM,
        "if len(seen) >= _FREEDOM:",
        "if False:",
        SUMS,
    ),
    (
        "a run learns as if it had eight prompts a step",
        WATCH,
        "first = steps_to_learn(config.pairs_per_step)",
        "first = steps_to_learn(8)",
        REPLAYS,
    ),
    ("a drift down counts as one up", CUSUM, 'change if way == "+" else -change', "change", SUMS),
    (
        "what is normal is learned for ever",
        CUSUM,
        "len(self.seen) >= self.first",
        "len(self.seen) >= 99",
        SUMS,
    ),
    (
        "saturation is tolerated",
        WATCH,
        'self._saturation(step, row["sigmoid_saturation"], ',
        "self._saturation(step, 0.0, ",
        REPLAYS,
    ),
    ("losers alone make a shortcut", WATCH, "min(winner, loser) / scale", "loser / scale", REPLAYS),
    ("winners alone make a shortcut", WATCH, "min(winner, loser) / scale", "winner / scale", REPLAYS),
    (
        "more motion raises the alarm",
        WATCH,
        'Drift(MOTION_TOLERATED, "-",',
        'Drift(MOTION_TOLERATED, "+-",',
        REPLAYS,
    ),
    ("less motion does not", WATCH, 'Drift(MOTION_TOLERATED, "-",', 'Drift(MOTION_TOLERATED, "+",', REPLAYS),
    ("a blind score alone raises the alarm", WATCH, "step, -change, *self", "step, 9.0, *self", REPLAYS),
    (
        "scores that read the prompt should fall",
        WATCH,
        "step, -change, *self",
        "step, change, *self",
        REPLAYS,
    ),
    (
        "a fall alone raises the alarm",
        WATCH,
        "level if self.rise(self.cause) > SCORE_TOLERATED else 0.0",
        "level",
        REPLAYS,
    ),
    ("a rise long ago counts", WATCH, "self.risen, self.steps = {}, 0", "pass", REPLAYS),
    (
        "steps are judged by their own errors",
        CUSUM,
        "noise = normal.error /",
        "noise = max(error, normal.error) /",
        REPLAYS,
    ),
    (
        "nothing reads the prompt",
        WATCH,
        "self._read = frozenset(dimensions)",
        "self._read = frozenset()",
        REPLAYS,
    ),
    (
        "prompts told apart better raise the alarm",
        WATCH,
        'Drift(SHARE_TOLERATED, "-",',
        'Drift(SHARE_TOLERATED, "+-",',
        REPLAYS,
    ),
    (
        "looks change downwards unseen",
        WATCH,
        'Drift(LOOK_TOLERATED * bound, "+-",',
        'Drift(LOOK_TOLERATED * bound, "+",',
        REPLAYS,
    ),
    (
        "looks change upwards unseen",
        WATCH,
        'Drift(LOOK_TOLERATED * bound, "+-",',
        'Drift(LOOK_TOLERATED * bound, "-",',
        REPLAYS,
    ),
    (
        "the sum of scores is not restored",
        WATCH,
        "setdefault(name, _Fall()).load(fall)",
        "setdefault(name, _Fall())",
        REPLAYS,
    ),
    (
        "the sum of saturation is not restored",
        WATCH,
        'self._saturation.load(state["saturation"])',
        "",
        REPLAYS,
    ),
    ("first scores are not restored", WATCH, "self._scores[name].load(seen)", "", REPLAYS),
    ("first looks are not restored", CUSUM, 'self.normal.load(state["normal"])', "", REPLAYS),
    (
        "honest runs' late rises are a shortcut",
        WATCH,
        "SHORTCUT_TOLERATED = 0.08",
        "SHORTCUT_TOLERATED = 0.05",
        REPLAYS,
    ),
    ("any clear fall counts", MONITOR, "LEAST_FALL = 0.1", "LEAST_FALL = 0.0", TRENDS),
    ("how far the reward fell is not asked", GUARDS, "or rise > -least_fall", "", TRENDS),
    ("the watch is not saved", MONITOR, '{"watch": self._watch.state()}', "{}", REPLAYS),
    (
        "an old state is refused",
        MONITOR,
        'if self._watch is not None and "watch" in state:',
        "if self._watch is not None:",
        REPLAYS,
    ),
    (
        "each candidate is one observation",
        STATISTICS,
        "places[text] for text in texts",
        "0 for text in texts",
        MEASURES,
    ),
    (
        "a prompt of two teams counts as two",
        STATISTICS,
        "dict.fromkeys(keys)",
        "keys",
        MEASURES,
    ),
    (
        "a step's videos count again",
        STATISTICS,
        "seen, self._seen = self._seen, []",
        "seen = self._seen",
        MEASURES,
    ),
    (
        "the variance within prompts counts as between",
        STATISTICS,
        "(mean_between - mean_within) / total",
        "mean_between / total",
        MEASURES,
    ),
    (
        "the curve of an alarm is not shown",
        "vpo_engine/runs/alarms.py",
        "</p>{_curve(alarm, rows)}",
        "</p>",
        REPORTS,
    ),
    (
        "an alarm of a step stops nothing",
        "vpo_engine/trainer.py",
        "= metrics, step self._raise_alarms(alarms)",
        "= metrics, step",
        STOPS,
    ),
]
