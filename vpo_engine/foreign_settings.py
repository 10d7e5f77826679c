"""Check the settings of published models, which others have made, before anything is computed or built from them.

The class that takes the settings describes them: its signature has the type and the default of each. What a number may
be follows from its name (``_RANGES``), or else from its default. Settings that a class does not have are let through.
Nothing here imports torch.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_FLOAT32 = 3.4e38
"""The largest number of a float32."""


@dataclass(frozen=True)
class _Range:
    """Numbers from ``low`` to ``high``; with ``open``, the two do not belong to them."""

    low: float = -_FLOAT32
    high: float = _FLOAT32
    open: bool = False

    def has(self, number: Any) -> bool:
        inside = self.low < number < self.high if self.open else self.low <= number <= self.high
        return inside and math.isfinite(number)

    def __str__(self) -> str:
        low, high = f"{self.low:.7g}", f"{self.high:.7g}"
        if self.high < _FLOAT32:
            return f"between {low} and {high}" if self.open else f"from {low} to {high}"
        if self.low > -_FLOAT32:
            return f"above {low}" if self.open else f"of at least {low}"
        return "that is finite"


_ANY, _POSITIVE, _SHARE = _Range(), _Range(0, open=True), _Range(0, 1)
_RANGES = (
    (r"_ids?$|ind(ex|exes|ices)$", _ANY),
    (r"decoder_layers$|sliding_window$", _Range(0)),
    (r"dropout|drop_path|_prob$", _SHARE),
    (r"[._]eps(ilon)?$|label_smoothing$", _SHARE),
    (r"\.(beta_start|beta_end|trained_betas)$", _Range(0, 1, open=True)),
    (r"heads$", _Range(1, 1 << 12)),
    (r"head_dim$", _Range(1, 1 << 10)),
    (r"seq_len", _Range(1, 1 << 17)),
    (r"timesteps", _Range(1, 1 << 20)),
    (r"sample_(height|width)$|image_size$|img_size$", _Range(1, 1 << 13)),
    (
        r"\.(spatial_scaling|scaling_factor|rope_theta|latents_std)$|interpolation_scale$|ratio$|VAE\.scale$",
        _POSITIVE,
    ),
    (r"Scheduler\.(flow_|snr_)?shift(_scale)?$", _POSITIVE),
)
"""What numbers settings may be, by the first pattern that is found in "Class.setting".

Upper bounds are far beyond published models. They bound the tables of positions that classes compute when they are
built, before any weights are compared.
"""
_MISSTATED: dict[str, Any] = {
    "sigma_max": float | None,
    "shift_terminal": float | None,
    "temporal_compression_ratio": int | None,
    "force_upcast": bool,
}
"""Types of settings of which classes of diffusers state another one."""
_UNIONS = (Union, types.UnionType)
_LISTS, _OBJECTS = (list, tuple, Sequence), (dict, Mapping)
_WORDS = {bool: "true or false", str: "a text", types.NoneType: "null"}
_KNOWN = (Literal, int, float, *_UNIONS, *_LISTS, *_OBJECTS, *_WORDS)
"""The types of which it can be told whether a value of a JSON file is one; a value of another type may be any."""
_FIXED_LENGTH = ("patch_size", "kernel_size")
"""Lists that have as many entries as the class's default: one for each dimension."""


