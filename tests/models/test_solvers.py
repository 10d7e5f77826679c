"""The solvers of flow models against diffusers' schedulers: step by step, cut and resumed, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from vpo_engine.models.rehearsal import rehearse_solver
from vpo_engine.models.solvers import FlowEuler, UniPC, flow_scheduler, flow_solver, shift_of

UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
"""What stands in the scheduler folder of Wan 2.1, where it differs from the defaults."""
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DYNAMIC = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
"""What stands in the scheduler folder of LTX-Video."""


def predict(latents: Tensor, time: float) -> Tensor:
    """Stand in for a network: smooth, not linear, and different at each time."""
    return torch.sin(2 * latents + time / 300) - 0.3 * latents


def start(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 4, 2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)


def sampled_by(scheduler: Any, steps: int, dtype: torch.dtype, **given: Any) -> list[Tensor]:
    """Return the latents after each step of the scheduler's own loop."""
    scheduler.set_timesteps(**({"num_inference_steps": steps} | given))
    latents, found = start(dtype), []
    for time in scheduler.timesteps:
        latents = scheduler.step(predict(latents, float(time)), time, latents, return_dict=False)[0]
        found.append(latents)
    return found


def sampled(solver: FlowEuler | UniPC, dtype: torch.dtype) -> list[Tensor]:
    latents, memory, found = start(dtype), (), []
    for step, time in enumerate(solver.times):
        latents, memory = solver.advance(step, latents, predict(latents, time), memory)
        found.append(latents)
    return found


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# Both sides round alike but for the order of one sum, so a step adds at most a few roundings.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (2, 3.0), (3, 5.0), (11, 3.0), (20, 1.0), (50, 8.0)])
def test_unipc_does_each_step_of_diffusers(
    steps: int, shift: float, dtype: torch.dtype, tolerance: float
) -> None:
    solver = flow_solver(flow_scheduler(UNIPC, "a file", shift), steps, 1)
    assert isinstance(solver, UniPC)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    assert_equal(sampled(solver, dtype), sampled_by(scheduler, steps, dtype), tolerance)
    assert [float(time) for time in scheduler.timesteps] == list(solver.times)
    assert all(time == int(time) for time in solver.times)  # the network is told whole times, cut off


