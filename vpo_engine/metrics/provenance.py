"""The origin of a number, and the rule that numbers of different settings do not share a column."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Everything that a number depends on beside the videos' pixels.

    metric: its name, with the output behind a slash if it has several. version: of the metric's arithmetic. backbone:
    the network, or "none". weights: {file name: SHA-256}. frames, fps, resolution: the distinct values of the videos
    that were measured, in order; a resolution is "HEIGHTxWIDTH". prompts: SHA-256 of the prompts of all videos, in any
    order. count: how many videos were measured. aggregation: how one number is made of theirs. settings: what
    else was chosen, by name.
    """

    metric: str
    version: str
    backbone: str
    weights: Mapping[str, str]
    frames: tuple[int, ...]
    fps: tuple[float, ...]
    resolution: tuple[str, ...]
    prompts: str
    count: int
    aggregation: str
    settings: Mapping[str, str] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @staticmethod
    def from_fields(values: Mapping[str, Any]) -> Provenance:
        """Make the provenance of which ``to_fields`` gave the values."""
        lists = {key: tuple(values[key]) for key in ("frames", "fps", "resolution")}
        return Provenance(**{**values, **lists})


def check_one_column(numbers: Mapping[str, Provenance]) -> None:
    """Raise ValueError unless the numbers, by the names of their rows, may stand in one column.

    They may if they agree in everything that a ``Provenance`` holds. The error names two rows, and all in which they
    differ.
    """
    rows = list(numbers.items())
    for name, other in rows[1:]:
        first_name, first = rows[0]
        different = [
            f"{each.name} is {_shown(getattr(first, each.name))} and {_shown(getattr(other, each.name))}"
            for each in fields(Provenance)
            if getattr(first, each.name) != getattr(other, each.name)
        ]
        if different:
            raise ValueError(
                f"{first_name} and {name} do not belong in one column: {'; '.join(different)}. Measure both with the "
                "same settings on the same videos' prompts, or show them in columns of their own"
            )


def hash_prompts(prompts: Iterable[str]) -> str:
    """Return the SHA-256 of prompts in any order; a prompt that occurs twice counts twice."""
    return hashlib.sha256(json.dumps(sorted(prompts), ensure_ascii=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _shown(value: Any) -> str:
    """Format a value for people: hashes by their first digits, several values with commas."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(each)}" for key, each in value.items()) or "none"
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text or "none"
