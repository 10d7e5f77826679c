"""Settings of how candidates are sampled."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from vpo_engine.config.presets import RolloutPreset, rollout_preset
from vpo_engine.config.section import Section


class PruneConfig(Section):
    """Give up candidates on the way: previews of all candidates are scored, and only the best and the worst are
    finished."""

    after: float = Field(gt=0, lt=1)
    """Share of the steps after which previews are made: the clean latents to which the last prediction points are
    decoded and scored."""
    keep: int = Field(ge=2)
    """Number of candidates of each prompt that are finished: the better half of this number from the top of the scores,
    the rest from the bottom."""
    frames: int | None = Field(None, ge=1)
    """Number of frames of a preview that are decoded and scored: the first ones, rounded up to the next count that the
    model decodes on its own; null: all. Finished candidates are always scored whole."""


Weights = Literal["policy", "bf16", "int8", "fp8"]


class ExploreConfig(Section):
    """Sample all candidates cheaply first and score them; then sample the best and the worst of each prompt again from
    the same noise, as the rollout would without this setting, and score them again. With N candidates it saves time if
    a cheap candidate costs less than 1 - 2 / N of a full one."""

    steps: int | None = Field(None, ge=1)
    """Sampling steps of cheap candidates; null: rollout.steps."""
    guidance_interval: tuple[float, float] | None = None
    """The same as rollout.guidance_interval, for cheap candidates."""
    cache: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The same as rollout.cache, for cheap candidates."""
    weights: Weights = "policy"
    """The same as rollout.weights, for cheap candidates."""


