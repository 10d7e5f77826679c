"""Values that are checked against names: kinds of models and rewards, and devices."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Annotated

from pydantic import AfterValidator

_DEVICES = {"gpu": "cuda", "cuda:": "cuda", "nvidia": "cuda", "cpu:0": "cpu", "none": "cpu"}
"""{what people write: what is meant}."""


def check_kind(kind: str, known: Sequence[str], group: str, thing: str, page: str) -> str:
    """Return a kind of model or reward; ValueError, with the nearest name, if it is none.

    known: the names that come with the engine. group: the entry points by which installed packages add names.
    thing, page: how the message calls such a thing, and where its documentation is.
    """
    if kind in known or re.fullmatch(r"\w+(\.\w+)*:\w+", kind):
        return kind
    names = [*known, *entry_points(group=group).names]
    if kind in names:
        return kind
    near = difflib.get_close_matches(kind, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise ValueError(
        f"there is no such {thing}{hint} Known are {', '.join(names)}. A {thing} of your own is given as "
        f"package.module:Class (see {page})"
    )


def check_device(name: str) -> str:
    """Return the name of a device; ValueError, with what may be meant, for one that is none."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        return name
    meant = _DEVICES.get(name.lower(), "")
    hint = f"; did you mean {meant}?" if meant else ""
    raise ValueError(f"must be auto, cpu, cuda, or cuda:N for one of several GPUs{hint}")


DeviceName = Annotated[str, AfterValidator(check_device)]
"""auto, cpu, cuda or cuda:N."""