def check_settings(
    settings: Mapping[str, Any],
    kind: Any,
    where: Path | str,
    remedy: str = "fetch it again",
    *,
    needed: Collection[str] = (),
) -> None:
    """Raise ValueError for a setting that a class cannot take: of another type, or a number out of its range.

    kind: a dataclass, a configuration of transformers, or a class that takes the settings as arguments. needed: the
    settings that may not be null, although the class takes null. where: the file that the settings are from.
    """
    parts, parameters = _parts(kind, settings), _parameters(kind)
    for name, (stated, default) in parameters.items():
        if name not in settings:
            continue
        value, hint = settings[name], _MISSTATED.get(name, stated)
        if name in parts and isinstance(value, Mapping):
            check_settings(value, parts[name], f"{where}: {name}", remedy)
            continue
        allowed = _Allowed(hint, default, _range_of(f"{kind.__name__}.{name}"), name in _FIXED_LENGTH)
        if not allowed.accepts(value) or (value is None and name in needed):
            shown, expected = json.dumps(value)[:100], allowed.described(null=name not in needed)
            raise ValueError(f"{where} sets {name} to {shown}, expected {expected}; {remedy}")
    if "text_config" in parts and "text_config" not in settings:
        # Older files have the settings of the text's network beside the others.
        rest = {name: value for name, value in settings.items() if name not in parameters}
        check_settings(rest, parts["text_config"], where, remedy)


def completed(settings: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Return settings with the defaults of their class for those that are left out, under the class's own names."""
    aliases: Mapping[str, str] = getattr(kind, "attribute_map", {})
    known = {name: default for name, (_, default) in _parameters(kind).items() if name not in aliases}
    defaults = {name: default for name, default in known.items() if default is not MISSING}
    return defaults | {aliases.get(name, name): value for name, value in settings.items()}


@contextmanager
def described_by(where: Path | str, what: str, remedy: str = "fetch it again") -> Iterator[None]:
    """Raise ValueError for whatever the block raises: settings by which a part cannot be built, or cannot run.

    where: the file that the settings are from. what: the part, and what it cannot do by them.
    """
    try:
        yield
    except Exception as error:  # a class can fail in any way on settings that it never had
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{where} does not describe a {what} ({type(error).__name__}: {reason}); {remedy}"
        ) from error


@dataclass(frozen=True)
class _Allowed:
    """The values that a setting may have.

    hint: its type. default: that of the class, or MISSING. numbers: what its name says that its numbers may be, if it
    says so. fixed: a list has as many entries as the default.
    """

    hint: Any
    default: Any
    numbers: _Range | None
    fixed: bool

    def accepts(self, value: object) -> bool:
        """Return whether a value of a JSON file may stand there."""
        default = _as_read(self.default)
        return (value == default and type(value) is type(default)) or self._fits(value, self._stated())

    def described(self, *, null: bool) -> str:
        """Return the values in words. null: mention null."""
        words = [
            self._words(hint) for hint in _alternatives(self._stated()) if null or hint is not types.NoneType
        ]
        return " or ".join(dict.fromkeys(words))

    def _stated(self) -> Any:
        """Return the type with that of the default, where the class leaves it out."""
        default = _as_read(self.default)
        if default is MISSING or self._fits(default, self.hint):
            return self.hint
        return Union[self.hint, type(default)]  # noqa: UP007 - one type for the checker, whatever the two are

    def _fits(self, value: object, hint: Any) -> bool:
        kind = get_origin(hint) or hint
        if kind in _UNIONS:
            return any(self._fits(value, each) for each in _alternatives(hint))
        if kind not in _KNOWN:
            return not is_dataclass(kind) or isinstance(value, Mapping)
        if kind is Literal:
            return value in [each for each in get_args(hint) if type(each) is type(value)]
        if kind in (int, float):
            is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(
                value, bool
            )
            return is_number and self._numbers(kind).has(value)
        if kind in _LISTS:
            return isinstance(value, list) and self._fits_list(value, _items(hint))
        return isinstance(value, Mapping) if kind in _OBJECTS else isinstance(value, kind)

    def _fits_list(self, value: list[Any], items: list[Any]) -> bool:
        if len(items) > 1:
            return len(value) == len(items) and all(map(self._fits, value, items))
        may_be_empty = not self.default or items[0] is bool or self.numbers is _ANY
        length = len(value) == len(self.default) if self.fixed else bool(value) or may_be_empty
        return length and all(self._fits(each, items[0]) for each in value)

    def _numbers(self, kind: Any) -> _Range:
        return self.numbers or (_ANY if kind is float else _Range(self._lowest()))

    def _lowest(self) -> int:
        """Return the lowest whole number where the name does not say it: 1, unless the class's default is lower.

        A list that the class leaves out, or leaves empty, may be one of positions, which begin at 0.
        """
        default = _as_read(self.default)
        numbers = default if isinstance(default, list) else [default]
        lists = any((get_origin(each) or each) in _LISTS for each in _alternatives(self.hint))
        return min([0 if lists and not default else 1, *(each for each in numbers if type(each) is int)])

    def _words(self, hint: Any) -> str:
        kind = get_origin(hint) or hint
        if kind in _UNIONS:
            return " or ".join(dict.fromkeys(self._words(each) for each in _alternatives(hint)))
        if kind is Literal:
            return " or ".join(map(repr, get_args(hint)))
        if kind in (int, float):
            return f"a {'whole ' if kind is int else ''}number {self._numbers(kind)}"
        if kind in _LISTS:
            items = _items(hint)
            length = len(items) if len(items) > 1 else len(self.default) if self.fixed else ""
            each = f", each {self._words(items[0])}"
            return f"a list{f' of {length}' if length else ''}{each}"
        return _WORDS.get(kind, "any value" if kind is Any else "an object")


