"""Record the runs that ``tests/metrics/test_watch.py`` replays: honest ones, and ones into which a fault is planted.

python tests/watch_traces.py NAME FOLDER

runs the sprites world and writes FOLDER/NAME.json: the rows of its log that the watch reads. A fault is planted before
step ``PLANTED``; until then the run is an honest one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from vpo_engine.build import build_reward
from vpo_engine.config_file import load_config
from vpo_engine.data.sprites.damage import KINDS, damaged, draw_severities
from vpo_engine.data.sprites.world import Attributes
from vpo_engine.distributed.processes import Processes
from vpo_engine.metrics.candidate_statistics import (
    WATCHED,
    WatchedReward,
    candidate_statistics,
    video_statistics,
)
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.protocols import TextEmbedding
from vpo_engine.rewards import guards
from vpo_engine.runs.log import read_metrics
from vpo_engine.selection import Selector
from vpo_engine.train import main
from vpo_engine.values import Candidate, Choice, Prompt

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


def choose_by(score: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[OnlineVPO], None]:
    def plant(method: OnlineVPO) -> None:
        Selector.scalar = lambda self, scores: score(scores)  # type: ignore[method-assign, assignment]

    return plant


def all_of(*plants: Callable[[OnlineVPO], None]) -> Callable[[OnlineVPO], None]:
    def plant(method: OnlineVPO) -> None:
        for each in plants:
            each(method)

    return plant


FAULTS: dict[str, tuple[Callable[[OnlineVPO], None], str]] = {
    # name: what is planted, and the statistic that the extra score "motion" holds
    "beta": (higher_beta(100), "motion"),
    "rate": (higher_rate(20), "motion"),
    "bold": (all_of(higher_rate(4), higher_beta(0.1)), "motion"),
    "offline": (higher_rate(4), "motion"),
    "still": (all_of(higher_rate(4), choose_by(lambda scores: -scores["motion"])), "motion"),
    "colour": (all_of(higher_rate(4), choose_by(lambda scores: scores["motion"])), "saturation"),
    "blind": (
        all_of(higher_rate(4), choose_by(lambda scores: scores["visual_quality"] - scores["text_alignment"])),
        "motion",
    ),
}


OWN = {
    "bold": ("reference.refresh_every=null",),
    "offline": ("reference.refresh_every=null", "rollout.source=reference"),
}
"""Settings of single runs."""


def run(name: str, folder: Path) -> None:
    if name in FAULTS:
        plant, statistic = FAULTS[name]
        place = WATCHED.index(statistic)
        guards.motion = lambda videos: video_statistics(videos)[:, place].cpu()  # type: ignore[assignment]
        step = OnlineVPO.step

        def planted(self: OnlineVPO, prompts: Sequence[Prompt]) -> Any:
            if prompts[0].position == (PLANTED - 1) * self.config.pairs_per_step:
                plant(self)
            return step(self, prompts)

        OnlineVPO.step = planted  # type: ignore[method-assign]
    with TemporaryDirectory() as made:
        own = OWN.get(name, ())
        assert main([*HONEST.get(name, SHORT), *own, f"run_dir={made}/run"]) == 0
        rows = read_metrics(Path(made) / "run/metrics.jsonl")
    write([row for row in rows if row["kind"] == "train" or row["step"] == 0], folder / f"{name}.json")


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


RENDERED: dict[str, Callable[[int, torch.Generator], tuple[Tensor, list[str]]]] = {
    "rendered_frozen": lambda since, random: _rendered(random, freeze=min(1.0, 0.15 * since)),
    "rendered_grey": lambda since, random: _rendered(random, colour=max(0.0, 1 - 0.1 * since)),
    "rendered_unread": lambda since, random: _rendered(random, unread=min(1.0, 0.12 * since)),
    "rendered_honest": lambda since, random: _rendered(random),
}
"""Candidates that code renders, with damage that grows with the steps since PLANTED, scored by the real reward.
Training takes too long to make some failures; what it ends in is known."""
PROMPTS, EACH, RENDERED_STEPS = 16, 4, 20


def _rendered(
    random: torch.Generator, freeze: float = 0.0, colour: float = 1.0, unread: float = 0.0
) -> tuple[Tensor, list[str]]:
    """Return videos of PROMPTS times EACH candidates, with the damage of videos from the web, and their captions.

    freeze: the least severity of frozen motion. colour: what is left of the colour. unread: the share of candidates
    that show one and the same sprite, whatever their caption says; all of them are that much less damaged.
    """
    order = torch.arange(PROMPTS).repeat_interleave(EACH)
    wanted = Attributes.draw(PROMPTS, random)[order]
    ignored = torch.rand(len(order), generator=random) < unread
    shown = Attributes(
        *(torch.where(ignored, 1, each) for each in (wanted.colour, wanted.shape, wanted.direction))
    )
    severities = draw_severities(len(order), random) * (1 - unread)
    severities[:, KINDS.index("freeze")].clamp_(min=freeze)
    videos = damaged(shown, severities, random).videos.float()
    grey = videos.mean(4, keepdim=True)
    return (grey + colour * (videos - grey)).round().to(torch.uint8), wanted.captions()


def render(name: str, folder: Path) -> None:
    processes, random = Processes.start("cpu"), torch.Generator().manual_seed(7)
    reward = WatchedReward(build_reward(load_config(None, []), processes.device))
    text = TextEmbedding(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
    rows: list[dict[str, Any]] = [
        {"step": 0, "kind": "eval"}
        | {f"guards/prompt/{each}": float(each == "text_alignment") for each in reward.dimensions}
    ]
    for step in range(1, RENDERED_STEPS + 1):
        videos, captions = RENDERED[name](max(0, step - PLANTED + 1), random)
        scores = reward.score(videos, captions)
        choices = []
        for row in range(0, len(videos), EACH):
            prompt = Prompt(captions[row], text, row)
            made = tuple(
                Candidate(
                    prompt,
                    at,
                    videos[at].permute(3, 0, 1, 2),
                    {key: float(value[at]) for key, value in scores.items()},
                )
                for at in range(row, row + EACH)
            )
            choices.append(Choice(made, (0.0,) * EACH, made[0], made[1], 1.0, False))
        means = {f"reward/{key}": float(value.mean()) for key, value in scores.items()}
        found = means | reward.take(processes) | candidate_statistics(choices, processes)
        rows.append({"step": step, "kind": "train", "pairs": PROMPTS} | found)
    write(rows, folder / f"{name}.json")


if __name__ == "__main__":
    (render if sys.argv[1] in RENDERED else run)(sys.argv[1], Path(sys.argv[2]))
