"""The card of a metric of videos: what it declares about itself. Importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["vbench", "fvd", "devil", "reward", "pixels", "proxy"]
"""vbench: a dimension of VBench with its own network. fvd: a distance of two sets of videos. devil: dynamics. reward:
the score of a reward model. pixels: simple measures of pixels. proxy: a stand-in without weights, which is never shown
as one of the others."""


@dataclass(frozen=True, kw_only=True)
class MetricCard:
    """A metric's contract.

    dimension: VBench's own name of what is measured, for the group vbench; one dimension can have two metrics.
    title: its name in plain words. measures: a sentence about what is measured. unit: "" for scores, which have none.
    better: +1 if more is better, -1 if less is, 0 if neither. version: changes whenever its numbers could. needs: the
    published names of its weight files; none for a metric without weights. source: where they are published. licence:
    of weights and, where it differs, code. package: one that the metric needs and the engine does not, and install: the
    command that installs it. least_frames, least_side: the frames, and the pixels of the shorter side, that a video
    must have. reads_prompt: whether the number depends on the prompt. missing: what the published metric has beyond
    this one; its numbers are then marked as partial.
    """

    name: str
    group: Group
    dimension: str = ""
    title: str
    measures: str
    unit: str = ""
    better: int = 1
    version: str = "1"
    needs: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""
    package: str = ""
    install: str = ""
    least_frames: int = 1
    least_side: int = 1
    reads_prompt: bool = False
    missing: str = ""
