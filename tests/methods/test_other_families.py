"""Methods that follow the gradient of a reward, on the families of diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gradient_of_reward import check_gradient
from safetensors.torch import load_file
from tiny_pipelines import FOLDERS, SMALL, sized

from vpo_engine import train as entry
from vpo_engine.runs.video import write_mp4

WHOLE = ("vader.steps=2", "vader.guidance=2", "vader.last_steps=2")
"""Every step of the sampling has a gradient, so that it is the whole gradient of the loss."""
RUNS = {
    "cogvideox": ("t2v_turbo", "t2v_turbo.steps=4", "t2v_turbo.guidance=1"),
    "wan": ("instructvideo", "instructvideo.steps=2", "instructvideo.guidance=1"),
    "ltx": ("vader", "vader.steps=2", "vader.guidance=2", "vader.last_steps=1"),
}
CAPTIONS = ("a red horse", "a blue horse")


@pytest.fixture(scope="module", params=list(FOLDERS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A kind of model, and a folder with a tiny model of it, prompts, and videos of its size."""
    kind, root = request.param, tmp_path_factory.mktemp(request.param)
    FOLDERS[kind](root / "model")
    (root / "prompts.txt").write_text("\n".join(CAPTIONS))
    (root / "held_out.txt").write_text("a grey horse\na white horse\n")
    (root / "videos").mkdir()
    frames, height, width = SMALL[kind]
    random = torch.Generator().manual_seed(0)
    rows = ["winner,loser,prompt"]
    for caption in CAPTIONS:
        for place in ("winner", "loser"):
            video = torch.randint(60, 200, (frames, height, width, 3), generator=random, dtype=torch.uint8)
            write_mp4(root / "videos" / f"{caption} {place}.mp4", video, 8, min_side=32)
        rows.append(f"videos/{caption} winner.mp4,videos/{caption} loser.mp4,{caption}")
    (root / "pairs.csv").write_text("\n".join(rows))
    return kind, root


def settings(world: tuple[str, Path], method: str) -> list[str]:
    kind, root = world
    given = method in ("instructvideo", "t2v_turbo")
    source = f"{method}.videos={root / 'pairs.csv'}" if given else f"prompts.train={root / 'prompts.txt'}"
    return [
        f"model.kind={kind}",
        f"model.policy={root / 'model'}",
        *sized(kind),
        source,
        f"prompts.held_out={root / 'held_out.txt'}",
        "reward.kind=bright_pixels:Brightness",
        f"method={method}",
        "pairs_per_step=2",
        "rollout.steps=2",
        f"run_dir={root / 'run'}",
    ]


@pytest.mark.long
def test_a_small_step_along_the_gradient_lowers_the_loss_by_what_it_promises(world: tuple[str, Path]) -> None:
    check_gradient([*settings(world, "vader"), *WHOLE], CAPTIONS, share=1e-4)


@pytest.mark.long
def test_a_run_trains_every_weight(world: tuple[str, Path]) -> None:
    method, *own = RUNS[world[0]]
    small = ("steps=2", "optimizer.warmup_steps=0", "checkpoint.every=1", "guards.style_bound=null")
    few = ("evaluation.every=null", "evaluation.prompts=1", "evaluation.samples_per_prompt=1")
    assert entry.main([*settings(world, method), *own, *small, *few]) == 0
    run = world[1] / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [row["reward/brightness"] for row in rows if "reward/brightness" in row]
    assert len(scores) == 2
    assert all(0 < score < 1 for score in scores)
    policies = sorted((run / "checkpoints").glob("*/policy"))
    first, last = (
        {
            name: value
            for file in sorted(policy.rglob("*.safetensors"))
            for name, value in load_file(file).items()
        }
        for policy in policies
    )
    assert first.keys() == last.keys()
    still = [name for name, value in first.items() if torch.equal(value, last[name])]
    assert len(still) < len(first) / 10, still
