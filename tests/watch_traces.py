"""Record the runs that ``tests/metrics/test_step_watch.py`` replays: honest ones, and ones that go wrong.

python -m tests.watch_traces NAME FOLDER

runs the sprites world and writes FOLDER/NAME.json: the rows of its log, as far as alarms depend on them. The runs of
``FAULTS`` have a fault planted before step ``PLANTED``, and are honest until then; those of ``EXPLOITED`` are trained
against a reward that is easily exploited. Of ``rate`` 20 steps were recorded, of candidates that were sampled in 8
steps, and only what the loss logs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.runs.log import read_metrics
from vpo_engine.train import main
from vpo_engine.values import Prompt

PLANTED = 9
QUIET = ("evaluation.prompts=2", "evaluation.samples_per_prompt=1", "evaluation.every=null")
SHORT = (
    "configs/sprites.yaml",
    "steps=16",
    "pairs_per_step=8",
    "rollout.steps=5",
    "objective.timesteps_per_pair=2",
    "optimizer.final_lr=1.0",
    "guards.motion_floor=1e-9",
    "guards.style_bound=null",
    *QUIET,
)


HONEST = {f"honest_{seed}": (*SHORT, f"seed={seed}") for seed in (1, 2, 3)}
LONG = {
    f"honest_long_{seed}": (
        "configs/sprites_fast.yaml",
        f"seed={seed}",
        "steps=42",
        "optimizer.warmup_steps=15",
        "evaluation.every=4",
        "evaluation.samples_between=4",
    )
    for seed in (0, 2)
}
"""Honest runs of three times the usual length: from step 20 on the reward is nearly as high as it can be."""
LATER = {
    "honest_seed7": (*SHORT, "seed=7"),
    "honest_eight": (*SHORT, "seed=8", "rollout.candidates=8", "reference.refresh_every=2", "steps=12"),
    "honest_lora": (
        *SHORT,
        "seed=10",
        "steps=12",
        "model.lora.rank=8",
        "reference.storage=adapter",
        "optimizer.lr=5e-4",
    ),
}
"""Honest runs that took no part in setting tolerances and thresholds."""
STRONG = (
    "configs/sprites.yaml",
    "steps=14",
    "pairs_per_step=8",
    "rollout.steps=5",
    "objective.beta=100",
    "objective.timesteps_per_pair=1",
    "objective.updates_per_rollout=4",
    "optimizer.lr=0.0002",
    "optimizer.final_lr=1.0",
    "optimizer.warmup_steps=20",
    "reward.dimensions=global",
    "evaluation.every=2",
    "evaluation.prompts=8",
    "evaluation.samples_per_prompt=2",
    "evaluation.samples_between=null",
)
"""A policy that learns fast enough to find within a dozen rollouts what its reward pays for."""
EXPLOITED = {
    "still": (*STRONG, "reward.kind=tests.exploited_rewards:Stillness"),
    "red": (*STRONG, "reward.kind=tests.exploited_rewards:Redness"),
    "colourful": (*STRONG, "reward.kind=examples.own_reward:Colourfulness"),
}


def higher_rate(factor: float) -> Callable[[OnlineVPO], None]:
    def plant(method: OnlineVPO) -> None:
        begin = method.optimizer.begin
        method.optimizer.begin = lambda rate: begin(rate * factor)  # type: ignore[method-assign]

    return plant


def higher_beta(factor: float) -> Callable[[OnlineVPO], None]:
    def plant(method: OnlineVPO) -> None:
        config = method.objective._config
        method.objective._config = config.model_copy(update={"beta": config.beta * factor})

    return plant


def all_of(*plants: Callable[[OnlineVPO], None]) -> Callable[[OnlineVPO], None]:
    def plant(method: OnlineVPO) -> None:
        for each in plants:
            each(method)

    return plant


FAULTS = {
    "beta": higher_beta(100),
    "rate": higher_rate(20),
    "bold": all_of(higher_rate(4), higher_beta(0.1)),
    "offline": higher_rate(4),
}
"""What is planted in a run that begins as the honest ones."""


OWN = {
    "bold": ("reference.refresh_every=null",),
    "offline": ("reference.refresh_every=null", "rollout.source=reference"),
}
"""Settings of single runs."""


def run(name: str, folder: Path) -> None:
    if name in FAULTS:
        step = OnlineVPO.step

        def planted(self: OnlineVPO, prompts: Sequence[Prompt]) -> Any:
            if prompts[0].position == (PLANTED - 1) * self.config.pairs_per_step:
                FAULTS[name](self)
            return step(self, prompts)

        OnlineVPO.step = planted  # type: ignore[method-assign]
    settings = (HONEST | LONG | LATER | EXPLOITED).get(name, (*SHORT, *OWN.get(name, ())))
    with TemporaryDirectory() as made:
        assert main([*settings, f"run_dir={made}/run"]) == 0
        rows = read_metrics(Path(made) / "run/metrics.jsonl")
    write(rows, folder / f"{name}.json")


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write what the watch reads of these rows, one row a line, with five digits."""
    left_out = ("seconds/", "speed/", "reference/", "memory/", "held_out/")
    kept = [
        {
            key: float(f"{value:.5g}") if isinstance(value, float) else value
            for key, value in row.items()
            if not key.startswith(left_out)
        }
        for row in rows
    ]
    lines = ",\n".join(json.dumps(row) for row in kept)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
