"""The moving average of a policy whose float32 weights are divided among processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from vpo_engine.config import EmaConfig
from vpo_engine.memory.ema import effective_decay


class Divided(Protocol):
    """The part of an optimizer with divided weights that the average needs."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]: ...

    @property
    def is_first(self) -> bool:
        """Return whether this process writes checkpoints."""
        ...

    def shards(self) -> list[Tensor]:
        """Return the flat float32 tensors that this process steps."""
        ...

    def joined(self, number: int, values: Sequence[Tensor]) -> Tensor:
        """Return the whole of a parameter's values from all processes; ``values`` are shaped like ``shards``."""
        ...

    def take(self, number: int, whole: Tensor, values: Sequence[Tensor]) -> None:
        """Copy this process's part of a parameter's ``whole`` values to where it is in ``values``."""
        ...

    def whole(self, changed: bool = False) -> AbstractContextManager[None]: ...


class DividedAverage:
    """The ``PolicyAverage`` of what a process steps; together the processes have the average of every weight.

    It is formed element by element, so its bits do not depend on the division. All processes must make the same calls.
    """

    def __init__(self, optimizer: Divided, settings: EmaConfig) -> None:
        assert settings.decay is not None
        self._optimizer, self._decay = optimizer, settings.decay
        self.updates = 0
        self._averages = [
            shard.detach().to("cpu" if settings.on_host else shard.device, copy=True)
            for shard in optimizer.shards()
        ]
        self._collected: list[Tensor] = []

    @property
    def decay(self) -> float:
        return effective_decay(self._decay, max(0, self.updates - 1))

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        self._collected = []
        for average, shard in zip(self._averages, self._optimizer.shards(), strict=True):
            average.lerp_(shard.detach().to(average), 1 - self.decay)

    def tensors(self) -> list[Tensor]:
        return self._averages

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        parameters = self._optimizer.parameters
        with self._optimizer.whole():
            trained = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
            with torch.no_grad():
                for number, parameter in enumerate(parameters):
                    parameter.copy_(self._optimizer.joined(number, self._averages))
            try:
                yield
            finally:
                with torch.no_grad():
                    for parameter, value in zip(parameters, trained, strict=True):
                        parameter.copy_(value)

    def collect(self) -> None:
        """Gather the average on the host of the first process, for ``in_place``."""
        whole = (self._optimizer.joined(n, self._averages) for n in range(len(self._optimizer.parameters)))
        self._collected = [value.cpu() for value in whole if self._optimizer.is_first]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters be what ``collect`` has gathered, in the first process, to save the policy's files."""
        assert self._collected, "collect() comes first, in all processes"
        with self._exchanged(self._collected):
            yield

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Let the parameters be whole float32 tensors, to load the average's files into them."""
        with self._optimizer.whole():
            wholes = [torch.empty(p.shape, dtype=torch.float32) for p in self._optimizer.parameters]
            with self._exchanged(wholes):
                yield
            for number, whole in enumerate(wholes):
                self._optimizer.take(number, whole, self._averages)

    @contextmanager
    def _exchanged(self, values: Sequence[Tensor]) -> Iterator[None]:
        parameters = self._optimizer.parameters
        trained = [parameter.data for parameter in parameters]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        try:
            yield
        finally:
            for parameter, data in zip(parameters, trained, strict=True):
                parameter.data = data
