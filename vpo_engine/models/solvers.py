"""Solvers of sampling loops; see ``video_model.Solver``.

``FlowEuler`` and ``UniPC`` do, with explicit state, what diffusers' FlowMatchEulerDiscreteScheduler and
UniPCMultistepScheduler do. Times and noise levels are read from a scheduler of diffusers, so they are its own to the
bit. A noise level s of a flow means latents (1 - s) * clean + s * noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vpo_engine.foreign_settings import check_settings, described_by


@dataclass(frozen=True)
class EulerFlow:
    """Euler steps along a straight flow whose network predicts the velocity: latents minus noise.

    times: of each step, from ``num_timesteps`` (noise) down to 0 (clean). lengths: what each step multiplies the
    velocity by; they add up to times[0] / num_timesteps.
    """

    times: Sequence[float]
    lengths: Sequence[float]
    num_timesteps: int = 1000

    def noise_level(self, step: int) -> float:
        """Return the time of a step as a share of ``num_timesteps``."""
        return self.times[step] / self.num_timesteps

    def advance(
        self, step: int, latents: Tensor, prediction: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Follow the velocity for the length of the step; nothing is remembered."""
        return latents + prediction * self.lengths[step], memory

    def preview(self, step: int, before: Tensor, after: Tensor, prediction: Tensor) -> Tensor:
        """Follow the velocity from where the step ended to the clean latents."""
        return after + prediction * (self.times[step] / self.num_timesteps - self.lengths[step])