def _alternatives(hint: Any) -> list[Any]:
    """Return the types of a union one by one. One that JSON does not have counts for nothing beside others."""
    if (get_origin(hint) or hint) not in _UNIONS:
        return [hint]
    return [
        each for each in get_args(hint) if (get_origin(each) or each) in _KNOWN or is_dataclass(each)
    ] or [Any]


def _as_read(default: Any) -> Any:
    """Return a default of a class as a JSON file would have it."""
    return list(default) if isinstance(default, tuple) else default


def _items(hint: Any) -> list[Any]:
    """Return the types of a list's entries: one for all of them, or one for each."""
    items = [each for each in get_args(hint) if each is not ...]
    return items or [Any]


def _range_of(name: str) -> _Range | None:
    """Return what the numbers of a setting, "Class.setting", may be, if its name says so."""
    return next((numbers for pattern, numbers in _RANGES if re.search(pattern, name)), None)


@functools.cache
def _parameters(kind: Any) -> dict[str, tuple[Any, Any]]:
    """Return {setting: (type, default)} of a class, also by the other names that transformers has for settings."""
    found: dict[str, tuple[Any, Any]] = {}
    if is_dataclass(kind):
        try:
            hints = get_type_hints(kind)
        except NameError:  # of what transformers imports for type checkers only
            hints = {}
        found = {field.name: (hints.get(field.name, field.type), field.default) for field in fields(kind)}
    else:
        for one in inspect.signature(kind.__init__, eval_str=True).parameters.values():
            default = MISSING if one.default is one.empty else one.default
            hint = type(default) if one.annotation is one.empty else one.annotation
            found[one.name] = (hint, default)
    aliases: Mapping[str, str] = getattr(kind, "attribute_map", {})
    return found | {name: found[meant] for name, meant in aliases.items() if meant in found}


def _parts(kind: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return {setting: class} of the settings that are objects which a class describes."""
    found: dict[str, Any] = {}
    for name, (hint, _) in _parameters(kind).items():
        described = [each for each in _alternatives(hint) if is_dataclass(each)]
        if described:
            found[name] = described[0]
    for name, part in getattr(kind, "sub_configs", {}).items():
        if part.__name__ == "AutoConfig":
            from transformers import CONFIG_MAPPING

            given = settings.get(name)
            model = given.get("model_type") if isinstance(given, Mapping) else None
            if not isinstance(model, str) or model not in CONFIG_MAPPING:
                continue
            part = CONFIG_MAPPING[model]
        found[name] = part
    return found
