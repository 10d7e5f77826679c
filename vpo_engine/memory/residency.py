"""Who is on the device in which phase of a step: the peak is the largest phase, not the sum of the parts.

Parts (policy, reference, optimizer, VAE, reward model) register their tensors. Entering a phase sends to pinned host
memory what the phase does not need, then brings in what it needs. Tensors keep their identity, only their data
moves, so optimizers, modules and autograd go on holding the same objects.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vpo_engine.config import Config

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
PartName = Literal["policy", "reference", "optimizer", "vae", "reward", "judge"]
Phase = Literal["rollout", "evaluation", "decode", "reward", "judge", "update", "optimizer", "refresh"]
"""rollout: candidates are sampled, by whom rollout.source says, with the policy's embedding of no caption. evaluation:
held-out videos are sampled by the policy. decode: latents become videos. reward: these are scored. judge: those of an
evaluation are scored by the held-out reward. update: losses and gradients. optimizer: the optimizer's step. refresh:
the reference is made, or made anew."""

SLAB_BYTES = 2**28
"""Pinned memory comes in powers of two: small tensors share an allocation of this size."""
_ALIGNMENT = 256


@dataclass(frozen=True)
class Needs:
    """The phases in which a part is on the device, and those among them that change it."""

    phases: frozenset[Phase]
    changed: frozenset[Phase] = frozenset()


def needs_of(config: Config) -> dict[PartName, Needs]:
    """What each part of a run of this configuration needs."""
    memory, storage = config.memory, config.reference.storage
    policy: set[Phase] = {"rollout", "evaluation", "update", "optimizer", "refresh"}
    policy_changes: set[Phase] = {"optimizer"}
    reference: set[Phase] = {"update", "refresh"}
    reference_changes: set[Phase] = {"refresh"}
    optimizer: set[Phase] = {"optimizer"}
    if config.rollout.source == "reference":
        reference.add("rollout")
    if storage == "exact8":
        reference.add("optimizer")
        reference_changes.add("optimizer")
    if memory.step_in_backward:
        optimizer.add("update")
        policy_changes.add("update")
        if storage == "exact8":
            reference_changes.add("update")
    return {
        "policy": Needs(frozenset(policy), frozenset(policy_changes)),
        "reference": Needs(frozenset(reference), frozenset(reference_changes)),
        "optimizer": Needs(frozenset(optimizer), frozenset(optimizer)),
        "vae": Needs(frozenset({"decode"})),
        "reward": Needs(frozenset({"reward"})),
        "judge": Needs(frozenset({"judge"})),
    }


def module_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, as the objects that the module holds."""
    return [*module.parameters(), *module.buffers()]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's state, none before its first step; counters of steps, which torch keeps on the
    host, are left out."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in values if torch.is_tensor(value) and value.dim() > 0]


class Mover(Protocol):
    """The device's side of a move; all tensors here are one-dimensional uint8."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor that was never moved lies on the device."""
        ...

    def host(self, nbytes: int) -> Tensor:
        """New host memory."""
        ...

    def load(self, host: Tensor) -> Tensor:
        """A copy on the device; may return before it is complete to kernels that follow, not to the host."""
        ...

    def store(self, device: Tensor, host: Tensor) -> None:
        """Copy into host memory, complete after ``wait``."""
        ...

    def wait(self) -> None: ...


