"""Sample the videos of an arm that are not there yet, in VBench's layout, shared among processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from vpo_engine.distributed.processes import Processes
from vpo_engine.evaluation.arms import Arm
from vpo_engine.evaluation.folders import Video, video_name
from vpo_engine.sample import frames_of, load_source, starting_noise

if TYPE_CHECKING:
    from torch import Tensor

    from vpo_engine.config import Config

Planned = tuple[int, str, int]
"""The number of a prompt, the prompt, and the number of one of its videos."""


def planned_videos(plan: Sequence[Planned], folder: Path) -> list[Video]:
    """Return the videos of a plan, there or not, with the names that they have in ``folder``."""
    names = [video_name(*row) for row in plan]
    return [
        Video(folder / name, prompt, index, name)
        for name, (_, prompt, index) in zip(names, plan, strict=True)
    ]


def generate(
    arm: Arm,
    plan: Sequence[Planned],
    folder: Path,
    processes: Processes,
    seed: int,
    say: Callable[[str], None] = print,
) -> None:
    """Sample the planned videos that ``folder`` does not have; a file is there only when it is complete.

    The noise of a video depends on the seed, the number of its prompt and its own number, and on nothing else: so two
    arms start from the same noise, and it does not matter which process samples, or when. All processes must call this.

    say: is told what the model says of the prompts and of itself.
    """
    assert arm.source is not None
    batches = _batches(plan, _at_once(arm.source.config))[processes.rank :: processes.count]
    # A batch with a missing video is sampled whole, so that a start that was stopped changes no bit of the others.
    todo = [batch for batch in batches if not all((folder / video_name(*row)).exists() for row in batch)]
    if not processes.any(bool(todo)):
        return
    _say_notes(arm, plan, processes, say)
    model = load_source(arm.source, say)
    model.prepare(list(dict.fromkeys(prompt for _, prompt, _ in plan)))
    folder.mkdir(parents=True, exist_ok=True)
    hidden = None if processes.first else True
    with tqdm(
        total=sum(map(len, todo)), unit="video", desc=f"sampling the {arm.role}", disable=hidden
    ) as progress:
        for batch in todo:
            number, prompt, _ = batch[0]
            noise = starting_noise(model, seed, number, 1 + max(index for _, _, index in batch))
            videos = frames_of(model, arm.source, prompt, noise[[index for _, _, index in batch]])
            for row, frames in zip(batch, videos, strict=True):
                if not (folder / video_name(*row)).exists():
                    _write(folder / video_name(*row), frames, model.fps)
                progress.update()


def _write(path: Path, frames: Tensor, fps: float) -> None:
    """Write a video under another name, and put it in its place when it is complete."""
    from vpo_engine.runs.video import write_mp4

    unfinished = path.with_name(f".{path.name}")
    try:
        write_mp4(unfinished, frames, fps)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _batches(plan: Sequence[Planned], size: int) -> list[list[Planned]]:
    """Divide a plan into batches of at most ``size`` videos of one prompt."""
    batches: list[list[Planned]] = []
    for row in plan:
        last = batches[-1] if batches else []
        if last and last[0][0] == row[0] and row[2] // size == last[0][2] // size:
            last.append(row)
        else:
            batches.append([row])
    return batches


def _at_once(config: Config) -> int:
    """Return how many videos of a prompt are sampled at once: as many as the run samples candidates."""
    return max(1, min(config.rollout.batch_limit or config.rollout.candidates, config.rollout.candidates))


def _say_notes(arm: Arm, plan: Sequence[Planned], processes: Processes, say: Callable[[str], None]) -> None:
    """Say what the model says about the prompts. Raise ValueError for one of which it would read nothing."""
    from vpo_engine.build import check_prompts

    assert arm.source is not None
    for note in check_prompts(arm.source.config, list(dict.fromkeys(prompt for _, prompt, _ in plan))):
        if processes.first:
            say(note)
