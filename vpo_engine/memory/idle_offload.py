"""Offload the idle parts of a run: memory peaks at the largest phase of a step, not at the sum of all parts.

Parts (policy, reference, optimizer, VAE, reward model) register their tensors. On entering a phase, tensors that the
phase does not need are moved to pinned host memory; then those that it needs are moved to the device. Only the data
of the tensors moves: optimizers, modules and autograd keep the same tensor objects.
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
PartName = Literal["policy", "reference", "optimizer", "ema", "vae", "reward", "judge"]
Phase = Literal[
    "text",
    "rollout",
    "evaluation",
    "decode",
    "reward",
    "judge",
    "update",
    "reward_gradient",
    "optimizer",
    "refresh",
]
"""text: prompts are encoded, by an encoder that is no part; nothing else is needed.
rollout: the model of rollout.source samples candidates; it needs the policy's embedding of the empty caption too.
evaluation: the policy samples held-out videos. decode: the VAE decodes latents. reward: the reward model scores videos.
judge: the held-out reward scores the videos of an evaluation. update: losses and gradients are computed.
reward_gradient: the policy samples, the VAE decodes and the reward model scores, with gradients. optimizer: the
optimizer steps. refresh: the reference is built or refreshed."""

SLAB_BYTES = 2**28
"""Pinned memory is allocated in powers of two, so small tensors share an allocation of this size."""
_ALIGNMENT = 256
"""Each tensor's host memory starts at a multiple of this many bytes."""


@dataclass(frozen=True)
class Needs:
    """The phases in which a part must be on the device, and those of them that change its values."""

    phases: frozenset[Phase]
    changed: frozenset[Phase] = frozenset()


def needs_of(config: Config) -> dict[PartName, Needs]:
    """Return the phases in which this configuration needs each part on the device."""
    memory, storage = config.memory, config.reference.storage
    policy: set[Phase] = {"rollout", "evaluation", "update", "optimizer", "refresh"}
    policy_changes: set[Phase] = {"optimizer"}
    reference: set[Phase] = {"update", "refresh"}
    reference_changes: set[Phase] = {"refresh"}
    optimizer: set[Phase] = {"optimizer"}
    vae: set[Phase] = {"decode"}
    reward: set[Phase] = {"reward"}
    if config.card.reward_gradient:
        for part in (policy, reference, vae, reward):
            part.add("reward_gradient")
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
        "ema": Needs(frozenset({"optimizer"}), frozenset({"optimizer"})),
        "vae": Needs(frozenset(vae)),
        "reward": Needs(frozenset(reward)),
        "judge": Needs(frozenset({"judge"})),
    }


