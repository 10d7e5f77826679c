"""Lengths of each method's run: with as many videos scored, or as many processor seconds, as OnlineVPO's run.

OnlineVPO's run is that of configs/sprites_fast.yaml: 14 steps of 16 prompts with 4 candidates, 896 videos, and 56
optimizer steps. A baseline scores one video of each prompt, so its run of as many videos has 56 steps. How many steps
take as many processor seconds was measured; see ``SECONDS_OF_A_STEP``. The tables print what each run really took.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vpo_engine.reproducing.spec import Row

BRIEF = ("steps=10", "evaluation.samples_per_prompt=4")
"""The quick form of a run: fewer steps, and fewer held-out clips."""
STEPS, QUICK_STEPS = 14, 10
LENGTH = 3
"""How many times as long as usual the runs of ``overoptimisation`` are."""
LONG = (f"steps={LENGTH * STEPS}", f"optimizer.warmup_steps={LENGTH * 5}", "evaluation.every=4")
QUICK_LONG = (*BRIEF, f"steps={LENGTH * 5}", f"optimizer.warmup_steps={LENGTH * 3}", "evaluation.every=3")
"""OnlineVPO at three times its usual length, and the quick form of it, which is half as long."""
_EVALUATION = ("evaluation.samples_per_prompt=4",)
_CANDIDATES = 4
_ONLINE_SECONDS = 7.1
"""Processor seconds of a step of OnlineVPO, measured on an idle Intel Xeon of two cores."""
SECONDS_OF_A_STEP = {"refl": 1.9, "vader": 2.0, "instructvideo": 2.0}
"""Processor seconds of a step of each method with 16 videos, measured in the same minutes."""


@dataclass(frozen=True)
class Budget:
    """A method with two lengths of its run, each for the whole and for the quick form.

    settings: of the method. videos, seconds: steps that score as many videos, and that take as many processor seconds.
    """

    title: str
    settings: tuple[str, ...]
    videos: tuple[int, int]
    seconds: tuple[int, int]

    @property
    def labels(self) -> tuple[str, str]:
        """Return the labels of the method's two rows."""
        return f"{self.title}, equal samples", f"{self.title}, equal seconds"

    def rows(self, paper: Mapping[str, float]) -> tuple[Row, Row]:
        """Return the method's two rows, with the paper's numbers beside the second."""
        samples, seconds = self.labels
        return (
            Row(
                samples,
                self._of(self.videos[0]),
                paper,
                "equal samples",
                (*self._of(self.videos[1]), *_EVALUATION),
            ),
            Row(
                seconds,
                self._of(self.seconds[0]),
                paper,
                "equal seconds",
                (*self._of(self.seconds[1]), *_EVALUATION),
            ),
        )

    def rated(self, lr: str) -> Row:
        """Return the row of equal seconds with another learning rate; its quick form is half as long."""
        more = (f"optimizer.lr={lr}",)
        whole, quick = self._of(self.seconds[0]), self._of(self.seconds[1] // 2)
        budget = "equal seconds"
        return Row(f"{self.title}, lr {lr}", (*whole, *more), {}, budget, (*quick, *_EVALUATION, *more))

    def timed(self, evaluations: int, length: int = 1, lr: str | None = None) -> Row:
        """Return a row of the method alone, ``length`` times as long in seconds, with this many evaluations.

        lr: the learning rate, where it is not that of all runs.
        """
        whole, quick = (self._evaluated(steps * length, evaluations) for steps in self.seconds)
        more = () if lr is None else (f"optimizer.lr={lr}",)
        label = self.title if lr is None else f"{self.title}, lr {lr}"
        return Row(label, (*whole, *more), budget="equal seconds", quick=(*quick, *_EVALUATION, *more))

    def _evaluated(self, steps: int, evaluations: int) -> tuple[str, ...]:
        every = max(1, steps // evaluations)
        return *self._of(every * evaluations), f"evaluation.every={every}"

    def _of(self, steps: int) -> tuple[str, ...]:
        return *self.settings, f"steps={steps}", f"optimizer.warmup_steps={steps // 8}"


def _budget(method: str, title: str, settings: tuple[str, ...]) -> Budget:
    each = SECONDS_OF_A_STEP[method]
    return Budget(
        title,
        (f"method={method}", *settings),
        (STEPS * _CANDIDATES, QUICK_STEPS * _CANDIDATES),
        (round(STEPS * _ONLINE_SECONDS / each), round(QUICK_STEPS * _ONLINE_SECONDS / each)),
    )


REFL = _budget("refl", "ReFL", ("refl.steps=12", "refl.last_steps=3", "refl.margin=null"))
VADER = _budget("vader", "VADER", ("vader.steps=12", "vader.guidance=1.0"))
INSTRUCT = _budget("instructvideo", "InstructVideo", ("instructvideo.steps=12", "instructvideo.guidance=1.0"))