class CudaMover:
    """Copies in the current stream, so that freed device memory is taken again only after they are done.

    The host waits for copies that it will read, once a phase, and for none that the device reads.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def holds(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._device.type

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def load(self, host: Tensor) -> Tensor:
        return host.to(self._device, non_blocking=True)

    def store(self, device: Tensor, host: Tensor) -> None:
        host.copy_(device, non_blocking=True)

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


@dataclass(eq=False)
class _Storage:
    """One storage with the tensors that look into it."""

    data: Tensor
    """Its bytes, where they are now."""
    on_device: bool
    host: Tensor | None = None
    """Its place in pinned memory, from the first time that it leaves the device."""
    clean: bool = False
    """``host`` holds what the device had when the tensors had these ``versions``."""
    tensors: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Where each tensor starts, in bytes of ``data``."""
    versions: list[int] = field(default_factory=list)

    def contains(self, tensor: Tensor) -> bool:
        same = _identity(tensor) == _identity(self.data)
        return same and 0 <= self._place_of(tensor) < self.data.numel()

    def add(self, tensor: Tensor) -> None:
        self.tensors.append(tensor)
        self.places.append(self._place_of(tensor))
        self.versions.append(tensor._version)

    def remove(self, tensor: Tensor) -> None:
        """A tensor whose data was exchanged for another's."""
        number = next(number for number, one in enumerate(self.tensors) if one is tensor)
        for entries in (self.tensors, self.places, self.versions):
            del entries[number]

    def _place_of(self, tensor: Tensor) -> int:
        return int(tensor.storage_offset()) * tensor.element_size() - int(self.data.storage_offset())

    def stored(self) -> bool:
        """Whether the host's copy is still true."""
        unwritten = all(
            tensor._version == seen for tensor, seen in zip(self.tensors, self.versions, strict=True)
        )
        return self.clean and unwritten

    def place(self, data: Tensor, on_device: bool) -> None:
        """Point every tensor into ``data``."""
        self.data, self.on_device = data, on_device
        for tensor, place in zip(self.tensors, self.places, strict=True):
            offset = (data.storage_offset() + place) // tensor.element_size()
            view = torch.empty(0, dtype=tensor.dtype, device=data.device)
            view.set_(data.untyped_storage(), offset, tensor.size(), tensor.stride())
            tensor.data = view
        self.versions = [tensor._version for tensor in self.tensors]


@dataclass
class _Part:
    tensors: Callable[[], Iterable[Tensor]]
    needs: Needs
    storages: list[_Storage] = field(default_factory=list)


