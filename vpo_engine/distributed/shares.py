"""Checks of whether the processes can share the prompts of a step, made before torch is loaded."""

from __future__ import annotations

from vpo_engine.config import Config


def check_shares(config: Config, processes: int) -> None:
    """Raise ValueError unless ``processes`` processes that train form whole teams with equally many prompts."""
    size, sequence = config.processes.per_prompt, config.distributed.sequence_parallel
    check_teams(size, sequence, processes)
    teams = processes // (size * sequence)
    if config.pairs_per_step % teams:
        raise uneven("pairs_per_step", config.pairs_per_step, teams, size * sequence)


def check_teams(size: int, sequence: int, processes: int) -> None:
    """Raise ValueError unless ``processes`` is a multiple of a team: ``size`` units of ``sequence`` processes each."""
    members = size * sequence
    if processes % members == 0:
        return
    parts = {"distributed.sequence_parallel": sequence, "processes.per_prompt": size}
    named = " times ".join(f"{name}={number}" for name, number in parts.items() if number > 1)
    who = "one process that trains" if processes == 1 else f"{processes} processes that train"
    raise ValueError(
        f"{named} does not divide the {who}; start a multiple of {members} with torchrun, or set "
        f"{'them so that their product is' if size > 1 and sequence > 1 else 'it to'} "
        f"{'1' if processes == 1 else f'a divisor of {processes}'}"
    )


def uneven(what: str, total: int, teams: int, size: int) -> ValueError:
    """Return the error of ``total`` items that ``teams`` teams of ``size`` processes cannot share equally."""
    who = "processes" if size == 1 else f"teams of {size} processes"
    return ValueError(f"{what}={total} cannot be shared equally by {teams} {who}; use a multiple of it")
