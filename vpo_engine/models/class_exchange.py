"""Change what an object does by exchanging its class; its attributes and its class's name stay."""

from __future__ import annotations

import functools
from typing import Any


def exchange(target: Any, mixin: type) -> None:
    """Let ``mixin`` override methods of ``target``, and of its copies, unless it does so already."""
    kind: Any = type(target)
    if not issubclass(kind, mixin):
        target.__class__ = _mixed(mixin, kind)


@functools.cache
def _mixed(mixin: Any, kind: Any) -> type:
    """Return the subclass of ``kind`` with what ``mixin`` overrides, under the same name."""
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})
