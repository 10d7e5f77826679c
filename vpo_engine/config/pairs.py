"""How pairs are made of scored candidates."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vpo_engine.config.section import Section


class PairsConfig(Section):
    """How pairs are made of scored candidates. The paper: best and worst of each prompt, all alike."""

    rule: Literal["extremes", "pareto"] = "extremes"
    """extremes: best and worst by the selected scalar. pareto: the pair of the widest gap whose winner is no worse than
    its loser in any of reward.dimensions; a prompt without one is a tie."""
    min_gap: float = Field(0.0, ge=0, allow_inf_nan=False)
    """A pair whose scores differ by no more than this is a tie: skipped and counted."""
    gap_power: float = Field(0.0, ge=0, le=4)
    """The weight of a pair's loss is gap^gap_power over the mean of that among the pairs of the step, over all
    processes. 0: all weigh 1 (paper). 1: in proportion to the gap."""
    resample: int = Field(0, ge=0)
    """Rounds in which the prompts that are a tie get rollout.candidates more candidates; the pair is then made of all
    that the prompt has."""
    dataset: Literal["none", "scores", "latents"] = "none"
    """What the run directory's dataset keeps of every prompt: nothing, all scores and the choice, or also the latents
    of the pair, from which rollout.source=dataset trains again."""
