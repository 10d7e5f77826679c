"""Settings of what is held in memory, where, and in which type."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from vpo_engine.config.presets import MEMORY_PRESETS, MemoryPreset
from vpo_engine.config.section import Section

ActivationCheckpointing = Literal["none", "pointwise", "all_but_attention", "block"]


class MemoryConfig(Section):
    """Settings that say what is held in memory, computed again, or sent to the host. They exchange memory for time and
    change nothing else but rounding."""

    preset: MemoryPreset | None = None
    """A named set of values for the other settings of this section; those that are given win. fast: keep everything on
    the device, in float32 (the defaults below). lean: weights=fp32_master, activation_checkpointing=block,
    mlp_chunks=4, sequential=true, offload_idle=true, decode_frames=2. balanced: the first step from fast to lean of
    which the plan says that it fits the device; docs/memory_modes.md lists the steps. null: only what is given."""
    weights: Literal["float32", "fp32_master", "stochastic_rounding"] = "float32"
    """The type of the policy's weights. fp32_master: bfloat16, with fp32 master weights for the optimizer.
    stochastic_rounding: bfloat16 only; every update is rounded up or down at random, in proportion to the distance, so
    that small updates add up. With model.dtype=float32 the bfloat16 values are held in float32 tensors, for CPUs that
    are slow at bfloat16. Under model.lora this is the type of the frozen base, and the adapter is float32 always."""
    base_bits: Literal[8, 4] | None = None
    """Bits in which the frozen base under model.lora is held: the linear layers of the repeating blocks, each 64
    weights with a scale of their own, by bitsandbytes (4 bits: NF4). Policy and reference share them. null: the base is
    held in the type that memory.weights says."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """The parts of a block that its backward pass computes again instead of keeping their results. none: nothing.
    pointwise: norms, modulations, gates and activation functions, which is all but matrix products and attention.
    all_but_attention: everything but attention. block: everything; only the block's input is kept."""
    offload_activations: bool = False
    """Keep the inputs of blocks in pinned host memory until the backward pass needs them; a separate stream copies
    them."""
    mlp_chunks: int = Field(1, ge=1)
    """Number of parts in which the MLP of a block goes over the tokens. Each part is computed again in the backward
    pass."""
    sequential: bool = False
    """Train on winner and loser one after the other: half the activations, for one more forward pass."""
    optimizer_bits: Literal[32, 8] = 32
    """Bits of AdamW's two moments. 8: rounded block by block, by bitsandbytes."""
    step_in_backward: bool = False
    """Update each weight as soon as its gradient is complete, and free the gradient."""
    offload_idle: bool = False
    """Keep policy, optimizer, reference, VAE and reward model on the device only while a phase of the step needs them,
    and in host memory otherwise. GPUs only."""
    decode_frames: int | None = Field(None, ge=1)
    """Number of frames that the image decoder takes at once; null: 4, as published. The activations of a frame of
    720 x 1280 pixels take 1.3 GiB in bfloat16."""
    decode_strip_height: int | None = Field(None, ge=1)
    """Number of rows of its feature maps that the image decoder computes at once; null: all rows. With 16 the
    activations of a frame of 720 x 1280 pixels take 0.7 GiB in bfloat16."""
    limit_gib: float | None = Field(None, gt=0)
    """Device memory that the run may take, in GiB; null: all that the device has."""
    overcommit: bool = False
    """Start the run even if the plan says that it does not fit."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        return {**MEMORY_PRESETS.get(name, {}), **values} if isinstance(name, str) else values

    def chooses(self, name: str) -> bool:
        """Return whether the value of a setting is still to be chosen by preset=balanced."""
        return self.preset == "balanced" and name not in self.model_fields_set
