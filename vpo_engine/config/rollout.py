"""How candidates are sampled."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from vpo_engine.config.section import Section


class PruneConfig(Section):
    """Candidates that are given up on the way: previews of all are scored, and only the extremes are finished."""

    after: float = Field(gt=0, lt=1)
    """Share of the steps after which the clean latents that the last prediction points to are decoded and scored."""
    keep: int = Field(ge=2)
    """Candidates of each prompt that are finished: the better half of this number from the top, the rest from the
    bottom."""


class RolloutConfig(Section):
    """How candidates are sampled. guidance_interval, prune and cache are approximations, for training only: held-out
    videos are sampled without them."""

    candidates: int = Field(4, ge=2)
    """N (paper, section 4.4)."""
    steps: int = Field(30, ge=1)
    """Inference steps (paper, section 4.1)."""
    guidance: float = Field(7.0, ge=0)
    """Classifier-free guidance scale; the published Open-Sora 1.2 sampling default. 1 turns guidance off."""
    source: Literal["policy", "reference"] = "policy"
    """Who samples. policy: online (the paper). reference with no refresh: offline preference data."""
    rows: int | None = Field(None, ge=1)
    """The most candidates that go through the network and the decoder at once, as whole prompts or as even parts of
    one; null: all of a step."""
    guidance_interval: tuple[float, float] | None = None
    """[low, high]: guidance only at times t / 1000 in it (arXiv 2404.07724), one branch at all others; null: always."""
    prune: PruneConfig | None = None
    """null: every candidate is finished."""
    cache: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Relative change of what the first pair of blocks adds, below which a step takes what the blocks after it add
    from the step that last computed it; null: every step computes all blocks."""

    @property
    def prune_step(self) -> int:
        """Steps before previews are scored; all of them without ``prune``."""
        return self.steps if self.prune is None else round(self.prune.after * self.steps)

    @model_validator(mode="after")
    def _approximations(self) -> Self:
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low < high <= 1:
                raise ValueError(
                    f"guidance_interval=[{low}, {high}] must be shares of the time with 0 <= low < high <= 1"
                )
            if self.guidance == 1.0:
                raise ValueError(
                    "guidance_interval limits a guidance that guidance=1.0 turns off; set guidance, or "
                    "guidance_interval=null"
                )
        if self.prune is None:
            return self
        if self.prune.keep >= self.candidates:
            raise ValueError(
                f"prune.keep={self.prune.keep} must be below candidates={self.candidates}, or nothing is pruned; "
                "lower it, or set prune=null"
            )
        if not 0 < self.prune_step < self.steps:
            raise ValueError(
                f"prune.after={self.prune.after} is {self.prune_step} of steps={self.steps}; at least one step must "
                "come before the previews and one after them"
            )
        return self
