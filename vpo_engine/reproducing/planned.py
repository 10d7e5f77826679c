"""Plan the memory of a run, as ``python -m vpo_engine.plan`` does, and keep its numbers.

    python -m vpo_engine.reproducing.planned FOLDER

Runs of the sprites world are planned for a CPU, where tensors are counted and nothing is added; others for an A100 of
80 GB.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vpo_engine.config_file import parse_config
from vpo_engine.planning.gpus import find_gpu
from vpo_engine.planning.planner import plan_run
from vpo_engine.planning.report import as_json
from vpo_engine.reproducing.cells import RESULT, Record

GPU = "a100-80g"


def main(arguments: Sequence[str] | None = None) -> int:
    (folder,) = map(Path, sys.argv[1:] if arguments is None else arguments)
    record = Record.read(folder)
    assert record is not None, folder
    config = parse_config(record.resolved, "the cell's configuration")
    plan = plan_run(config, None if config.model.kind == "sprites" else find_gpu(GPU))
    unfinished = folder / f".{RESULT}"
    unfinished.write_text(json.dumps(as_json(plan), indent=1), encoding="utf-8")
    unfinished.replace(folder / RESULT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
