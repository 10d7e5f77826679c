"""The state of a run: how it goes into a checkpoint and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vpo_engine.memory.host_copy import HostCopies
from vpo_engine.method import Method
from vpo_engine.video_model import VideoModel


def capture(algorithm: Method, step: int, baseline: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the ``tensors`` and the ``state`` of a checkpoint after ``step`` steps.

    Every process must call this; what the first one gets is complete. Random numbers need no state beside the seed and
    the step: see ``vpo_engine.seeding``. baseline: the evaluation of the policy that the run started from; the end of
    the run is compared with it.
    """
    config = algorithm.config
    if algorithm.average is not None:
        algorithm.average.collect()
    reference = algorithm.reference
    return {
        "tensors": {
            **({} if reference is None else {"reference": reference.state_dict()}),
            "optimizer": algorithm.optimizer.state_dict(),
            "baseline": dict(baseline),
        },
        "state": {
            "step": step,
            "optimizer_steps": algorithm.optimizer_steps,
            **algorithm.state(),
            "prompt_cursor": step * config.pairs_per_step,
            "seed": config.seed,
        },
    }


def restore(
    algorithm: Method,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    policy: Path,
    average: Path | None = None,
) -> tuple[int, dict[str, Tensor]]:
    """Put a checkpoint back into the algorithm, and return the steps done and the baseline evaluation.

    policy, average: the folders that ``model.save_policy`` and ``average_writer`` wrote; the second is read with
    ema.decay only.
    """
    with algorithm.optimizer.whole(changed=True):
        algorithm.model.load_policy(policy)
    if algorithm.reference is not None:
        algorithm.reference.load_state_dict(dict(tensors["reference"]))
    algorithm.optimizer.load_state_dict(dict(tensors["optimizer"]))
    algorithm.load_state(state)
    if algorithm.average is not None:
        assert average is not None
        with algorithm.average.loaded():
            algorithm.model.load_policy(average)
        algorithm.average.updates = algorithm.optimizer_steps
    return state["step"], dict(tensors["baseline"])


def policy_writer(model: VideoModel, copies: HostCopies | None) -> Callable[[Path], None]:
    """Return what writes the policy as it is now, from ``copies`` of it; without them, as it is when it is called."""
    if copies is None:
        return model.save_policy
    twin = copy.copy(model)
    twin.network = copies.network(model.network)
    return twin.save_policy


def average_writer(algorithm: Method, copies: HostCopies | None) -> Callable[[Path], None] | None:
    """Return what writes the moving average, in float32 and in the policy's own layout; None where there is none.

    It writes the average as it is now, from ``copies`` of it; without them, as it is when it is called.
    """
    average = algorithm.average
    if average is None:
        return None
    if copies is not None:
        with average.in_place():
            return policy_writer(algorithm.model, copies)

    def write(folder: Path) -> None:
        with average.in_place():
            algorithm.model.save_policy(folder)

    return write
