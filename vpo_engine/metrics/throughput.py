"""How well a step uses the device: samples per second, model FLOP utilisation, and time outside of all stages.

Operations are those of the model as the algorithm asks for it, a multiplication with its addition counted as two:
what memory settings compute a second time is not counted, so that they lower the utilisation.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vpo_engine.config import Config
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.protocols import Network, TextEmbedding, VideoModel

SMALLEST, LARGEST = 128, 8192
"""Sides of the matrices whose products are timed."""

BETWEEN = ("evaluate", "checkpoint")
"""Stages that are no part of Algorithm 1."""

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class RowFlops:
    """Floating point operations of one row of the network.

    forward: a prediction. training: a prediction and its backward pass, with nothing computed twice.
    """

    forward: float
    training: float


class CountedRows:
    """A network whose rows are counted as they go through it."""

    def __init__(self, network: Network) -> None:
        self._network, self.rows, self._last = network, 0, 0

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """The network's forward, whose first argument is [rows, ...]."""
        assert isinstance(args[0], Tensor)
        self._last = len(args[0])
        self.rows += self._last
        return self._network(*args, **kwargs)

    def replayed(self) -> None:
        """A CUDA graph makes the last call again."""
        self.rows += self._last

    def take(self) -> int:
        """The rows since the last call of this."""
        rows, self.rows = self.rows, 0
        return rows


def count_row_flops(model: VideoModel, text: TextEmbedding) -> RowFlops:
    """Of the policy with its adapter, for captions as long as those of ``text`` are on average.

    The prediction is counted on fake tensors; of a deep network two shallow ones, since blocks repeat. A backward pass
    makes each attention product twice, once for either operand; of a product with weights the half that gives the
    weights' gradient only for the share of weights that trains.
    """
    tokens = max(1, round(float(text.mask.sum()) / len(text)))
    network = model.network
    depth = len(network.spatial_blocks) if isinstance(network, STDiT3) else 1
    if depth <= 3:
        weights, attention = _products(model, tokens, text.embeddings.shape[-1], depth)
    else:
        one, two = (_products(model, tokens, text.embeddings.shape[-1], shallow) for shallow in (1, 2))
        weights, attention = (low + (depth - 1) * (high - low) for low, high in zip(one, two, strict=True))
    matrices = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    trained = sum(matrix.numel() for matrix in matrices if matrix.requires_grad)
    share = trained / sum(matrix.numel() for matrix in matrices)
    forward = float(weights + attention)
    return RowFlops(forward, forward + (1 + share) * weights + 2 * attention)


def _products(model: VideoModel, tokens: int, width: int, depth: int) -> tuple[int, int]:
    """Operations of one row: of products with weights, and of attention; with ``depth`` pairs of blocks."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    network = _without_data(model.network, depth, mode)
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


def _without_data(network: nn.Module, depth: int, mode: FakeTensorMode) -> nn.Module:
    """A copy whose parameters and buffers are fake ones of the CPU, computing in plain torch."""
    memo: dict[int, object] = {}
    with mode:
        for tensor in (*network.parameters(), *network.buffers()):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    bare = copy.deepcopy(network, memo)
    if isinstance(bare, STDiT3):
        bare.spatial_blocks, bare.temporal_blocks = bare.spatial_blocks[:depth], bare.temporal_blocks[:depth]
        bare.choose_backends("sdpa", "reference", dtype=bare.dtype)
        bare.register_forward_pre_hook(without_mask)
    return bare


def without_mask(network: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook of STDiT3: every token counts, since a fake mask has no values to read lengths from."""
    return (*arguments[:3], None, *arguments[4:])


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest product of two square matrices seen in about ``seconds``.

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


class Throughput:
    """Turns the seconds of a step into the metrics ``speed/...`` of one process; see docs/architecture.md."""

    def __init__(self, config: Config, flops: RowFlops, ceiling: float) -> None:
        """ceiling: FLOP/s of the device, as ``matrix_rate`` gives it, in the network's arithmetic."""
        self._config, self._flops, self.ceiling = config, flops, ceiling

    def utilisation(self, seconds: Mapping[str, float], rows: int, pairs: float) -> dict[str, float]:
        """Shares of the ceiling that rollout and update of a step reach; of an update without pairs nothing is said.

        seconds: of the stages. rows: that the rollout sent through the network. pairs: that this process trained on,
        a part of its team's, each draw of them with winner and loser through the reference, and through the policy and
        back.
        """
        objective = self._config.objective
        guided = objective.branch == "guided" and self._config.rollout.guidance != 1.0
        trained = pairs * 2 * objective.draws * objective.updates * (2 if guided else 1)
        work = {
            "rollout": rows * self._flops.forward,
            "update": trained * (self._flops.forward + self._flops.training),
        }
        return {
            f"speed/{stage}_mfu": flops / (seconds[stage] * self.ceiling)
            for stage, flops in work.items()
            if flops
        }

    def rates(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Candidates per second of all processes, if any are sampled, and the share of the time outside of all stages.

        Candidates that ``pairs.refill`` adds are not counted.

        seconds: of every stage since the last call, and of everything as "step".
        """
        whole = seconds["step"]
        staged = sum(value for stage, value in seconds.items() if stage != "step")
        between = sum(seconds.get(stage, 0.0) for stage in BETWEEN)
        rates = {"speed/idle": max(0.0, 1 - staged / whole)}
        if self._config.rollout.source != "ledger":
            candidates = self._config.pairs_per_step * self._config.rollout.candidates
            rates["speed/samples_per_second"] = candidates / (whole - between)
        return rates
