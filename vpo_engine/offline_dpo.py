"""Offline Diffusion-DPO (arXiv 2311.12908): the update of OnlineVPO, on pairs that are there before the first step.

for each step:
    take the next pairs of winner and loser                     rollout/preference_dataset.py
    one Diffusion-DPO update on their latents                   objectives/dpo.py

The reference is the policy that the run starts from, and stays so.
"""

from __future__ import annotations

from collections.abc import Sequence

from vpo_engine.config import Config
from vpo_engine.data.prompt_record import Texts
from vpo_engine.data.prompts import Prompts
from vpo_engine.method import Stream
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.rollout.preference_dataset import StoredPairs
from vpo_engine.values import Choice, Prompt


class OfflineDPO(OnlineVPO):
    """OnlineVPO's update on stored pairs; no step samples a video."""

    stream: StoredPairs

    @classmethod
    def open_stream(cls, config: Config, prompts: Prompts) -> tuple[Stream, Texts]:
        settings = config.offline_dpo
        assert settings is not None
        assert settings.dataset is not None
        stored = StoredPairs(settings.dataset, config.pairs.min_gap)
        return stored, {"offline_dpo.dataset": stored.texts()}

    def _choose(self, prompts: Sequence[Prompt]) -> list[Choice]:
        return self.stream.choices(prompts, self.model.latent_shape, self.processes.device)

    @property
    def _videos(self) -> int:
        return 0
