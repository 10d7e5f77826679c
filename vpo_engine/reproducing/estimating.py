"""About how many processor seconds a cell takes, for the line that a grid prints at its start."""

from __future__ import annotations

from vpo_engine.reproducing.budgets import SECONDS_OF_A_STEP
from vpo_engine.reproducing.cells import Cell

_CANDIDATE, _CACHED, _DECODED, _SAMPLE = 0.073, 0.58, 0.022, 0.052
"""Processor seconds of a candidate's 12 sampling steps; the share of that with rollout.cache; of decoding and scoring a
video; of a pair at one timestep in an update. Measured on one core of an Intel Xeon."""
_CLIP, _START, _GROUP, _PLAN = 0.095, 8.0, 11.0, 30.0
"""Processor seconds of a held-out clip with its scores; of a run's start and report; of a ranked group; of a plan."""


def processor_seconds(cell: Cell) -> float:
    """Return about how many processor seconds a cell takes."""
    if cell.kind == "ranking":
        return _START + _GROUP * int(cell.values()["groups"])
    if cell.kind == "memory":
        return _PLAN
    config = cell.config()
    evaluation = config.evaluation
    clips = 16 * evaluation.samples_per_prompt
    if cell.kind == "base":
        return _START + clips * _CLIP
    between = 16 * (evaluation.samples_between or evaluation.samples_per_prompt)
    evaluations = 0 if evaluation.every is None else (config.steps - 1) // evaluation.every
    evaluating = (3 * clips + evaluations * between) * _CLIP
    return _START + evaluating + config.steps * _step(cell)


def _step(cell: Cell) -> float:
    """Return the processor seconds of a training step."""
    config = cell.config()
    method = cell.values().get("method", "online_vpo")
    if method in SECONDS_OF_A_STEP:
        return SECONDS_OF_A_STEP[method] * config.pairs_per_step / 16
    rollout, objective = config.rollout, config.objective
    candidate = _CANDIDATE * rollout.steps / 12 * (1.0 if rollout.cache is None else _CACHED)
    samples = objective.timesteps_per_pair * objective.updates_per_rollout
    return config.pairs_per_step * (rollout.candidates * (candidate + _DECODED) + samples * _SAMPLE)
