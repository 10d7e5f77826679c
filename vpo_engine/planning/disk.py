"""The plan of a run's disk, without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from vpo_engine.config import Config
from vpo_engine.data.prompt_settings import count_prompts
from vpo_engine.models.policy import prepare_policy
from vpo_engine.planning.parts import Assumed, blueprint_of
from vpo_engine.video_model import VideoModel

Told = TypeVar("Told")


def planned_disk(
    config: Config, tell: Callable[[Config, VideoModel, int], Told], prompts: int | None = None
) -> Told:
    """Return what ``tell`` makes of the configured model without weights and of the number of training prompts.

    prompts: that number; None to count those of the file if it is here, else each position of the run has another one.
    """
    model = blueprint_of(config, Assumed()).model
    prepare_policy(model.network, config, model.card, model.dtype)
    file, positions = config.prompts.train, config.steps * config.pairs_per_step
    if prompts is None and file is not None and file.is_file():
        prompts = count_prompts(file, config.prompts.column)
    return tell(config, model, positions if prompts is None else prompts)
