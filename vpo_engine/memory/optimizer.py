"""AdamW one parameter at a time, over float32 weights, fp32 master weights or bfloat16 weights alone.

torch (or bitsandbytes for 8-bit moments) steps each parameter separately. So a step can be part of the backward pass,
the float32 weight can exist during its own step only, and a stored reference can be updated around each change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vpo_engine.config import EmaConfig, MemoryConfig, OptimizerConfig
from vpo_engine.distributed.processes import Processes
from vpo_engine.errors import NotFiniteError
from vpo_engine.memory.ema import PolicyAverage
from vpo_engine.memory.optimizer_state import MASTER, STEP, STEPS, StateFormat
from vpo_engine.memory.rounding import (
    is_kept_in_float32,
    round_stochastically,
    rounding_offsets,
    take_unrounded,
)

PreserveReference = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
"""Returns a context in which these parameters may change while the reference keeps its values."""

_TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""bitsandbytes' code tables: the entry of a weight's state, and the table's name."""


def learning_rate(settings: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of optimizer step ``step`` (counted from 0) in a run of ``steps``.

    It rises linearly during warm-up, then falls linearly to ``final_lr`` times the peak at the last step.
    """
    warmup = min(settings.warmup_steps, steps - 1)
    left = max(1, steps - 1 - warmup)
    if step < warmup:
        return settings.lr * ((step + 1) / (warmup + 1))
    return settings.lr * (1 - (1 - settings.final_lr) * min(1.0, (step - warmup) / left))


class PolicyOptimizer:
    """AdamW (``settings``) over ``parameters``, whose weights are stored as ``memory.weights`` says.

    float32: the parameters are stepped themselves. fp32_master: a float32 copy of each is stepped, and the parameter
    gets it rounded to the nearest bfloat16 value. stochastic_rounding: a parameter is float32 during its own step only,
    and is then rounded stochastically to bfloat16. The random numbers are a function of ``seed``, the step and the
    parameter's number, so they are the same in every process, in a rerun and after a resume. Parameters that
    ``hold_in_bfloat16`` has kept in float32 are stepped themselves, whatever memory.weights says.

    With memory.optimizer_bits=8 the moments are bitsandbytes', which keeps those of parameters of fewer than 4096
    elements in 32 bits. All parameters must be on one device. Each change of a parameter happens inside the context
    ``preserve_reference([parameter])``. A parameter's gradient is freed when the parameter is stepped.
    """

    in_lockstep = False
    settings: dict[str, Any] | None = None

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        settings: OptimizerConfig,
        memory: MemoryConfig,
        *,
        seed: int,
        preserve_reference: PreserveReference,
    ) -> None:
        self.steps = 0
        self._parameters, self._settings, self._mode = list(parameters), settings, memory.weights
        self._modes = ["float32" if is_kept_in_float32(one) else self._mode for one in self._parameters]
        self._seed, self._preserve_reference = seed, preserve_reference
        self._bits = memory.optimizer_bits
        self._format = StateFormat(
            memory.weights,
            memory.optimizer_bits,
            [tuple(p.shape) for p in self._parameters],
            [mode == "fp32_master" for mode in self._modes],
        )
        self._weights = list(map(self._float32_weight, self._parameters, self._modes))
        self._library: _Library = (_Bitsandbytes if self._bits == 8 else _Torch)(self._weights, settings)
        self._in_backward = memory.step_in_backward
        self._norms: dict[int, Tensor] = {}
        if self._in_backward:
            for number, parameter in enumerate(self._parameters):
                parameter.register_post_accumulate_grad_hook(self._hook(number))

    def begin(self, rate: float) -> None:
        """Clear all gradients and set the learning rate. Call this before the backward pass of every step."""
        self._norms.clear()
        self._library.set_rate(rate)
        for parameter in self._parameters:
            parameter.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to the parameters'."""
        loss.backward()

    def average_gradients(self, processes: Processes) -> None:
        processes.average_gradients(self._parameters)

    def whole(self, changed: bool = False) -> AbstractContextManager[None]:
        """Return a context that does nothing: every process holds the whole policy."""
        return nullcontext()

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Return a context that does nothing, as ``whole`` does."""
        return nullcontext()

    def step(self) -> float:
        """Clip the gradients to norm settings.clip and step every parameter that has one.

        Return the gradient norm before clipping. With memory.step_in_backward the parameters have been stepped
        already, and this only ends the step. Raise NotFiniteError if the norm is not finite; the policy is then
        unchanged, except with memory.step_in_backward, where the backward pass raises it.
        """
        if not self._in_backward:
            self._norms = {number: _norm(p.grad) for number, p in self._with_gradients()}
        norm = self._total_norm()
        value = float(norm)
        self._check(value)
        if not self._in_backward:
            clip = self._settings.clip
            factor = None if clip is None else torch.clamp(clip / (norm + 1e-6), max=1.0)
            for number, _ in self._with_gradients():
                self._step_one(number, factor)
        self.steps += 1
        return value

    def nbytes(self) -> dict[str, int]:
        """Count the bytes of the "moments" (with scales; 0 before the first step) and of the "fp32_master"."""
        kinds = {"moments": self._moment_tensors(), "fp32_master": self._fp32_masters()}
        return {
            kind: sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            for kind, tensors in kinds.items()
        }

    def tensors(self) -> list[Tensor]:
        """Return the optimizer's own tensors, not copies, so that their data can be moved.

        The moments and fp32 master weights there are; before the first step there are no moments.
        """
        return [*self._moment_tensors(), *self._fp32_masters()]

    def average(self, settings: EmaConfig) -> PolicyAverage:
        """Return the moving average of the weights."""
        return PolicyAverage(self._parameters, self.precise_weights, settings)

    def precise_weights(self) -> Sequence[Tensor]:
        """Return the most precise value there is of each parameter: its fp32 master weight, or the parameter itself."""
        return self._weights if self._mode == "fp32_master" else self._parameters

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state under flat names, "{parameter's number}.{name}" for that of a parameter; not copies."""
        state = self._format.header(self.steps)
        for number, weight in enumerate(self._weights):
            state |= {f"{number}.{name}": value for name, value in self._library.state(number).items()}
            if self._modes[number] == "fp32_master":
                state[f"{number}.{MASTER}"] = weight.detach()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore ``state`` bit for bit; ValueError, with nothing changed, if it belongs to another setup."""
        entries = self._format.entries(state)
        self.steps = int(state[STEPS])
        for number, entry in entries.items():
            if self._modes[number] == "fp32_master":
                self._weights[number].data.copy_(entry.pop(MASTER))
            self._library.load(number, entry, self._parameters[number].device)

    def _float32_weight(self, parameter: nn.Parameter, mode: str) -> nn.Parameter:
        """Return the weight that is stepped: the parameter, its master, or a weight that is empty between steps."""
        if mode == "float32":
            return parameter
        if mode == "fp32_master":
            return nn.Parameter(take_unrounded(parameter))
        return nn.Parameter(torch.empty(0, device=parameter.device))

    def _with_gradients(self) -> list[tuple[int, nn.Parameter]]:
        return [(number, p) for number, p in enumerate(self._parameters) if p.grad is not None]

    @torch.no_grad()
    def _step_one(self, number: int, factor: Tensor | None) -> None:
        """Step one parameter by its gradient times ``factor``, and free the gradient."""
        parameter, weight, mode = self._parameters[number], self._weights[number], self._modes[number]
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        parameter.grad = None
        if factor is not None:
            gradient.mul_(factor)
        with self._preserve_reference([parameter]):
            if mode == "stochastic_rounding":
                weight.data = parameter.detach().to(torch.float32, copy=True)
            weight.grad = gradient
            del gradient
            self._library.step(number)
            weight.grad = None
            if mode == "fp32_master":
                parameter.copy_(weight.bfloat16())
            elif mode == "stochastic_rounding":
                offsets = rounding_offsets(weight, self._seed, self.steps, number)
                parameter.copy_(round_stochastically(weight.detach(), offsets))
                weight.data = weight.data.new_empty(0)

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def step_now(parameter: Tensor) -> None:
            assert number not in self._norms, (
                "a second backward pass since begin(): gradients cannot accumulate"
            )
            assert parameter.grad is not None
            self._norms[number] = _norm(parameter.grad)
            self._check(float(self._norms[number]))
            self._step_one(number, None)

        return step_now

    def _total_norm(self) -> Tensor:
        norms = [norm for _, norm in sorted(self._norms.items())]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def _check(self, norm: float) -> None:
        if math.isfinite(norm):
            return
        what_now = "the policy was not changed"
        if self._in_backward:
            what_now = "with memory.step_in_backward=true part of the policy has changed already"
        raise NotFiniteError(f"the gradient norm is {norm} at optimizer step {self.steps + 1}; {what_now}")

    def _moment_tensors(self) -> list[Tensor]:
        states = [self._library.state(number) for number in range(len(self._weights))]
        return [value for state in states for name, value in state.items() if name != STEP]

    def _fp32_masters(self) -> Sequence[Tensor]:
        return [
            weight for weight, mode in zip(self._weights, self._modes, strict=True) if mode == "fp32_master"
        ]


def _norm(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


class _Library(Protocol):
    """An AdamW that steps float32 weights separately, each by its own gradient; weights are named by their number."""

    def set_rate(self, rate: float) -> None: ...

    def step(self, number: int) -> None: ...

    def state(self, number: int) -> dict[str, Tensor]:
        """Return the counter "step" and the moments of one weight; empty before its first step."""
        ...

    def load(self, number: int, state: dict[str, Tensor], device: torch.device) -> None:
        """Copy a ``state`` back."""
        ...


class _Torch:
    """torch's AdamW, with an optimizer for each weight."""

    def __init__(self, weights: Sequence[nn.Parameter], settings: OptimizerConfig) -> None:
        arguments = (settings.lr, settings.betas, settings.eps, settings.weight_decay)
        self._weights = weights
        self._libraries = [torch.optim.AdamW([weight], *arguments, foreach=False) for weight in weights]

    def set_rate(self, rate: float) -> None:
        for library in self._libraries:
            library.param_groups[0]["lr"] = rate

    def step(self, number: int) -> None:
        self._libraries[number].step()

    def state(self, number: int) -> dict[str, Tensor]:
        return dict(self._libraries[number].state.get(self._weights[number], {}))

    def load(self, number: int, state: dict[str, Tensor], device: torch.device) -> None:
        places = {name: device if name != STEP else "cpu" for name in state}
        self._libraries[number].state[self._weights[number]] = {
            name: value.to(places[name], copy=True) for name, value in state.items()
        }


class _Bitsandbytes:
    """bitsandbytes' AdamW8bit, one optimizer for all weights, because each optimizer would have its own code tables.

    Its ``step`` would step all weights, so this calls for one weight what that calls for each. The code tables are
    constants and are not part of the state.
    """

    def __init__(self, weights: Sequence[nn.Parameter], settings: OptimizerConfig) -> None:
        from bitsandbytes.optim import AdamW8bit

        arguments = (settings.lr, settings.betas, settings.eps, settings.weight_decay)
        self._weights = weights
        self._library = AdamW8bit(list(weights), *arguments)
        self._group = self._library.param_groups[0]

    def set_rate(self, rate: float) -> None:
        self._group["lr"] = rate

    def step(self, number: int) -> None:
        weight = self._weights[number]
        if weight not in self._library.state:
            self._library.init_state(self._group, weight, 0, number)
        self._library.update_step(self._group, weight, 0, number)

    def state(self, number: int) -> dict[str, Tensor]:
        state = self._library.state.get(self._weights[number], {})
        return {name: torch.as_tensor(value) for name, value in state.items() if name not in _TABLES}

    def load(self, number: int, state: dict[str, Tensor], device: torch.device) -> None:
        weight = self._weights[number]
        self._library.state.pop(weight, None)
        if not state:
            return
        entry: dict[str, Any] = {name: value.to(device, copy=True) for name, value in state.items()}
        entry[STEP] = int(state[STEP])
        if "absmax1" in state:
            tables = self._library.name2qmap
            for place, name in _TABLES.items():
                entry[place] = tables[name] = tables[name].to(device)
        self._library.state[weight] = entry
