"""The form in which the optimizer's state is kept in checkpoints: the same for every way of holding it in memory.

Names are flat: "setup" (type of weights, bits of moments, number of parameters), "steps", and for each parameter by
its number "0.step", "0.exp_avg", "0.exp_avg_sq" (with 8-bit moments "0.state1", "0.state2" and their scales
"0.absmax1", "0.absmax2"), and with fp32 master weights "0.master". A parameter that was never stepped has no moments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor

from vpo_engine.config import MemoryConfig

WEIGHTS: tuple[str, ...] = get_args(MemoryConfig.model_fields["weights"].annotation)
MASTER = "master"
STEPS, SETUP, STEP = "steps", "setup", "step"
BLOCK = 256
"""Elements that share a scale in bitsandbytes' 8-bit moments."""
SMALLEST = 4096
"""Tensors with fewer elements have moments of 32 bits in any case."""

Entry = dict[str, Tensor]


class StateFormat:
    """The form that the state of an optimizer with these settings must have.

    shapes: of the parameters, in order. masters: which of them have fp32 master weights; None: all or none of them, as
    ``weights`` says.
    """

    def __init__(
        self,
        weights: str,
        bits: int,
        shapes: Sequence[tuple[int, ...]],
        masters: Sequence[bool] | None = None,
    ) -> None:
        self._weights, self._bits, self._shapes = weights, bits, list(shapes)
        self._masters = [weights == "fp32_master"] * len(self._shapes) if masters is None else list(masters)

    def header(self, steps: int) -> Entry:
        """Return the entries that do not belong to a parameter."""
        setup = [WEIGHTS.index(self._weights), self._bits, len(self._shapes)]
        return {SETUP: torch.tensor(setup), STEPS: torch.tensor(steps)}

    def entries(self, state: Mapping[str, Tensor]) -> dict[int, Entry]:
        """Return the entries of ``state`` by parameter. Raise ValueError if it belongs to another setup or network."""
        self._check_setup(state)
        entries: dict[int, Entry] = {number: {} for number in range(len(self._shapes))}
        for key, value in state.items():
            if key not in (SETUP, STEPS):
                owner, name = key.split(".", 1)
                entries[int(owner)][name] = value
        for number, entry in entries.items():
            self._check_entry(number, entry)
        return entries

    def _check_setup(self, state: Mapping[str, Tensor]) -> None:
        if SETUP not in state or STEPS not in state:
            raise ValueError(
                f"the optimizer state has no {SETUP!r} or no {STEPS!r}: another program or an older version saved "
                "it; start a new run"
            )
        weights, bits, count = state[SETUP].tolist()
        saved = f"memory.weights={WEIGHTS[weights]}, memory.optimizer_bits={bits} and {count} parameters"
        mine = f"memory.weights={self._weights}, memory.optimizer_bits={self._bits} and {len(self._shapes)} parameters"
        if saved != mine:
            raise ValueError(
                f"the optimizer state was saved with {saved}, but this run has {mine}; resume with the saved ones"
            )

    def _check_entry(self, number: int, entry: Entry) -> None:
        shape = self._shapes[number]
        expected: dict[str, tuple[int, ...]] = {MASTER: shape} if self._masters[number] else {}
        if STEP in entry:  # absent if it has never been stepped
            expected |= {STEP: (), **moment_shapes(self._bits, shape, entry)}
        for name in sorted(expected.keys() | entry.keys()):
            given = tuple(entry[name].shape) if name in entry else "nothing"
            wanted = expected.get(name, "nothing")
            if given != wanted:
                raise ValueError(
                    f"optimizer state {number}.{name}: {given}, but parameter {number} of shape {shape} needs "
                    f"{wanted}; the state belongs to another network"
                )


def moment_shapes(bits: int, shape: tuple[int, ...], entry: Entry) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a weight's moments, by name; ``entry`` is what is to be loaded for it."""
    if bits == 32:
        return {"exp_avg": shape, "exp_avg_sq": shape}
    moments = {"state1": shape, "state2": shape}
    if "state1" in entry and entry["state1"].dtype == torch.float32:
        return moments
    blocks = (-(-math.prod(shape) // BLOCK),)
    return {**moments, "absmax1": blocks, "absmax2": blocks}
