"""Settings of the log."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from vpo_engine.config.section import Section


def _check_project(name: str) -> str:
    if name.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0"):
        raise ValueError(
            "must be the name of a project, for example log.wandb=video-dpo; null switches wandb off"
        )
    if not re.fullmatch(r"([^/\\#?%:\s]+/)?[^/\\#?%:]{1,128}", name):
        raise ValueError(
            "must be PROJECT or ENTITY/PROJECT, without the characters \\ # ? % : and with at most 128 letters"
        )
    return name


class LogConfig(Section):
    """Settings of where the numbers of a run go, beside metrics.jsonl and TensorBoard in its run directory."""

    wandb: Annotated[str, AfterValidator(_check_project)] | None = None
    """Project of Weights & Biases, as PROJECT or ENTITY/PROJECT, that gets the numbers and the held-out videos too;
    null: none. It needs the package wandb. With WANDB_MODE=offline in the environment nothing is sent; all is kept in
    the run directory."""
