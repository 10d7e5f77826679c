"""Settings of the guards, which notice when a run exploits its reward."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from vpo_engine.config.reward import RewardKind, check_path
from vpo_engine.config.section import Section


class HeldOutRewardConfig(Section):
    """A second reward model, which scores held-out videos and never selects pairs."""

    kind: RewardKind
    """Name of the reward model, as for reward.kind."""
    path: Path | None = None
    """Folder of its checkpoint; null for reward models whose weights are in the package."""
    dimensions: tuple[str, ...] = ("global",)
    """Dimensions whose average is compared with the training reward; "global" alone means all of them."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        check_path(self.kind, self.path, "guards.reward")
        return self


class GuardsConfig(Section):
    """Checks of the reward at the start of a run, and alarms of its steps and at its evaluations.

    Two checks are always made: one clip is scored twice and must get the same scores, and captions are exchanged to see
    whether a reward that should read them does. No paper gives values for the settings below; the defaults are this
    project's own.
    """

    motion_floor: float | None = Field(None, gt=0, le=100)
    """Mean motion below which a video never wins a pair, in per cent of the shorter side per frame; null: any video may
    win. Online pairs are known to favour still videos (DenseDPO, arXiv 2506.03517; the second model of the
    paper's Table 3)."""
    reward: HeldOutRewardConfig | None = None
    """The held-out reward; null: the judge of the sprites world there, and none for other models."""
    window: int = Field(5, ge=4)
    """Number of evaluations over which slopes are taken. An alarm is raised when in them the training reward rises and
    the held-out reward falls, each by more than two standard errors, and the fall is at least a tenth of the standard
    deviation of single clips. Whatever the window, an alarm is also raised when both changes since the base policy are
    clear of zero at 95 %."""
    style_bound: float | None = Field(1.0, gt=0, allow_inf_nan=False)
    """The largest change of mean brightness, contrast, saturation or sharpness of the held-out clips without an alarm,
    in standard deviations of the base policy's clips; null: any distance. Of the candidates of the training steps three
    quarters of it are tolerated, so that an alarm comes before the change is as large."""
    on_alarm: Literal["note", "stop"] = "note"
    """What an alarm does. note: it is printed, logged and shown in the report. stop: the run is also saved and ended; a
    resumed run goes on."""
