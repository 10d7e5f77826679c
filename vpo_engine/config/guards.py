"""What is watched while a run trains, so that a reward that is exploited is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from vpo_engine.config.reward import RewardKind
from vpo_engine.config.section import Section


class HeldOutRewardConfig(Section):
    """A second reward model, which scores held-out videos and never selects pairs."""

    kind: RewardKind
    path: Path | None = None
    """Folder of its checkpoint; null for those whose weights are in the package."""
    dimensions: tuple[str, ...] = ("global",)
    """Those whose average is compared with the training reward; "global" alone for all."""


class GuardsConfig(Section):
    """Checks of the reward at the start of a run, and alarms at its evaluations. No paper gives values; these are ours.

    Always: one clip is scored twice and must get the same scores, and captions are exchanged to see whether a reward
    that should read them does.
    """

    motion_floor: float | None = Field(None, gt=0, le=100)
    """Mean motion, in per cent of the shorter side a frame, below which a video never wins a pair; null: any may win.
    Online pairs are known to favour still videos (DenseDPO, arXiv 2506.03517; the paper's Table 3 on CogVideoX)."""
    reward: HeldOutRewardConfig | None = None
    """The held-out reward; null: the sprites world's judge, and none elsewhere."""
    window: int = Field(5, ge=4)
    """Evaluations in which the training reward rises and the held-out reward falls, both slopes by two standard errors,
    for an alarm. Beside it, whatever the window: both changes since the base policy clear of zero, at 95 %."""
    style_bound: float | None = Field(1.0, gt=0, allow_inf_nan=False)
    """Standard deviations of the base policy's clips by which mean brightness, contrast, saturation or sharpness of
    the same held-out clips may move before an alarm; null: any."""
    on_alarm: Literal["note", "stop"] = "note"
    """note: say it, log it, show it in the report. stop: also save and end the run; resumed, it goes on."""
