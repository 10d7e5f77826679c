"""What is held where."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vpo_engine.config.section import Section

ActivationCheckpointing = Literal["none", "pointwise", "all_but_attention", "block"]


class MemoryConfig(Section):
    """What is held, computed again, or sent to the host: memory against time. Rounding apart, nothing else changes."""

    weights: Literal["float32", "fp32_master", "stochastic_rounding"] = "float32"
    """How the policy's weights are held. fp32_master: bfloat16, with float32 copies for the optimizer.
    stochastic_rounding: bfloat16 only; updates are rounded up or down at random, in proportion, so that small ones add
    up. With model.dtype float32 the bfloat16 values are held in float32, for CPUs that are slow at bfloat16."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """What the backward pass computes again rather than finding it in memory: none; pointwise (norms, modulations,
    gates, activations: all but matrix products and attention); all_but_attention; block (all but a block's input)."""
    offload_activations: bool = False
    """Inputs of blocks wait for the backward pass in pinned host memory, copied on a stream of their own."""
    mlp_chunks: int = Field(1, ge=1)
    """Parts in which a block's MLP goes over the tokens, each computed again in the backward pass."""
    sequential: bool = False
    """One member of a pair at a time: half the activations for one forward pass more."""
    optimizer_bits: Literal[32, 8] = 32
    """Of AdamW's two moments; 8: blockwise, by bitsandbytes."""
    step_in_backward: bool = False
    """Each weight is updated as soon as its gradient is there, which is then freed."""
    offload_idle: bool = False
    """Keep policy, optimizer, reference, VAE and reward model on the device only while a phase needs them."""
    decode_frames: int | None = Field(None, ge=1)
    """Frames that the image decoder takes at once; null: as published, 4. Activations of a frame of 720 x 1280 pixels
    take 1.3 GiB in bfloat16."""
    decode_strip_height: int | None = Field(None, ge=1)
    """Rows of its maps that the image decoder goes over at once; null: all. With 16, activations of a frame of 720 x
    1280 pixels take 0.7 GiB in bfloat16."""
    limit_gib: float | None = Field(None, gt=0)
    """Device memory that the run may take; null: what the device has."""
    overcommit: bool = False
    """Go on when the plan says that the run does not fit."""
