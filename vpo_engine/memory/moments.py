"""AdamW over flat parts of several weights: how its moments are read in float32, set, and written to a checkpoint.

DeepSpeed joins the parts of weights that a process owns into flat float32 tensors, and steps those. Moments of 32 bits
are the same however weights are divided. Moments of 8 bits have a scale for each block of neighbours, and the blocks of
a flat tensor are others than those of a weight: they are rounded once more wherever the division changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vpo_engine.config import OptimizerConfig
from vpo_engine.memory.optimizer_state import BLOCK, SMALLEST, STEP, Entry


class Moments(Protocol):
    """AdamW of one of the two widths. ``names``: of its two moments in checkpoints."""

    names: tuple[str, str]

    def optimizer(self, weights: Sequence[nn.Parameter]) -> torch.optim.Optimizer: ...

    def read(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """Return both moments of a flat tensor that has been stepped, in float32."""
        ...

    def set(
        self, optimizer: torch.optim.Optimizer, flat: Tensor, step: int, values: dict[str, Tensor]
    ) -> None:
        """Set the state of a flat tensor; ``values`` are both moments in float32."""
        ...

    def pack(self, values: dict[str, Tensor]) -> Entry:
        """Return the entries of a whole weight in a checkpoint."""
        ...

    def unpack(self, entry: Entry) -> dict[str, Tensor]:
        """Return both moments of a whole weight in float32."""
        ...


class WideMoments:
    """torch's AdamW, with float32 moments. On the host (``fused``) it is torch's kernel for CPUs."""

    names = ("exp_avg", "exp_avg_sq")

    def __init__(self, settings: OptimizerConfig, fused: bool) -> None:
        self._settings, self._fused = settings, fused

    def optimizer(self, weights: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        arguments = (self._settings.lr, self._settings.betas, self._settings.eps, self._settings.weight_decay)
        return torch.optim.AdamW(weights, *arguments, foreach=False, fused=self._fused)

    def read(self, state: dict[str, Any]) -> dict[str, Tensor]:
        return {name: state[name] for name in self.names}

    def set(
        self, optimizer: torch.optim.Optimizer, flat: Tensor, step: int, values: dict[str, Tensor]
    ) -> None:
        optimizer.state[flat] = {STEP: torch.tensor(float(step)), **values}

    def pack(self, values: dict[str, Tensor]) -> Entry:
        return values

    def unpack(self, entry: Entry) -> dict[str, Tensor]:
        return {name: entry[name] for name in self.names}


class NarrowMoments:
    """bitsandbytes' AdamW8bit, whose moments have 8 bits, and 32 in tensors of fewer than 4096 elements."""

    names = ("state1", "state2")

    def __init__(self, settings: OptimizerConfig) -> None:
        self._settings = settings
        self._tables: dict[str, Tensor] = {}

    def optimizer(self, weights: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit

        arguments = (self._settings.lr, self._settings.betas, self._settings.eps, self._settings.weight_decay)
        made = AdamW8bit(list(weights), *arguments)
        made.fill_qmap()
        self._tables = {"state1": made.name2qmap["dynamic"], "state2": made.name2qmap["udynamic"]}
        return made

    def read(self, state: dict[str, Any]) -> dict[str, Tensor]:
        return self.unpack({name: value for name, value in state.items() if isinstance(value, Tensor)})

    def set(self, optimizer: Any, flat: Tensor, step: int, values: dict[str, Tensor]) -> None:
        entry: dict[str, Any] = {STEP: step, **self.pack(values)}
        if "absmax1" in entry:
            for place, name in (("qmap1", "state1"), ("qmap2", "state2")):
                entry[place] = self._tables[name].to(flat.device)
            optimizer.name2qmap = {"dynamic": entry["qmap1"], "udynamic": entry["qmap2"]}
        optimizer.state[flat] = entry

    def pack(self, values: dict[str, Tensor]) -> Entry:
        from bitsandbytes.functional import quantize_blockwise

        packed: Entry = {}
        for number, (name, value) in enumerate(values.items(), 1):
            if value.numel() < SMALLEST:
                packed[name] = value
                continue
            table = self._tables[name].to(value.device)
            packed[name], state = quantize_blockwise(value.contiguous(), code=table, blocksize=BLOCK)
            packed[f"absmax{number}"] = state.absmax
        return packed

    def unpack(self, entry: Entry) -> dict[str, Tensor]:
        from bitsandbytes.functional import dequantize_blockwise

        values: dict[str, Tensor] = {}
        for number, name in enumerate(self.names, 1):
            codes = entry[name]
            if codes.dtype == torch.float32:
                values[name] = codes
                continue
            table = self._tables[name].to(codes.device)
            values[name] = dequantize_blockwise(
                codes, absmax=entry[f"absmax{number}"], code=table, blocksize=BLOCK
            )
        return values


def make_moments(settings: OptimizerConfig, bits: int, on_host: bool) -> Moments:
    """Return AdamW with moments of ``bits`` bits; ``on_host``: its steps are made on the CPU, beside a GPU."""
    return NarrowMoments(settings) if bits == 8 else WideMoments(settings, fused=on_host)