def module_tensors(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters and buffers, not copies of them."""
    return [*module.parameters(), *module.buffers()]


class Mover(Protocol):
    """Moves bytes between one device and the host; apart from ``holds``, tensors are one-dimensional uint8."""

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor, never moved so far, lies on the device."""
        ...

    def host(self, nbytes: int) -> Tensor:
        """Allocate host memory."""
        ...

    def load(self, host: Tensor) -> Tensor:
        """Copy to the device. Later kernels see the complete copy; the host may have to wait for it."""
        ...

    def store(self, device: Tensor, host: Tensor) -> None:
        """Begin to copy into host memory; the copy is complete after ``wait``."""
        ...

    def wait(self) -> None:
        """Wait until all copies made by ``store`` are complete."""
        ...


class CudaMover:
    """Copies in the current CUDA stream, so that freed device memory is reused only after the copies are done.

    The host waits once per phase for the copies into its memory. It does not wait for copies to the device.
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
    """The memory of one torch storage, with all registered tensors that are views of it."""

    data: Tensor
    """The bytes, on the device or on the host."""
    on_device: bool
    host: Tensor | None = None
    """The storage's pinned memory, allocated when it first leaves the device and kept from then on."""
    clean: bool = False
    """``host`` has the values that the device had when the tensors had these ``versions``."""
    tensors: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Byte offset of each tensor in ``data``."""
    versions: list[int] = field(default_factory=list)
    """torch's version counter of each tensor, which every in-place operation increases."""

    def contains(self, tensor: Tensor) -> bool:
        same = _identity(tensor) == _identity(self.data)
        return same and 0 <= self._place_of(tensor) < self.data.numel()

    def add(self, tensor: Tensor) -> None:
        self.tensors.append(tensor)
        self.places.append(self._place_of(tensor))
        self.versions.append(tensor._version)

    def remove(self, tensor: Tensor) -> None:
        """Forget a tensor that has been given other data (by assigning ``tensor.data``)."""
        number = next(number for number, one in enumerate(self.tensors) if one is tensor)
        for entries in (self.tensors, self.places, self.versions):
            del entries[number]

    def _place_of(self, tensor: Tensor) -> int:
        return int(tensor.storage_offset()) * tensor.element_size() - int(self.data.storage_offset())

    def stored(self) -> bool:
        """Return whether the host's copy still has the current values."""
        unwritten = all(
            tensor._version == seen for tensor, seen in zip(self.tensors, self.versions, strict=True)
        )
        return self.clean and unwritten

    def place(self, data: Tensor, on_device: bool) -> None:
        """Make every tensor a view of ``data``."""
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


class IdleOffload:
    """Moves registered parts between device and host when a phase is entered; without a mover it does nothing.

    After a phase its parts stay on the device until another phase is entered. Between phases, tensors may be read
    wherever they are and written by ordinary torch operations. A kernel that writes without increasing torch's version
    counter must run in a phase whose ``Needs.changed`` includes the part.
    """

    def __init__(self, needs: Mapping[PartName, Needs], mover: Mover | None) -> None:
        self._needs, self._mover = needs, mover
        self._parts: dict[PartName, _Part] = {}
        self._known: dict[int, _Storage] = {}
        self._current: Phase | None = None
        self._entered: list[Phase] = []

    @staticmethod
    def from_config(config: Config, device: torch.device) -> IdleOffload:
        """Offload idle parts with memory.offload_idle on a CUDA device; on a CPU there is nothing to offload to."""
        active = config.memory.offload_idle and device.type == "cuda"
        return IdleOffload(needs_of(config), CudaMover(device) if active else None)

    @staticmethod
    def disabled() -> IdleOffload:
        """Leave all parts where they are."""
        return IdleOffload({}, None)

    @property
    def active(self) -> bool:
        """Return whether parts are moved at all."""
        return self._mover is not None

    def register(self, name: PartName, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Add a part, which leaves the device at once unless the current phase needs it.

        ``tensors`` is called at every change of phase. It must return the same objects each time, apart from tensors
        that the part created or dropped since. A tensor of several parts is moved once, and so are views of one
        storage. If two parts have different views of one storage, register the first part before the second part's
        view is created, or register them as one part.
        """
        if self._mover is None:
            return
        assert name not in self._parts, name
        self._parts[name] = _Part(tensors, self._needs[name])
        self._move(self._current)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Have the parts that phase ``name`` needs on the device; at the end, restore those of the enclosing phase."""
        self._enter(name)
        self._entered.append(name)
        try:
            yield
        finally:
            self._entered.pop()
            if self._entered:
                self._enter(self._entered[-1])

    def during(self, name: Phase, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Return ``function``, wrapped so that the parts that phase ``name`` needs are on the device while it runs."""

        def moved(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with self.phase(name):
                return function(*args, **kwargs)

        return moved

    def nbytes(self, phase: Phase) -> int:
        """Return the bytes of registered tensors that a phase has on the device; ValueError if nothing is moved."""
        if self._mover is None:
            raise ValueError("memory.offload_idle=false: no part is registered; set memory.offload_idle=true")
        self._update_storages()
        return sum(storage.data.numel() for storage in self._needed(phase))

    def _enter(self, phase: Phase) -> None:
        if self._mover is not None and phase != self._current:
            self._move(phase)
            self._current = phase

    def _move(self, phase: Phase | None) -> None:
        assert self._mover is not None
        everything = self._update_storages()
        self._mark_changed()
        wanted = self._needed(phase)
        self._move_to_host([one for one in everything if one.on_device and one not in wanted])
        for storage in wanted:
            if not storage.on_device:
                storage.place(self._mover.load(storage.data), on_device=True)

    def _move_to_host(self, leaving: list[_Storage]) -> None:
        """Move storages to the host; copy only those whose current values the host does not have."""
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

    def _needed(self, phase: Phase | None) -> dict[_Storage, None]:
        parts = [part for part in self._parts.values() if phase in part.needs.phases]
        return dict.fromkeys(storage for part in parts for storage in part.storages)

    def _mark_changed(self) -> None:
        for part in self._parts.values():
            if self._current in part.needs.changed:
                for storage in part.storages:
                    storage.clean = False

    def _update_storages(self) -> dict[_Storage, None]:
        """Ask every part for its tensors; add storages for new tensors and forget those of tensors that are gone."""
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
    """Finds or creates the storage of a tensor that was not seen before."""

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
        base = tensor._base  # must be moved with its views; otherwise it would keep their device memory alive
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
