"""The exponential moving average (EMA) of the policy's trained weights, for evaluation and export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from vpo_engine.config import EmaConfig


def effective_decay(decay: float, updates: int) -> float:
    """Return the decay of the update after ``updates`` earlier ones: min(decay, (1 + updates) / (10 + updates)).

    So the average follows the first steps closely instead of staying near the start. Source: TensorFlow's
    ExponentialMovingAverage, with num_updates.
    """
    return min(decay, (1 + updates) / (10 + updates))


class PolicyAverage:
    """A float32 average of each trained weight: average <- d * average + (1 - d) * weight after every optimizer step.

    ``weights`` returns the most precise values of ``parameters`` (fp32 master weights where there are some), in their
    order. The average starts at these values. It takes 4 bytes a trained weight, on the weights' device or the host.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], weights: Callable[[], Sequence[Tensor]], settings: EmaConfig
    ) -> None:
        assert settings.decay is not None
        self._parameters, self._weights, self._decay = list(parameters), weights, settings.decay
        self.updates = 0
        self._averages = [
            one.detach().to("cpu" if settings.on_host else one.device, torch.float32, copy=True)
            for one in weights()
        ]

    @property
    def decay(self) -> float:
        """Return the decay of the last update; that of the first one if there was none."""
        return effective_decay(self._decay, max(0, self.updates - 1))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        self.updates += 1
        for average, weight in zip(self._averages, self._weights(), strict=True):
            average.lerp_(weight.detach().to(average), 1 - self.decay)

    def tensors(self) -> list[Tensor]:
        """Return the averages in the order of the parameters, not copies, so that their data can be moved."""
        return self._averages

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Have the average in the policy, rounded to the type of its weights, and the trained weights again afterwards.

        The trained weights wait in host memory, bit for bit. The reference must not be used meanwhile: one that is
        stored as a difference from the policy would move with it.
        """
        trained = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters]
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(trained)

    def collect(self) -> None:
        """Do nothing: the average is here."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters be the float32 averages themselves, to save the policy's files from them or load them."""
        trained = [parameter.data for parameter in self._parameters]
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            parameter.data = average.data
        try:
            yield
        finally:
            for parameter, data in zip(self._parameters, trained, strict=True):
                parameter.data = data

    def loaded(self) -> AbstractContextManager[None]:
        """Return ``in_place``, to load the average's files."""
        return self.in_place()

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
