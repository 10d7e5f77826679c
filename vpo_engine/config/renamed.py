"""Settings that have been renamed: the old keys and values, and what replaces them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

KEYS = {
    "memory.recompute": "memory.activation_checkpointing",
    "memory.residency": "memory.offload_idle",
    "memory.offload": "memory.offload_activations",
    "memory.decode_rows": "memory.decode_strip_height",
    "rollout.rows": "rollout.batch_size",
    "rollout.ledger": "offline_dpo.dataset",
    "rollout.dataset": "offline_dpo.dataset",
    "objective.rows": "objective.micro_batch_size",
    "objective.draws": "objective.timesteps_per_pair",
    "objective.updates": "objective.updates_per_rollout",
    "reward.rows": "reward.batch_size",
    "pairs.refill": "pairs.resample",
    "pairs.ledger": "pairs.dataset",
    "model.companions": "model.fused_ops",
}
"""A map from old keys to new keys."""

VALUES: dict[str, dict[str, str]] = {
    "memory.activation_checkpointing": {"nothing": "none"},
    "memory.weights": {"masters": "fp32_master", "stochastic": "stochastic_rounding"},
    "memory.offload_idle": {"all": "false", "phases": "true"},
}
"""A map from new keys to their old values, each with the value that replaces it, as it is written in a file."""

MOVED: dict[tuple[str, str], tuple[str, str]] = {
    ("rollout.source", value): ("method", "offline_dpo") for value in ("dataset", "ledger")
}
"""A map from old keys with a value to the setting, key and value, that takes the place of both."""


_OF_A_METHOD = (("rollout", "dataset"), ("rollout", "ledger"))
"""Old keys, by section, that are settings of a single method now."""


def drop_empty(values: Mapping[str, Any]) -> None:
    """Take out old keys of a single method whose value is null: every earlier run recorded so that it had none."""
    for section, name in _OF_A_METHOD:
        given = values.get(section)
        if isinstance(given, dict) and given.get(name, "") is None:
            del given[name]


@dataclass(frozen=True)
class Rename:
    """A setting in a user's configuration that has an old key, an old value, or both."""

    key: str
    value: Any
    new_key: str
    new_value: Any

    def __str__(self) -> str:
        if self.key == self.new_key:
            return f"{self.key}={self.value} is now {self.new_key}={self.new_value}"
        if self.value == self.new_value:
            return f"{self.key} is now {self.new_key}"
        return f"{self.key}={self.value} is now {self.new_key}={self.new_value}"


def find_renamed(values: Mapping[str, Any], prefix: str = "") -> Iterator[Rename]:
    """Yield every old key and old value in nested ``values``, in their order."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from find_renamed(value, f"{key}.")
            continue
        new_key = KEYS.get(key, key)
        replaced = VALUES.get(new_key, {})
        new_value = replaced.get(value, value) if isinstance(value, str) else value
        if isinstance(value, str):
            new_key, new_value = MOVED.get((key, value), (new_key, new_value))
        if new_key != key or new_value is not value:
            yield Rename(key, value, new_key, new_value)