class Residency:
    """Moves registered parts as phases are entered; without a mover it does nothing.

    What is left on the device after a phase stays there until another phase is entered. Between phases tensors may
    be read wherever they are, and written by ordinary torch operations; kernels that write past torch's version
    counters belong in a phase that changes their part.
    """

    def __init__(self, needs: Mapping[PartName, Needs], mover: Mover | None) -> None:
        self._needs, self._mover = needs, mover
        self._parts: dict[PartName, _Part] = {}
        self._known: dict[int, _Storage] = {}
        self._current: Phase | None = None
        self._entered: list[Phase] = []

    @staticmethod
    def from_config(config: Config, device: torch.device) -> Residency:
        """Active with memory.residency phases on CUDA; a CPU is its own host."""
        active = config.memory.residency == "phases" and device.type == "cuda"
        return Residency(needs_of(config), CudaMover(device) if active else None)

    @staticmethod
    def everything() -> Residency:
        """All parts stay where they are."""
        return Residency({}, None)

    @property
    def active(self) -> bool:
        """Whether parts take turns on the device."""
        return self._mover is not None

    def register(self, name: PartName, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """A part, which leaves the device unless the current phase needs it.

        ``tensors`` names the same objects each time, but for those that the part made or dropped since; it is asked
        at every change of phase. A tensor of several parts, and views of one storage, move once; parts that look into
        one storage by different objects must be made after each other's registration, or registered as one.
        """
        if self._mover is None:
            return
        assert name not in self._parts, name
        self._parts[name] = _Part(tensors, self._needs[name])
        self._move(self._current)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What ``name`` needs is on the device within; an enclosing phase gets back what it needs at the end."""
        self._enter(name)
        self._entered.append(name)
        try:
            yield
        finally:
            self._entered.pop()
            if self._entered:
                self._enter(self._entered[-1])

    def during(self, name: Phase, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Return ``function``, during whose calls what ``name`` needs is on the device."""

        def moved(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with self.phase(name):
                return function(*args, **kwargs)

        return moved

    def nbytes(self, phase: Phase) -> int:
        """Bytes of registered tensors that are on the device in a phase; ValueError when nothing is moved."""
        if self._mover is None:
            raise ValueError("memory.residency=all: no part is registered; set memory.residency=phases")
        self._look()
        return sum(storage.data.numel() for storage in self._wanted(phase))

    def _enter(self, phase: Phase) -> None:
        if self._mover is not None and phase != self._current:
            self._move(phase)
            self._current = phase

    def _move(self, phase: Phase | None) -> None:
        assert self._mover is not None
        everything = self._look()
        self._note_changes()
        wanted = self._wanted(phase)
        self._send([one for one in everything if one.on_device and one not in wanted])
        for storage in wanted:
            if not storage.on_device:
                storage.place(self._mover.load(storage.data), on_device=True)

    def _send(self, leaving: list[_Storage]) -> None:
        """To the host; copied only what the host does not have already."""
        assert self._mover is not None
        changed = [storage for storage in leaving if not storage.stored()]
        _give_host_memory([storage for storage in changed if storage.host is None], self._mover.host)
        for storage in changed:
            assert storage.host is not None
            self._mover.store(storage.data, storage.host)
        if changed:
            self._mover.wait()
        for storage in leaving:
            assert storage.host is not None
            storage.place(storage.host, on_device=False)
            storage.clean = True

    def _wanted(self, phase: Phase | None) -> dict[_Storage, None]:
        parts = [part for part in self._parts.values() if phase in part.needs.phases]
        return dict.fromkeys(storage for part in parts for storage in part.storages)

    def _note_changes(self) -> None:
        for part in self._parts.values():
            if self._current in part.needs.changed:
                for storage in part.storages:
                    storage.clean = False

    def _look(self) -> dict[_Storage, None]:
        """Ask every part for its tensors; those not seen before get a storage, those gone are let go."""
        assert self._mover is not None
        known, index = self._known, _Index(self._known.values())
        self._known = {}
        for part in self._parts.values():
            part.storages = []
            for tensor in part.tensors():
                if tensor.untyped_storage().nbytes() == 0:
                    continue
                storage = self._known.get(id(tensor)) or known.get(id(tensor))
                if storage is not None and not storage.contains(tensor):
                    storage.remove(tensor)
                    storage = None
                if storage is None:
                    storage = index.find(tensor, self._mover)
                self._known[id(tensor)] = storage
                part.storages.append(storage)
        return dict.fromkeys(self._known.values())


class _Index:
    """Finds the storage of a tensor that was not seen before."""

    def __init__(self, known: Iterable[_Storage]) -> None:
        self._by_storage: dict[int, list[_Storage]] = defaultdict(list)
        for storage in dict.fromkeys(known):
            self._by_storage[_identity(storage.data)].append(storage)

    def find(self, tensor: Tensor, mover: Mover) -> _Storage:
        peers = self._by_storage[_identity(tensor)]
        storage = next((one for one in peers if one.contains(tensor)), None)
        if storage is None:
            storage = _Storage(_bytes_of(tensor), mover.holds(tensor))
            peers.append(storage)
        storage.add(tensor)
        base = tensor._base  # it would keep the memory of its views
        if base is not None and not any(one is base for one in storage.tensors):
            storage.add(base)
        return storage


def _give_host_memory(storages: list[_Storage], allocate: Callable[[int], Tensor]) -> None:
    left = sum(_aligned(storage.data.numel()) for storage in storages)
    room: Tensor | None = None
    for storage in storages:
        nbytes = storage.data.numel()
        if room is None or room.numel() < nbytes:
            room = allocate(max(_aligned(nbytes), min(SLAB_BYTES, left)))
        storage.host, room = room[:nbytes], room[_aligned(nbytes) :]
        left -= _aligned(nbytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return view.set_(storage, 0, (storage.nbytes(),), (1,))


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
