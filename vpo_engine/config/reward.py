"""Settings of how candidates are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from vpo_engine.config.names import DeviceName, check_kind
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
    return check_kind(kind, KNOWN_REWARDS, _ENTRY_POINTS, "reward", "docs/rewards.md")


RewardKind = Annotated[str, AfterValidator(_check_kind)]
"""A name of KNOWN_REWARDS or of an installed package, or package.module:Class."""


def check_path(kind: str, path: Path | None, section: str) -> None:
    """Raise ValueError if a reward that comes with the engine lacks its folder, or has none and is given one."""
    if kind in _SHIPPED and path is not None:
        raise ValueError(
            f"{section}.path={path} has no meaning for {section}.kind={kind}, whose weights are in the package; leave "
            f"it out, or give {section}.path=null"
        )
    if kind in KNOWN_REWARDS and kind not in _SHIPPED and path is None:
        raise ValueError(f"{section}.kind={kind} needs {section}.path, a local folder of its checkpoint")


class RewardConfig(Section):
    """The reward model, and how its scores become one number."""

    kind: RewardKind = "sprites"
    """A name that ``python -m vpo_engine.rank --list`` prints, except for those that it calls not for training; or
    package.module:Class for a reward of your own (see docs/rewards.md)."""
    path: Path | None = None
    """Folder of the reward model's checkpoint; null for reward models whose weights are in the package."""
    batch_size: int | None = Field(None, ge=1)
    """Number of videos that are scored at once, or of frames for a scorer of images; null: 4 videos (viclip: 8), 64
    frames."""
    bits: Literal[16, 8, 4] = 16
    """Bits of the matrices of videoscore behind its vision tower, by bitsandbytes. The model takes 15.4, 8.2 or 5.1
    GiB; scores change by the rounding."""
    max_frames: int | None = Field(None, ge=1)
    """Number of frames that videoscore looks at; null: 16, and 48 for version 1.1."""
    frames: int | None = Field(None, ge=1)
    """Number of frames, evenly spread, that are scored by scorers of images (null: all), builtin (null: 8) and q_align
    (null: one per second). With frame_reduce=segments it is the number of segments (null: 4)."""
    frame_reduce: Literal["mean", "min", "segments"] = "mean"
    """The way in which the scores of frames become the score of a video. mean, min: of all frames. segments: one frame
    of each segment, weighted by exp(-frame_decay * distance from the middle frame) (arXiv 2312.12490)."""
    frame_decay: float | None = Field(None, ge=0, allow_inf_nan=False)
    """InstructVideo's lambda, per frame of distance; null: 4 divided by the frames of a segment, which is
    InstructVideo's 1 at 16 frames."""
    device: DeviceName = "auto"
    """Device of the reward model. auto: the policy's. On any other device it stays, whatever memory.offload_idle
    says."""
    process: bool = False
    """Run the reward model in a separate process, where it stays on its device. If that process dies, the run ends with
    the reason."""
    time_limit: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Seconds that scoring one group of videos may take before the run stops; it needs reward.process=true. null: no
    limit."""
    dimensions: tuple[str, ...] | dict[str, float] = ("temporal_consistency",)
    """The dimensions whose average selects pairs: one name, several names, "global" for all, or {name: weight} for a
    weighted average. Source: paper, Table 4b, the best row."""
    normalise: Literal["none", "group"] = "none"
    """Scale of the dimensions. none: as scored. group: standard deviations from the mean of the dimension among the
    candidates of the prompt; pairs and their gaps are then made in these."""

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("dimensions"), str):
            return {**values, "dimensions": (values["dimensions"],)}
        return values

    @model_validator(mode="after")
    def _complete(self) -> Self:
        check_path(self.kind, self.path, "reward")
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
        """Return the settings from batch_size to frame_decay that differ from their defaults, by name."""
        names = ("batch_size", "bits", "max_frames", "frames", "frame_reduce", "frame_decay")
        fields = type(self).model_fields
        return {name: value for name in names if (value := getattr(self, name)) != fields[name].default}
