"""Presets: named sets of values for the settings of a section. Settings that are given win over them."""

from __future__ import annotations

from typing import Any, Literal

MemoryPreset = Literal["fast", "balanced", "lean"]
RolloutPreset = Literal["exact", "fast"]

_FAST: dict[str, Any] = {
    "weights": "float32",
    "activation_checkpointing": "none",
    "mlp_chunks": 1,
    "sequential": False,
    "offload_idle": False,
    "decode_frames": None,
}

MEMORY_STEPS: tuple[dict[str, Any], ...] = (
    _FAST,
    {"offload_idle": True, "decode_frames": 2},
    {"activation_checkpointing": "pointwise"},
    {"activation_checkpointing": "block"},
    {"mlp_chunks": 4},
    {"sequential": True},
    {"weights": "fp32_master"},
)
"""The steps from memory.preset=fast to lean, each in addition to those before it, in the order of what they cost: first
copies between phases, then more and more that is computed again, last a rounding of the weights."""


def memory_step(number: int) -> dict[str, Any]:
    """Return the values of step ``number``, 0 being fast and the last one lean."""
    values: dict[str, Any] = {}
    for step in MEMORY_STEPS[: number + 1]:
        values |= step
    return values


MEMORY_PRESETS: dict[str, dict[str, Any]] = {"fast": _FAST, "lean": memory_step(len(MEMORY_STEPS) - 1)}
"""The presets that need no plan; balanced is chosen among the steps by ``vpo_engine.planning.presets``."""

_EXACT: dict[str, Any] = {
    "guidance_interval": None,
    "prune": None,
    "cache": None,
    "weights": "policy",
    "explore": None,
}
_FAST_CACHE = 0.1
_FAST_INTERVAL = (0.3, 1.0)
"""The interval for guidance that docs/rollout.md measures on the sprites world and proposes for Open-Sora."""


def rollout_preset(name: Any, guidance: Any) -> dict[str, Any]:
    """Return the values of a rollout preset; an interval for guidance is set only where there is guidance."""
    if name == "fast":
        return {"cache": _FAST_CACHE} | ({} if guidance == 1 else {"guidance_interval": _FAST_INTERVAL})
    return _EXACT if name == "exact" else {}
