"""The watch: alarms from what every step logs, before evaluations or eyes can see the damage.

Each alarm is a sequential test (``cusum.py``) of a number that says directly what goes wrong; docs/guards.md explains
them all. Nothing here needs a held-out set or another network, and a log can be replayed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vpo_engine.metrics.cusum import Cusum, Drift, Normal, steps_to_learn

if TYPE_CHECKING:
    from vpo_engine.config import Config

_SCORE_ERROR = "watch/se/reward/"
_READ_PROMPTS = (
    "give a dimension that reads the prompt more weight in reward.dimensions, or take a reward that reads it, and name "
    "another one as guards.reward"
)

AlarmKind = Literal["prompt", "divergence", "style", "saturation", "shortcut", "motion", "prompt_blind"]
LOOKS = ("brightness", "contrast", "saturation", "sharpness")
LOOK_TOLERATED = 0.75
"""Tolerated change of a look, as a share of guards.style_bound."""
LEAST_LOOK = 0.5
"""Least standard deviation of a look that counts as one, in levels; rounding to bytes can cause as much."""

SATURATION_TOLERATED, SATURATION_EXPECTED = 0.75, 0.5
"""Tolerated saturation of the log-sigmoid, and one that is normal before a refresh. 0.75 is that of margins of 2, where
a pair's gradient has an eighth of the weight that it could have, or nearly all of it."""
_SATURATION_DEVIATION = 0.29
"""Standard deviation of numbers that are spread evenly from 0 to 1, as the saturations of single pairs about are."""
SHORTCUT_TOLERATED = 0.08
"""Tolerated rise of the winners' error over the reference's between two refreshes, as a share of it. Honest runs of
three times the usual length, which have nearly reached the reward's maximum, rise by 7 % through four steps and by up
to 13 % in single ones; the smallest shortcut that was measured is 11 %, and lasts."""
MOTION_TOLERATED = 0.25
"""Tolerated fall of the candidates' mean motion, as a share of what it was. Honest runs of the sprites world, which
remove jitter, lose 10 to 15 %; with a reward that favours still videos OnlineVPO's table shows 29 % (dynamic degree
55.6 to 39.4)."""
SHARE_TOLERATED = 0.3
"""Tolerated fall of the prompt's share of the candidates' variance, as a share of what it was."""
SCORE_TOLERATED = 0.2
"""Tolerated change of a score, in standard deviations of single candidates, where one that reads the prompt falls while
one that does not rises."""


@dataclass(frozen=True)
class Alarm:
    """A warning about the reward or the policy, raised after ``step`` steps.

    metric, limit: the name in the log of the number that raised it, and the value up to which it is tolerated; "" and
    None for alarms of evaluations and of the start.
    """

    step: int
    kind: AlarmKind
    text: str
    metric: str = ""
    limit: float | None = None

    @property
    def stops(self) -> bool:
        """Return whether guards.on_alarm=stop stops the run. A "prompt" alarm is about the reward, so it never does."""
        return self.kind != "prompt"


_Found = tuple[AlarmKind, float | None, Alarm | None]
"""A kind, how near it is to its alarm (None: the row says nothing about it), and the alarm to raise from level 1 on."""


@dataclass
class _Fall:
    """Watches how a score that reads the prompt falls, and how far those that do not have risen since it began to.

    risen: for each of these, the sum of its rises over ``steps`` steps.
    """

    sum: Cusum = field(default_factory=lambda: Cusum(SCORE_TOLERATED))
    risen: dict[str, float] = field(default_factory=dict)
    steps: int = 0

    def __call__(
        self, step: int, fall: float, error: float, uncertainty: float, rises: Mapping[str, float]
    ) -> float:
        """Take a step and return how near the alarm is: 0 unless a score has risen by more than is tolerated."""
        # One standard error of what is normal is taken off, not two: another score would have to rise as well.
        level = self.sum(step, fall, error, uncertainty / 2)
        if not self.sum.total:
            self.risen, self.steps = {}, 0
            return 0.0
        self.steps += 1
        self.risen = {name: self.risen.get(name, 0.0) + rise for name, rise in rises.items()}
        return level if self.rise(self.cause) > SCORE_TOLERATED else 0.0

    @property
    def cause(self) -> str:
        """Return the name of the score that has risen most."""
        return max(self.risen, key=lambda name: self.risen[name])

    def rise(self, name: str) -> float:
        """Return the mean rise of a score since the fall began."""
        return self.risen[name] / self.steps

    def state(self) -> list[Any]:
        return [self.sum.state(), self.risen, self.steps]

    def load(self, state: Sequence[Any]) -> None:
        self.sum.load(state[0])
        self.risen, self.steps = dict(state[1]), int(state[2])


