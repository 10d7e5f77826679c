"""Settings of how the policy learns: the objective, the reference, the optimizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from vpo_engine.config.section import Section


class ObjectiveConfig(Section):
    """The preference loss: the mean over pairs of -logsigmoid(margin), where margin is
    -(beta / 2) (winner error change - loser error change) and an error change is the policy's error minus the
    reference's."""

    beta: float = Field(500.0, gt=0, allow_inf_nan=False)
    """Strength of the preference, with the half in front and errors averaged over the elements of a sample. An
    implementation that sums errors or leaves out the half means something else by 500. Source: VideoReward, appendix I,
    for flow matching on a model of 1 B parameters with this form of the loss; the paper gives none."""
    timesteps_per_pair: int = Field(1, ge=1)
    """Number of timesteps, each with its own noise and its own sigmoid, per pair and optimizer step. Source: paper."""
    updates_per_rollout: int = Field(1, ge=1)
    """Number of optimizer steps on the pairs of one rollout, each with other timesteps and noise. The log has the
    numbers of the last one. Source: paper."""
    weighting: Literal["prediction", "epsilon", "x0"] = "prediction"
    """The space in which beta is the same at all times: the model's own prediction (as published flow trainers have
    it), the noise (epsilon) or the clean latents (x0). The last two weight beta by the square of the signal's or the
    noise's share at time t, which is a third on average over uniform t."""
    noise: Literal["fresh", "trajectory"] = "fresh"
    """The noise that is added to winner and loser. fresh: drawn anew at every timestep, the same for both. trajectory:
    each member's own, from which its video was sampled, so that what is trained on lies near the paths of the sampler
    (PNAPO, arXiv 2605.09433, and Diffusion-APO, arXiv 2605.07503); for methods that sample their pairs in every step.
    Source: paper (fresh)."""
    winner_anchor: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Factor of the policy's error on the winner, which is added to the loss. It works against winners that get worse
    while margins grow."""
    loser_scaling: float | None = Field(None, ge=0, le=1)
    """mu of Diffusion-SDPO (arXiv 2511.03317): scales the loser's gradient down to where the winner's error does not
    grow to first order; null: the gradient stays as it is."""
    branch: Literal["conditional", "guided"] = "conditional"
    """The prediction that is trained. conditional: with the caption, as public code has it. guided: the guided
    prediction of policy and reference, at rollout.guidance."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Number of (pair, timestep) combinations that go through the networks at once; null: all of a step. Gradients add
    up to the same step."""


class ReferenceConfig(Section):
    """The frozen reference against which the loss compares the policy."""

    storage: Literal["copy", "bf16", "int8", "exact8", "adapter"] = "copy"
    """The form in which the reference is stored. copy: in the policy's own type. bf16: matrices are rounded to
    bfloat16. int8: matrices are rounded to 8 bits in groups, by about half a percent. exact8: 8-bit differences
    from the policy's bfloat16 weights, which give the bfloat16 reference bit for bit; it needs
    memory.weights=fp32_master or stochastic_rounding. adapter: under model.lora, the base and a frozen copy of the
    adapter."""
    refresh_every: int | None = Field(200, ge=1)
    """K: the reference becomes the policy after every so many optimizer steps; null: never. Source: paper, section
    4.1."""
    refresh_share: float = Field(1.0, gt=0, le=1)
    """Share of the way to the policy that a refresh moves the reference (the soft update of TR-DPO, arXiv 2404.09656);
    1: all of it. Below 1 it needs reference.storage=copy of float32 weights, or adapter. Source: paper (1)."""


class OptimizerConfig(Section):
    """AdamW and the course of its learning rate. Source of AdamW: paper, section 4.1."""

    lr: float = Field(1e-5, gt=0, allow_inf_nan=False)
    """Learning rate. Source: paper, section 4.1."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment. Source: torch's defaults."""
    eps: float = Field(1e-8, gt=0)
    """Term that is added to the root of the second moment. Source: torch's default."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    clip: float | None = Field(1.0, gt=0)
    """Largest norm of all gradients together; null: gradients stay as they are. Source: public implementations, which
    all use 1."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps in which the learning rate rises in a straight line to lr."""
    final_lr: float = Field(1.0, gt=0, le=1)
    """Share of lr that is left at the last step; the learning rate falls to it in a straight line after the warm-up."""

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both must be at least 0 and below 1")
        return betas


class EmaConfig(Section):
    """An exponential moving average of the trained weights, in float32. Held-out evaluations use it, and
    export --ema does; rollout and reference never do."""

    decay: float | None = Field(None, gt=0, lt=1)
    """Decay d of the average, which becomes d * average + (1 - d) * weights after every optimizer step; null: there is
    no average. The n-th step, counted from 0, uses at most (1 + n) / (10 + n). Source: paper (null)."""
    on_host: bool = False
    """Keep the average in host memory, where it is updated too. It takes 4 bytes a trained weight."""