@dataclass(frozen=True)
class FlowEuler:
    """Euler steps along a straight flow whose network predicts noise minus latents.

    times: the time of each step, as the network is told it. levels: the noise level before each step and, last, the one
    after the last step.
    """

    times: Sequence[float]
    levels: Sequence[float]

    def noise_level(self, step: int) -> float:
        return self.levels[step]

    def advance(
        self, step: int, latents: Tensor, prediction: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Follow the prediction to the next noise level; nothing is remembered."""
        return latents + prediction * (self.levels[step + 1] - self.levels[step]), memory

    def preview(self, step: int, before: Tensor, after: Tensor, prediction: Tensor) -> Tensor:
        """Follow the prediction from where the step ended to the clean latents."""
        return after - prediction * self.levels[step + 1]


@dataclass(frozen=True)
class UniPC:
    """UniPC (arXiv 2302.04867) of order 2 with B2(h) on clean latents, for a network that predicts noise minus latents.

    times, levels: as in ``FlowEuler``; the last level is 0. A step first corrects the latents that the step before
    gave, then predicts the next ones. The first and the last prediction are of order 1; the first is that of the step
    before which nothing is remembered, wherever a loop begins. What is remembered is the corrected latents of the step,
    the clean latents that its prediction points to and, from the second step on, the clean latents of the step before.
    """

    times: Sequence[float]
    levels: Sequence[float]

    def __post_init__(self) -> None:
        """Compute the numbers of all steps now, because a plan takes the steps with tensors that have no values."""
        assert len(self._numbers) == len(self.times) == len(self.levels) - 1

    def noise_level(self, step: int) -> float:
        return self.levels[step]

    def advance(
        self, step: int, latents: Tensor, prediction: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Correct ``latents`` by what the prediction says of them, and go on to the next noise level."""
        clean = self.preview(step, latents, latents, prediction)
        if memory:
            latents = self._corrected(step, clean, *memory)
        numbers = self._numbers[step]
        after = latents * numbers.keep - clean * numbers.pull
        if memory and step < len(self.times) - 1:
            after = after - (memory[1] - clean) / numbers.ratio * 0.5 * numbers.pull
        return after, (latents, clean, *memory[1:2])

    def preview(self, step: int, before: Tensor, after: Tensor, prediction: Tensor) -> Tensor:
        """Return the clean latents that the prediction points to from where it was made."""
        return before - prediction * self.levels[step]

    def _corrected(
        self, step: int, clean: Tensor, last: Tensor, last_clean: Tensor, *earlier_clean: Tensor
    ) -> Tensor:
        """Repeat the step before ``step``, now that it is known which clean latents its end points to."""
        numbers = self._numbers[step - 1]
        if earlier_clean:
            change = (clean - last_clean) * numbers.weights[-1]
            change = (earlier_clean[0] - last_clean) / numbers.ratio * numbers.weights[0] + change
        else:
            change = (clean - last_clean) * _FIRST_ORDER
        return last * numbers.keep - last_clean * numbers.pull - change * numbers.pull

    @cached_property
    def _numbers(self) -> list[_StepNumbers]:
        return [
            _step_numbers(
                self.levels[step + 1],
                self.levels[step],
                self.levels[step - 1] if 0 < step < len(self.times) - 1 else None,
            )
            for step in range(len(self.times))
        ]


_FIRST_ORDER = 0.5
"""The weight of the corrector's only difference at order 1."""


@dataclass(frozen=True)
class _StepNumbers:
    """The numbers of one step of UniPC from noise level s to t, as Python floats with float32 values.

    The step gives keep * latents - pull * (clean + weighted differences from clean), where ``clean`` is what level s
    points to. ratio: the distance of the level before from s, in units of the step, on the scale of log signal-to-noise
    ratios. weights: those of the corrector's differences: of the level before (order 2 only), and of level t. A step of
    order 2 that begins a loop is one of order 1, which uses neither.
    """

    keep: float
    pull: float
    ratio: float
    weights: tuple[float, ...]


def _step_numbers(end: float, start: float, before: float | None) -> _StepNumbers:
    """Return the numbers of a step; before: the level before ``start``, for a step of order 2.

    The arithmetic is that of diffusers, in float32 on the CPU: near pure noise 1 - level has few digits, and other
    roundings would give visibly other samples.
    """
    level, first = torch.tensor(end), torch.tensor(start)
    h = _log_snr(level) - _log_snr(first)
    phi1 = torch.expm1(-h)
    ratio, weights = torch.ones(()), torch.full((1,), _FIRST_ORDER)
    if before is not None:
        ratio = (_log_snr(torch.tensor(before)) - _log_snr(first)) / h
        phi2 = phi1 / -h - 1
        phi3 = phi2 / -h - 1 / 2
        matrix = torch.stack([torch.ones(2), torch.stack([ratio, torch.ones(())])])
        weights = torch.linalg.solve(matrix, torch.stack([phi2 / phi1, phi3 * 2 / phi1]))
    return _StepNumbers(
        float(level / first), float((1 - level) * phi1), float(ratio), tuple(weights.tolist())
    )


def _log_snr(level: Tensor) -> Tensor:
    return torch.log(1 - level) - torch.log(level)


_PUT = "put the published scheduler_config.json there"
_REQUIRED: dict[str, dict[str, Any]] = {
    "UniPCMultistepScheduler": {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "use_dynamic_shifting": False,
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "final_sigmas_type": "zero",
        "thresholding": False,
        "disable_corrector": [],
        "solver_p": None,
        "num_train_timesteps": 1000,
    },
    "FlowMatchEulerDiscreteScheduler": {
        "invert_sigmas": False,
        "stochastic_sampling": False,
        "num_train_timesteps": 1000,
    },
}
"""The schedulers of diffusers that a solver reproduces, with the settings that they must have."""
_SHIFT = {"UniPCMultistepScheduler": "flow_shift", "FlowMatchEulerDiscreteScheduler": "shift"}
"""The settings that hold a scheduler's shift."""


def build_scheduler(name: str, config: Mapping[str, Any], source: str) -> Any:
    """Return diffusers' scheduler ``name`` with a config's settings.

    ValueError, naming ``source``, for settings that it cannot take, or by which it cannot be built.
    """
    import diffusers

    kind = getattr(diffusers, name)
    check_settings(config, kind, source, _PUT)
    with described_by(source, f"{name} that can be built", _PUT):
        return kind.from_config(dict(config))


def flow_scheduler(config: Mapping[str, Any], source: str, flow_shift: float | None = None) -> Any:
    """Return diffusers' scheduler from the content of a scheduler_config.json.

    source: names the file in errors. flow_shift: takes the place of the config's shift, also where that depends on the
    number of tokens. ValueError for a scheduler, or a setting of it, that no solver here reproduces.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _REQUIRED:
        raise ValueError(
            f"{source}: _class_name is {name}, but the engine samples this model as {' or '.join(_REQUIRED)}; "
            f"{_PUT}"
        )
    values = dict(config)
    if flow_shift is not None:
        values |= {_SHIFT[name]: flow_shift, "use_dynamic_shifting": False}
    scheduler = build_scheduler(name, values, source)
    for key, needed in _REQUIRED[name].items():
        if (found := scheduler.config[key]) != needed:
            raise ValueError(
                f"{source}: {key} is {found}, but must be {needed} for the engine's {name}; {_PUT}"
            )
    return scheduler


def shift_of(scheduler: Any, tokens: int) -> float:
    """Return s of the scheduler's map of noise levels, u -> s * u / (1 + (s - 1) * u), for videos of ``tokens``."""
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return float(config[_SHIFT[type(scheduler).__name__]])
    mu = _mu(config, tokens)
    return math.exp(mu) if config.time_shift_type == "exponential" else mu


def flow_solver(scheduler: Any, steps: int, tokens: int, *, from_one: bool = False) -> FlowEuler | UniPC:
    """Return the solver that does in ``steps`` steps what a scheduler of ``flow_scheduler`` does.

    tokens: those of a video, for a shift that depends on them. from_one: the model's pipeline gives the noise levels 1,
    1 - 1 / steps, ..., 1 / steps to the scheduler to be shifted; otherwise the scheduler starts from its own.
    """
    mu = _mu(scheduler.config, tokens) if scheduler.config.use_dynamic_shifting else None
    given: dict[str, Any] = {"num_inference_steps": steps}
    if from_one:
        given = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    with np.errstate(invalid="ignore"):
        scheduler.set_timesteps(**given, mu=mu)
    if not bool(scheduler.sigmas.isfinite().all()):
        raise ValueError(
            f"the scheduler has no noise levels for {steps} steps: shift_terminal={scheduler.config.shift_terminal} "
            "sets the last of several; sample in at least 2 steps"
        )
    kind = UniPC if has_whole_times(scheduler) else FlowEuler
    return kind(scheduler.timesteps.float().tolist(), scheduler.sigmas.tolist())


def has_whole_times(scheduler: Any) -> bool:
    """Return whether the scheduler rounds the times that it tells the network down to whole numbers."""
    return type(scheduler).__name__ == "UniPCMultistepScheduler"


def _mu(config: Mapping[str, Any], tokens: int) -> float:
    """Return the shift's exponent: linear in the number of tokens, through the two points of the config."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    return float(tokens * slope + (config["base_shift"] - slope * low))