class RolloutConfig(Section):
    """The way in which candidates are sampled. The settings guidance_interval, prune, cache, weights and explore are
    approximations and apply to training only: held-out videos are sampled without them."""

    preset: RolloutPreset | None = None
    """A named set of values for the approximations; settings that are given win. exact: none of them. fast: cache=0.1,
    and with guidance (guidance other than 1) guidance_interval=[0.3, 1.0]. null: only what is given. Source:
    docs/rollout.md."""
    candidates: int = Field(4, ge=2)
    """N: number of candidates per prompt. Source: paper, section 4.4."""
    steps: int = Field(30, ge=1)
    """Number of sampling steps. Source: paper, section 4.1."""
    guidance: float = Field(7.0, ge=0)
    """Scale of classifier-free guidance; 1 turns guidance off. Source: the published Open-Sora 1.2 sampling default."""
    source: Literal["policy", "reference"] = "policy"
    """What samples the candidates. policy: the current policy (online). reference: the reference; if it is never
    refreshed, the policy of the start. Source: paper (policy)."""
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] | None = "auto"
    """Largest number of candidates that go through the network and the decoder at once, as whole prompts or as even
    parts of one prompt; null: all candidates of a step. auto: as many as the plan says fit. If a resumed run has to be
    the same bit for bit on a device with other memory, give the number that the run prints."""
    overlap: bool = False
    """Decode and score groups of batch_size candidates while the next group is sampled: on a GPU in a separate stream,
    on a CPU between groups. Scores stay the same. Seconds of decoding and scoring that sampling hides count as the
    rollout's. It needs the memory of both at once, and excludes memory.offload_idle=true."""
    compile: Literal["none", "blocks", "graphs"] = "none"
    """The compilation of the policy while it samples for training. blocks: its blocks go through torch.compile, as
    three functions for any depth and batch size; candidates differ by rounding, and a CPU needs a C++ compiler.
    graphs: all steps of a sampling loop but the first replay one CUDA graph of the same kernels; GPUs only."""
    guidance_interval: tuple[float, float] | None = None
    """[low, high]: guidance is used only at times t / 1000 in this interval, and one branch at all other times
    (arXiv 2404.07724); null: guidance is always used."""
    prune: PruneConfig | None = None
    """Candidates that are given up on the way; null: every candidate is finished."""
    cache: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Largest relative change of what the first pair of blocks adds at which a step reuses what the other blocks added
    in the step that last computed them; null: every step computes all blocks."""
    weights: Weights = "policy"
    """The weights that sample. policy: the policy's own. bf16: of a float32 model, a copy whose blocks multiply in
    bfloat16, for processors that do so faster (AMX); it takes longer on others. int8, fp8: a copy whose blocks multiply
    in 8 bits, for GPUs that do so; it takes longer on other devices. A copy is rounded again before every rollout."""
    explore: ExploreConfig | None = None
    """Cheap sampling of all candidates before the exact sampling of two; null: candidates are sampled once."""

    @property
    def batch_limit(self) -> int | None:
        """Return ``batch_size`` as a number. None means all candidates, which is also the limit of an auto that nobody
        has planned."""
        return None if self.batch_size == "auto" else self.batch_size

    @property
    def prune_step(self) -> int:
        """Return the number of steps before previews are scored; all steps without ``prune``."""
        return self.steps if self.prune is None else round(self.prune.after * self.steps)

    @property
    def preview_frames(self) -> int | None:
        """Return the least number of frames of a preview that are scored; None: all of them."""
        return None if self.prune is None else self.prune.frames

    @property
    def keep(self) -> int | None:
        """Return the number of candidates of each prompt that a second pass makes; None if there is no second pass."""
        if self.explore is not None:
            return 2
        return None if self.prune is None else self.prune.keep

    @property
    def first_pass(self) -> ExploreConfig:
        """Return the settings with which all candidates are sampled first."""
        if self.explore is None:
            return ExploreConfig(
                steps=self.steps,
                guidance_interval=self.guidance_interval,
                cache=self.cache,
                weights=self.weights,
            )
        return self.explore.model_copy(update={"steps": self.explore.steps or self.steps})

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        guidance = values.get("guidance", cls.model_fields["guidance"].default)
        return {**rollout_preset(values.get("preset"), guidance), **values}

    @model_validator(mode="after")
    def _compiled(self) -> Self:
        first = self.first_pass
        if self.compile == "none":
            return self
        if self.source != "policy" or {self.weights, first.weights} != {"policy"}:
            raise ValueError(
                f"compile={self.compile} is for the policy's own weights, but source={self.source} and "
                f"weights={first.weights if self.weights == 'policy' else self.weights}; set compile=none"
            )
        if self.compile == "graphs" and (self.cache is not None or first.cache is not None):
            raise ValueError(
                "compile=graphs replays the same kernels in every step, but cache chooses in each step which to run; "
                "set compile=none, or cache=null"
            )
        return self

    @model_validator(mode="after")
    def _approximations(self) -> Self:
        self._check_interval(self.guidance_interval)
        if self.source == "reference" and {self.weights, self.first_pass.weights} != {"policy"}:
            raise ValueError(
                "rounded weights are a copy of the policy, but source=reference samples from the reference; set "
                "weights=policy"
            )
        if self.explore is not None:
            self._check_explore(self.explore)
        return self._check_prune()

    def _check_interval(self, interval: tuple[float, float] | None) -> None:
        if interval is None:
            return
        low, high = interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"guidance_interval=[{low}, {high}] must be shares of the time with 0 <= low < high <= 1"
            )
        if self.guidance == 1.0:
            raise ValueError(
                "guidance_interval limits a guidance that guidance=1.0 turns off; set guidance, or "
                "guidance_interval=null"
            )

    def _check_explore(self, explore: ExploreConfig) -> None:
        self._check_interval(explore.guidance_interval)
        if self.prune is not None:
            raise ValueError(
                "explore and prune both choose which candidates are finished; set one of them null"
            )
        if self.weights != "policy":
            raise ValueError(
                f"explore samples what it has chosen by the policy's weights, but weights={self.weights}; set "
                f"explore.weights={self.weights} and weights=policy"
            )
        if self.candidates == 2:
            raise ValueError("explore chooses two of the candidates, but candidates=2; set explore=null")
        if self.first_pass == ExploreConfig(steps=self.steps):
            raise ValueError(
                "explore samples all candidates at full cost before it samples two of them again; give it fewer steps, "
                "a guidance_interval, a cache or rounded weights, or set explore=null"
            )

    def _check_prune(self) -> Self:
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
