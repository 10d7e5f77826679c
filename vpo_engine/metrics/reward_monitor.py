"""Monitor the reward of a run: raise an alarm if steps or evaluations show that the policy exploits it."""

from __future__ import annotations

import math
import textwrap
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from torch import Tensor

from vpo_engine.config import GuardsConfig
from vpo_engine.metrics.appearance import STATISTICS, style_distance
from vpo_engine.metrics.measures import describe
from vpo_engine.metrics.step_watch import Alarm, StepWatch
from vpo_engine.metrics.summary import WIDTH, paired_difference
from vpo_engine.rewards.guards import DivergenceAlarm, Shuffled

LEAST_FALL = 0.1
"""Least fall of the held-out reward through a window that counts as one, in standard deviations of the base policy's
single clips."""
Measured = Mapping[str, Tensor]
"""The result of ``HeldOut.evaluate``."""


class RewardMonitor:
    """Watches every step, compares every evaluation with earlier ones, and raises each kind of alarm once.

    All processes have the same alarms, since they have the same rows and evaluations. ``clips``: the number of clips,
    counted from the first, that every evaluation has; only these are compared. ``watch``: of the steps; None: none.
    """

    NOTHING: ClassVar[Mapping[str, Any]] = {"observations": (), "alarms": ()}
    """The state of a run that had no monitor."""

    def __init__(self, settings: GuardsConfig, clips: int, watch: StepWatch | None = None) -> None:
        self._settings, self._clips, self._watch = settings, clips, watch
        self._comparable = True  # whether earlier evaluations, of a state that was loaded, had as many clips
        self._trend = DivergenceAlarm(settings.window)
        self._observations: deque[tuple[int, float, float]] = deque(maxlen=settings.window)
        self.alarms: list[Alarm] = []

    def prompts(self, found: Mapping[str, Shuffled]) -> list[Alarm]:
        """Raise an alarm if no dimension of the reward reads the prompt, and there are enough clips to tell."""
        level = 0.05 / len(found)
        if self._watch is not None:
            self._watch.reads([name for name, shuffled in found.items() if shuffled.reads(level)])
        if any(shuffled.reads(level) for shuffled in found.values()):
            return []
        if any(0.5**shuffled.clips > level for shuffled in found.values()):
            return []
        shares = ", ".join(f"{name} {shuffled.share:.2f}" for name, shuffled in found.items())
        text = (
            f"the reward scores {next(iter(found.values())).clips} held-out clips no higher with their own prompts "
            f"than with each other's (share that scores higher with its own prompt: {shares}). It does not read "
            "prompts and cannot teach the policy to follow them, or the base policy does not follow prompts at all"
        )
        return self._raise(Alarm(0, "prompt", text))

    def step(self, step: int, row: Mapping[str, float]) -> tuple[dict[str, float], list[Alarm]]:
        """Return numbers for the log, named ``guards/level/...``, and the alarms that the row of a step raises."""
        if self._watch is None:
            return {}, []
        levels, alarms = self._watch.observe(step, row)
        return levels, [alarm for each in alarms for alarm in self._raise(each)]

    def observe(self, step: int, base: Measured, now: Measured) -> tuple[dict[str, float], list[Alarm]]:
        """Return numbers for the log, named ``guards/...``, and the alarms that this evaluation raises."""
        alarms: list[Alarm] = []
        numbers: dict[str, float] = {}
        if "judge/selected" in now:
            sides = [
                self._shared(measured[f"{kind}/selected"])
                for kind in ("reward", "judge")
                for measured in (base, now)
            ]
            training, held_out = (float(values.double().mean()) for values in sides[1::2])
            numbers |= {"guards/training": training, "guards/held_out": held_out}
            self._observations.append((step, training, held_out))
            least = LEAST_FALL * float(sides[2].double().std()) if self._clips > 1 else 0.0
            said = self._trend(step, training, held_out, least) or _since_base(step, *sides)
            if said is not None:
                alarms += self._raise(Alarm(step, "divergence", said))
        names = [f"style/{name}" for name in STATISTICS]
        if all(name in measured for name in names for measured in (base, now)) and self._clips > 1:
            before, after = (
                {name: self._shared(measured[f"style/{name}"]) for name in STATISTICS}
                for measured in (base, now)
            )
            distances = style_distance(before, after)
            numbers |= {f"guards/style/{name}": value for name, value in distances.items()}
            alarms += self._style(step, distances)
        return numbers, alarms

    def _style(self, step: int, distances: Mapping[str, float]) -> list[Alarm]:
        bound = self._settings.style_bound
        beyond = {
            name: value for name, value in distances.items() if bound is not None and abs(value) > bound
        }
        if not beyond:
            return []
        words = ", ".join(f"{name} {value:+.2f}" for name, value in beyond.items())
        text = (
            f"held-out clips look different from the base policy's: {words} standard deviations of its clips, more "
            f"than guards.style_bound={bound:g}; look at the clips before you trust the reward"
        )
        return self._raise(Alarm(step, "style", text))

    def _shared(self, values: Tensor) -> Tensor:
        return values[: self._clips]

    def _raise(self, alarm: Alarm) -> list[Alarm]:
        if any(earlier.kind == alarm.kind for earlier in self.alarms):
            return []
        self.alarms.append(alarm)
        return [alarm]

    def recall(self, alarms: Iterable[Mapping[str, Any]], evaluation: Mapping[str, Any] | None) -> None:
        """Take alarms for raised that were raised after the state was saved, {"step", "kind", "text", ...} each.

        evaluation: the log's row of the evaluation at the step of the state; it may have come after the save as well.
        """
        for fields in alarms:
            self._raise(Alarm(**fields))
        if evaluation is not None and self._comparable and "guards/held_out" in evaluation:
            seen = (evaluation["step"], evaluation["guards/training"], evaluation["guards/held_out"])
            if seen[0] not in [step for step, *_ in self._observations]:
                self._remember(*seen)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON data."""
        return {
            "clips": self._clips,
            "observations": [list(seen) for seen in self._observations],
            "alarms": [asdict(alarm) for alarm in self.alarms],
            **({} if self._watch is None else {"watch": self._watch.state()}),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Load a saved state into a new monitor, which then continues as if the run had never stopped.

        A state without a watch is one of an earlier version: the watch learns from the next steps what is normal. What
        was observed on another number of clips (evaluation.samples_between may change) is not compared with.
        """
        self.alarms = [Alarm(**fields) for fields in state["alarms"]]
        self._comparable = state.get("clips", self._clips) == self._clips
        for step, training, held_out in state["observations"] if self._comparable else ():
            self._remember(step, training, held_out)
        if self._watch is not None and "watch" in state:
            self._watch.load(state["watch"])

    def _remember(self, step: int, training: float, held_out: float) -> None:
        self._observations.append((step, training, held_out))
        self._trend(step, training, held_out, math.inf)  # what was raised is among the alarms


