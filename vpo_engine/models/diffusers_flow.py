"""The base class of flow-matching families of diffusers, whose networks predict noise minus clean latents."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vpo_engine.models.diffusers_facts import Setup
from vpo_engine.models.diffusers_model import DiffusersModel
from vpo_engine.models.rehearsal import REHEARSED, rehearse_solver, rehearsing
from vpo_engine.models.solvers import (
    FlowEuler,
    UniPC,
    flow_scheduler,
    flow_solver,
    has_whole_times,
    shift_of,
)
from vpo_engine.video_model import TextSource


class FlowModel(DiffusersModel):
    """A ``DiffusersModel`` whose noisy latents are (1 - s) * clean + s * noise at time 1000 * s.

    The scheduler of the pipeline's folder says how it is sampled and by how much noise levels are shifted. Training
    draws levels uniformly and shifts them alike, so it meets them as often as sampling does (diffusers has no training
    rule of its own). Where the scheduler rounds times down to whole numbers (UniPC), the network is always told whole
    times, in rollouts, by the policy and by the reference; the latents are noised by the unrounded ones.
    """

    levels_from_one: ClassVar[bool] = False
    """Whether the pipeline gives the scheduler the levels 1 to 1 / steps; see ``flow_solver``."""

    def __init__(
        self,
        network: nn.Module,
        vae: nn.Module,
        text: TextSource,
        setup: Setup,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(network, vae, text, setup, device=device, dtype=dtype)
        self._scheduler: Any = flow_scheduler(setup.scheduler, setup.sources.scheduler, setup.flow_shift)
        self.tokens = math.prod(self.latent_shape[1:])
        self._whole_times = has_whole_times(self._scheduler)

    @classmethod
    def check_configs(cls, setup: Setup) -> None:
        """See ``DiffusersModel``. The scheduler must be one that a solver reproduces, and have noise levels."""
        source, tokens = setup.sources.scheduler, math.prod(cls.latent_size(setup)[1:])
        scheduler = flow_scheduler(setup.scheduler, source, setup.flow_shift)
        with rehearsing(source, "scheduler"):
            shift_of(scheduler, tokens)
            solver = flow_solver(scheduler, REHEARSED, tokens, from_one=cls.levels_from_one)
        rehearse_solver(solver, source)

    @property
    def shift(self) -> float:
        """Return s of the shift of noise levels u -> s * u / (1 + (s - 1) * u)."""
        return shift_of(self._scheduler, self.tokens)

    def network_time(self, t: Tensor) -> Tensor:
        return t.floor() if self._whole_times else t

    def draw_timesteps(self, u: Tensor) -> Tensor:
        """Map uniform numbers to times 1000 * s * u / (1 + (s - 1) * u), with the shift s of sampling."""
        return 1000 * self.shift * u / (1 + (self.shift - 1) * u)

    def noising_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t / 1000, t / 1000

    def target_scales(self, t: Tensor) -> tuple[float, float]:
        return -1.0, 1.0

    def _time_before(self, steps: int, step: int) -> float:
        """See ``BaseModel``. Some solvers round the times that the network is told; the noise level is not rounded."""
        return 1000 * self.solver(steps).noise_level(step)

    def solver(self, steps: int) -> FlowEuler | UniPC:
        return flow_solver(self._scheduler, steps, self.tokens, from_one=self.levels_from_one)
