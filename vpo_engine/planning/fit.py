"""Find, by planning with them, the settings and the number of frames with which a run fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vpo_engine.config import Config
from vpo_engine.models.registry import check_model, model_family
from vpo_engine.planning.estimate import COMPUTED, FRAGMENTATION, Plan
from vpo_engine.planning.trace import PHASES

Planner = Callable[[Config], Plan]

_ROLLOUT, _UPDATE = ("rollout", "decode"), ("update",)
_SAMPLED_OR_TRAINED = (*_ROLLOUT, *_UPDATE)
"""Methods that follow the gradient of a reward sample in micro-batches, and decode in the update."""
_EVERYWHERE = PHASES
_PARTS = ("weights", "optimizer", "ema", "reference", "vae", "reward", "judge")

CHANGES: tuple[tuple[str, Any, Sequence[str], Sequence[str]], ...] = (
    ("memory.offload_idle", True, _EVERYWHERE, _PARTS),
    ("ema.on_host", True, _EVERYWHERE, ("ema",)),
    ("rollout.overlap", False, _ROLLOUT, COMPUTED),
    ("objective.micro_batch_size", 1, _SAMPLED_OR_TRAINED, COMPUTED),
    ("rollout.batch_size", 4, _ROLLOUT, COMPUTED),
    ("rollout.batch_size", 1, _ROLLOUT, COMPUTED),
    ("reward.batch_size", 1, ("rollout", "reward"), COMPUTED),
    ("memory.decode_frames", 1, _SAMPLED_OR_TRAINED, COMPUTED),
    ("memory.decode_strip_height", 16, _ROLLOUT, COMPUTED),
    ("memory.mlp_chunks", 4, ("rollout", "update"), COMPUTED),
    ("memory.sequential", True, _UPDATE, COMPUTED),
    ("memory.activation_checkpointing", "block", _UPDATE, COMPUTED),
    ("memory.offload_activations", True, _UPDATE, COMPUTED),
    ("reference.storage", "bf16", _EVERYWHERE, ("reference",)),
    ("reference.storage", "exact8", _EVERYWHERE, ("reference",)),
    ("memory.optimizer_bits", 8, _EVERYWHERE, ("optimizer",)),
    ("memory.weights", "stochastic_rounding", _EVERYWHERE, (*_PARTS, *COMPUTED, "gradients")),
    ("memory.base_bits", 8, _EVERYWHERE, ("weights",)),
    ("reward.bits", 8, _EVERYWHERE, ("reward",)),
    ("reference.storage", "int8", _EVERYWHERE, ("reference",)),
    ("memory.base_bits", 4, _EVERYWHERE, ("weights",)),
    ("reward.bits", 4, _EVERYWHERE, ("reward",)),
)
"""Settings that take less memory, the cheapest first: those that only move or reorder work, then those that compute or
copy more, then those that round. With each stand the phases and the categories that it can reduce."""


@dataclass(frozen=True)
class Change:
    """A changed setting, and the plan with that setting."""

    name: str
    value: Any
    plan: Plan

    def __str__(self) -> str:
        shown = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.name}={shown}"


def with_setting(config: Config, name: str, value: Any) -> Config | None:
    """Return the configuration with one setting changed.

    None if it has that value, if another setting excludes it, or if the model's family does not have it.
    """
    section, key = name.split(".")
    values = config.model_dump()
    if values[section][key] == value:
        return None
    values[section][key] = value
    try:
        changed = Config.model_validate(values)
        check_model(changed)
    except ValueError:
        return None
    return changed


def fitting_changes(config: Config, plan: Plan, planner: Planner) -> Iterator[Change]:
    """Yield the single settings that make a run fit which does not, the cheapest first."""
    for name, value, phases, categories in CHANGES:
        if not _could_suffice(plan, phases, categories) or _takes_more(config, name, value):
            continue
        changed = with_setting(config, name, value)
        if changed is not None:
            found = planner(changed)
            if found.fits:
                yield Change(name, value, found)


def _could_suffice(plan: Plan, phases: Sequence[str], categories: Sequence[str]) -> bool:
    """Return whether every phase would fit if these categories took nothing in these phases.

    Settings that cannot suffice need not be planned.
    """
    for phase in plan.phases:
        lessened = sum(phase.bytes.get(name, 0) for name in categories) if phase.name in phases else 0
        if phase.total - (1 + FRAGMENTATION) * lessened > plan.limit:
            return False
    return True


def _takes_more(config: Config, name: str, value: Any) -> bool:
    """Return whether a batch size, a number of frames or bits is at or below ``value`` already; None means all of
    them."""
    section, key = name.split(".")
    now = getattr(getattr(config, section), key)
    return key.endswith(("batch_size", "strip_height", "frames", "bits")) and now is not None and now <= value


def with_granted_batch_size(config: Config, planner: Planner, processes: int = 1) -> Config:
    """Replace rollout.batch_size=auto by the number that the plan grants.

    That is all candidates of a process's step, or else the most whole prompts, or even parts of one, with which
    sampling and decoding fit. It is 1 if not even one fits.
    """
    if config.rollout.batch_size != "auto" or not config.card.candidates:
        return config
    team = config.processes.per_prompt * config.distributed.sequence_parallel
    each = max(1, config.rollout.candidates // config.processes.sharers)
    prompts = max(1, config.pairs_per_step * team // processes)
    choices = [*_halvings(each)[:0:-1], *(each * number for number in reversed(_halvings(prompts)))]

    def fits(changed: Config) -> bool:
        plan = planner(changed)
        return all(phase.total <= plan.limit for phase in plan.phases if phase.name in _ROLLOUT)

    if fits(everything := _with_batch_size(config, None)):
        return everything
    low, high = 0, len(choices) - 1  # choices[high] does not fit; choices[low] does, if any
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(_with_batch_size(config, choices[middle])) else (low, middle)
    return _with_batch_size(config, choices[low])


def _halvings(number: int) -> list[int]:
    """Return the number, its half rounded up, and so on down to 1."""
    found = [number]
    while found[-1] > 1:
        found.append(-(-found[-1] // 2))
    return found


def _with_batch_size(config: Config, rows: int | None) -> Config:
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"batch_size": rows})})


def most_frames(config: Config, resolution: str, planner: Planner) -> int:
    """Return the most frames with which the run fits at ``resolution``; 0 if not even the fewest fit.

    Counted are whole groups of frames, as the model's ``SizeRule`` has them. Every phase grows with the frames in
    nearly a straight line: two plans give a guess, and more confirm that it fits and that a group more does not. With
    rollout.batch_size=auto that is a batch of one: any run that fits at all fits so. Raise ValueError for a model
    whose videos have one size.
    """
    card = model_family(config.model.kind).card
    if not card.resolutions:
        raise ValueError(
            f"{card.name} has videos of one size; the most frames are planned for models with several sizes"
        )
    if config.rollout.batch_size == "auto":
        config = _with_batch_size(config, 1)

    def plan(groups: int) -> Plan:
        size = {"resolution": resolution, "num_frames": card.sizes.frames(groups)}
        return planner(config.model_copy(update={"model": config.model.model_copy(update=size)}))

    plans = {1: plan(1)}
    fits, fails, guess = 0, 2**31, 5
    while True:
        newest = next(reversed(plans))
        if plans[newest].fits:
            fits = max(fits, newest)
        else:
            fails = min(fails, newest)
        if fails == fits + 1:
            return card.sizes.frames(fits) if fits else 0
        if len(plans) > 1:
            guess = _crossing(*list(plans.items())[-2:])
        guess = min(max(guess, fits + 1), fails - 1)
        plans[guess] = plan(guess)


def _crossing(one: tuple[int, Plan], other: tuple[int, Plan]) -> int:
    """Return the largest number at which the line of every phase through two plans stays below the limit.

    It is four times the larger number if no phase grows.
    """
    (a, first), (b, second) = sorted((one, other), key=lambda item: item[0])
    most = 4 * b
    for low, high in zip(first.phases, second.phases, strict=True):
        slope = (high.total - low.total) / (b - a)
        if slope > 0:
            most = min(most, int(b + (second.limit - high.total) // slope))
    return most
