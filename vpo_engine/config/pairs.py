"""Settings of how pairs are made of scored candidates."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vpo_engine.config.section import Section


class PairsConfig(Section):
    """The rule by which pairs are made of scored candidates. The defaults are the paper's: the best and the worst
    candidate of each prompt, and all pairs weigh the same."""

    rule: Literal["extremes", "pareto"] = "extremes"
    """The two candidates that make the pair. extremes: the best and the worst by the selected scalar. pareto: the two
    with the widest gap of which the winner is no worse than the loser in any of reward.dimensions; a prompt without
    such a pair is a tie. Source: paper, Algorithm 1."""
    min_gap: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Largest difference of scores that is a tie. Ties are counted and not trained on."""
    gap_power: float = Field(0.0, ge=0, le=4)
    """Exponent of the pair weights: the weight of a pair's loss is gap^gap_power, divided by the mean of that over the
    pairs of the step on all processes. 0: all pairs weigh 1. 1: the weight is proportional to the gap. Source: paper
    (0)."""
    resample: int = Field(0, ge=0)
    """Number of rounds in which prompts that are a tie get rollout.candidates more candidates. The pair is then made of
    all candidates of the prompt."""
    dataset: Literal["none", "scores", "latents"] = "none"
    """The part of every prompt's results that the run directory keeps, as a preference dataset. none: nothing. scores:
    all scores and the chosen pair. latents: also the latents of the pair, on which method=offline_dpo can train."""
