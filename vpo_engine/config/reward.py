"""How candidates are scored and paired."""

from __future__ import annotations

import difflib
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from vpo_engine.config.section import Section

KNOWN_REWARDS = (
    "sprites",
    "sprites_image",
    "builtin",
    "brisque",
    "videoscore",
    "videoscore_v1_1",
    "videoscore2",
    "videoalign",
    "q_align",
    "unified_reward",
    "laion_aesthetic",
    "imagereward",
    "mps",
    "hpsv2",
    "hpsv2_1",
    "pickscore",
    "viclip",
    "vjepa",
)
"""The names of all rewards that come with the engine."""
_SHIPPED = ("sprites", "sprites_image", "builtin", "brisque")
"""The rewards whose weights are in the package."""
_ENTRY_POINTS = "vpo_engine.rewards"
"""The group of entry points under which an installed package offers rewards by name (also in rewards/own.py)."""


def _check_kind(kind: str) -> str:
    if kind in KNOWN_REWARDS or re.fullmatch(r"\w+(\.\w+)*:\w+", kind):
        return kind
    known = [*KNOWN_REWARDS, *entry_points(group=_ENTRY_POINTS).names]
    if kind in known:
        return kind
    near = difflib.get_close_matches(kind, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"{kind} is no reward; {hint}Known are {', '.join(known)}. A reward of your own is given as "
        "package.module:Class (see docs/rewards.md)"
    )


RewardKind = Annotated[str, AfterValidator(_check_kind)]
"""A name of KNOWN_REWARDS or of an installed package, or package.module:Class."""


class RewardConfig(Section):
    """How candidates are scored."""

    kind: RewardKind = "sprites"
    """A name that ``python -m vpo_engine.rank --list`` prints, except for those that it calls not for training; or
    package.module:Class for a reward of your own (see docs/rewards.md)."""
    path: Path | None = None
    """Folder of the reward model's checkpoint; null for those whose weights are in the package."""
    batch_size: int | None = Field(None, ge=1)
    """Videos, or frames of a scorer of images, that are scored at once; null: 4 videos (viclip: 8), 64 frames."""
    bits: Literal[16, 8, 4] = 16
    """Of the matrices behind videoscore's vision tower, by bitsandbytes: 15.4, 8.2 or 5.1 GiB in all; scores move by
    rounding."""
    max_frames: int | None = Field(None, ge=1)
    """Frames that videoscore looks at; null: 16, and 48 for v1.1."""
    frames: int | None = Field(None, ge=1)
    """Frames that are scored, evenly spread, by scorers of images (null: all), builtin (null: 8) and q_align (null: one
    a second). With frame_reduce=segments it is the number of segments (null: 4)."""
    frame_reduce: Literal["mean", "min", "segments"] = "mean"
    """How the scores of frames become a video's. segments: InstructVideo's (arXiv 2312.12490), one frame of each
    segment, weighed by exp(-frame_decay * its distance from the middle frame)."""
    frame_decay: float | None = Field(None, ge=0, allow_inf_nan=False)
    """InstructVideo's lambda, per frame; null: 4 over the frames of a segment, which is its 1 at 16 frames."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where the reward model is; auto: where the policy is. Elsewhere it stays, whatever memory.offload_idle says."""
    process: bool = False
    """The reward model in a process of its own, where it stays on its device; its death says why, and ends the run."""
    time_limit: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Seconds that the scoring of one group of videos may take before the run stops; needs process. null: any."""
    dimensions: tuple[str, ...] | dict[str, float] = ("temporal_consistency",)
    """One dimension, several (their average), "global" (the average of all) or {name: weight} (the average weighted by
    them). The paper's best row is temporal consistency alone (Table 4b)."""
    normalise: Literal["none", "group"] = "none"
    """group: a dimension counts in standard deviations from its mean among the candidates of the prompt; pairs and
    their gaps are then made in these."""

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("dimensions"), str):
            return {**values, "dimensions": (values["dimensions"],)}
        return values

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.path is None and self.kind in KNOWN_REWARDS and self.kind not in _SHIPPED:
            raise ValueError(f"kind {self.kind} needs reward.path, a local folder of its checkpoint")
        if self.frame_decay is not None and self.frame_reduce != "segments":
            raise ValueError(
                f"frame_decay={self.frame_decay} weighs segments, but frame_reduce={self.frame_reduce}; leave it out, "
                "or set frame_reduce=segments"
            )
        weights = self.dimensions if isinstance(self.dimensions, dict) else {}
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(
                    f"dimensions.{name}={weight:g} is no weight; give a number above 0, or leave the dimension out"
                )
        if self.time_limit is not None and not self.process:
            raise ValueError(
                f"time_limit={self.time_limit:g} needs reward.process=true: nothing else can be stopped while it scores"
            )
        return self

    @property
    def scorer_settings(self) -> dict[str, Any]:
        """Those of the settings batch_size to frame_decay that are not left to the scorer, by name."""
        names = ("batch_size", "bits", "max_frames", "frames", "frame_reduce", "frame_decay")
        fields = type(self).model_fields
        return {name: value for name in names if (value := getattr(self, name)) != fields[name].default}
