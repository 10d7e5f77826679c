"""AdamW one parameter at a time, over float32 weights, float32 masters or bfloat16 weights alone.

A library's optimizer for each parameter (torch's, or bitsandbytes' with 8-bit moments) makes a step of it alone
possible: inside the backward pass, in float32 memory that is there only for that step, and under the eyes of a
reference that follows every change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from vpo_engine.config import MemoryConfig, OptimizerConfig
from vpo_engine.memory.rounding import round_stochastically, rounding_offsets, take_unrounded

Following = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]

_WEIGHTS: tuple[str, ...] = get_args(MemoryConfig.model_fields["weights"].annotation)
_MASTER = "master"
_STEPS, _SETUP = "steps", "setup"
_BLOCK = 256
"""Elements that share a scale in bitsandbytes' 8-bit moments."""


def learning_rate(settings: OptimizerConfig, step: int, steps: int) -> float:
    """Of optimizer step ``step`` (from 0) in a run of ``steps``: linear warm-up, then a straight line down to
    ``final_lr`` of the peak at the last step."""
    warmup, left = settings.warmup_steps, max(1, steps - 1 - settings.warmup_steps)
    if step < warmup:
        return settings.lr * ((step + 1) / (warmup + 1))
    return settings.lr * (1 - (1 - settings.final_lr) * min(1.0, (step - warmup) / left))


