"""All settings of a run together, and the rules among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator

from vpo_engine.config.checkpoint import CheckpointConfig
from vpo_engine.config.disk import DiskConfig
from vpo_engine.config.distributed import DistributedConfig
from vpo_engine.config.errors import shown
from vpo_engine.config.evaluation import EvaluationConfig
from vpo_engine.config.guards import GuardsConfig
from vpo_engine.config.log import LogConfig
from vpo_engine.config.memory import MemoryConfig
from vpo_engine.config.methods import (
    SECTIONS,
    InstructVideoConfig,
    MethodCard,
    MethodName,
    OfflineDPOConfig,
    ReflConfig,
    T2VTurboConfig,
    VaderConfig,
    card_of,
    refuse_beside_gradients,
    unused_settings,
)
from vpo_engine.config.model import ModelConfig
from vpo_engine.config.pairs import PairsConfig
from vpo_engine.config.processes import ProcessesConfig
from vpo_engine.config.prompts import PromptsConfig
from vpo_engine.config.reward import RewardConfig
from vpo_engine.config.rollout import RolloutConfig
from vpo_engine.config.section import Section
from vpo_engine.config.update import EmaConfig, ObjectiveConfig, OptimizerConfig, ReferenceConfig


class Config(Section):
    """All settings of a run."""

    name: str = Field("run", pattern=r"[A-Za-z0-9]")
    """Name of the run; its directory under runs/ begins with it."""
    seed: int = 0
    """Seed of all random numbers. Runs with the same seed on the same machine are the same."""
    steps: int = Field(1000, ge=1)
    """Steps of Algorithm 1. Each makes objective.updates_per_rollout optimizer steps, or none if all pairs are ties."""
    pairs_per_step: int = Field(8, ge=1)
    """Number of prompts, and so of pairs, per step over all processes. Source: paper, section 4.1 (batch 8)."""
    run_dir: Path | None = None
    """Directory of the run; null: a new one under runs/ of the current directory."""
    method: MethodName = "online_vpo"
    """The training method (see docs/methods.md). Its own settings stand in the section of its name; sections of other
    methods, and settings that the method does not use, are refused. Source: paper."""
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    pairs: PairsConfig = PairsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    reference: ReferenceConfig = ReferenceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    memory: MemoryConfig = MemoryConfig()
    processes: ProcessesConfig = ProcessesConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    guards: GuardsConfig = GuardsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    disk: DiskConfig = DiskConfig()
    offline_dpo: OfflineDPOConfig | None = None
    """Settings of method=offline_dpo."""
    refl: ReflConfig | None = None
    """Settings of method=refl."""
    vader: VaderConfig | None = None
    """Settings of method=vader."""
    instructvideo: InstructVideoConfig | None = None
    """Settings of method=instructvideo."""
    t2v_turbo: T2VTurboConfig | None = None
    """Settings of method=t2v_turbo."""
    _left_out: tuple[str, ...] = PrivateAttr(())

    @property
    def card(self) -> MethodCard:
        """Return the facts about the method that runs."""
        own = self.instructvideo or self.t2v_turbo
        videos = None if own is None or own.videos is None else "videos"
        return card_of(self.method, videos if self.offline_dpo is None else self.offline_dpo.given)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Return the settings of the file that the method, given as an argument, does not use."""
        return self._left_out

    def with_left_out(self, keys: Sequence[str]) -> Self:
        """Keep what ``left_out`` returns."""
        self._left_out = tuple(keys)
        return self

    @property
    def trained_sampling(self) -> tuple[int, float]:
        """Return the sampling steps and the guidance of the videos that are trained on."""
        own = self.refl or self.vader or self.instructvideo
        steps, guidance = (None, None) if own is None else (own.steps, own.guidance)
        return steps or self.rollout.steps, self.rollout.guidance if guidance is None else guidance

    @property
    def refresh_every(self) -> int | None:
        """Return K, the optimizer steps between refreshes of the reference; None: it is never refreshed."""
        return self.reference.refresh_every if self.offline_dpo is None else self.offline_dpo.refresh_every

    @property
    def samples_before(self) -> bool:
        """Return whether all pairs are sampled before the first step, and kept."""
        return self.offline_dpo is not None and self.offline_dpo.given is None

    @property
    def refreshes(self) -> bool:
        """Return whether the reference is ever refreshed; that of T2V-Turbo, its teacher, is not."""
        return self.refresh_every is not None and self.method != "t2v_turbo"

    @property
    def optimizer_steps(self) -> int:
        """Return the number of optimizer steps of a run in which every step has pairs."""
        return self.steps * self.objective.updates_per_rollout

    @property
    def optimizer_memory(self) -> MemoryConfig:
        """Return the settings of memory by which the optimizer holds what it trains: an adapter is float32 always."""
        return (
            self.memory if self.model.lora is None else self.memory.model_copy(update={"weights": "float32"})
        )

    @property
    def held_out_steps(self) -> int:
        """Return the number of sampling steps of held-out videos."""
        return self.evaluation.steps or self.rollout.steps

    @model_validator(mode="before")
    @classmethod
    def _with_section_of_method(cls, values: Any) -> Any:
        """Give the method that runs its section, with defaults where none is given."""
        method = values.get("method") if isinstance(values, dict) else None
        if isinstance(method, str) and method in SECTIONS and values.get(method) is None:
            return {**values, method: {}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_method()
        self._check_run()
        self._check_memory()
        self._check_processes()
        self._check_distributed()
        return self

    def _check_method(self) -> None:
        for name in SECTIONS:
            if name != self.method and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} has the settings of method={name}, but method={self.method} runs; set method={name}, or "
                    f"{name}=null"
                )
        found = list(unused_settings(self, self.card.unused))
        if found:
            given = ", ".join(f"{key}={shown(value)}" for key, value, _ in found)
            defaults = " ".join(f"{key}={shown(default)}" for key, _, default in found)
            raise ValueError(
                f"{given} {'has' if len(found) == 1 else 'have'} no meaning for method={self.method} "
                f"({self.card.title}); leave it out, or give {defaults}"
            )
        if self.card.reward_gradient:
            refuse_beside_gradients(self)
        sampled = self.offline_dpo.pairs if self.offline_dpo is not None else None
        if sampled is not None and sampled % self.pairs_per_step:
            raise ValueError(
                f"offline_dpo.pairs={sampled} is no multiple of pairs_per_step={self.pairs_per_step}, by which pairs "
                "are sampled and trained on; make it one"
            )
        own, steps = self.refl or self.vader, self.trained_sampling[0]
        if own is not None and own.last_steps > steps:
            where = f"rollout.steps={steps}" if own.steps is None else f"{self.method}.steps={steps}"
            raise ValueError(
                f"{self.method}.last_steps={own.last_steps} are more than the {steps} sampling steps ({where}); lower "
                f"it, or raise {where.partition('=')[0]}"
            )

    def _check_run(self) -> None:
        missing = [
            name
            for name in ("train", "held_out")
            if getattr(self.prompts, name) is None and (name != "train" or self.card.prompts)
        ]
        if self.model.kind != "sprites" and missing:
            raise ValueError(
                f"{' and '.join(f'prompts.{name}' for name in missing)} must name a file; only the sprites world has "
                "prompts of its own"
            )
        if self.reward.kind.startswith("sprites") and self.model.kind != "sprites":
            raise ValueError(
                f"reward.kind {self.reward.kind} scores the sprites world only; set reward.kind=videoscore with its "
                "reward.path, or reward.kind=builtin"
            )
        if self.rollout.first_pass.weights == "bf16" and self.model.dtype == "bfloat16":
            name = "weights" if self.rollout.weights == "bf16" else "explore.weights"
            raise ValueError(
                f"rollout.{name}=bf16 lets a float32 model multiply in bfloat16 while it samples, which "
                f"model.dtype=bfloat16 does everywhere; set rollout.{name}=policy"
            )
        held_out = self.guards.reward
        second = next((own.second for own in (self.vader, self.t2v_turbo) if own is not None), None)
        trained = [(each.kind, each.path) for each in (self.reward, second) if each is not None]
        if held_out is not None and (held_out.kind, held_out.path) in trained:
            raise ValueError(
                f"guards.reward is the reward that is trained against ({held_out.kind}); name another reward model, "
                "whose scores never select pairs, or leave it out"
            )
        if self.model.kind == "sprites":
            self._check_sprites()

    def _check_sprites(self) -> None:
        """Refuse settings that the sprites world, whose clips have one size, would ignore."""
        for name in ("vae", "text_encoder", "resolution", "aspect", "num_frames", "fps"):
            value = getattr(self.model, name)
            if value != type(self.model).model_fields[name].default:
                raise ValueError(
                    f"model.{name}={value} has no meaning for model.kind=sprites, whose clips have 17 frames of 32 x "
                    "32 pixels; leave it out, or choose another model.kind"
                )

    def _check_processes(self) -> None:
        size, rollout, split = self.processes.per_prompt, self.rollout, self.processes.split_guidance
        if split:
            self._check_split_guidance()
        shared = {"rollout.candidates": rollout.candidates} if self.card.candidates else {}
        if rollout.prune is not None:
            shared["rollout.prune.keep"] = rollout.prune.keep
        sharers, fits = self.processes.sharers, "4 or 2" if split else "2 or 1"
        if rollout.explore is not None and sharers > 2:
            raise ValueError(
                f"rollout.explore samples two candidates of a prompt again, which processes.per_prompt={size} cannot "
                f"share; set processes.per_prompt to {fits}"
            )
        couples, twice = (f"the {sharers} couples of ", "twice ") if split else ("", "")
        for name, number in shared.items():
            if number % sharers:
                raise ValueError(
                    f"{name}={number} cannot be shared equally by {couples}processes.per_prompt={size}; make {name} a "
                    f"multiple of {sharers}, or set processes.per_prompt to {twice}a divisor of {number}"
                )

    def _check_split_guidance(self) -> None:
        size, rollout = self.processes.per_prompt, self.rollout
        caches = rollout.cache or rollout.first_pass.cache
        wrong = {
            f"processes.per_prompt={size}": (
                size % 2 == 1,
                "its teams are made of couples; set an even number",
            ),
            "rollout.guidance=1": (rollout.guidance == 1.0, "there is one branch only; set false"),
            f"method={self.method}": (not self.card.candidates, "it samples no candidates; set false"),
            f"rollout.cache={caches}": (
                caches is not None,
                "each process would decide by its own branch what a step computes; set null (also in rollout.explore)",
            ),
            "rollout.compile=graphs": (
                rollout.compile == "graphs",
                "processes exchange predictions in every step, and a graph cannot wait for them; set none or blocks",
            ),
        }
        for name, (given, reason) in wrong.items():
            if given:
                raise ValueError(f"processes.split_guidance=true excludes {name}: {reason}")

    def _check_distributed(self) -> None:
        """Refuse what sequence parallelism excludes, and DeepSpeed at any stage; see ``deepspeed_settings`` too."""
        if self.distributed.sequence_parallel > 1:
            self._check_sequence()
        if self.distributed.engine != "deepspeed":
            return
        memory = self.memory
        wrong = {
            "memory.step_in_backward=true": (
                memory.step_in_backward,
                "gradients are averaged over processes before any weight is stepped; set false",
            ),
            "memory.weights=stochastic_rounding": (
                memory.weights == "stochastic_rounding",
                "it steps float32 weights of its own and rounds them to the policy's; set fp32_master, whose masters "
                "it divides among the processes",
            ),
            "memory.offload_idle=true": (
                memory.offload_idle,
                "it holds the policy and the optimizer's state in tensors of its own, which must stay in place; set "
                "false, and distributed.offload_optimizer=true",
            ),
        }
        for name, (given, reason) in wrong.items():
            if given:
                raise ValueError(f"distributed.engine=deepspeed excludes {name}: {reason}")

    def _check_sequence(self) -> None:
        wrong = {
            "rollout.overlap=true": (
                self.rollout.overlap,
                "the processes that share a video share its decoding and scoring, too, when it is sampled; set false",
            ),
            "rollout.compile=graphs": (
                self.rollout.compile == "graphs",
                "the exchange between processes is not part of a CUDA graph; set blocks or none",
            ),
            "processes.split_guidance=true": (
                self.processes.split_guidance,
                "it gives each process one branch of guidance and this gives it a slice of both; set one of them",
            ),
        }
        for name, (given, reason) in wrong.items():
            if given:
                raise ValueError(
                    f"distributed.sequence_parallel={self.distributed.sequence_parallel} excludes {name}: {reason}"
                )

    def _check_memory(self) -> None:
        storage, memory, lora = self.reference.storage, self.memory, self.model.lora
        if storage == "exact8" and memory.weights == "float32" and not memory.chooses("weights"):
            raise ValueError(
                "reference.storage=exact8 keeps differences from bfloat16 weights, but memory.weights=float32; set "
                "memory.weights=fp32_master or stochastic_rounding, or use reference.storage=int8"
            )
        if self.reference.refresh_share < 1 and self.refreshes:
            self._check_soft_refresh()
        if self.card.reference and (storage == "adapter") != (lora is not None):
            raise ValueError(
                f"reference.storage={storage} and model.lora={'null' if lora is None else 'set'} do not go together: "
                "an adapter's reference is its base and a frozen copy of the adapter (storage adapter), and full "
                "fine-tuning has no adapter"
            )
        if memory.base_bits is not None:
            self._check_base_bits()
        kept = memory.activation_checkpointing
        if memory.offload_activations and kept not in ("block", "all_but_attention"):
            raise ValueError(
                "memory.offload_activations=true sends the inputs of blocks to the host, but "
                f"memory.activation_checkpointing={kept} keeps many times as much on the device; set "
                "memory.activation_checkpointing=block or all_but_attention"
            )
        if self.rollout.overlap and memory.offload_idle:
            raise ValueError(
                "rollout.overlap=true has policy, VAE and reward model on the device at once, which "
                "memory.offload_idle=true exists to avoid; set rollout.overlap=false, or memory.offload_idle=false"
            )
        if memory.step_in_backward:
            self._check_step_in_backward()

    def _check_soft_refresh(self) -> None:
        storage, weights = self.reference.storage, self.optimizer_memory.weights
        if storage not in ("copy", "adapter") or weights != "float32":
            raise ValueError(
                f"reference.refresh_share={self.reference.refresh_share:g} moves the reference by small steps, which "
                f"reference.storage={storage} with memory.weights={weights} would round away; set "
                "reference.storage=copy memory.weights=float32, or reference.refresh_share=1"
            )

    def _check_base_bits(self) -> None:
        bits, rollout = self.memory.base_bits, self.rollout
        if self.model.lora is None:
            raise ValueError(
                f"memory.base_bits={bits} holds a frozen base in {bits} bits, but without model.lora all weights are "
                "trained; set model.lora.rank=64 reference.storage=adapter, or leave memory.base_bits out"
            )
        for name, weights in (("weights", rollout.weights), ("explore.weights", rollout.first_pass.weights)):
            if weights != "policy":
                raise ValueError(
                    f"rollout.{name}={weights} rounds the linear layers of the blocks for sampling, which "
                    f"memory.base_bits={bits} has rounded already; set rollout.{name}=policy"
                )

    def _check_step_in_backward(self) -> None:
        wrong = {
            "memory.sequential=true": (
                self.memory.sequential,
                "a step needs the gradients of winner and loser; set false",
            ),
            "objective.micro_batch_size": (
                self.objective.micro_batch_size is not None,
                "a step needs the gradients of all pairs; set null",
            ),
            "optimizer.clip": (
                self.optimizer.clip is not None,
                "the norm of all gradients is known too late; set null",
            ),
        }
        for name, (given, reason) in wrong.items():
            if given:
                raise ValueError(f"memory.step_in_backward=true excludes {name}: {reason}")
