"""The state of a run: how it goes into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vpo_engine.online_vpo import OnlineVPO


def capture(algorithm: OnlineVPO, step: int, baseline: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the ``tensors`` and the ``state`` of a checkpoint after ``step`` steps.

    Every process must call this; what the first one gets is complete. Random numbers need no state beside the seed and
    the step: see ``vpo_engine.seeding``. baseline: the evaluation of the policy that the run started from; the end of
    the run is compared with it.
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
    with algorithm.optimizer.whole(changed=True):
        algorithm.model.load_policy(policy)
    algorithm.reference.load_state_dict(dict(tensors["reference"]))
    algorithm.optimizer.load_state_dict(dict(tensors["optimizer"]))
    algorithm.refreshed_at = state["refreshed_at"]
    return state["step"], dict(tensors["baseline"])
