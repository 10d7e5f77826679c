"""Everything that a run needs to go on: what a checkpoint holds, and how it is put back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.models.lora import has_adapter, load_adapter
from vpo_engine.online_vpo import OnlineVPO

_FREE_TO_CHANGE = ("name", "run_dir", "steps", "evaluation", "checkpoint", "processes")
"""Settings that may differ when a run is resumed."""


def capture(algorithm: OnlineVPO, step: int, baseline: Mapping[str, Tensor]) -> dict[str, Any]:
    """The ``tensors`` and ``state`` of a checkpoint after ``step`` steps.

    Random numbers need no state beside the seed and the step: see ``vpo_engine.seeding``. ``baseline`` is the
    evaluation of the policy that the run started from, against which its end is compared.
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
    """Put a checkpoint back; (steps done, baseline)."""
    network = algorithm.model.network
    if has_adapter(network):
        load_adapter(network, policy)
    else:
        with safe_open(policy / "model.safetensors", framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        network.load_state_dict(weights, strict=True)
    algorithm.reference.load_state_dict(dict(tensors["reference"]))
    algorithm.optimizer.load_state_dict(dict(tensors["optimizer"]))
    algorithm.refreshed_at = state["refreshed_at"]
    return state["step"], dict(tensors["baseline"])


def check_same_run(config: Config, saved_config: Path) -> None:
    """ValueError if ``config`` would not continue the run whose resolved configuration is at ``saved_config``."""
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
    if different:
        raise ValueError(
            f"cannot resume {saved_config.parent}: {'; '.join(different)}. Resume with the run's own settings "
            f"(only {', '.join(_FREE_TO_CHANGE)} may change), or start a new run"
        )
