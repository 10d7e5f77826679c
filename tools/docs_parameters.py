"""Show the parameters that a docstring explains as a list: an extension of griffe, which reads docstrings for the site.

Docstrings of this project are prose, in which "name: meaning." explains a parameter or a field. That reads well in a
terminal; on a page each name begins a line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from griffe import Class, Extension, Function, Object


class ParametersAsList(Extension):
    """Begin a list entry at each name of a parameter or field that a docstring explains."""

    def on_function(self, *, func: Function, **_: Any) -> None:
        """Rewrite the docstring of a function or method."""
        _rewrite(func, [parameter.name.lstrip("*") for parameter in func.parameters])

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Rewrite the docstring of a class."""
        _rewrite(cls, list(cls.members))


def _rewrite(documented: Object, names: Sequence[str]) -> None:
    if documented.docstring is not None:
        documented.docstring.value = listed(documented.docstring.value, names)


def listed(text: str, names: Sequence[str]) -> str:
    """Return a docstring in which each sentence "NAME: ..." or "NAME, NAME: ..." of these names is a list entry."""
    if not names:
        return text
    name = "|".join(re.escape(one) for one in names)
    entry = re.compile(rf"(?:^|(?<=[.;)])\s+|\n)((?:{name})(?:, (?:{name}))*):\s", re.MULTILINE)
    return entry.sub(lambda found: f"\n\n- **{found[1]}**: ", text)
