"""Resolve the presets of a configuration: choose the values of memory.preset=balanced, and say what presets set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from vpo_engine.config import Config
from vpo_engine.config.presets import MEMORY_PRESETS, MEMORY_STEPS, memory_step, rollout_preset
from vpo_engine.models.registry import check_model

_LAST = len(MEMORY_STEPS) - 1


def resolve_presets(
    config: Config, fits: Callable[[Config], bool], agree: Callable[[str], str] = str
) -> tuple[Config, str]:
    """Return the configuration with the values of its presets, and a line about each preset ("" without any).

    memory.preset=balanced becomes the first step from fast to lean with which the run ``fits``, else lean. Settings
    that were given are never replaced. A value that another setting excludes is replaced by lean's, or left out where
    that is excluded, too. ``agree`` returns the first process's text in every process: all take the same step.
    """
    lines = []
    if (sampling := config.rollout.preset) is not None:
        values = rollout_preset(sampling, config.rollout.guidance)
        lines.append(_line(f"rollout.preset={sampling}", config.rollout, values))
    if (name := config.memory.preset) is not None:
        values, title = MEMORY_PRESETS.get(name, {}), f"memory.preset={name}"
        if name == "balanced" and config.memory.model_fields_set >= memory_step(_LAST).keys():
            title += " (every setting is given)"
        elif name == "balanced":
            number = int(agree(str(_first_that_fits(config, fits))))
            config, values = _with_memory(config, memory_step(number)), memory_step(number)
            title += f" (step {number} of {_LAST} from fast to lean)"
        lines.append(_line(title, config.memory, values))
    return config, "\n".join(lines)


def _first_that_fits(config: Config, fits: Callable[[Config], bool]) -> int:
    changed = (_with_memory(config, memory_step(number)) for number in range(_LAST))
    return next((number for number, step in enumerate(changed) if fits(step)), _LAST)


def _with_memory(config: Config, values: dict[str, Any]) -> Config:
    """Return the configuration with those of the values that were not given. In place of one that another setting
    excludes, or that the model's family has not, lean's is taken if it is not excluded as well.
    """
    given, lean = config.memory.model_fields_set, memory_step(_LAST)
    for name, value in values.items():
        if name not in given:
            config = _with_value(config, name, value) or _with_value(config, name, lean[name]) or config
    return config


def _with_value(config: Config, name: str, value: Any) -> Config | None:
    """Return the configuration with a value of memory; None if another setting or the model excludes it."""
    sections = {section: getattr(config, section) for section in config.model_fields_set}
    sections["memory"] = config.memory.model_copy(update={name: value})
    try:
        changed = Config.model_validate(sections)
        check_model(changed)
    except ValueError:
        return None
    return changed


def _line(title: str, section: BaseModel, values: dict[str, Any]) -> str:
    """Say which settings a preset has set, and which of its settings have another value."""
    found = {name: getattr(section, name) for name in values}
    kept = [f"{name}={_shown(value)}" for name, value in found.items() if value == values[name]]
    others = [f"{name}={_shown(value)}" for name, value in found.items() if value != values[name]]
    return f"{title} sets {' '.join(kept) or 'nothing'}" + (f"; but {' '.join(others)}" if others else "")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
