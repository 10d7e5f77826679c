"""How a run is laid over the processes that torchrun starts."""

from __future__ import annotations

from pydantic import Field

from vpo_engine.config.section import Section


class ProcessesConfig(Section):
    """Who does what among several processes. What is trained does not depend on it beyond rounding, so that a run may
    be resumed on others."""

    per_prompt: int = Field(1, ge=1)
    """Processes that have their prompts in common, as a team: each samples, decodes and scores an equal part of the
    candidates of every prompt, and trains on a part of the pairs, or of their draws. 1: each has its own prompts. Must
    divide the processes that train, rollout.candidates and rollout.prune.keep; the teams must divide pairs_per_step."""
    reward: bool = False
    """The last process loads the reward model and nothing else, and scores for all the others, which have one device
    more to themselves. pairs_per_step and per_prompt then go by the processes that are left."""
