"""Count what the processes of a step of the sprites world send each other, beside what the formulas say."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.distributed.counting import CollectiveBytes
from vpo_engine.distributed.couples import Couple
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.traffic import checkpoint_transfers, step_transfers
from vpo_engine.method import embed_prompts
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.planning.exchanged import division, exchanged
from vpo_engine.reference.store import build_reference
from vpo_engine.run_state import capture

PROMPTS = (
    "a red circle moving left",
    "a blue square moving up",
    "a green circle moving right",
    "a red square moving down",
)
ALL = (
    "rollout.candidates=4",
    "rollout.steps=2",
    "rollout.guidance=4",
    "objective.timesteps_per_pair=2",
    "optimizer.warmup_steps=0",
    "optimizer.lr=1e-4",
    "reference.refresh_every=1",
)
SEQUENTIAL = ("memory.sequential=true",)
HALF = ("model.dtype=bfloat16", "memory.weights=fp32_master")
AGAIN = ("memory.activation_checkpointing=block",)
MICRO = ("objective.micro_batch_size=1",)
ADAPTER = ("model.lora.rank=4", "model.lora.alpha=8", "reference.storage=adapter")
PRUNED = ("rollout.prune.after=0.5", "rollout.prune.keep=2")


def zero(stage: int) -> tuple[str, ...]:
    return ("distributed.engine=deepspeed", f"distributed.zero_stage={stage}")


AS_LARGE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
"""Settings with which stage 3 treats the sprites world like a model of more than 1e9 weights: it divides all of them,
and keeps none that will be needed again."""
TEAM = ("processes.per_prompt=2",)
SPLIT = ("processes.split_guidance=true",)
CASES: dict[str, tuple[str, ...]] = {
    "data parallel": (),
    "data parallel, sequential": SEQUENTIAL,
    "data parallel, bfloat16": HALF,
    "data parallel, adapter": ADAPTER,
    "ZeRO 0": zero(0),
    "ZeRO 1": zero(1),
    "ZeRO 1, sequential, bfloat16": (*zero(1), *SEQUENTIAL, *HALF),
    "ZeRO 2": zero(2),
    "ZeRO 2, sequential": (*zero(2), *SEQUENTIAL),
    "ZeRO 2, micro-batches": (*zero(2), *MICRO),
    "ZeRO 3": zero(3),
    "ZeRO 3, sequential": (*zero(3), *SEQUENTIAL),
    "ZeRO 3, sequential, bfloat16": (*zero(3), *SEQUENTIAL, *HALF),
    "ZeRO 3, checkpointed blocks": (*zero(3), *AGAIN),
    "ZeRO 3, checkpointed blocks, sequential": (*zero(3), *AGAIN, *SEQUENTIAL),
    "ZeRO 3, micro-batches": (*zero(3), *MICRO),
    "ZeRO 3, adapter": (*zero(3), *ADAPTER),
    "candidates over 2": TEAM,
    "candidates over 2, pruned": (*TEAM, *PRUNED),
    "candidates over 2, ZeRO 2": (*TEAM, *zero(2)),
    "guidance over 2": (*TEAM, *SPLIT),
    "guidance over 2, pruned": (*TEAM, *SPLIT, *PRUNED),
}
"""Settings of the cases, by the names that tables have."""


class Brightness:
    """A reward that is a function of the pixels, with as many dimensions as that of the sprites world."""

    dimensions = (
        "visual_quality",
        "temporal_consistency",
        "dynamic_degree",
        "text_alignment",
        "factual_consistency",
    )

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return dict.fromkeys(self.dimensions, videos.float().mean(dim=(1, 2, 3, 4)))


def configured(case: str, processes: int, folder: Path) -> Config:
    """Return a case's configuration with a prompt for each process."""
    settings = [*ALL, *CASES[case], f"pairs_per_step={processes}"]
    if "distributed.zero_stage=3" in settings:
        file = folder / f"divide_all_{os.getpid()}.json"  # of this process, so that none reads half a file
        file.write_text(json.dumps({"zero_optimization": {"stage": "auto", **AS_LARGE}}), encoding="utf-8")
        settings.append(f"distributed.deepspeed_config={file}")
    return load_config(None, settings)


def formulas(config: Config, processes: int) -> dict[str, float]:
    """Return the bytes that a process sends in a step and for a checkpoint, by purpose."""
    step, divided = exchanged(config), division(config, processes)
    transfers = [*step_transfers(step, divided), *checkpoint_transfers(step, divided)]
    return {transfer.purpose: transfer.nbytes for transfer in transfers}


def counted(config: Config, processes: Processes) -> dict[str, float]:
    """Make two steps, the second of which is counted, and gather what a checkpoint holds."""
    model = build_model(config, processes, lambda _: None)
    model.prepare(PROMPTS)
    reference = build_reference(config.reference.storage, model.network)
    algorithm = OnlineVPO(config, model, Brightness(), reference, processes)
    total = config.pairs_per_step
    mine = processes.team_range(total, "pairs_per_step")

    def step(number: int) -> None:
        texts = [PROMPTS[place % len(PROMPTS)] for place in mine]
        prompts = embed_prompts(model, texts, [total * number + place for place in mine])
        made = algorithm.step(prompts)
        assert made.metrics["pairs"] == total, "a tie would leave a process without work"

    step(0)
    purposes = Purposes(processes)
    with purposes.told(), CollectiveBytes(purposes) as counter:
        step(1)
        purposes.saving = True
        with algorithm.optimizer.whole():
            capture(algorithm, 2, {})
    return {name: sent for name, sent in counter.sent.items() if name != "agreement"}


class Purposes:
    """Says what an operation is for, by the stage in which it comes."""

    def __init__(self, processes: Processes) -> None:
        self.saving = self._guiding = False
        self._processes = processes

    def __call__(self, operation: str) -> str:
        if self.saving:
            return "checkpoint"
        if self._guiding:
            return "guidance"
        stage, reduces = self._processes.stages.now.stage, "reduce" in operation
        if stage == "update":
            return "gradients" if reduces else "weights"
        if stage in ("rollout", "decode", "reward"):
            return "candidates"
        return "refresh" if stage == "refresh" else "agreement" if reduces else "rollout"

    @contextmanager
    def told(self) -> Iterator[None]:
        """Notice exchanges of guided predictions, which come in the middle of a rollout."""
        exchange = Couple.exchange

        def noticed(couple: Couple, prediction: Tensor) -> Tensor:
            self._guiding = True
            try:
                return exchange(couple, prediction)
            finally:
                self._guiding = False

        with patch.object(Couple, "exchange", noticed):
            yield


def compared(case: str, processes: Processes, folder: Path) -> dict[str, tuple[float, float]]:
    """Return for each purpose of a case what was counted here, and what the formulas say."""
    config = configured(case, processes.count, folder)
    own = processes.in_teams(config.processes.per_prompt)
    if config.processes.split_guidance:
        own = own.in_couples()
    found, expected = counted(config, own), formulas(config, processes.count)
    return {name: (found.get(name, 0.0), expected.get(name, 0.0)) for name in sorted({*found, *expected})}


def off_by(case: Mapping[str, tuple[float, float]]) -> float:
    """Return the largest difference of a count from its formula, as a share; of flags among gradients, a few bytes."""
    return max(abs(count - formula) / max(count, formula) for count, formula in case.values())
