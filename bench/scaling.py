"""Make the tables of docs/scaling.md: bytes that are counted here beside the formulas, and the model of many GPUs.

    torchrun --nproc-per-node=2 bench/scaling.py --count [docs/scaling.md]     # and with 4; on CPUs, with DeepSpeed
    python bench/scaling.py [docs/scaling.md]                                  # plan 8, 16 and 64 GPUs; some minutes

With the page's path the tables are put between its markers, without it they are printed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from report import Table, size

CLUSTERS = ((8, 1), (8, 2), (8, 8))
PLANNED = (("opensora_v1_2_720p.yaml", ("memory.offload_idle=false",)),)
"""Configurations, and settings without which DeepSpeed would be excluded."""
GPU = "h100-80g"


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--count"]
    page = Path(words[0]) if words else None
    if "--count" in sys.argv:
        count(page)
        return
    put(page, "model", "\n\n".join(models()))


def count(page: Path | None) -> None:
    """Count every case with the processes of this torchrun; the first of them writes the table."""
    from scaling_counts import CASES, compared

    from vpo_engine.distributed.processes import Processes

    processes = Processes.start("cpu")
    lines, largest = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            for purpose, (counted, formula) in compared(case, processes, Path(folder)).items():
                off = abs(counted - formula) / formula
                largest = max(largest, off)
                lines.append([case, purpose, size(counted), size(formula), f"{off:.2%}"])
    processes.stop()
    if processes.first:
        head = ["case", "for", f"counted, {processes.count} processes", "formula", "differs by"]
        text = f"{Table(head, lines, []).markdown()}\n\nThe largest difference is {largest:.2%}."
        put(page, f"counts {processes.count}", text)


def models() -> Iterator[str]:
    """Yield a table for each configuration and cluster."""
    from vpo_engine.config_file import load_config
    from vpo_engine.planning.gpus import GPUS
    from vpo_engine.planning.links import make_cluster
    from vpo_engine.planning.planner import plan_run
    from vpo_engine.planning.presets import resolve_presets
    from vpo_engine.planning.scaling_report import HEADER, cells
    from vpo_engine.planning.strategies import Refused, Row, compare, recommended

    gpu = GPUS[GPU]

    def shown(rows: Sequence[Row], refused: Sequence[Refused]) -> str:
        text = Table([*HEADER], [[*cells(row)] for row in rows], []).markdown()
        reasons = {one.reason.partition(";")[0]: [] for one in refused}
        for one in refused:
            reasons[one.reason.partition(";")[0]].append(one.strategy.name)
        left = [f"Left out: {'; '.join(names)} ({reason})." for reason, names in reasons.items()]
        chosen, why = recommended(rows)
        named = "None fits." if chosen is None else f"Recommended: **{chosen.strategy.name}** ({why})."
        return "\n\n".join([text, *left, named])

    for name, settings in PLANNED:
        config, _ = resolve_presets(load_config(name, settings), lambda changed: plan_run(changed, gpu).fits)
        for gpus, nodes in CLUSTERS:
            cluster = make_cluster(gpus, nodes, gpu.name, None, None)
            words = " ".join([name, *settings, f"--gpu {GPU} --gpus {gpus} --nodes {nodes}"])
            title = f"### `{name}`: {cluster}\n\n`python -m vpo_engine.plan {words}`"
            print(title, file=sys.stderr, flush=True)
            yield f"{title}\n\n{shown(*compare(config, gpu, cluster))}"


def put(page: Path | None, name: str, text: str) -> None:
    """Put a text between the page's markers of that name; without a page, print it."""
    if page is None:
        print(text)
        return
    whole = page.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = whole.partition(start)
    assert found, f"{page} has no marker {start.strip()}"
    assert end in rest, f"{page} has no marker {end}"
    page.write_text(f"{before}{start}\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
