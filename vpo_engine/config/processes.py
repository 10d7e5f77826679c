"""Settings of how a run is divided among the processes that torchrun starts."""

from __future__ import annotations

from pydantic import Field

from vpo_engine.config.section import Section


class ProcessesConfig(Section):
    """The division of the work among several processes. What is trained does not depend on it beyond rounding, so a run
    may be resumed with other settings and another number of processes."""

    per_prompt: int = Field(1, ge=1)
    """Number of processes that work on the same prompts, as a team. Each of them samples, decodes and scores an equal
    part of the candidates of every prompt, and trains on a part of the pairs or of their timesteps. 1: each process has
    its own prompts. It must divide the number of training processes, rollout.candidates and rollout.prune.keep, and the
    number of teams must divide pairs_per_step."""
    split_guidance: bool = False
    """Let two neighbouring processes of a team share each candidate: while it is sampled, one predicts with the prompt
    and the other one without, and they exchange their predictions once per step. So per_prompt may be twice
    rollout.candidates. It must be even, and half of it must divide rollout.candidates and rollout.prune.keep."""
    reward: bool = False
    """Give the last process to the reward model: it loads nothing else, and scores for all other processes. They have
    more device memory to themselves; pairs_per_step and per_prompt then refer to the processes that are left."""

    @property
    def sharers(self) -> int:
        """Return among how many the candidates of a prompt are shared: the processes of a team, or its couples."""
        return self.per_prompt // 2 if self.split_guidance else self.per_prompt
