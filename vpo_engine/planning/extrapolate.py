"""Plan a deep network's step from two shallow ones: blocks repeat, so each adds the same bytes and operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vpo_engine.config import Config
from vpo_engine.planning.parts import configured_depth
from vpo_engine.planning.trace import PhaseName, Trace, trace_step
from vpo_engine.planning.tracker import Peak

SHALLOW, DEEPER = 2, 4
"""Depths that are traced where blocks keep nothing but their input, autocast holds no casts of weights, and gradients
stay. Where in a phase the peak falls could change with depth; there it did not from depth two on, in any
setting tried, the full depth among them: tests/planning/test_depth.py looks at deeper networks. Elsewhere it did."""

_ALWAYS = ("weights", "optimizer", "ema", "reference")
"""Categories of memory that are held even in phases that do not use the network."""


class Traced(Protocol):
    """The phases of a step as ``estimate`` reads them; see ``Trace``."""

    @property
    def names(self) -> tuple[PhaseName, ...]: ...

    @property
    def notes(self) -> list[str]: ...

    def peak(self, name: PhaseName, absent: frozenset[str] = frozenset()) -> Peak: ...

    def host(self, name: PhaseName) -> int: ...

    def flops(self, name: PhaseName) -> float: ...

    def traffic(self, name: PhaseName) -> float: ...


@dataclass(frozen=True)
class Extrapolated:
    """A step at the configured depth, on straight lines through two traces."""

    shallow: Trace
    deeper: Trace

    @property
    def names(self) -> tuple[PhaseName, ...]:
        return self.shallow.names

    @property
    def notes(self) -> list[str]:
        return self.shallow.notes

    def peak(self, name: PhaseName, absent: frozenset[str] = frozenset()) -> Peak:
        low = self.shallow.peak(name, absent)
        if name in self.deeper.names:
            high = self.deeper.peak(name, absent)
        else:
            common: PhaseName = "rollout" if "rollout" in self.deeper.names else "update"
            before, after = (trace.peak(common, absent) for trace in (self.shallow, self.deeper))
            high = low | {
                part: low[part] + after.get(part, 0) - before.get(part, 0) for part in _ALWAYS if part in low
            }
        return {part: round(self._line(low.get(part, 0), high.get(part, 0))) for part in low | high}

    def host(self, name: PhaseName) -> int:
        return round(self._either(name, lambda trace: trace.host(name)))

    def flops(self, name: PhaseName) -> float:
        return self._either(name, lambda trace: trace.flops(name))

    def traffic(self, name: PhaseName) -> float:
        return self._either(name, lambda trace: trace.traffic(name))

    def _either(self, name: PhaseName, value: Callable[[Trace], float]) -> float:
        low = value(self.shallow)
        return self._line(low, value(self.deeper)) if name in self.deeper.names else low

    def _line(self, low: float, high: float) -> float:
        return low + (high - low) * (self.shallow.depth - SHALLOW) / (DEEPER - SHALLOW)


def traced(config: Config, *, on_gpu: bool, processes: int = 1) -> Traced:
    """Trace a step of the configured network, or extrapolate it where peaks do not move with depth."""
    memory = config.memory
    autocast = config.model.dtype == "bfloat16" and memory.weights == "float32"
    straight = memory.activation_checkpointing == "block" and not autocast and not memory.step_in_backward
    if configured_depth(config) <= DEEPER or not straight:
        return trace_step(config, on_gpu=on_gpu, processes=processes)
    shallow = trace_step(config, on_gpu=on_gpu, processes=processes, depth=SHALLOW)
    deeper = trace_step(config, on_gpu=on_gpu, processes=processes, depth=DEEPER, network_only=True)
    return Extrapolated(shallow, deeper)
