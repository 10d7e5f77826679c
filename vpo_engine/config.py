"""The typed configuration: one YAML per run, unknown keys refused, every default with its source.

"paper" below is OnlineVPO, arXiv 2412.15159; where it gives no value the comment says whose the default is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from vpo_kernels.attention import AttentionName
from vpo_kernels.companions import BackendName as CompanionName

Recompute = Literal["nothing", "pointwise", "all_but_attention", "block"]


class Section(BaseModel):
    """A group of settings: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class LoraConfig(Section):
    """A low-rank adapter (arXiv 2106.09685), kept in PEFT's format. Defaults: VideoReward's Flow-DPO, appendix I."""

    rank: int = Field(64, ge=1)
    alpha: float = Field(128.0, gt=0, allow_inf_nan=False)
    """The adapter's product is scaled by alpha / rank."""
    targets: tuple[str, ...] = (
        "attn.qkv",
        "attn.proj",
        "cross_attn.q_linear",
        "cross_attn.kv_linear",
        "cross_attn.proj",
    )
    """Ends of the names of the linear layers that get one."""


class ModelConfig(Section):
    """What is trained."""

    kind: Literal["sprites", "opensora"] = "sprites"
    policy: Path | None = None
    """STDiT3 folder (model.safetensors, config.json). sprites: the shipped weights unless given."""
    vae: Path | None = None
    """OpenSora-VAE-v1.2 folder. Used by kind opensora only."""
    text_encoder: Path | None = None
    """T5 v1.1 XXL folder. Used by kind opensora only."""
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
    companions: CompanionName = "auto"
    """What computes the modulated norm, the gated residual, the query-key norm with rope, and temporal
    attention: reference is plain torch, triton the fused kernels (GPU only). auto: those measured to win."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter in place of the weights; null: full fine-tuning (paper)."""

    @model_validator(mode="after")
    def _needs_weights(self) -> Self:
        missing = [name for name in ("policy", "vae", "text_encoder") if getattr(self, name) is None]
        if self.kind == "opensora" and missing:
            raise ValueError(
                f"kind opensora needs local checkpoints, but these are not set: {', '.join(missing)}; "
                "give them as model.NAME=/path/to/folder"
            )
        return self


class PromptsConfig(Section):
    """Where prompts come from. Without files, the sprites world's own captions."""

    train: Path | None = None
    held_out: Path | None = None
    column: str | None = None
    """Column of a .csv or key of a .jsonl file; by default the usual one is found by name."""
    cache: Path | None = None
    """Folder of text embeddings, shared between runs; null: ``embeddings`` beside the run directory."""


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


class RewardConfig(Section):
    """How candidates are scored."""

    kind: Literal["sprites", "videoscore"] = "sprites"
    path: Path | None = None
    """Folder of the reward model's checkpoint. Used by kind videoscore only."""
    max_frames: int = Field(16, ge=1)
    """Frames that videoscore looks at: 16 for VideoScore, 48 for v1.1."""
    rows: int = Field(4, ge=1)
    """Videos that videoscore scores at once."""
    bits: Literal[16, 8, 4] = 16
    """Of the matrices behind videoscore's vision tower, by bitsandbytes: 15.4, 8.2 or 5.1 GiB in all; scores move by
    rounding."""
    dimensions: tuple[str, ...] = ("temporal_consistency",)
    """One dimension, several (their average) or "global" (the average of all). The paper's best row is
    temporal consistency alone (Table 4b)."""
    min_gap: float = Field(0.0, ge=0)
    """A pair whose scores differ by no more than this is a tie: skipped and counted."""

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("dimensions"), str):
            return {**values, "dimensions": (values["dimensions"],)}
        return values


class ObjectiveConfig(Section):
    """The preference loss: mean over pairs of -logsigmoid(-(beta / 2) (winner gap - loser gap))."""

    beta: float = Field(500.0, gt=0, allow_inf_nan=False)
    """With the half factor and errors averaged over the elements of a sample. The paper gives none; 500 is
    the published value for flow matching on a 1 B video model with this form (VideoReward, appendix I). It is
    not the 500 of an implementation that sums errors or drops the half."""
    draws: int = Field(1, ge=1)
    """(t, noise) draws per pair and step, a sigmoid each (paper: one)."""
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
    rows: int | None = Field(None, ge=1)
    """Pairs times draws that go through the networks at once; null: all of a step."""


class ReferenceConfig(Section):
    """The frozen reference."""

    storage: Literal["copy", "bf16", "int8", "exact8", "adapter"] = "copy"
    """copy: in the policy's own type. bf16: matrices rounded to it. int8: absmax groups, half a percent of rounding.
    exact8: 8-bit differences from the policy's bf16 weights, bit for bit the bf16 reference; needs memory.weights
    masters or stochastic. adapter: under model.lora, the base and a frozen copy of the adapter."""
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


