"""Measures of how well a step uses the device: samples per second, model FLOP utilisation, time outside of stages.

Operations are those that the algorithm asks of the model; a multiplication and its addition count as two. Operations
that memory settings make a second time are not counted, so such settings lower the utilisation.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vpo_engine.memory.quantised_base import frozen_layers
from vpo_engine.model_values import RowFlops
from vpo_engine.protocols import Network, TextEmbedding
from vpo_engine.video_model import VideoModel, repeating_blocks

SMALLEST, LARGEST = 128, 8192
"""Sides of the matrices whose products are timed."""

BETWEEN = ("evaluate", "checkpoint")
"""Stages that do not belong to a step."""

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@runtime_checkable
class ChoosesBackends(Protocol):
    """A network whose attention and fused operations come in several implementations."""

    def choose_backends(self, attention: str, fused_ops: str, *, dtype: torch.dtype) -> object:
        """Choose the implementations that compute from now on; "sdpa" and "reference" are plain torch."""
        ...


class CountedRows:
    """A network that counts the inputs (rows of its batches) that go through it, and calls ``before`` each time."""

    def __init__(self, network: Network, before: Callable[[], None] = lambda: None) -> None:
        self._network, self._before, self.rows, self._last = network, before, 0, 0

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """Call the network; its first argument is [rows, ...]."""
        self._before()
        assert isinstance(args[0], Tensor)
        self._last = len(args[0])
        self.rows += self._last
        return self._network(*args, **kwargs)

    def replayed(self) -> None:
        """Count the last call again, because a CUDA graph has repeated it."""
        self._before()
        self.rows += self._last

    def take(self) -> int:
        """Return how many rows were counted since the last ``take``."""
        rows, self.rows = self.rows, 0
        return rows


def count_row_flops(model: VideoModel, text: TextEmbedding) -> RowFlops:
    """Return the cost of one sample of the policy, with its adapter, for captions of the mean length of ``text``.

    A prediction is counted on tensors without values. For a deep network, shallow ones are counted and extrapolated,
    since blocks repeat.
    A backward pass makes each attention product twice, once for either operand, and each product with weights once for
    its input and once for the weights, as far as these train.
    """
    known = model.row_flops(text)
    if known is not None:
        return known
    network = model.network
    weights, attention = _by_depth(model, text)
    matrices = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    trained = sum(matrix.numel() for matrix in matrices if matrix.requires_grad)
    frozen = sum(layer.numel for layer in frozen_layers(network))
    share = trained / (sum(matrix.numel() for matrix in matrices) + frozen)
    forward = float(weights + attention)
    return RowFlops(forward, forward + (1 + share) * weights + 2 * attention)


def _by_depth(model: VideoModel, text: TextEmbedding) -> tuple[int, int]:
    """Return the operations of products with weights and of attention, of one sample of the whole network.

    Lists of repeating blocks that are equally long grow together: one block of each, then two.
    """
    tokens, width = max(1, round(float(text.mask.sum()) / len(text))), text.embeddings.shape[-1]
    lists = repeating_blocks(model.network)
    depths = {len(blocks) for blocks in lists.values()}
    if max(depths, default=0) <= 3:
        return _products(model, tokens, width, {})
    one = dict.fromkeys(lists, 1)
    weights, attention = base = _products(model, tokens, width, one)
    for depth in depths - {1}:
        two = one | {name: 2 for name, blocks in lists.items() if len(blocks) == depth}
        high = _products(model, tokens, width, two)
        weights += (depth - 1) * (high[0] - base[0])
        attention += (depth - 1) * (high[1] - base[1])
    return weights, attention


def _products(model: VideoModel, tokens: int, width: int, depths: Mapping[str, int]) -> tuple[int, int]:
    """Count one sample, of a network whose lists of blocks have the lengths ``depths``."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    network = _without_data(model.network, depths, mode)
    with mode, torch.no_grad():
        latents, times = torch.empty(1, *model.latent_shape), torch.empty(1)
        text = TextEmbedding(torch.empty(1, tokens, width), torch.ones(1, tokens, dtype=torch.bool))
        with FlopCounterMode(display=False, custom_mapping={_ATTENTION: _attention}) as counter:
            model.predict(network, latents, times, text)
    found = counter.get_flop_counts()["Global"]
    attention = found.pop(_ATTENTION, 0)
    return sum(found.values()), attention


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _without_data(network: nn.Module, depths: Mapping[str, int], mode: FakeTensorMode) -> nn.Module:
    """Copy a network with fake parameters and buffers of the CPU, computing in plain torch."""
    memo: dict[int, object] = {}
    with mode:
        for tensor in (*network.parameters(), *network.buffers()):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    bare = copy.deepcopy(network, memo)
    for name, depth in depths.items():
        bare.set_submodule(name, bare.get_submodule(name)[:depth])  # type: ignore[index]
    if isinstance(bare, ChoosesBackends):
        bare.choose_backends("sdpa", "reference", dtype=next(bare.parameters()).dtype)
    return bare


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measure the FLOP/s of the fastest product of two square matrices seen in about ``seconds``.

    Sides double from 128 to 8192 as far as the time allows. No global random number is drawn.
    """
    random = torch.Generator(device).manual_seed(0)
    best, size = 0.0, SMALLEST
    a = torch.rand(size, size, generator=random, device=device).to(dtype)
    _product_seconds(a)  # libraries load
    until = time.perf_counter() + seconds
    while True:
        took = _product_seconds(a)
        best = max(best, 2 * size**3 / took)
        left = until - time.perf_counter()
        if left <= 0:
            return best
        if size < LARGEST and 16 * took < left:  # the next size takes 8 times as long, and may be asked twice
            size *= 2
            a = torch.rand(size, size, generator=random, device=device).to(dtype)


def _product_seconds(a: Tensor) -> float:
    start = time.perf_counter()
    torch.mm(a, a)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Work:
    """The inputs (rows of batches) that a step sent through the network in this process, and its videos.

    sampled: inputs of the sampling. compared, trained: inputs of the update without and with a backward pass. videos:
    how many videos all processes together sampled.
    """

    sampled: float = 0
    compared: float = 0
    trained: float = 0
    videos: int = 0


class Throughput:
    """Turns the seconds of a step into the metrics ``speed/...`` of one process; see docs/architecture.md."""

    def __init__(self, flops: RowFlops, ceiling: float) -> None:
        """Keep the costs. ceiling: FLOP/s of the device, as ``matrix_rate`` gives it, in the network's arithmetic."""
        self._flops, self.ceiling = flops, ceiling

    def utilisation(self, seconds: Mapping[str, float], work: Work) -> dict[str, float]:
        """Return the shares of the ceiling that rollout and update reach; a stage without work is left out.

        seconds: of the stages.
        """
        flops_of = {
            "rollout": work.sampled * self._flops.forward,
            "update": work.compared * self._flops.forward + work.trained * self._flops.training,
        }
        return {
            f"speed/{stage}_mfu": flops / (seconds[stage] * self.ceiling)
            for stage, flops in flops_of.items()
            if flops
        }

    def rates(self, seconds: Mapping[str, float], work: Work) -> dict[str, float]:
        """Return videos per second of all processes, if any are sampled, and the share of time outside of stages.

        seconds: of every stage since the last call, and of everything as "step".
        """
        whole = seconds["step"]
        staged = sum(value for stage, value in seconds.items() if stage != "step")
        between = sum(seconds.get(stage, 0.0) for stage in BETWEEN)
        rates = {"speed/idle": max(0.0, 1 - staged / whole)}
        if work.videos:
            rates["speed/samples_per_second"] = work.videos / (whole - between)
        return rates
