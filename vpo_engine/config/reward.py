"""How candidates are scored and paired."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from vpo_engine.config.section import Section


class RewardConfig(Section):
    """How candidates are scored."""

    kind: Literal["sprites", "videoscore"] = "sprites"
    path: Path | None = None
    """Folder of the reward model's checkpoint. Used by kind videoscore only."""
    max_frames: int = Field(16, ge=1)
    """Frames that videoscore looks at: 16 for VideoScore, 48 for v1.1."""
    rows: int = Field(4, ge=1)
    """Videos that videoscore scores at once."""
    bits: Literal[16, 8, 4] = 16
    """Of the matrices behind videoscore's vision tower, by bitsandbytes: 15.4, 8.2 or 5.1 GiB in all; scores move by
    rounding."""
    dimensions: tuple[str, ...] = ("temporal_consistency",)
    """One dimension, several (their average) or "global" (the average of all). The paper's best row is
    temporal consistency alone (Table 4b)."""
    min_gap: float = Field(0.0, ge=0)
    """A pair whose scores differ by no more than this is a tie: skipped and counted."""

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("dimensions"), str):
            return {**values, "dimensions": (values["dimensions"],)}
        return values
