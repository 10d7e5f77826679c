"""Settings of the model that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from vpo_kernels.attention import AttentionName
from vpo_kernels.fused_ops import BackendName as FusedOpsBackend

from vpo_engine.config.section import Section


class LoraConfig(Section):
    """A low-rank adapter (arXiv 2106.09685), kept in PEFT's format. Defaults: VideoReward's Flow-DPO, appendix I."""

    rank: int = Field(64, ge=1)
    alpha: float = Field(128.0, gt=0, allow_inf_nan=False)
    """The adapter's product is scaled by alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Ends of the names of the linear layers that get one; null: those that the model's family names."""


class ModelConfig(Section):
    """The model that is trained, its files, and the size of its videos."""

    kind: str = Field("sprites", pattern=r"^(\w[\w-]*|\w+(\.\w+)*:\w+)$")
    """The model's family: sprites, one that comes with the engine or an installed package (see docs/models.md), or
    package.module:Class for one of your own."""
    policy: Path | None = None
    """Folder of the weights that training starts from, as their project publishes them. sprites: the shipped weights
    unless given."""
    vae: Path | None = None
    """Folder of the VAE, for families that need one."""
    text_encoder: Path | None = None
    """Folder of the text encoder, for families that need one."""
    resolution: str = "240p"
    """Candidates are sampled at 240p (paper, section 4.1)."""
    aspect: str = "9:16"
    """Height to width (paper, section 4.1)."""
    num_frames: int = Field(34, ge=1)
    """Paper, section 4.1."""
    fps: int = Field(24, ge=1)
    aesthetic_score: float | None = 6.5
    """Appended to prompts as the published sampling script does; null leaves prompts as they are."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic type of the video model; memory.weights says how the policy's weights are held."""
    device: str = "auto"
    """auto: cuda when there is one, else cpu."""
    attention: AttentionName = "auto"
    """What computes attention: torch's own (sdpa), flash2, flash3, flash4 or xformers. auto: sdpa, unless another
    imports and has been measured to win on this GPU; the run prints the choice with its reason."""
    fused_ops: FusedOpsBackend = "auto"
    """What computes the modulated norm, the gated residual, the query-key norm with rope, and temporal
    attention: reference is plain torch, triton the fused kernels (GPU only). auto: those measured to win."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter in place of the weights; null: full fine-tuning (paper)."""
