"""Settings of the model that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from vpo_engine.config.names import DeviceName, check_kind
from vpo_engine.config.section import Section

AttentionName = Literal["auto", "sdpa", "flash2", "flash3", "flash4", "xformers"]
FusedOpsBackend = Literal["auto", "reference", "triton"]
"""The names that ``vpo_kernels`` knows, written out so that a configuration is read without loading torch."""


KNOWN_MODELS = ("opensora", "sprites", "cogvideox", "wan", "ltx")
"""The names of the model families that come with the engine."""
_ENTRY_POINTS = "vpo_engine.models"
"""The group of entry points under which an installed package offers families (also in models/registry.py)."""


def _check_kind(kind: str) -> str:
    return check_kind(kind, KNOWN_MODELS, _ENTRY_POINTS, "model family", "docs/models.md")


ModelKind = Annotated[str, AfterValidator(_check_kind)]
"""A name of KNOWN_MODELS or of an installed package, or package.module:Class."""


_SCALE = 2.0
"""alpha / rank of an adapter unless alpha is given."""


class LoraConfig(Section):
    """A low-rank adapter (arXiv 2106.09685), which is saved in PEFT's format."""

    rank: int = Field(64, ge=1)
    """Rank of the adapter's matrices. Source: VideoReward's Flow-DPO, appendix I."""
    alpha: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The adapter's product is multiplied by alpha / rank; null: twice the rank, so that this scale is 2 at every rank.
    Source: VideoReward's Flow-DPO, appendix I (128 at rank 64)."""
    targets: tuple[str, ...] | str | None = None
    """Linear layers that get an adapter: a list of endings of their names, or the name of a set that the model's family
    has, such as attention or all (see docs/models.md); null: those that the family names."""

    @field_validator("alpha")
    @classmethod
    def _follow_rank(cls, alpha: float | None, known: ValidationInfo) -> float | None:
        rank = known.data.get("rank")
        return _SCALE * rank if alpha is None and rank is not None else alpha

    @property
    def scale(self) -> float:
        """Return the factor by which the adapter's product is multiplied."""
        assert self.alpha is not None
        return self.alpha / self.rank


class ModelConfig(Section):
    """The model that is trained, its files, and the size of its videos."""

    kind: ModelKind = "sprites"
    """The model's family: sprites, opensora, cogvideox, wan, ltx, one of an installed package, or package.module:Class
    for your own. See docs/models.md."""
    policy: Path | None = None
    """Folder (or weights file) that training starts from, as the model's project publishes it or its training wrote it.
    sprites: the shipped weights unless given. Families of diffusers: the folder of the pipeline (with
    model_index.json), or a transformer's folder alone if vae and text_encoder are given."""
    vae: Path | None = None
    """Folder of the VAE, for families that need one. Families of diffusers: the one of the policy's folder unless
    given."""
    text_encoder: Path | None = None
    """Folder of the text encoder, for families that need one. Families of diffusers: the one of the policy's folder
    unless given."""
    resolution: str = "240p"
    """Name of the size of the videos, for families whose sizes have names. Source: paper, section 4.1."""
    aspect: str = "9:16"
    """Height to width, for families whose sizes have names. Source: paper, section 4.1."""
    height: int | None = Field(None, ge=1)
    """Height of the videos in pixels, for families that take any size; null: the height that the model was made for."""
    width: int | None = Field(None, ge=1)
    """Width of the videos in pixels, for families that take any size; null: the width that the model was made for."""
    num_frames: int = Field(34, ge=1)
    """Number of frames of a video. Source: paper, section 4.1."""
    fps: int = Field(24, ge=1)
    """Frames per second."""
    flow_shift: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Shift of the noise levels towards noise, for families of flow matching; null: what the scheduler of the policy's
    folder says."""
    negative_prompt: str | None = None
    """Prompt of guidance's second prediction, for families that take one; null: the family's own (see
    docs/models.md)."""
    aesthetic_score: float | None = 6.5
    """Aesthetic score that opensora appends to prompts; null: prompts stay as they are. Source: the published Open-Sora
    1.2 sampling script."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the video model computes; memory.weights is the type in which its weights are held."""
    device: DeviceName = "auto"
    """Device of the model: cpu, cuda or cuda:N. auto: cuda if there is one, else cpu."""
    attention: AttentionName = "auto"
    """Implementation of attention: torch's own (sdpa), flash2, flash3, flash4 or xformers. auto: sdpa, unless another
    one can be imported and has been measured to be faster on this GPU; the run prints the choice and the reason."""
    fused_ops: FusedOpsBackend = "auto"
    """Implementation of the modulated norm, the gated residual, the query-key norm with rope, and temporal attention.
    reference: plain torch. triton: the fused ops (GPU only). auto: the fused ops that have been measured to be
    faster."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter instead of the weights; null: train all weights. Source: paper (null)."""
