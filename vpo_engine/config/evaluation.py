"""Settings of evaluations during a run."""

from __future__ import annotations

from pydantic import Field

from vpo_engine.config.section import Section


class EvaluationConfig(Section):
    """Evaluation on held-out prompts: videos are sampled with fixed noise before, during and after training, and never
    trained on."""

    every: int | None = Field(200, ge=1)
    """Steps between evaluations; null: only at the start and at the end."""
    samples_per_prompt: int = Field(1, ge=1)
    """Number of videos per held-out prompt."""
    prompts: int | None = Field(None, ge=1)
    """Number of held-out prompts that are used; null: all."""
    samples_between: int | None = Field(None, ge=1)
    """Number of videos per prompt in evaluations during training; null: as many as at the start and at the end."""
    steps: int | None = Field(None, ge=1)
    """Sampling steps of held-out videos; null: rollout.steps."""
