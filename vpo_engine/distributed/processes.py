"""Data parallelism over processes: each has its own prompts, gradients are averaged, rank 0 writes the log."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_ELEMENTS = 32 * 2**20


@dataclass(frozen=True)
class Processes:
    """This process among its equals."""

    rank: int
    count: int
    device: torch.device

    @staticmethod
    def start(device: str = "auto") -> Processes:
        """Join the group that torchrun describes in the environment, or stand alone without one.

        gloo on CPU, nccl on CUDA. ``device`` is "auto", or what torch.device accepts.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = torch.device(device)
        if chosen.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(f"model.device={device} needs a CUDA device, and torch sees none; use cpu")
            chosen = torch.device("cuda", chosen.index if chosen.index is not None else local_rank)
            torch.cuda.set_device(chosen)
        if count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return Processes(rank, count, chosen)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, total: int, what: str) -> range:
        """This process's part of ``total`` equal pieces. ValueError if they cannot be dealt out equally."""
        if total % self.count:
            raise ValueError(
                f"{what}={total} cannot be shared equally by {self.count} processes; use a multiple of it"
            )
        each = total // self.count
        return range(self.rank * each, (self.rank + 1) * each)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [n, ...] of every process, the same n everywhere, concatenated in rank order."""
        if self.count == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.count)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over processes; a missing one counts as zero."""
        if self.count == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(grad.numel() for grad in bucket) >= _BUCKET_ELEMENTS:
                self._average(bucket)
                bucket = []
        self._average(bucket)

    def _average(self, bucket: list[Tensor]) -> None:
        if not bucket:
            return
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat)
        flat /= self.count
        for grad, mean in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))

    def any(self, flag: bool) -> bool:
        """True everywhere if it is true anywhere."""
        if self.count == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def agree(self, text: str) -> str:
        """The first process's text, everywhere."""
        box = [text]
        if self.count > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def stop(self) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