class PolicyOptimizer:
    """AdamW (``settings``) over ``parameters``, whose weights are held as ``memory.weights`` says.

    float32: the parameters are stepped themselves. masters: a float32 master of each is stepped, and the parameter
    gets it rounded to the nearest bfloat16 value. stochastic: a parameter is float32 during its own step only, and
    rounded stochastically to bfloat16 after it, by random numbers that are a function of ``seed``, the step and the
    parameter's number: the same in every process, in a rerun and after a resume.

    With memory.optimizer_bits=8 the moments are bitsandbytes', which keeps those of parameters of fewer than 4096
    elements in 32 bits. All parameters are on one device. ``following([parameter])`` is entered around each change
    of one. Gradients are consumed: a parameter's is gone once it has been stepped.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        settings: OptimizerConfig,
        memory: MemoryConfig,
        *,
        seed: int,
        following: Following,
    ) -> None:
        self.steps = 0
        self._parameters, self._settings, self._mode = list(parameters), settings, memory.weights
        self._seed, self._following = seed, following
        self._bits = memory.optimizer_bits
        self._weights = [self._float32_weight(parameter) for parameter in self._parameters]
        self._libraries = [_library(weight, settings, self._bits) for weight in self._weights]
        self._in_backward = memory.step_in_backward
        self._norms: dict[int, Tensor] = {}
        if self._in_backward:
            for number, parameter in enumerate(self._parameters):
                parameter.register_post_accumulate_grad_hook(self._hook(number))

    def begin(self, rate: float) -> None:
        """Forget all gradients and set the learning rate: to be called before the backward pass of every step."""
        self._norms.clear()
        for parameter, library in zip(self._parameters, self._libraries, strict=True):
            parameter.grad = None
            for group in library.param_groups:
                group["lr"] = rate

    def step(self) -> float:
        """Clip the gradients to norm settings.clip, step every parameter that has one; the norm before clipping.

        Stepping in the backward pass, only the end of a step: all parameters have been stepped already. ValueError
        if the norm is not finite; the policy is then as it was, except when stepping in the backward pass.
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
        """Bytes of the "moments" (with what belongs to them; they are made in the first step) and the "masters"."""
        masters = self._weights if self._mode == "masters" else []
        moments = [
            tensor for number in range(len(self._weights)) for tensor in self._moments(number).values()
        ]
        return {"moments": _bytes(moments), "masters": _bytes(masters)}

    def tensors(self) -> list[Tensor]:
        """The moments and masters there are, as the objects that the optimizer holds: for moving their data."""
        moments = [self._moments(number) for number in range(len(self._weights))]
        masters = self._weights if self._mode == "masters" else []
        return [*(value for one in moments for name, value in one.items() if name != "step"), *masters]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything under flat names, "{parameter's number}.{name}" for what belongs to one; not copies."""
        setup = [_WEIGHTS.index(self._mode), self._bits, len(self._parameters)]
        state = {_SETUP: torch.tensor(setup), _STEPS: torch.tensor(self.steps)}
        for number, weight in enumerate(self._weights):
            state |= {f"{number}.{name}": value for name, value in self._moments(number).items()}
            if self._mode == "masters":
                state[f"{number}.{_MASTER}"] = weight.detach()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state``, bit for bit; ValueError, with nothing changed, if it is not one of this setup."""
        entries = self._checked(state)
        self.steps = int(state[_STEPS])
        for number, (weight, library) in enumerate(zip(self._weights, self._libraries, strict=True)):
            entry = dict(entries.get(number, {}))
            if self._mode == "masters":
                weight.data.copy_(entry.pop(_MASTER))
            library.state.pop(weight, None)
            if entry:
                library.state[weight] = _library_state(library, entry, self._parameters[number].device)

    def _float32_weight(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the library steps: the parameter, its master, or a float32 weight that is empty between steps."""
        if self._mode == "float32":
            return parameter
        if self._mode == "masters":
            return nn.Parameter(take_unrounded(parameter))
        return nn.Parameter(torch.empty(0, device=parameter.device))

    def _with_gradients(self) -> list[tuple[int, nn.Parameter]]:
        return [(number, p) for number, p in enumerate(self._parameters) if p.grad is not None]

    @torch.no_grad()
    def _step_one(self, number: int, factor: Tensor | None) -> None:
        """One parameter by its gradient times ``factor``, which is consumed."""
        parameter, weight = self._parameters[number], self._weights[number]
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        parameter.grad = None
        if factor is not None:
            gradient.mul_(factor)
        with self._following([parameter]):
            if self._mode == "stochastic":
                weight.data = parameter.detach().to(torch.float32, copy=True)
            weight.grad = gradient
            del gradient
            self._libraries[number].step()
            weight.grad = None
            if self._mode == "masters":
                parameter.copy_(weight.bfloat16())
            elif self._mode == "stochastic":
                offsets = rounding_offsets(weight, self._seed, self.steps, number)
                parameter.copy_(round_stochastically(weight.detach(), offsets))
                weight.data = weight.data.new_empty(0)

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def step_now(parameter: Tensor) -> None:
            assert number not in self._norms, "a second backward pass since begin(): gradients cannot add up"
            assert parameter.grad is not None
            self._norms[number] = _norm(parameter.grad)
            self._step_one(number, None)

        return step_now

    def _total_norm(self) -> Tensor:
        norms = [norm for _, norm in sorted(self._norms.items())]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def _check(self, norm: float) -> None:
        if math.isfinite(norm):
            return
        what_now = "the policy was left as it was"
        if self._in_backward:
            what_now = (
                "with memory.step_in_backward=true the policy is already partly changed: resume from the last "
                "checkpoint"
            )
        raise ValueError(
            f"the gradient norm is {norm} at optimizer step {self.steps + 1}; {what_now}. "
            "Lower optimizer.lr or objective.beta, or look for non-finite latents"
        )

    def _moments(self, number: int) -> dict[str, Tensor]:
        """The library's state of one parameter; empty before its first step. Its constant code tables are left out."""
        state = self._libraries[number].state.get(self._weights[number], {})
        return {name: torch.as_tensor(value) for name, value in state.items() if "qmap" not in name}

    def _checked(self, state: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """``state`` by parameter."""
        self._check_setup(state)
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key not in (_SETUP, _STEPS):
                owner, name = key.split(".", 1)
                entries.setdefault(int(owner), {})[name] = value
        for number, parameter in enumerate(self._parameters):
            self._check_entry(number, parameter, entries.get(number, {}))
        return entries

    def _check_setup(self, state: dict[str, Tensor]) -> None:
        if _SETUP not in state or _STEPS not in state:
            raise ValueError(
                f"an optimizer state without {_SETUP!r} and {_STEPS!r}: it was not saved by this engine"
            )
        weights, bits, count = state[_SETUP].tolist()
        saved = f"memory.weights={_WEIGHTS[weights]}, memory.optimizer_bits={bits} and {count} parameters"
        mine = f"memory.weights={self._mode}, memory.optimizer_bits={self._bits} and {len(self._parameters)} parameters"
        if saved != mine:
            raise ValueError(
                f"the optimizer state was saved with {saved}, but this run has {mine}; resume with the saved ones"
            )

    def _check_entry(self, number: int, parameter: nn.Parameter, entry: dict[str, Tensor]) -> None:
        for name, shape in self._shapes(parameter, entry).items():
            given = tuple(entry[name].shape) if name in entry else "missing"
            if given != shape:
                raise ValueError(
                    f"optimizer state {number}.{name}: {given}, but parameter {number} of shape "
                    f"{tuple(parameter.shape)} needs {shape}; the state belongs to another network"
                )

    def _shapes(self, parameter: nn.Parameter, entry: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """What an entry must hold: nothing but a master if the parameter has never been stepped."""
        shape = tuple(parameter.shape)
        shapes = {_MASTER: shape} if self._mode == "masters" else {}
        if "step" not in entry:
            return shapes
        names = ("exp_avg", "exp_avg_sq") if self._bits == 32 else ("state1", "state2")
        shapes |= {"step": (), names[0]: shape, names[1]: shape}
        if self._bits == 8 and entry[names[0]].dtype == torch.uint8:
            blocks = (-(-parameter.numel() // _BLOCK),)
            shapes |= {"absmax1": blocks, "absmax2": blocks}
        return shapes


def _norm(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _library(weight: nn.Parameter, settings: OptimizerConfig, bits: int) -> torch.optim.Optimizer:
    """AdamW over one weight, by torch or, with 8-bit moments, by bitsandbytes."""
    arguments = ([weight], settings.lr, settings.betas, settings.eps, settings.weight_decay)
    if bits == 32:
        return torch.optim.AdamW(*arguments, foreach=False)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(*arguments)


def _library_state(
    library: torch.optim.Optimizer, entry: dict[str, Tensor], device: torch.device
) -> dict[str, Any]:
    """What the library keeps of its weight, from a saved entry."""
    moments = {name: value.to(device, copy=True) for name, value in entry.items() if name != "step"}
    if isinstance(library, torch.optim.AdamW):
        return {"step": entry["step"].clone(), **moments}
    tables = library.name2qmap  # type: ignore[attr-defined]
    codes = {"qmap1": tables["dynamic"], "qmap2": tables["udynamic"]} if "absmax1" in entry else {}
    return {"step": int(entry["step"]), **moments, **{name: code.to(device) for name, code in codes.items()}}
