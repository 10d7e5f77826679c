"""How the policy learns: the objective, its reference, the optimizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vpo_engine.config.section import Section


class ObjectiveConfig(Section):
    """The preference loss: mean over pairs of -logsigmoid(-(beta / 2) (winner error change - loser error change))."""

    beta: float = Field(500.0, gt=0, allow_inf_nan=False)
    """With the half factor and errors averaged over the elements of a sample. The paper gives none; 500 is
    the published value for flow matching on a 1 B video model with this form (VideoReward, appendix I). It is
    not the 500 of an implementation that sums errors or drops the half."""
    timesteps_per_pair: int = Field(1, ge=1)
    """(t, noise) draws per pair and optimizer step, a sigmoid each (paper: one)."""
    updates_per_rollout: int = Field(1, ge=1)
    """Optimizer steps on the pairs of one rollout, each with other draws (paper: one). The log has the numbers of the
    last."""
    weighting: Literal["prediction", "epsilon", "x0"] = "prediction"
    """The space in which beta is the same at all times: the model's own prediction, as published flow trainers
    have it, or the noise or the clean latents, which weights beta by the square of the signal's or the noise's
    share at t (a third on average over uniform t)."""
    winner_anchor: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Adds this times the policy's error on the winner, against winners that get worse while margins grow."""
    loser_scaling: float | None = Field(None, ge=0, le=1)
    """mu of Diffusion-SDPO (arXiv 2511.03317): scales the loser's gradient down to where the winner's error does
    not grow to first order; null: left as it is."""
    branch: Literal["conditional", "guided"] = "conditional"
    """Which prediction is trained: the conditional branch, as public code does, or the guided prediction of
    policy and reference alike, at rollout.guidance."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Pairs times timesteps per pair that go through the networks at once; null: all of a step."""


class ReferenceConfig(Section):
    """The frozen reference."""

    storage: Literal["copy", "bf16", "int8", "exact8", "adapter"] = "copy"
    """copy: in the policy's own type. bf16: matrices rounded to it. int8: absmax groups, half a percent of rounding.
    exact8: 8-bit differences from the policy's bf16 weights, bit for bit the bf16 reference; needs memory.weights
    fp32_master or stochastic_rounding. adapter: under model.lora, the base and a frozen copy of the adapter."""
    refresh_every: int | None = Field(200, ge=1)
    """K, in optimizer steps (paper, section 4.1); null: never refreshed."""


class OptimizerConfig(Section):
    """AdamW (paper, section 4.1)."""

    lr: float = Field(1e-5, gt=0, allow_inf_nan=False)
    """Paper, section 4.1."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float | None = Field(1.0, gt=0)
    """Largest gradient norm; every public implementation uses 1. null: gradients are left as they are."""
    warmup_steps: int = Field(0, ge=0)
    final_lr: float = Field(1.0, gt=0, le=1)
    """Share of lr that is left at the last step, reached in a straight line after the warm-up."""
