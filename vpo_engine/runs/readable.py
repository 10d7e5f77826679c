"""Errors of files that a run wrote and that can no longer be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from safetensors import SafetensorError

from vpo_engine.texts import shortened

_UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
    yaml.YAMLError,
    SafetensorError,
)
"""What code raises that reads values which are not what it expects."""


@contextmanager
def readable(path: Path, remedy: str) -> Iterator[None]:
    """Raise ValueError, naming ``path`` and the remedy, if the code inside cannot make sense of the file."""
    try:
        yield
    except _UNREADABLE as error:
        reason = shortened(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ValueError(f"'{path}' is damaged, or was not written by a run ({reason}); {remedy}") from error
