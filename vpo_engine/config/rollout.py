"""How candidates are sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vpo_engine.config.section import Section


class PruneConfig(Section):
    """Candidates that are given up on the way: previews of all are scored, and only the extremes are finished."""

    after: float = Field(gt=0, lt=1)
    """Share of the steps after which the clean latents that the last prediction points to are decoded and scored."""
    keep: int = Field(ge=2)
    """Candidates of each prompt that are finished: the better half of this number from the top, the rest from the
    bottom."""


Weights = Literal["policy", "int8", "fp8"]


class ExploreConfig(Section):
    """How all candidates are sampled first, cheaply, and scored; the best and the worst of each prompt are then sampled
    once more from the same noise, as the rollout would without this, and scored again. At N candidates it pays where a
    cheap one costs less than 1 - 2 / N of another. Settings as in ``RolloutConfig``."""

    steps: int | None = Field(None, ge=1)
    """null: rollout.steps."""
    guidance_interval: tuple[float, float] | None = None
    cache: float | None = Field(None, gt=0, allow_inf_nan=False)
    weights: Weights = "policy"


class RolloutConfig(Section):
    """How candidates are sampled. guidance_interval, prune, cache, weights and explore are approximations, for training
    only: held-out videos are sampled without them."""

    candidates: int = Field(4, ge=2)
    """N (paper, section 4.4)."""
    steps: int = Field(30, ge=1)
    """Inference steps (paper, section 4.1)."""
    guidance: float = Field(7.0, ge=0)
    """Classifier-free guidance scale; the published Open-Sora 1.2 sampling default. 1 turns guidance off."""
    source: Literal["policy", "reference", "dataset"] = "policy"
    """Who samples. policy: online (the paper). reference with no refresh: offline preference data. dataset: nobody; the
    pairs are those that another run stored."""
    dataset: Path | None = None
    """Run directory (or its folder preference_dataset) whose pairs source dataset trains on, in the order in which they
    were made, again and again; it was written with pairs.dataset=latents."""
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] | None = "auto"
    """The most candidates that go through the network and the decoder at once, as whole prompts or as even parts of
    one; null: all of a step. auto: as many as the plan says fit; give the number that the run prints where a resumed
    run is to be the same bit for bit on a device with other memory."""
    overlap: bool = False
    """Decode and score groups of ``batch_size`` while the next are sampled: on a GPU in a stream of its own, on a CPU,
    whose cores sampling takes, between groups. Scores stay the same. The seconds of decoding and scoring that sampling
    hides count as the rollout's. It needs the memory of both at once, and excludes memory.offload_idle=true."""
    compile: Literal["none", "blocks", "graphs"] = "none"
    """blocks: the policy's blocks go through torch.compile while it samples for training, as three functions for any
    depth and batch size; candidates differ by rounding, and a CPU needs a C++ compiler. graphs: all steps of a loop
    but the first are replays of one CUDA graph, of the same kernels; GPUs only."""
    guidance_interval: tuple[float, float] | None = None
    """[low, high]: guidance only at times t / 1000 in it (arXiv 2404.07724), one branch at all others; null: always."""
    prune: PruneConfig | None = None
    """null: every candidate is finished."""
    cache: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Relative change of what the first pair of blocks adds, below which a step takes what the blocks after it add
    from the step that last computed it; null: every step computes all blocks."""
    weights: Weights = "policy"
    """What samples: the policy's weights, or a copy of it whose blocks multiply in 8 bits, rounded anew before every
    rollout. It is meant for GPUs that have such products; elsewhere it takes longer than the policy."""
    explore: ExploreConfig | None = None
    """null: candidates are sampled once."""

    @property
    def batch_limit(self) -> int | None:
        """``batch_size`` as a number, None for all; all, too, where nobody planned what auto may take."""
        return None if self.batch_size == "auto" else self.batch_size

    @property
    def prune_step(self) -> int:
        """Steps before previews are scored; all of them without ``prune``."""
        return self.steps if self.prune is None else round(self.prune.after * self.steps)

    @property
    def keep(self) -> int | None:
        """Candidates of each prompt that a second pass makes; None where there is none."""
        if self.explore is not None:
            return 2
        return None if self.prune is None else self.prune.keep

    @property
    def first_pass(self) -> ExploreConfig:
        """How all candidates are sampled first."""
        if self.explore is None:
            return ExploreConfig(
                steps=self.steps,
                guidance_interval=self.guidance_interval,
                cache=self.cache,
                weights=self.weights,
            )
        return self.explore.model_copy(update={"steps": self.explore.steps or self.steps})

    @model_validator(mode="after")
    def _from_a_dataset(self) -> Self:
        if (self.source == "dataset") != (self.dataset is not None):
            raise ValueError(
                f"source={self.source} and dataset={'null' if self.dataset is None else self.dataset} do "
                f"not go together: "
                "source dataset reads pairs from the run directory that rollout.dataset names"
            )
        return self

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
                "weights in 8 bits are a copy of the policy, but source=reference samples from the reference; set "
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
                "a guidance_interval, a cache or weights in 8 bits, or set explore=null"
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
