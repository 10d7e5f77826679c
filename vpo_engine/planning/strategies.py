"""Ways to divide a run among GPUs: what a process of each takes, how long a step lasts, and which one to choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError

from vpo_engine.config import Config, MemoryConfig
from vpo_engine.config.errors import explain, shown
from vpo_engine.distributed.deepspeed_settings import check_deepspeed, offloads_optimizer
from vpo_engine.distributed.shares import check_shares
from vpo_engine.distributed.traffic import Division, Exchanged, Transfer, step_transfers
from vpo_engine.models.registry import check_model, model_family
from vpo_engine.planning.estimate import Plan
from vpo_engine.planning.exchanged import division, exchanged
from vpo_engine.planning.gpus import Gpu
from vpo_engine.planning.links import EFFICIENCY, WITHIN, Cluster
from vpo_engine.planning.planner import plan_run
from vpo_engine.planning.presets import resolve_presets

HOST_RATE = 200e9
"""Bytes a second that a machine's processors read and write together. This is an estimate: eight channels of DDR4-3200
have 205 GB/s."""
_HOST_BYTES = 28
"""Bytes that AdamW reads and writes for a weight: gradient, weight and two moments in float32, the last three twice."""
NEAR = 0.02
"""Steps whose expected times differ by less than this share are taken for equally fast."""

Settings = Mapping[str, Any]
_PLAIN: Settings = {
    "distributed.engine": "data_parallel",
    "distributed.zero_stage": None,
    "distributed.offload_optimizer": None,
    "distributed.deepspeed_config": None,
    "processes.per_prompt": 1,
    "processes.split_guidance": False,
    "processes.reward": False,
    "distributed.sequence_parallel": 1,
}
"""Plain data parallelism; the settings of other strategies are added to these."""


@dataclass(frozen=True)
class Strategy:
    """A way to divide a run, by the settings in which it differs from plain data parallelism."""

    name: str
    settings: Settings


@dataclass(frozen=True)
class Row:
    """A strategy that can run. processes: those that train. sends: what a process sends in a step. waits: seconds that
    a step takes beside what the plan of a process computes, by what for. arguments: the words of the command line that
    make the given configuration this one. presets: what the configuration's presets set."""

    strategy: Strategy
    config: Config
    processes: int
    plan: Plan
    sends: Sequence[Transfer]
    waits: Mapping[str, float]
    arguments: str = ""
    presets: str = ""

    @property
    def computing(self) -> float | None:
        """Return the seconds of a step that a process computes; the optimizer's are those of its part."""
        if self.plan.seconds is None:
            return None
        zero = self.config.distributed.engine == "deepspeed" and self.config.distributed.zero_stage != 0
        spared = [phase.seconds or 0.0 for phase in self.plan.phases if phase.name == "optimizer" and zero]
        share = 0.0 if offloads_optimizer(self.config, self.processes) else 1 / self.processes
        return self.plan.seconds - sum(spared) * (1 - share)

    @property
    def seconds(self) -> float | None:
        return None if self.computing is None else self.computing + sum(self.waits.values())

    @property
    def sent(self) -> float:
        return sum(transfer.nbytes for transfer in self.sends)


@dataclass(frozen=True)
class Refused:
    """A strategy that a setting, or the number of processes, excludes."""

    strategy: Strategy
    reason: str


def compare(config: Config, gpu: Gpu, cluster: Cluster) -> tuple[list[Row], list[Refused]]:
    """Plan a run on a cluster in every way that its settings allow. Times are those of steps without evaluation."""
    rows: list[Row] = []
    refused: list[Refused] = []
    sizes: dict[tuple[bool, int, MemoryConfig], Exchanged] = {}
    for strategy in strategies(config, cluster.ranks):
        try:
            changed = divided(config, strategy.settings, cluster.ranks)
            processes = cluster.ranks - changed.processes.reward
            fits = partial(_fits, gpu, processes)
            changed, presets = resolve_presets(changed, fits)
            check_deepspeed(changed, processes)
            plan = plan_run(changed, gpu, processes)
        except ValueError as error:
            refused.append(Refused(strategy, str(error)))
            continue
        deepspeed = changed.distributed.engine == "deepspeed"
        kind = deepspeed, changed.distributed.sequence_parallel, changed.memory  # presets differ by division
        if kind not in sizes:
            sizes[kind] = exchanged(changed)
        shared = division(changed, processes)
        sends = step_transfers(sizes[kind], shared)
        waits = _waits(changed, cluster, sizes[kind], shared, sends, rows)
        words = _words(config, changed, strategy)
        rows.append(Row(strategy, changed, processes, plan, sends, waits, words, presets))
    return rows, refused


def _fits(gpu: Gpu, processes: int, config: Config) -> bool:
    return plan_run(config, gpu, processes).fits


def _words(given: Config, divided: Config, strategy: Strategy) -> str:
    """Return the settings of the division in which a configuration differs from the given one, as words."""
    found = []
    for name in dict.fromkeys([*strategy.settings, *_PLAIN]):
        section, key = name.split(".")
        before, now = (getattr(getattr(config, section), key) for config in (given, divided))
        if before != now:
            found.append(f"{name}={shown(now)}")
    return " ".join(found)


