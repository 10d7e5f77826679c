"""Figure 7: peak memory of every method by resolution and frames, planned; and of the sprites world's runs, counted."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from vpo_engine.reproducing.cells import Cell, Record, read_result
from vpo_engine.reproducing.results import Judged
from vpo_engine.reproducing.spec import Table
from vpo_engine.reproducing.statistics import Verdict
from vpo_engine.reproducing.writing import grid, origin

GIB = 2**30
A100_GIB = 79.2
"""What a process can have of an A100 of 80 GB."""
OPEN_SORA, SPRITES = "opensora_v1_2_720p.yaml", "sprites.yaml"
RESOLUTIONS, FRAMES = ("240p", "360p", "480p", "720p"), (17, 34, 51, 68)
QUICK_RESOLUTIONS, QUICK_FRAMES = ("240p", "720p"), (17, 68)
_ONE = "objective.micro_batch_size=1"
_PLAIN = (
    "memory.weights=fp32_master",
    "memory.activation_checkpointing=block",
    "memory.mlp_chunks=1",
    "memory.offload_idle=false",
    _ONE,
)
_LEANEST = (
    "memory.weights=stochastic_rounding",
    "memory.optimizer_bits=8",
    "memory.offload_activations=true",
    "memory.mlp_chunks=8",
)
RECOMMENDED, PLAIN, REFL = "OnlineVPO, recommended", "OnlineVPO, plain", "ReFL, plain"
METHODS: dict[str, tuple[str, ...]] = {
    "OnlineVPO, leanest": _LEANEST,
    RECOMMENDED: (),
    PLAIN: (*_PLAIN, "memory.sequential=false", "reference.storage=copy"),
    REFL: ("method=refl", *_PLAIN),
    "VADER K = 1, plain": ("method=vader", *_PLAIN),
    "VADER K = 10, plain": ("method=vader", "vader.last_steps=10", *_PLAIN),
    "InstructVideo, plain": ("method=instructvideo", *_PLAIN),
    "T2V-Turbo, plain": ("method=t2v_turbo", *_PLAIN),
}
"""The lines of the figure. Plain: bfloat16 with fp32 master weights, checkpointed blocks, everything on the device,
and one pair or video at a time; winner and loser of a pair in one batch."""
_COUNTED = {
    "OnlineVPO": (),
    "offline DPO": ("method=offline_dpo",),
    "ReFL": ("method=refl",),
    "VADER K = 1": ("method=vader", "vader.steps=12", "vader.guidance=1.0"),
    "VADER K = 10": ("method=vader", "vader.steps=12", "vader.guidance=1.0", "vader.last_steps=10"),
    "InstructVideo": ("method=instructvideo", "instructvideo.guidance=1.0"),
    "T2V-Turbo": ("method=t2v_turbo",),
}
_Key = tuple[str, int]
Cells = Mapping[_Key, Cell]


def cells_of(quick: bool) -> dict[_Key, Cell]:
    """Return the plans: {(line, number of the size): cell}; of the sprites world the number is -1."""
    sizes = sizes_of(quick)
    found = {
        (label, number): Cell(
            "memory",
            (*settings, f"model.resolution={resolution}", f"model.num_frames={frames}"),
            0,
            OPEN_SORA,
        )
        for label, settings in METHODS.items()
        for number, (resolution, frames) in enumerate(sizes)
    }
    return found | {(label, -1): Cell("memory", settings, 0, SPRITES) for label, settings in _COUNTED.items()}


def sizes_of(quick: bool) -> list[tuple[str, int]]:
    """Return the sizes of videos, in the order of their numbers."""
    resolutions, frames = (QUICK_RESOLUTIONS, QUICK_FRAMES) if quick else (RESOLUTIONS, FRAMES)
    return [(resolution, count) for resolution in resolutions for count in frames]


def _size(cell: Cell) -> tuple[str, int]:
    values = cell.values()
    return values["model.resolution"], int(values["model.num_frames"])


def _peaks(cells: Cells, finished: Mapping[Cell, Path]) -> dict[str, dict[tuple[str, int], float]]:
    """Return GiB at the peak of a step, by line and size, of the plans for Open-Sora that are there."""
    found: dict[str, dict[tuple[str, int], float]] = {label: {} for label in METHODS}
    for (label, number), cell in cells.items():
        if number >= 0 and cell in finished:
            found[label][_size(cell)] = read_result(finished[cell])["peak_bytes"] / GIB
    return found


def markdown(table: Table, cells: Cells, finished: Mapping[Cell, Path], command: str) -> str:
    """Return the tables and the paper's claims as Markdown; ``command``: what makes them."""
    done = {key: cell for key, cell in cells.items() if cell in finished}
    parts = [table.about]
    if len(done) < len(cells):
        lost = [
            f"{label} {'sprites' if n < 0 else ' x '.join(map(str, _size(c)))}"
            for (label, n), c in cells.items()
            if c not in finished
        ]
        parts.append(f"**Partial: {len(lost)} of {len(cells)} plans are missing** ({'; '.join(lost)}).")
    peaks = _peaks(cells, finished)
    parts += [_peak_table(peaks), _claims(peaks), _counted(done, finished)]
    records = [record for cell in done.values() if (record := Record.read(finished[cell]))]
    parts.append(origin(records, command, f"{len(records)} plans"))
    return "\n\n".join(parts)


