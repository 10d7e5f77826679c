"""The noise schedule of CogVideoX: v-prediction on 1000 integer times, the last of which is pure noise; DDIM.

``abar`` is the share of the clean latents' variance in the noised ones: 1 at the end of sampling, 0 at t = 999.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpo_engine.models.solvers import build_scheduler


class Schedule:
    """The schedule that a scheduler_config.json describes, computed by diffusers' CogVideoXDDIMScheduler.

    Raise ValueError for a schedule of another prediction type, and for settings by which none can be built.
    """

    def __init__(self, config: Mapping[str, Any], source: str = "the scheduler's config") -> None:
        """source: the file that ``config`` is from."""
        self._scheduler = build_scheduler("CogVideoXDDIMScheduler", config, source)
        if self._scheduler.config.prediction_type != "v_prediction":
            raise ValueError(
                f"the scheduler's prediction_type is {self._scheduler.config.prediction_type}, and CogVideoX-2B's is "
                "v_prediction; give the scheduler_config.json of the model"
            )
        self.abar: Tensor = self._scheduler.alphas_cumprod.double()
        self.num_times = len(self.abar)
        self._scales: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar) and sqrt(1 - abar) at integer times t [B], float32 [B]."""
        if t.device not in self._scales:
            kept, added = self.abar.sqrt(), (1 - self.abar).sqrt()
            self._scales[t.device] = (kept.float().to(t.device), added.float().to(t.device))
        kept, added = self._scales[t.device]
        index = t.long()
        return kept[index], added[index]

    def draw(self, u: Tensor) -> Tensor:
        """Map uniform numbers in (0, 1) to all integer times with equal probability, in float32."""
        return (u * self.num_times).floor().clamp(0, self.num_times - 1).float()

    def solver(self, steps: int) -> DDIM:
        """Return DDIM in ``steps`` steps; ValueError for more steps than there are times."""
        if steps > self.num_times:
            raise ValueError(
                f"{steps} sampling steps are more than the model's {self.num_times} times; set rollout.steps to "
                f"{self.num_times} or less"
            )
        self._scheduler.set_timesteps(steps)
        times = [int(time) for time in self._scheduler.timesteps]
        before = [time - self.num_times // steps for time in times]
        last = float(self._scheduler.final_alpha_cumprod)
        return DDIM(
            times,
            [float(self.abar[time]) for time in times],
            [float(self.abar[time]) if time >= 0 else last for time in before],
        )


@dataclass(frozen=True)
class DDIM:
    """DDIM without noise (arXiv 2010.02502), for a network that predicts v = sqrt(abar) noise - sqrt(1 - abar) x0.

    times: of each step. abar, next_abar: before and after each step.
    """

    times: Sequence[float]
    abar: Sequence[float]
    next_abar: Sequence[float]

    def noise_level(self, step: int) -> float:
        """Return the standard deviation of the noise, which is 1 at the start."""
        return (1 - self.abar[step]) ** 0.5

    def advance(
        self, step: int, latents: Tensor, prediction: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Keep the noise that the prediction points to, at the next step's level; nothing is remembered."""
        abar, following = self.abar[step], self.next_abar[step]
        kept = ((1 - following) / (1 - abar)) ** 0.5
        clean = following**0.5 - abar**0.5 * kept
        return kept * latents + clean * self.preview(step, latents, latents, prediction), memory

    def preview(self, step: int, before: Tensor, after: Tensor, prediction: Tensor) -> Tensor:
        """Return the clean latents x0 = sqrt(abar) x - sqrt(1 - abar) v."""
        abar = self.abar[step]
        return abar**0.5 * before - (1 - abar) ** 0.5 * prediction