def strategies(config: Config, ranks: int) -> Iterator[Strategy]:
    """Yield the ways to divide a run among ``ranks`` GPUs, the simplest first, also those that settings exclude.

    Candidates are shared where prompts are too few for all processes; ZeRO comes with the smallest teams that work.
    """
    shares: list[tuple[str, dict[str, Any]]] = [("own prompts", {})]
    candidates = config.rollout.candidates if config.card.candidates else 1
    for size in range(2, candidates + 1):
        if candidates % size == 0 and ranks % size == 0:
            shares.append((f"candidates over {size}", {"processes.per_prompt": size}))
    if candidates > 1 and config.rollout.guidance != 1.0 and ranks % (2 * candidates) == 0:
        split = {"processes.per_prompt": 2 * candidates, "processes.split_guidance": True}
        shares.append((f"candidates over {candidates}, guidance over 2", split))
    if "distributed.sequence_parallel" in model_family(config.model.kind).card.supports:
        for size in (2, 4, 8):
            if ranks % size == 0:
                shares.append((f"a video over {size}", {"distributed.sequence_parallel": size}))
    for name, settings in shares:
        yield Strategy(f"data parallel, {name}", settings)
    name, team = next(
        ((name, team) for name, team in shares if _works(config, team, ranks)), ("own prompts", {})
    )
    for stage in (1, 2, 3):
        for offload in (False, True):
            zero = {"distributed.engine": "deepspeed", "distributed.zero_stage": stage}
            more = {"distributed.offload_optimizer": True} if offload else {}
            title = f"ZeRO {stage}{' with offload' if offload else ''}, {name}"
            yield Strategy(title, {**zero, **more, **team})
    yield Strategy(f"data parallel, {name}, a GPU for the reward", {**team, "processes.reward": True})


def divided(config: Config, settings: Settings, ranks: int) -> Config:
    """Return the configuration with a strategy's settings. Raise ValueError if ``ranks`` GPUs cannot run it."""
    values = config.model_dump(exclude_unset=True)  # so that presets may still choose what is not set
    keeps_json = settings.get("distributed.engine") == "deepspeed"
    for name, value in {**_PLAIN, **settings}.items():
        section, key = name.split(".")
        if key != "deepspeed_config" or not keeps_json:
            values.setdefault(section, {})[key] = value
    try:
        changed = Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(explain(error, Config, {})) from error
    check_model(changed)
    processes = ranks - changed.processes.reward
    if processes < 1:
        raise ValueError("the reward model would have the only GPU")
    check_shares(changed, processes)
    check_deepspeed(changed, processes)
    return changed


def recommended(rows: Sequence[Row]) -> tuple[Row | None, str]:
    """Return the strategy to choose, and why: of those that fit the fastest, and of equally fast ones the simplest."""
    fitting = [row for row in rows if row.plan.fits]
    if not rows:
        return None, "no strategy can run with these settings; the reasons are above"
    if not fitting:
        least = min(rows, key=lambda row: row.plan.peak.total)
        return None, (
            f"no strategy fits; the least memory takes {least.strategy.name} ({least.plan.peak.total / 2**30:.1f} GiB "
            f"in {least.plan.peak.name}). python -m vpo_engine.plan without --gpus names settings that take less"
        )
    known = [row for row in fitting if row.seconds is not None]
    if not known:
        return fitting[0], "it fits, and is the simplest; rates of this GPU are not known"
    fastest = min(row.seconds or 0.0 for row in known)
    chosen = next(row for row in known if (row.seconds or 0.0) <= (1 + NEAR) * fastest)
    why = "it fits and is the fastest"
    if any(row is not chosen and (row.seconds or 0.0) <= (1 + NEAR) * fastest for row in known):
        why = f"it fits, none is faster by more than {NEAR:.0%}, and it is the simplest of the fast ones"
    if chosen.config.distributed.engine == "deepspeed" and not any(
        row.plan.fits for row in rows if row.config.distributed.engine == "data_parallel"
    ):
        why += "; where every process holds everything, nothing fits"
    return chosen, why


def _works(config: Config, settings: Settings, ranks: int) -> bool:
    try:
        divided(config, settings, ranks)
    except ValueError:
        return False
    return True


def _waits(
    config: Config,
    cluster: Cluster,
    step: Exchanged,
    shared: Division,
    sends: Sequence[Transfer],
    rows: Sequence[Row],
) -> dict[str, float]:
    """Return the seconds in which a process does not compute; nothing is hidden behind computing."""
    waits: dict[str, float] = {}
    for transfer in sends:
        waits[transfer.purpose] = cluster.seconds(transfer)
    if offloads_optimizer(config, shared.ranks):
        each = step.updates * step.trained / shared.ranks
        waits["host"] = each * _HOST_BYTES * cluster.gpus / HOST_RATE
        waits["host"] += each * (4 + step.weight_bytes) / (EFFICIENCY * WITHIN["pcie4"].rate)
    if config.processes.reward and rows and "reward" not in rows[0].plan.before:
        known = rows[0]
        scoring = sum(phase.seconds or 0.0 for phase in known.plan.phases if phase.name == "reward")
        hidden = 0.0
        if config.rollout.overlap:
            hidden = sum(phase.seconds or 0.0 for phase in known.plan.phases if phase.name == "rollout")
        waits["reward"] = max(0.0, scoring * known.processes - hidden)
    return waits