class StepWatch:
    """Reads the log's row of every step, and says what goes wrong.

    All processes have the same rows, hence the same alarms. Rows of methods that lack a number are not watched for it.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._first = first = steps_to_learn(config.pairs_per_step)
        every, section = config.refresh_every, "reference" if config.offline_dpo is None else "offline_dpo"
        self._refreshes = f"{section}.refresh_every={'null' if every is None else every}"
        bound = config.guards.style_bound
        self._looks = (
            {}
            if bound is None
            else {name: Drift(LOOK_TOLERATED * bound, "+-", False, LEAST_LOOK, first) for name in LOOKS}
        )
        self._motion = Drift(MOTION_TOLERATED, "-", relative=True, first=first)
        self._share = Drift(SHARE_TOLERATED, "-", relative=True, first=first)
        self._scores: dict[str, Normal] = {}
        self._falls: dict[str, _Fall] = {}
        self._saturation = Cusum(SATURATION_TOLERATED, SATURATION_EXPECTED)
        self._shortcut = Cusum(SHORTCUT_TOLERATED)
        self._read: frozenset[str] = frozenset()

    def reads(self, dimensions: Collection[str]) -> None:
        """Say which dimensions of the reward have been found to read the prompt."""
        self._read = frozenset(dimensions)

    def observe(self, step: int, row: Mapping[str, float]) -> tuple[dict[str, float], list[Alarm]]:
        """Return numbers for the log, and the alarms of this step, whether or not they were raised before.

        The numbers, ``guards/level/<kind>``, say how near each kind is to its alarm, which is raised at 1.
        """
        found = [
            self._watch_saturation(step, row),
            self._watch_shortcut(step, row),
            self._watch_motion(step, row),
            self._watch_prompts(step, row),
            self._watch_looks(step, row),
        ]
        levels = {f"guards/level/{kind}": level for kind, level, _ in found if level is not None}
        return levels, [alarm for _, _, alarm in found if alarm is not None]

    # --- one for each kind -------------------------------------------------------------------------------------

    def _watch_saturation(self, step: int, row: Mapping[str, float]) -> _Found:
        if "sigmoid_saturation" not in row:
            return "saturation", None, None
        level = self._saturation(step, row["sigmoid_saturation"], _SATURATION_DEVIATION / row["pairs"] ** 0.5)
        if level < 1:
            return "saturation", level, None
        text = (
            f"the log-sigmoid is saturated (by {row['sigmoid_saturation']:.0%}, mostly above "
            f"{SATURATION_TOLERATED:.0%} since step {self._saturation.since}): right pairs teach nothing more, and "
            "wrong ones pull with full weight however wrong they are. Lower "
            f"objective.beta={self._config.objective.beta:g}, lower optimizer.lr={self._config.optimizer.lr:g}, or "
            f"refresh sooner ({self._refreshes}), so that margins stay small enough to learn from"
        )
        return (
            "saturation",
            level,
            Alarm(step, "saturation", text, "sigmoid_saturation", SATURATION_TOLERATED),
        )

    def _watch_shortcut(self, step: int, row: Mapping[str, float]) -> _Found:
        if "watch/se/winner_error_change" not in row or not row["reference_winner_error"]:
            return "shortcut", None, None
        scale = row["reference_winner_error"]
        winner, loser = row["winner_error_change"], row["loser_error_change"]
        error = row["watch/se/winner_error_change"] / scale
        both = min(winner, loser) / scale
        if not error:
            return "shortcut", 0.0, None
        level = self._shortcut(step, both, error)
        if level < 1:
            return "shortcut", level, None
        text = (
            "the policy gets worse at winners too: since the last refresh its error has risen by "
            f"{winner / scale:.0%} on winners and {loser / row['reference_loser_error']:.0%} on losers. The loss "
            f"falls by spoiling losers more: lower optimizer.lr={self._config.optimizer.lr:g}, refresh sooner "
            f"({self._refreshes}), or set objective.loser_scaling=1, which weakens a loser's gradient where it would "
            "make the winner worse"
        )
        limit = SHORTCUT_TOLERATED * scale
        return "shortcut", level, Alarm(step, "shortcut", text, "winner_error_change", limit)

    def _watch_motion(self, step: int, row: Mapping[str, float]) -> _Found:
        if "watch/motion" not in row:
            return "motion", None, None
        level = self._motion(step, row["watch/motion"], row["watch/sd/motion"], row["watch/se/motion"])
        if level < 1:
            return "motion", level, None
        floor = 0.7 * self._motion.normal.mean
        text = (
            f"candidates move {-self._motion.change(row['watch/motion']):.0%} less than in the first steps, since "
            f"about step {self._motion.since}: set guards.motion_floor={floor:.2g}, so that still videos never win, or "
            "give a dimension that wants motion more weight in reward.dimensions"
        )
        return "motion", level, Alarm(step, "motion", text, "watch/motion", self._motion.limit())

    def _watch_prompts(self, step: int, row: Mapping[str, float]) -> _Found:
        """Watch whether prompts still decide what candidates are, and what scores that read them do."""
        share, scores = self._watch_share(step, row), self._watch_scores(step, row)
        found = [each for each in (share, scores) if each[1] is not None]
        return max(found, key=lambda each: each[1] or 0.0) if found else share

    def _watch_share(self, step: int, row: Mapping[str, float]) -> _Found:
        if "watch/prompt_share" not in row:
            return "prompt_blind", None, None
        drift, share = self._share, row["watch/prompt_share"]
        level = drift(step, share, 0.0, row["watch/se/prompt_share"])
        if level < 1:
            return "prompt_blind", level, None
        text = (
            f"videos of different prompts have become alike: the prompt decides {share:.0%} of their variance, "
            f"{drift.normal.mean:.0%} in the first steps. The policy learns to ignore the prompt: {_READ_PROMPTS}, and "
            f"go back to a checkpoint before step {drift.since}"
        )
        return "prompt_blind", level, Alarm(step, "prompt_blind", text, "watch/prompt_share", drift.limit())

    def _watch_scores(self, step: int, row: Mapping[str, float]) -> _Found:
        changes: dict[bool, dict[str, float]] = {True: {}, False: {}}
        for key, error in row.items():
            if key.startswith(_SCORE_ERROR):
                name = key.removeprefix(_SCORE_ERROR)
                normal, value = (
                    self._scores.setdefault(name, Normal(first=self._first)),
                    row[f"reward/{name}"],
                )
                learning = normal.learn(value, row[f"watch/sd/reward/{name}"], error)
                if not learning and normal.unit and normal.error:
                    changes[name in self._read][name] = (value - normal.mean) / normal.unit
        reading, blind = changes[True], changes[False]
        if not (reading and blind):
            return "prompt_blind", None, None
        levels = {
            name: self._falls.setdefault(name, _Fall())(step, -change, *self._noise(name), blind)
            for name, change in reading.items()
        }
        name = max(levels, key=lambda each: levels[each])
        if levels[name] < 1:
            return "prompt_blind", levels[name], None
        fall, normal = self._falls[name], self._scores[name]
        text = (
            f"{fall.cause}, which does not read the prompt, has risen by {fall.rise(fall.cause):.1f} standard "
            f"deviations of the first candidates' scores, while {name}, which does, has fallen by "
            f"{-reading[name]:.1f}, since about step {fall.sum.since}: the policy exploits what is blind to the "
            f"prompt. So {_READ_PROMPTS}"
        )
        limit = normal.mean - SCORE_TOLERATED * normal.unit
        return "prompt_blind", levels[name], Alarm(step, "prompt_blind", text, f"reward/{name}", limit)

    def _noise(self, score: str) -> tuple[float, float]:
        """Return the standard errors of a step's mean score and of the first steps', in deviations of candidates."""
        error = self._scores[score].error / self._scores[score].unit
        return error, error / math.sqrt(self._first)

    def _watch_looks(self, step: int, row: Mapping[str, float]) -> _Found:
        levels = {
            name: drift(step, row[f"watch/{name}"], row[f"watch/sd/{name}"], row[f"watch/se/{name}"])
            for name, drift in self._looks.items()
            if f"watch/{name}" in row
        }
        if not levels:
            return "style", None, None
        name = max(levels, key=lambda each: levels[each])
        drift = self._looks[name]
        if levels[name] < 1:
            return "style", levels[name], None
        text = (
            f"candidates change their look: {name} is {drift.change(row[f'watch/{name}']):+.1f} standard deviations "
            f"from the first steps' candidates since about step {drift.since}. If the prompts do not ask for it, "
            f"the reward pays for a look: look at the clips, lower optimizer.lr={self._config.optimizer.lr:g}, "
            "and give other dimensions more weight in reward.dimensions; if they do, raise guards.style_bound="
            f"{self._config.guards.style_bound:g}, three quarters of which are tolerated"
        )
        return "style", levels[name], Alarm(step, "style", text, f"watch/{name}", drift.limit())

    # --- for checkpoints -----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON data."""
        return {
            "looks": {name: drift.state() for name, drift in self._looks.items()},
            "motion": self._motion.state(),
            "share": self._share.state(),
            "scores": {name: normal.seen for name, normal in self._scores.items()},
            "falls": {name: fall.state() for name, fall in self._falls.items()},
            "saturation": self._saturation.state(),
            "shortcut": self._shortcut.state(),
            "reads": sorted(self._read),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Load a saved state into a new watch, which then continues as if the run had never stopped."""
        self._read = frozenset(state["reads"])
        self._motion.load(state["motion"])
        self._share.load(state["share"])
        self._saturation.load(state["saturation"])
        self._shortcut.load(state["shortcut"])
        for name, drift in self._looks.items():
            if name in state["looks"]:
                drift.load(state["looks"][name])
        for name, fall in state["falls"].items():
            self._falls.setdefault(name, _Fall()).load(fall)
        for name, seen in state["scores"].items():
            self._scores[name] = Normal(first=self._first)
            self._scores[name].load(seen)