@pytest.mark.parametrize(("steps", "first"), [(8, 0), (8, 3), (8, 6), (8, 7), (20, 8)])
def test_unipc_that_begins_in_the_middle_does_each_step_of_diffusers(steps: int, first: int) -> None:
    """As after ``set_begin_index``: the first step remembers nothing, so it and its correction are of order 1."""
    solver = flow_solver(flow_scheduler(UNIPC, "a file", 3.0), steps, 1)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(first)
    found, expected, memory = [start(torch.float64)], [start(torch.float64)], ()
    for step in range(first, steps):
        time = scheduler.timesteps[step]
        prediction = predict(expected[-1], float(time))
        expected.append(scheduler.step(prediction, time, expected[-1], return_dict=False)[0])
        prediction = predict(found[-1], solver.times[step])
        latents, memory = solver.advance(step, found[-1], prediction, memory)
        found.append(latents)
    assert_equal(found, expected, 1e-12)


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_euler_with_a_static_shift_does_each_step_of_diffusers(steps: int) -> None:
    """The scheduler starts from levels that are shifted already, and shifts them again: its last time is 8.9, not 1."""
    solver = flow_solver(flow_scheduler(EULER, "a file"), steps, 1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert_equal(sampled(solver, torch.float32), sampled_by(scheduler, steps, torch.float32), 1e-6)


@pytest.mark.parametrize("tokens", [64, 1024, 7392])
def test_euler_with_a_shift_by_tokens_does_each_step_of_diffusers(tokens: int) -> None:
    steps = 12
    scheduler = flow_scheduler(DYNAMIC, "a file")
    solver = flow_solver(scheduler, steps, tokens, from_one=True)
    own = FlowMatchEulerDiscreteScheduler(
        **{key: value for key, value in DYNAMIC.items() if key != "_class_name"}
    )
    mu = 0.95 + (tokens - 1024) * (2.05 - 0.95) / (4096 - 1024)
    expected = sampled_by(own, steps, torch.float32, sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    assert_equal(sampled(solver, torch.float32), expected, 1e-6)
    assert solver.levels[-2] == pytest.approx(0.1)  # shift_terminal
    assert shift_of(scheduler, tokens) == pytest.approx(np.exp(mu))


@pytest.mark.parametrize("config", [UNIPC, EULER, DYNAMIC])
def test_a_given_shift_takes_the_place_of_the_schedulers(config: dict[str, Any]) -> None:
    scheduler = flow_scheduler(config, "a file", 7.5)
    assert shift_of(scheduler, 99) == 7.5
    if "shift_terminal" not in config:
        middle = flow_solver(scheduler, 4, 99, from_one=True).levels[2]
        assert middle == pytest.approx(7.5 * 0.5 / (1 + 6.5 * 0.5))


def test_the_shift_is_the_schedulers_unless_it_is_given() -> None:
    assert shift_of(flow_scheduler(UNIPC, "a file"), 1) == 3.0
    assert shift_of(flow_scheduler(EULER | {"shift": 2.5}, "a file"), 1) == 2.5


@pytest.mark.parametrize("config", [UNIPC, EULER])
def test_a_cut_loop_goes_on_bit_for_bit_from_its_latents_and_memory(config: dict[str, Any]) -> None:
    """Nothing else is remembered: another solver object goes on, for a choice of the samples."""
    steps, chosen = 7, torch.tensor([2, 0])
    whole = sampled(flow_solver(flow_scheduler(config, "a file"), steps, 1), torch.float32)
    for cut in range(1, steps):
        latents, memory = start(torch.float32), ()
        for step in range(steps):
            if step == cut:
                latents, memory = latents[chosen], tuple(one[chosen] for one in memory)
            solver = flow_solver(flow_scheduler(config, "a file"), steps, 1)
            latents, memory = solver.advance(step, latents, predict(latents, solver.times[step]), memory)
        assert torch.equal(latents, whole[-1][chosen])


@pytest.mark.parametrize("config", [UNIPC, EULER])
def test_a_preview_is_where_the_prediction_points(config: dict[str, Any]) -> None:
    """For a prediction of noise - clean that knows the clean latents, every preview is them, and so is the end."""
    clean, noise = start(torch.float64), start(torch.float64).flip(0)
    solver = flow_solver(flow_scheduler(config, "a file"), 9, 1)
    latents, memory = (1 - solver.levels[0]) * clean + solver.levels[0] * noise, ()
    for step in range(9):
        assert solver.noise_level(step) == solver.levels[step]
        before, prediction = latents, noise - clean
        latents, memory = solver.advance(step, before, prediction, memory)
        preview = solver.preview(step, before, latents, prediction)
        torch.testing.assert_close(preview, clean, rtol=0, atol=1e-6)
    torch.testing.assert_close(latents, clean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "DDIMScheduler"}, r"scheduler\.json: _class_name is DDIMScheduler, .* UniPC"),
        ({"solver_order": 3}, r"scheduler\.json: solver_order is 3, but must be 2"),
        ({"prediction_type": "epsilon"}, r"prediction_type is epsilon, but must be flow_prediction"),
        ({"final_sigmas_type": "sigma_min"}, r"final_sigmas_type is sigma_min, but must be zero"),
        ({"disable_corrector": [0]}, r"disable_corrector is \[0\], but must be \[\]"),
    ],
)
def test_schedulers_that_no_solver_reproduces_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        flow_scheduler(UNIPC | change, "scheduler.json")


def test_one_step_has_no_levels_that_end_at_a_terminal_shift() -> None:
    with pytest.raises(
        ValueError, match=r"no noise levels for 1 steps: shift_terminal=0\.1 .* at least 2 steps"
    ):
        flow_solver(flow_scheduler(DYNAMIC, "a file"), 1, 64, from_one=True)


@pytest.mark.parametrize("levels", [(0.5, 0.9, 0.0), (0.5, 0.5, 0.0), (1.5, 0.5, 0.0), (0.5, -0.1, 0.0)])
def test_a_rehearsal_refuses_noise_that_does_not_fall_from_1_to_0(levels: tuple[float, ...]) -> None:
    rehearse_solver(FlowEuler([1000.0, 500.0], [1.0, 0.5, 0.0]), "a file")
    with pytest.raises(
        ValueError, match=r"a file does not describe a scheduler that can run .*falls from 1 to 0"
    ):
        rehearse_solver(FlowEuler([1000.0, 500.0], levels), "a file")


def test_a_linear_shift_is_the_same_in_training_and_in_sampling() -> None:
    config = {name: value for name, value in DYNAMIC.items() if name != "shift_terminal"}
    scheduler = flow_scheduler(config | {"time_shift_type": "linear"}, "a file")
    shift = 0.95 + (2000 - 1024) * (2.05 - 0.95) / (4096 - 1024)
    assert shift_of(scheduler, 2000) == pytest.approx(shift)
    middle = flow_solver(scheduler, 4, 2000, from_one=True).levels[2]
    assert middle == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))
