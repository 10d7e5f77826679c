"""Trace once what a step does again and again.

That is the network in a sampling loop, blocks without gradients, micro-batches of a decoder, and AdamW on weights of
one shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

from vpo_engine.model_values import StepMemo
from vpo_engine.planning.tracker import BLOCK, Phase, Tracker


@dataclass
class _Call:
    """A record of a call: operations, bytes, its highest memory above that at its start, and its results.

    results: for each tensor, the number of the argument whose memory it is, else shape, stride and dtype; other values
    as they are.
    """

    flops: int
    traffic: int
    transient: int
    results: list[Any]
    structure: Any


@contextmanager
def repeated(tracker: Tracker, networks: Iterable[nn.Module], *groups: Iterable[nn.Module]) -> Iterator[None]:
    """Trace calls without gradients, of a network or of a group's modules, for the first of equal arguments only.

    The later calls count as much, allocate equal results and reach the same height. A group's modules must differ in
    weights only. Two kinds of calls are always traced: those of a network that fill the ``StepMemo`` of a sampling
    loop, and those of a group after which more is held than their results (autocast holds casts of weights until a
    network's call is over).
    """
    with ExitStack() as restore:
        for modules, whole in (
            *(([network], True) for network in networks),
            *((group, False) for group in groups),
        ):
            known: dict[Hashable, _Call] = {}
            for module in modules:
                module.forward = _remembering(tracker, known, module.forward, whole)
                restore.callback(module.__dict__.pop, "forward")
        yield


def _remembering(
    tracker: Tracker, known: dict[Hashable, _Call], original: Callable[..., Any], whole: bool
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves = list(tree_iter((args, kwargs)))
        filling = any(isinstance(leaf, StepMemo) and not leaf.filled for leaf in leaves)
        if torch.is_grad_enabled() or filling:
            return original(*args, **kwargs)
        key = (torch.is_autocast_enabled("cpu"), *(_signature(leaf) for leaf in leaves))
        call = known.get(key)
        if call is None:
            before = tracker.live()
            with tracker.phase() as phase:
                result = original(*args, **kwargs)
            call = _recorded(tracker, phase, result, leaves)
            if whole or tracker.live() - before <= _nbytes(call.results):
                known[key] = call
            return result
        tracker.add(call.flops, call.traffic, call.transient)
        results = [_again(item, leaves) for item in call.results]
        return tree_unflatten(results, call.structure)

    return forward


def _nbytes(results: list[Any]) -> int:
    """Return the bytes of results that have memory of their own."""
    shapes = (item for item in results if isinstance(item, tuple))
    return sum(-(-math.prod(shape) * dtype.itemsize // BLOCK) * BLOCK for shape, _, dtype in shapes)


def _signature(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype)
    plain = isinstance(leaf, (bool, int, float, str, type(None)))
    return (leaf if plain else type(leaf),)


def _recorded(tracker: Tracker, phase: Phase, result: Any, leaves: list[Any]) -> _Call:
    storages = {
        leaf.untyped_storage()._cdata: number
        for number, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor)
    }
    flat, structure = tree_flatten(result)
    results: list[Any] = []
    for item in flat:
        if isinstance(item, Tensor):
            number = storages.get(item.untyped_storage()._cdata)
            same = number is not None and leaves[number].shape == item.shape
            assert number is None or same, "a result is part of an argument"
            results.append((tuple(item.shape), item.stride(), item.dtype) if number is None else number)
        else:
            results.append(_Other(item))
    return _Call(phase.flops, phase.traffic, tracker.height(phase), results, structure)


@dataclass
class _Other:
    value: Any


def _again(item: Any, leaves: list[Any]) -> Any:
    if isinstance(item, _Other):
        return item.value
    if isinstance(item, int):
        return leaves[item]
    shape, stride, dtype = item
    return torch.empty_strided(shape, stride, dtype=dtype)


@contextmanager
def repeated_steps(tracker: Tracker) -> Iterator[None]:
    """Trace steps of AdamWs that have one weight each for the first weight of a shape and type only.

    The later steps count as much, make an equal state and reach the same height. All AdamWs must have the same
    settings.
    """
    own, original = vars(AdamW).get("step"), AdamW.step
    known: dict[Hashable, tuple[Phase, int]] = {}
    states: dict[Hashable, dict[str, Tensor]] = {}

    def step(self: AdamW) -> None:
        [[weight]] = (group["params"] for group in self.param_groups)
        kind = (_signature(weight), _signature(weight.grad))
        fresh = weight not in self.state
        if (kind, fresh) not in known:
            before = tracker.live()
            with tracker.phase() as phase:
                original(self)
            known[kind, fresh] = phase, tracker.height(phase) - (tracker.live() - before)
            states[kind] = self.state[weight]
            return
        if fresh:
            self.state[weight] = {name: torch.zeros_like(like) for name, like in states[kind].items()}
        phase, transient = known[kind, fresh]
        tracker.add(phase.flops, phase.traffic, transient)

    step.hooked = True  # type: ignore[attr-defined]  # else AdamW's constructor wraps it for the profiler
    AdamW.step = step  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if own is None:
            del AdamW.step
        else:
            AdamW.step = own  # type: ignore[method-assign]
