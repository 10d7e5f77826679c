"""Whether the prompts of a step can be shared by the processes; known before torch is loaded."""

from __future__ import annotations

from vpo_engine.config import Config


def check_shares(config: Config, processes: int) -> None:
    """Raise ValueError unless ``processes`` processes that train form whole teams with equally many prompts."""
    size = config.processes.per_prompt
    if processes % size:
        raise ValueError(
            f"processes.per_prompt={size} does not divide the {processes} processes that train; start a multiple of "
            f"{size}, or set it to a divisor of {processes}"
        )
    if config.pairs_per_step % (processes // size):
        raise uneven("pairs_per_step", config.pairs_per_step, processes // size, size)


def uneven(what: str, total: int, teams: int, size: int) -> ValueError:
    """Return the error of ``total`` items that ``teams`` teams of ``size`` processes cannot share equally."""
    who = "processes" if size == 1 else f"teams of {size} processes"
    return ValueError(f"{what}={total} cannot be shared equally by {teams} {who}; use a multiple of it")