class MemoryConfig(Section):
    """What is held, computed again, or sent to the host: memory against time. Rounding apart, nothing else changes."""

    weights: Literal["float32", "masters", "stochastic"] = "float32"
    """How the policy's weights are held. masters: bfloat16, with float32 copies for the optimizer. stochastic:
    bfloat16 only; updates are rounded up or down at random, in proportion, so that small ones add up. With model.dtype
    float32 the bfloat16 values are held in float32, for CPUs that are slow at bfloat16."""
    recompute: Recompute = "nothing"
    """What the backward pass computes again rather than finding it in memory: nothing; pointwise (norms, modulations,
    gates, activations: all but matrix products and attention); all_but_attention; block (all but a block's input)."""
    offload: bool = False
    """Inputs of blocks wait for the backward pass in pinned host memory, copied on a stream of their own."""
    mlp_chunks: int = Field(1, ge=1)
    """Parts in which a block's MLP goes over the tokens, each computed again in the backward pass."""
    sequential: bool = False
    """One member of a pair at a time: half the activations for one forward pass more."""
    optimizer_bits: Literal[32, 8] = 32
    """Of AdamW's two moments; 8: blockwise, by bitsandbytes."""
    step_in_backward: bool = False
    """Each weight is updated as soon as its gradient is there, which is then freed."""
    residency: Literal["all", "phases"] = "all"
    """phases: policy, optimizer, reference, VAE and reward model are on the device only while a phase needs them."""
    decode_frames: int | None = Field(None, ge=1)
    """Frames that the image decoder takes at once; null: as published, 4. Activations of a frame of 720 x 1280 pixels
    take 1.3 GiB in bfloat16."""
    limit_gib: float | None = Field(None, gt=0)
    """Device memory that the run may take; null: what the device has."""
    overcommit: bool = False
    """Go on when the plan says that the run does not fit."""


class EvaluationConfig(Section):
    """Held-out prompts, sampled with fixed noise before, during and after training, never trained on."""

    every: int | None = Field(200, ge=1)
    """Optimizer steps between evaluations; null: at the start and the end only."""
    samples_per_prompt: int = Field(1, ge=1)
    prompts: int | None = Field(None, ge=1)
    """How many of the held-out prompts are used; null: all."""
    samples_between: int | None = Field(None, ge=1)
    """Samples of an evaluation during training; null: as many as at the start and the end."""


class CheckpointConfig(Section):
    every: int | None = Field(100, ge=1)
    """Steps between checkpoints; null: at the end (and on SIGTERM) only."""
    keep: int = Field(2, ge=1)
    resume: bool = False
    """Continue from the newest complete checkpoint of the run directory."""


class Config(Section):
    """A run."""

    name: str = "run"
    seed: int = 0
    steps: int = Field(1000, ge=1)
    """Steps of Algorithm 1; each makes at most one optimizer step."""
    pairs_per_step: int = Field(8, ge=1)
    """Prompts, hence pairs, per step over all processes (paper, section 4.1: batch 8)."""
    run_dir: Path | None = None
    """Where the run lives; null: a new directory under runs/ of the current directory."""
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    reference: ReferenceConfig = ReferenceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    memory: MemoryConfig = MemoryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_run()
        self._check_memory()
        return self

    def _check_run(self) -> None:
        if self.model.kind != "sprites" and (self.prompts.train is None or self.prompts.held_out is None):
            raise ValueError(
                "prompts.train and prompts.held_out name files; only the sprites world has its own"
            )
        if self.reward.kind == "videoscore" and self.reward.path is None:
            raise ValueError("reward.kind videoscore needs reward.path, a local folder of its checkpoint")
        if self.reward.kind == "sprites" and self.model.kind != "sprites":
            raise ValueError("reward.kind sprites scores the sprites world only; set reward.kind=videoscore")
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be below steps={self.steps}"
            )

    def _check_memory(self) -> None:
        storage, memory, lora = self.reference.storage, self.memory, self.model.lora
        if storage == "exact8" and memory.weights == "float32":
            raise ValueError(
                "reference.storage=exact8 keeps differences from bfloat16 weights, but memory.weights=float32; set "
                "memory.weights=masters or stochastic, or use reference.storage=int8"
            )
        if (storage == "adapter") != (lora is not None):
            raise ValueError(
                f"reference.storage={storage} and model.lora={'null' if lora is None else 'set'} do not go together: "
                "an adapter's reference is its base and a frozen copy of the adapter (storage adapter), and full "
                "fine-tuning has no adapter"
            )
        if memory.offload and memory.recompute not in ("block", "all_but_attention"):
            raise ValueError(
                f"memory.offload=true sends the inputs of blocks to the host, but memory.recompute={memory.recompute} "
                "keeps many times as much on the device; set memory.recompute=block or all_but_attention"
            )
        if memory.step_in_backward:
            self._check_step_in_backward()

    def _check_step_in_backward(self) -> None:
        wrong = {
            "memory.sequential=true": (self.memory.sequential, "a step needs the gradients of both members"),
            "objective.rows": (self.objective.rows is not None, "a step needs the gradients of all rows"),
            "optimizer.clip": (
                self.optimizer.clip is not None,
                "their common norm is known too late; set null",
            ),
        }
        for name, (given, reason) in wrong.items():
            if given:
                raise ValueError(f"memory.step_in_backward=true excludes {name}: {reason}")