def _since_base(step: int, *sides: Tensor) -> str | None:
    """Return the text of an alarm if the training reward rose and the held-out reward fell since the base policy.

    sides: training reward of the same clips before and now, then held-out reward before and now, each [M].
    """
    training, held_out = paired_difference(*sides[:2]), paired_difference(*sides[2:])
    if training.low is None or held_out.low is None or held_out.high is None:  # there is one clip
        return None
    if training.low <= 0 or held_out.high >= 0:
        return None
    return (
        f"on {training.n} held-out clips the training reward rose by {training.mean:.3g} since the base policy (95 % "
        f"bounds {training.low:.3g} to {training.high:.3g}) while the held-out reward fell by {-held_out.mean:.3g} "
        f"({-held_out.high:.3g} to {-held_out.low:.3g}): the policy exploits its reward; look at its videos, and "
        f"return to a checkpoint before step {step}"
    )


def describe_shuffle(found: Mapping[str, Shuffled]) -> str:
    """Describe the result of the prompt check in a sentence, wrapped for the terminal."""
    shares = [f"{describe(f'reward/{name}').label.lower()} {each.share:.2f}" for name, each in found.items()]
    clips = next(iter(found.values())).clips
    text = f"share of {clips} clips that score higher with their own prompt than with another: {', '.join(shares)}"
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
