"""Give operators on fake tensors the results that they gave before to arguments of the same description.

FakeTensorMode keeps such a table, too, but it also serves symbolic sizes, and looking a result up there takes most of
the time of a plan. A plan has none of those, so that a description of a tensor is its shape, strides, offset, type and
device. What the table cannot hold is left to FakeTensorMode, as everything is where torch lacks what is used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_USED = ("_get_dispatch_mode", "_TorchDispatchModeKey", "_DisableTorchDispatch", "_get_default_device")
_AVAILABLE = all(hasattr(torch._C, name) for name in _USED)
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_UNTOLD = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
"""Tags of operators whose results depend on values, or which change what an argument is."""


@dataclass(frozen=True)
class _Made:
    """A description of a tensor that an operator makes.

    of: the place, among the tensors in the arguments, of the one whose memory it shares; None for memory of its own.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    of: int | None


_Recipe = _Made | int | None
"""How to make a result again: a new tensor, the place of an argument that is returned as it is, or nothing."""

_known: dict[tuple[Any, ...], tuple[type, list[_Recipe]]] = {}
"""For each description of a call, the type that it returned and the recipes of its parts."""


def call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator. Under FakeTensorMode take its result from the table, or put it there."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) if _AVAILABLE else None
    if not isinstance(mode, FakeTensorMode) or not _told_by_descriptions(function):
        return function(*args, **kwargs)
    key: list[Any] = [function, torch.get_default_dtype(), torch._C._get_default_device()]
    tensors: list[FakeTensor] = []
    if not (_describe(mode, args, key, tensors) and _describe(mode, kwargs, key, tensors)):
        return function(*args, **kwargs)
    described = tuple(key)
    if described in _known:
        kind, recipes = _known[described]
        parts = [_again(mode, recipe, tensors) for recipe in recipes]
        return parts[0] if kind is FakeTensor else kind(parts)
    result = function(*args, **kwargs)
    kind = type(result)
    made = [result] if kind is FakeTensor else list(result) if kind in (tuple, list) else []
    found = _recipes(made, tensors, function._schema.is_mutable)
    if found:
        _known[described] = kind, found
    return result


@cache
def _told_by_descriptions(function: Any) -> bool:
    """Return whether descriptions of an operator's arguments tell its result."""
    plain = function.namespace == "aten" and "lift" not in function._schema.name
    return plain and not any(tag in function.tags for tag in _UNTOLD)


def _describe(mode: FakeTensorMode, value: Any, key: list[Any], tensors: list[FakeTensor]) -> bool:
    """Add the description of an argument to ``key`` and its tensors to ``tensors``; return False if it has none."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.fake_mode is not mode or value.layout != torch.strided:
            return False
        tensors.append(value)
        key += (kind, value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        return not value.dtype.is_complex
    key.append(kind)
    if kind is tuple or kind is list:
        key.append(len(value))
        return all(_describe(mode, item, key, tensors) for item in value)
    if kind is dict:
        key.append(tuple(value))
        return all(_describe(mode, item, key, tensors) for item in value.values())
    key.append(value if kind in _PLAIN else None)
    return kind in _PLAIN


def _recipes(parts: list[Any], tensors: list[FakeTensor], mutable: bool) -> list[_Recipe]:
    """Return how to make the parts of a result again; nothing if one of them cannot be made from a description.

    mutable: the operator writes to an argument, and what it returns must be that.
    """
    memories = [tensor.untyped_storage()._cdata for tensor in tensors]
    found: list[_Recipe] = []
    for part in parts:
        place = next((place for place, tensor in enumerate(tensors) if part is tensor), None)
        if place is not None or (part is None and not mutable):
            found.append(place)
            continue
        if mutable or type(part) is not FakeTensor or part.constant is not None or part.requires_grad:
            return []
        memory = part.untyped_storage()
        of = memories.index(memory._cdata) if memory._cdata in memories else None
        offset = int(part.storage_offset())
        made = _Made(tuple(part.shape), part.stride(), offset, part.dtype, part.fake_device, of)
        if of is None and (made.offset or memory.nbytes() != _extent(made) * part.element_size()):
            return []
        found.append(made)
    own = [part.untyped_storage()._cdata for part in parts if part is not None]
    return found if len({*own} - {*memories}) == sum(_has_own(recipe) for recipe in found) else []


def _has_own(recipe: _Recipe) -> bool:
    return isinstance(recipe, _Made) and recipe.of is None


def _extent(made: _Made) -> int:
    """Return the number of elements from a tensor's first to its last in memory."""
    if 0 in made.shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(made.shape, made.stride, strict=True))


def _again(mode: FakeTensorMode, recipe: _Recipe, tensors: list[FakeTensor]) -> Tensor | None:
    if not isinstance(recipe, _Made):
        return None if recipe is None else tensors[recipe]
    with torch._C._DisableTorchDispatch():
        if recipe.of is None:
            meta = torch.empty_strided(recipe.shape, recipe.stride, dtype=recipe.dtype, device="meta")
        else:
            meta = torch.empty(0, dtype=recipe.dtype, device="meta")
            meta.set_(tensors[recipe.of].untyped_storage(), recipe.offset, recipe.shape, recipe.stride)
    return FakeTensor(mode, meta, recipe.device)
