"""AdamW by DeepSpeed's ZeRO, which divides the optimizer's state, gradients and weights among processes.

It has the interface of ``PolicyOptimizer``. DeepSpeed sees the trained parameters only; frozen ones stay whole in every
process. Its ``managed_gradient_accumulation`` is off: any number of backward passes may lead to one step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vpo_engine.config import Config, EmaConfig
from vpo_engine.distributed.deepspeed_settings import INSTALL, resolve
from vpo_engine.distributed.processes import Processes
from vpo_engine.errors import NotFiniteError
from vpo_engine.memory.moments import make_moments
from vpo_engine.memory.optimizer import PreserveReference
from vpo_engine.memory.optimizer_state import MASTER, STEP, STEPS, StateFormat
from vpo_engine.memory.rounding import take_unrounded
from vpo_engine.memory.zero_average import DividedAverage


@dataclass(frozen=True)
class _Piece:
    """The part of a parameter that this process steps: ``size`` elements of ``flat`` from ``at`` on, which are those of
    the parameter from ``start`` on."""

    flat: Tensor
    at: int
    start: int
    size: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.detach().view(-1)[self.at : self.at + self.size]


class ZeroOptimizer:
    """AdamW (config.optimizer) over the trained parameters of ``network``, stepped by DeepSpeed.

    All processes must make the same calls in the same order, also those without a pair: backward passes and
    steps exchange gradients. With stage 3 a process has a part of each trained weight only; DeepSpeed gathers the
    weights of a module when the module runs, and ``whole`` gathers all of them.
    """

    in_lockstep = True
    """Every process must make equally many backward passes, of the same graph."""

    def __init__(
        self, config: Config, network: nn.Module, processes: Processes, preserve_reference: PreserveReference
    ) -> None:
        self.steps = 0
        self._processes, self._preserve_reference = processes, preserve_reference
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        kinds = {parameter.dtype for parameter in self.parameters}
        if len(kinds) > 1:
            names = ", ".join(sorted(str(kind) for kind in kinds))
            raise ValueError(
                f"DeepSpeed trains weights of one type, but those of this policy are {names}; set "
                "memory.weights=float32, or distributed.engine=data_parallel"
            )
        half = kinds == {torch.bfloat16}
        given = resolve(config, processes.count, half)
        self.settings: dict[str, Any] | None = given
        self._stage = int(given["zero_optimization"]["stage"])
        self._shapes = [tuple(p.shape) for p in self.parameters]
        self._masters = config.optimizer_memory.weights == "fp32_master" and half
        weights = "fp32_master" if self._masters else "float32"
        self._format = StateFormat(weights, config.optimizer_memory.optimizer_bits, self._shapes)
        offloads = given["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
        self._moments = make_moments(config.optimizer, config.optimizer_memory.optimizer_bits, offloads)
        unrounded = [take_unrounded(p) for p in self.parameters] if self._masters else []
        self._engine = self._start(network)
        self._gathered = False
        for number in range(len(unrounded)):
            self._set(number, unrounded[number])
            unrounded[number] = torch.empty(0)

    # --- the step ------------------------------------------------------------------------------------------

    def begin(self, rate: float) -> None:
        """Set the learning rate. Call this before the backward pass of every step."""
        for group in self._library.param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to those of earlier calls since the last step."""
        self._engine.backward(self._engine(loss), scale_wrt_gas=False)

    def average_gradients(self, processes: Processes) -> None:
        """Do nothing: DeepSpeed averages gradients in backward passes, or in its step."""

    def step(self) -> float:
        """Clip the averaged gradients, step all parameters, and return the norm before clipping.

        Raise NotFiniteError, in all processes and with the policy unchanged, if the norm is not finite.
        """
        engine, norm = self._engine, 0.0
        if self._stage == 0:
            engine.buffered_allreduce_fallback()
            norm = float(_norm_of(self.parameters))
            self._check(norm)
        with self._preserve_reference(self.parameters if self._stage < 3 else []):
            engine.step()
        if self._stage > 0:
            norm = float(engine.get_global_grad_norm())
            self._check(norm if engine.was_step_applied() else math.inf)
        self.steps += 1
        return norm

    def _check(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise NotFiniteError(
                f"the gradient norm is not finite at optimizer step {self.steps + 1}; the policy was not changed"
            )

    # --- weights that are divided (stage 3) ----------------------------------------------------------------

    @contextmanager
    def whole(self, changed: bool = False) -> Iterator[None]:
        """Have all weights whole in every process. All processes must enter it.

        changed: weights are changed meanwhile, in the same way everywhere, and stay so.
        """
        if self._stage < 3 or self._gathered:
            yield
            return
        offload = self._zero.parameter_offload
        self._gathered = True
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        for parameter in self.parameters:
            parameter.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
        try:
            with self.gathered(self.parameters, changed):
                yield
        finally:
            offload._register_deepspeed_module(offload.module)
            self._gathered = False

    def gathered(
        self, parameters: Sequence[nn.Parameter], changed: bool = False
    ) -> AbstractContextManager[None]:
        """Return a context in which these parameters are whole; hooks of modules may divide them again."""
        if self._stage < 3:
            return nullcontext()
        from deepspeed import zero

        mine: AbstractContextManager[None] = zero.GatheredParameters(
            list(parameters), modifier_rank=0 if changed else None
        )
        return mine

    # --- checkpoints ---------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """Return no tensors: DeepSpeed says where they are."""
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as ``PolicyOptimizer`` has it, gathered on the host of the first process; other processes
        get its header only. All processes must call this."""
        state = self._format.header(self.steps)
        moments = self._read_moments()
        step = max((int(self._library.state[flat][STEP]) for flat in moments), default=0)
        step = self._processes.largest(step)  # of many processes the last may have no part of small weights
        read = {name: [moments[flat][name] for flat in moments] for name in self._moments.names}
        for number in range(len(self.parameters)):
            entry = {}
            if step:
                values = {name: self.joined(number, read[name]) for name in self._moments.names}
                entry = {STEP: torch.tensor(float(step)), **self._moments.pack(values)}
                if self._moments.names[0] == "state1":
                    entry[STEP] = torch.tensor(step)
            if self._masters:
                entry[MASTER] = self.joined(number, self.shards())
            if self._processes.first:
                state |= {f"{number}.{name}": value.cpu() for name, value in entry.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a ``state``, of any engine and any number of processes; load the policy first.

        Raise ValueError, with nothing changed, if it belongs to another setup.
        """
        entries = self._format.entries(state)
        steps = {int(entry[STEP]) for entry in entries.values() if STEP in entry}
        if len(steps) > 1:
            raise ValueError(
                f"the optimizer state has weights that were stepped {min(steps)} and others that were stepped "
                f"{max(steps)} times; DeepSpeed steps all of them together. Resume with "
                "distributed.engine=data_parallel"
            )
        self.steps = int(state[STEPS])
        with self.whole():
            for number, parameter in enumerate(self.parameters):
                self._set(number, entries[number][MASTER] if self._masters else parameter)
        for flat in self.shards():
            if not steps:
                self._library.state.pop(flat, None)
                continue
            values = {name: torch.zeros_like(flat.detach()) for name in self._moments.names}
            for number, entry in entries.items():
                piece = self._pieces[number]
                if piece is not None and piece.flat is flat and STEP in entry:
                    for name, value in self._moments.unpack(entry).items():
                        self._copy(piece, value, values[name])
            self._moments.set(self._library, flat, max(steps), values)

    # --- inside --------------------------------------------------------------------------------------------

    def _start(self, network: nn.Module) -> Any:
        on_cpu = self._processes.device.type == "cpu"
        if on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take a GPU that the run leaves alone
        deepspeed = _import_deepspeed()
        if on_cpu:
            deepspeed.ops.__compatible_ops__ = {}  # else it compiles an operator for inference, for a minute
        os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed asks for, and torchrun sets
        if not dist.is_initialized():  # a single process needs no address to meet others at
            backend = "nccl" if self._processes.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if self._stage == 3:
            _keep_frozen_whole(network)
        module = _Trained(self.parameters, network if self._stage == 3 else None)
        optimizer = self._moments.optimizer(self.parameters)
        # DeepSpeed would take the GPU whose number is LOCAL_RANK, whatever model.device says.
        place = None if on_cpu else SimpleNamespace(device_rank=self._processes.device.index)
        engine, *_ = deepspeed.initialize(place, module, optimizer, config=self.settings)
        self._zero = engine.optimizer
        self._library = optimizer if self._stage == 0 else engine.optimizer.optimizer
        if self._stage == 0:
            engine.enable_backward_allreduce = False  # ``step`` has averaged them already
        self._pieces = [self._piece(engine, parameter) for parameter in self.parameters]
        flats = {id(piece.flat): piece.flat for piece in self._pieces if piece is not None}
        self._shards, self._places = list(flats.values()), {key: place for place, key in enumerate(flats)}
        return engine

    def _piece(self, engine: Any, parameter: nn.Parameter) -> _Piece | None:
        """Return the part of a parameter that this process steps, if there is one."""
        zero: Any = engine.optimizer
        if self._stage == 0:
            return _Piece(parameter, 0, 0, parameter.numel())
        if self._stage == 3:
            group, at, each = zero.grad_position[zero.get_param_id(parameter)]
            start = each * self._processes.rank
            size = min(each, max(0, parameter.ds_numel - start))  # type: ignore[attr-defined]
            return _Piece(zero.fp32_partitioned_groups_flat[group], at, start, size) if size else None
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        flat = zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
        own, theirs = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Piece(flat, own.start, theirs.start, own.numel)

    def shards(self) -> list[Tensor]:
        """Return the flat float32 tensors that this process steps, each once."""
        return self._shards

    def _read_moments(self) -> dict[Tensor, dict[str, Tensor]]:
        """Return the float32 moments of every flat tensor that has been stepped."""
        states = {flat: self._library.state.get(flat) for flat in self.shards()}
        return {flat: self._moments.read(state) for flat, state in states.items() if state}

    def joined(self, number: int, values: Sequence[Tensor]) -> Tensor:
        """Return a whole float32 tensor of the shape of a parameter, from the ``values`` of all processes, which are
        shaped like their ``shards``. All processes must call this."""
        shape, piece = self._shapes[number], self._pieces[number]
        whole = torch.zeros(math.prod(shape), device=self._processes.device)
        if piece is not None:
            own = piece.of(values[self._place_of(piece.flat)])
            whole[piece.start : piece.start + piece.size] = own.to(whole)
        return (whole if self._stage == 0 else self._processes.sum(whole)).view(shape)

    def take(self, number: int, whole: Tensor, values: Sequence[Tensor]) -> None:
        """Copy this process's part of a parameter's ``whole`` tensor into ``values``, shaped like its ``shards``."""
        piece = self._pieces[number]
        if piece is not None:
            self._copy(piece, whole, values[self._place_of(piece.flat)])

    @property
    def is_first(self) -> bool:
        return self._processes.first

    def average(self, settings: EmaConfig) -> DividedAverage:
        """Return the moving average of the weights, divided as they are."""
        return DividedAverage(self, settings)

    def _place_of(self, flat: Tensor) -> int:
        return self._places[id(flat)]

    @torch.no_grad()
    def _set(self, number: int, value: Tensor) -> None:
        """Set the float32 weight of a parameter; ``value`` is whole."""
        piece = self._pieces[number]
        if piece is not None and piece.flat is not value:
            self._copy(piece, value, piece.flat)

    @staticmethod
    @torch.no_grad()
    def _copy(piece: _Piece, whole: Tensor, flat: Tensor) -> None:
        piece.of(flat).copy_(whole.detach().reshape(-1)[piece.start : piece.start + piece.size])


class _Trained(nn.Module):
    """The model as DeepSpeed sees it: the trained parameters, and with stage 3 the network that they are in.

    A forward pass returns its input: losses go through it, so that DeepSpeed learns of the backward pass.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], network: nn.Module | None) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters) if network is None else network

    def forward(self, loss: Tensor) -> Tensor:
        return loss


def _import_deepspeed() -> Any:
    try:
        import deepspeed
    except Exception as error:  # DeepSpeed has exceptions of its own for what it misses in an installation
        raise ValueError(
            f"distributed.engine=deepspeed needs DeepSpeed, which cannot be imported ({error}); {INSTALL}"
        ) from error
    if not hasattr(deepspeed.DeepSpeedEngine, "managed_gradient_accumulation"):
        raise ValueError(
            f"DeepSpeed {deepspeed.__version__} applies the gradient of the last of several backward passes only, with "
            f"ZeRO stages 1 and 2; {INSTALL} --upgrade, which takes a version with managed_gradient_accumulation"
        )
    return deepspeed


def _keep_frozen_whole(network: nn.Module) -> None:
    """Make buffers of frozen parameters, which DeepSpeed leaves as they are; names and values stay."""
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.requires_grad:
                del module._parameters[name]
                module._buffers[name] = parameter


def _norm_of(parameters: Sequence[nn.Parameter]) -> Tensor:
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
