"""The state of a run: how it goes into a checkpoint and back, and which settings may change in between."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.online_vpo import OnlineVPO

_FREE_TO_CHANGE = ("name", "run_dir", "steps", "evaluation", "checkpoint", "processes")
"""Settings that may differ when a run is resumed."""


def capture(algorithm: OnlineVPO, step: int, baseline: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the ``tensors`` and the ``state`` of a checkpoint after ``step`` steps.

    Random numbers need no state beside the seed and the step: see ``vpo_engine.seeding``. baseline: the evaluation of
    the policy that the run started from; the end of the run is compared with it.
    """
    config = algorithm.config
    return {
        "tensors": {
            "reference": algorithm.reference.state_dict(),
            "optimizer": algorithm.optimizer.state_dict(),
            "baseline": dict(baseline),
        },
        "state": {
            "step": step,
            "optimizer_steps": algorithm.optimizer_steps,
            "refreshed_at": algorithm.refreshed_at,
            "prompt_cursor": step * config.pairs_per_step,
            "seed": config.seed,
        },
    }


def restore(
    algorithm: OnlineVPO, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], policy: Path
) -> tuple[int, dict[str, Tensor]]:
    """Put a checkpoint back into the algorithm, and return the steps done and the baseline evaluation."""
    algorithm.model.load_policy(policy)
    algorithm.reference.load_state_dict(dict(tensors["reference"]))
    algorithm.optimizer.load_state_dict(dict(tensors["optimizer"]))
    algorithm.refreshed_at = state["refreshed_at"]
    return state["step"], dict(tensors["baseline"])


def check_same_run(config: Config, saved_config: Path) -> None:
    """Raise ValueError if ``config`` does not continue the run whose resolved configuration is at ``saved_config``."""
    saved = load_config(saved_config)
    different = [
        f"{name} was {getattr(saved, name)!r}, now {getattr(config, name)!r}"
        for name in Config.model_fields
        if name not in _FREE_TO_CHANGE and getattr(saved, name) != getattr(config, name)
    ]
    if saved.held_out_steps != config.held_out_steps:
        different.append(
            f"evaluation.steps was {saved.held_out_steps}, now {config.held_out_steps}, and the base was evaluated so"
        )
    samples, now = saved.evaluation.samples_per_prompt, config.evaluation.samples_per_prompt
    if samples != now:
        different.append(
            f"evaluation.samples_per_prompt was {samples}, now {now}, and the base was evaluated so"
        )
    if different:
        raise ValueError(
            f"cannot resume {saved_config.parent}: {'; '.join(different)}. Resume with the run's own settings "
            f"(only {', '.join(_FREE_TO_CHANGE)} may change), or start a new run"
        )
