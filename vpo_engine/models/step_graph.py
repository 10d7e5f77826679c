"""The steps of a sampling loop as one CUDA graph, so that the host issues a step with one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vpo_engine.model_values import Network, Replayed

Predict = Callable[[Tensor, Tensor], Tensor]
"""A function of latents [B, C, T, H, W] and t [B] that predicts [B, C, T, H, W]."""


class StepGraph:
    """A prediction that does the same in every call; for one sampling loop, without gradients.

    The first call runs as it is, the second is captured, and from then on calls are replayed in the current stream.
    What ``predict`` reads beside its arguments must stay where it is, and neither it nor what it calls may wait for the
    device. The next call overwrites the result.
    """

    def __init__(self, predict: Predict, network: Network) -> None:
        """Prepare for ``predict``, which calls ``network``; that is told of replays if it is ``Replayed``."""
        self._predict, self._network = predict, network
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        assert z.is_cuda
        if not self._warm:
            self._warm = True
            return self._predict(z, t)
        if self._graph is None:
            self._z, self._t = z.clone(), t.clone()
            self._graph = torch.cuda.CUDAGraph()
            # Another thread may decode meanwhile, and wait for its own stream.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._out = self._predict(self._z, self._t)
        else:
            self._z.copy_(z)
            self._t.copy_(t)
            if isinstance(self._network, Replayed):
                self._network.replayed()
        self._graph.replay()
        return self._out
