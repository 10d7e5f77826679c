"""Print the table of docs/models.md: shipped configurations with their planned memory and time per step.

    python bench/model_plans.py [NAME.yaml ...]

Everything is planned from published sizes, so no weights are needed. A row takes one to two minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.planning.gpus import GIB, GPUS
from vpo_engine.planning.parts import Assumed, blueprint_of
from vpo_engine.planning.planner import plan_run

CONFIGS = Path(__file__).parents[1] / "configs"
DEVICES = ("a100-80g", "h100-80g", "h200")
WHOLE = ("model.lora=null", "reference.storage=exact8", "memory.base_bits=null", "memory.weights=fp32_master")
ADAPTER = ("model.lora.rank=32", "reference.storage=adapter")
HEAD = [
    "configuration",
    "model",
    "parameters",
    "video",
    "full",
    "LoRA",
    *(f"step, {name}" for name in DEVICES),
]


def main() -> None:
    print(_line(HEAD))
    print(_line(["---"] * len(HEAD)))
    for path in sorted(CONFIGS.glob("*.yaml")):
        if path.name in sys.argv[1:] or (len(sys.argv) == 1 and not path.stem.startswith("sprites")):
            print(_line(row(path)), flush=True)


def row(path: Path) -> list[str]:
    """Return the cells of a configuration; the time of a step is that of the configuration as it is shipped."""
    shipped = load_config(str(path), [])
    model = blueprint_of(shipped, Assumed()).model
    weights = sum(parameter.numel() for parameter in model.network.parameters())
    frames, height, width = model.video_size or (0, 0, 0)
    steps = [plan_run(shipped, GPUS[name]).seconds for name in DEVICES]
    return [
        f"`{path.name}`",
        model.card.name,
        f"{weights / 1e9:.2f} B",
        f"{height} x {width} x {frames}",
        _peak(load_config(str(path), WHOLE)),
        _peak(load_config(str(path), ADAPTER)),
        *("-" if seconds is None else _time(seconds) for seconds in steps),
    ]


def _peak(config: Config) -> str:
    """Return the peak of a run on the largest device, on which every part stays planned as configured."""
    return f"{plan_run(config, GPUS[DEVICES[-1]]).peak.total / GIB:.1f} GiB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
