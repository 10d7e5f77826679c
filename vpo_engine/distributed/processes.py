"""Data parallelism: each process, or each team of processes, has its own prompts, and gradients are averaged."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vpo_engine.distributed.couples import Couple, Couples
from vpo_engine.distributed.meeting import meet
from vpo_engine.distributed.shares import check_teams, uneven
from vpo_engine.distributed.stages import Stages
from vpo_engine.errors import LostProcessError

_BUCKET_ELEMENTS = 32 * 2**20
_LOST = ("onnection closed by peer", "onnection reset by peer", "roken pipe", "remote process exited")
"""Parts of the errors of gloo and NCCL when a process of the group is gone."""


@dataclass(frozen=True)
class Processes:
    """This process's rank among the processes that train together, those of the whole run or those of its team.

    group: their process group; None means all processes of torch.distributed. store: a key-value store shared by all
    processes that torchrun started; None if there is one process. stages: where this process is.
    """

    rank: int
    count: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    _team: Processes | None = None
    _sequence: Processes | None = None
    _units: Processes | None = None
    _pair: Processes | None = None
    store: dist.Store | None = None
    stages: Stages = field(default_factory=Stages)

    @staticmethod
    def start(
        device: str = "auto",
        per_team: int = 1,
        reward_process: bool = False,
        limit: timedelta | None = None,
        sequence: int = 1,
    ) -> Processes:
        """Join the process group that torchrun describes in the environment; without one, return a single process.

        The backend is gloo on CPU and nccl on CUDA. ``device`` is "auto", or what torch.device accepts. per_team and
        sequence: see ``in_teams``. reward_process: the process with the last rank runs the reward model and is not in
        the group (see ``is_reward_process``); ValueError if no other process is left. limit: the time that a process
        waits for the others in a collective operation; None: torch's default.
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
            serves = reward_process and rank == count - 1  # its model may be on another device
            _take(chosen, device, needed=not serves)
        store = None
        if count > 1 and not dist.is_initialized():
            store = meet(next(dist.rendezvous("env://"))[0], rank, count)
        if reward_process:
            if count == 1:
                raise ValueError(
                    "processes.reward=true gives the last of 1 processes to the reward model, which leaves none to "
                    "train; start at least 2 (torchrun --nproc-per-node=2), or set it to false"
                )
            count -= 1
            if rank == count:
                return Processes(rank, count, chosen, store=store)
        if count > 1 and store is not None:
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            own = dist.PrefixStore("training", store)
            dist.init_process_group(backend, store=own, rank=rank, world_size=count, timeout=limit)
        return Processes(rank, count, chosen, store=store).in_teams(per_team, sequence, limit)

    def in_teams(self, size: int, sequence: int = 1, limit: timedelta | None = None) -> Processes:
        """Divide the processes into teams of ``size * sequence`` neighbouring ranks, whose members share their prompts.

        A team divides its candidates among ``size`` units, of ``sequence`` neighbouring ranks each, which hold slices
        of the same videos. Every process of the run must call this. Raise ValueError if the number of processes is not
        a multiple of a team's.
        """
        check_teams(size, sequence, self.count)
        members = size * sequence
        made = self
        if size > 1:
            teams = range(0, self.count, members)
            same = [range(at + slot, at + members, sequence) for at in teams for slot in range(sequence)]
            made = replace(made, _team=self._among(same, limit))
        if sequence > 1:
            units = [range(at, at + sequence) for at in range(0, self.count, sequence)]
            same = [range(slot, self.count, sequence) for slot in range(sequence)]
            made = replace(made, _sequence=self._among(units, limit), _units=self._among(same, limit))
        return made

    def _among(self, groups: Sequence[range], limit: timedelta | None) -> Processes:
        """Return this process's place in its one of ``groups`` of ranks; together they have every rank once."""
        made = [dist.new_group(ranks, timeout=limit) for ranks in groups]
        number = next(number for number, ranks in enumerate(groups) if self.rank in ranks)
        mine = groups[number]
        return Processes(mine.index(self.rank), len(mine), self.device, made[number], stages=self.stages)

    def in_couples(self, limit: timedelta | None = None) -> Processes:
        """Let two neighbouring processes of a team share every candidate; see ``couples.py``.

        Every process of the run must call this, after ``in_teams`` of an even size.
        """
        mine = self._among([range(first, first + 2) for first in range(0, self.count, 2)], limit)
        return replace(self, _team=replace(self.team, _pair=mine))

    @property
    def is_reward_process(self) -> bool:
        """Return whether this process runs the reward model only, and takes part in no collective operation."""
        return self.rank == self.count

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def team(self) -> Processes:
        """Return this process's rank among those that share its prompts; without ``in_teams`` it is alone.

        With sequence parallelism these are the ones that hold the same slice in the units of its team.
        """
        return self._team or Processes(0, 1, self.device)

    @property
    def sequence(self) -> Processes:
        """Return this process's rank in its unit, the processes that hold slices of the same videos."""
        return self._sequence or Processes(0, 1, self.device)

    @property
    def units(self) -> Processes:
        """Return this process's rank among those of all units that hold the same slice; without slices, among all."""
        return self._units or self

    @property
    def team_size(self) -> int:
        """Return how many processes share this one's prompts, itself included."""
        return self.team.count * self.sequence.count

    @property
    def first_of_team(self) -> bool:
        """Return whether this process writes what its team has made."""
        return self.team.first and self.sequence.first

    @property
    def sharers(self) -> Processes | Couples:
        """Return those among whom the candidates of a team's prompts are shared, of a team: its processes, or its
        couples."""
        return self if self._pair is None else Couples(self)

    @property
    def couple(self) -> Couple | None:
        """Return the two processes that share guided predictions, of a team; None if every process makes its own."""
        return None if self._pair is None else Couple(self._pair)

    def team_range(self, total: int, what: str) -> range:
        """Return which of ``total`` items belong to this team. Raise ValueError if the teams cannot get equally many.

        ``what`` is the name of the setting that has the value ``total``, for the error.
        """
        size = self.team_size
        teams = self.count // size
        if total % teams:
            raise uneven(what, total, teams, size)
        each = total // teams
        team = self.rank // size
        return range(team * each, (team + 1) * each)

    def encoder_share(self) -> slice:
        """Return which texts this process encodes for all of them: every n-th, or none. All processes must call this.

        On GPUs all processes encode. On CPUs one of each machine does, since the others would only hold copies of the
        text encoder and wait for the same cores.
        """
        encodes = self.device.type != "cpu" or os.environ.get("LOCAL_RANK", "0") == "0"
        flags = self.gather(torch.tensor([int(encodes)])).tolist()
        ranks = [rank for rank, flag in enumerate(flags) if flag]
        return slice(ranks.index(self.rank), None, len(ranks)) if encodes else slice(0, 0)

    def rank_range(self, total: int) -> range:
        """Return which of ``total`` items belong to this process, divided in rank order as evenly as possible."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def sum(self, values: Tensor) -> Tensor:
        """Add ``values`` of all processes elementwise, in place."""
        if self.count > 1:
            with self._together():
                dist.all_reduce(values, group=self.group)
        return values

    def gather(self, values: Tensor, dim: int = 0) -> Tensor:
        """Concatenate the ``values`` of all processes along ``dim`` in rank order; shapes must be equal.

        They are sent through ``device``, and the result is on the device of ``values``.
        """
        if self.count == 1:
            return values
        here = values.to(self.device).contiguous()
        parts = [torch.empty_like(here) for _ in range(self.count)]
        with self._together():
            dist.all_gather(parts, here, group=self.group)
        return torch.cat(parts, dim).to(values.device)

    def exchange(
        self, received: Tensor, sent: Tensor, received_counts: list[int], sent_counts: list[int]
    ) -> None:
        """Send a part of ``sent`` to each process in rank order, and fill ``received`` with what they send here.

        Both are flat. The counts are numbers of elements, one for each process.
        """
        with self._together():
            dist.all_to_all_single(received, sent, received_counts, sent_counts, group=self.group)

    def broadcast(self, values: Tensor) -> Tensor:
        """Replace ``values`` by those of the process with rank 0, in place."""
        if self.count > 1:
            with self._together():
                dist.broadcast(values, group_src=0, group=self.group)
        return values

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
        with self._together():
            dist.all_reduce(flat, group=self.group)
        flat /= self.count
        for grad, mean in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true in any process."""
        if self.count == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        with self._together():
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
            return bool(value.item())

    def largest(self, number: int) -> int:
        """Return the largest ``number`` of all processes."""
        if self.count == 1:
            return number
        value = torch.tensor(number, device=self.device)
        with self._together():
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
            return int(value.item())

    def broadcast_text(self, text: str) -> str:
        """Return the text of the process with rank 0, in every process."""
        box = [text]
        if self.count > 1:
            with self._together():
                dist.broadcast_object_list(box, group_src=0, device=self.device, group=self.group)
        return box[0]

    def wait(self) -> None:
        if self.count > 1:
            with self._together():
                # Without a device, NCCL takes that of the rank's number where nothing was exchanged before.
                ids = [self.device.index] if self.device.type == "cuda" else None
                dist.barrier(group=self.group, device_ids=ids)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Mark an operation in which all processes wait for each other. LostProcessError if one of them is gone."""
        with self.stages.waiting():
            where = self.stages.now
            try:
                yield
            except RuntimeError as error:
                if not any(sign in str(error) for sign in _LOST):
                    raise
                raise LostProcessError(
                    f"rank {self.rank} lost another process while it waited for all of them in {where.stage} of step "
                    f"{where.step}; what the process that ended first has printed says why"
                ) from error

    def stop(self) -> None:
        if not self.is_reward_process and dist.is_initialized():
            dist.destroy_process_group()


def _take(chosen: torch.device, asked: str, needed: bool) -> None:
    """Make a GPU this process's own. ValueError if there is no such GPU, unless it is not ``needed``."""
    count = torch.cuda.device_count()
    if chosen.index < count:
        torch.cuda.set_device(chosen)
    elif needed:
        remedy = (
            f"start at most {count} processes on a machine" if asked == "cuda" else "set another model.device"
        )
        raise ValueError(f"this process takes {chosen}, but torch sees {count} CUDA devices; {remedy}")