def _peak_table(peaks: Mapping[str, Mapping[tuple[str, int], float]]) -> str:
    frames = sorted({count for row in peaks.values() for _, count in row})
    lines = [
        [label, resolution, *(_gib(row.get((resolution, count))) for count in frames)]
        for label, row in peaks.items()
        for resolution in dict.fromkeys(resolution for resolution, _ in row)
    ]
    return grid(["", "resolution", *(f"{count} frames" for count in frames)], lines)


def _gib(value: float | None) -> str:
    if value is None:
        return ""
    return f"**{value:.1f}**" if value > A100_GIB else f"{value:.1f}"


def judge(peaks: Mapping[str, Mapping[tuple[str, int], float]]) -> list[Judged]:
    """Return what the plans say about the paper's claims of Figure 7."""
    largest, small = ("720p", 68), ("240p", 68)

    def judged(said: str, label: str, size: tuple[str, int], holds: bool | None, words: str) -> Judged:
        value = peaks[label].get(size)
        found: Verdict = "not run" if value is None else ("agrees" if holds else "disagrees")
        return Judged(said, "not run" if value is None else f"{value:.1f} GiB, {words}", found)

    free = {label: 100 * (1 - peaks[label].get(largest, 0.0) / A100_GIB) for label in (PLAIN, RECOMMENDED)}
    beyond = peaks[REFL].get(("720p", 68), 0.0)
    return [
        *(
            judged(
                f"OnlineVPO at 720p x 68 frames leaves 25 % of 80 GB free ({label.partition(', ')[2]})",
                label,
                largest,
                value >= 25,
                f"{value:.0f} % free",
            )
            for label, value in free.items()
        ),
        judged(
            "ReFL fits at 240p x 68 frames",
            REFL,
            small,
            peaks[REFL].get(small, 0.0) <= A100_GIB,
            "the paper's largest",
        ),
        judged("ReFL does not fit at 720p x 68 frames", REFL, largest, beyond > A100_GIB, "planned"),
    ]


def _claims(peaks: Mapping[str, Mapping[tuple[str, int], float]]) -> str:
    return grid(
        ["the paper says", "here", ""], [[one.said, one.here, f"**{one.verdict}**"] for one in judge(peaks)]
    )


def _counted(done: Cells, finished: Mapping[Cell, Path]) -> str:
    """Return the peaks of the sprites world's runs by phase, MiB, with 16 prompts a step."""
    plans = {
        label: read_result(finished[cell])["phases"] for (label, number), cell in done.items() if number < 0
    }
    if not plans:
        return ""
    phases = list(dict.fromkeys(name for plan in plans.values() for name in plan))
    lines = [
        [label, *(f"{plan[name]['peak_bytes'] / 2**20:.0f}" if name in plan else "" for name in phases)]
        for label, plan in plans.items()
    ]
    words = "The sprites world's runs, 16 prompts at a time in float32 on a CPU; MiB at each phase's peak, counted."
    return f"{words}\n\n{grid(['', *phases], lines)}"


def _rows(cells: Cells, finished: Mapping[Cell, Path]) -> Iterator[tuple[object, ...]]:
    for (label, number), cell in cells.items():
        if cell in finished:
            size = ("sprites", 17) if number < 0 else _size(cell)
            for phase, found in read_result(finished[cell])["phases"].items():
                yield label, *size, phase, found["peak_bytes"]


def write_csv(path: Path, cells: Cells, finished: Mapping[Cell, Path]) -> None:
    """Write a line for each method, size and phase, in bytes."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("method", "resolution", "frames", "phase", "peak_bytes"))
        writer.writerows(_rows(cells, finished))


def draw(folder: Path, name: str, cells: Cells, finished: Mapping[Cell, Path]) -> list[Path]:
    """Draw a panel for each resolution: GiB against frames, a line for each method."""
    peaks = {label: row for label, row in _peaks(cells, finished).items() if row}
    if not peaks:
        return []
    resolutions = list(dict.fromkeys(resolution for row in peaks.values() for resolution, _ in row))
    figure = Figure(figsize=(3.1 * len(resolutions) + 0.5, 4.6), layout="constrained")
    panels = figure.subplots(1, len(resolutions), sharey=True, squeeze=False)[0]
    for panel, resolution in zip(panels, resolutions, strict=True):
        for number, (label, row) in enumerate(peaks.items()):
            points = sorted((count, value) for (size, count), value in row.items() if size == resolution)
            style = (":o", "-o", "--o")[number] if label.startswith("OnlineVPO") else "-s"
            panel.plot(
                *zip(*points, strict=True), style, color=_colour(label, number), label=label, markersize=3.5
            )
        panel.axhline(A100_GIB, color="black", linewidth=0.9, linestyle=":")
        panel.set(
            title=resolution,
            xlabel="frames",
            xticks=sorted({count for row in peaks.values() for _, count in row}),
        )
        panel.set_yscale("log")
        panel.set_yticks(
            [5, 10, 20, 40, 80, 160, 320, 640], ["5", "10", "20", "40", "80", "160", "320", "640"]
        )
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("peak of a step, GiB (dotted: A100 of 80 GB)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8.5)
    figure.suptitle("Figure 7: peak memory, planned", fontsize=11)
    from vpo_engine.reproducing.pictures import save

    return save(figure, folder, name)


def _colour(label: str, number: int) -> str:
    return (
        "#3257a8"
        if label.startswith("OnlineVPO")
        else ("#b3541e", "#3a8f5c", "#7a4fa3", "#8a8a2a", "#444444")[number - 3]
    )
