"""The formulas of the scaling page against bytes that are counted in collective operations, DeepSpeed's included."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from process_group import run_in_group
from scaling_counts import ALL, CASES, compared
from small_policy import write_small_policy
from torch import Tensor

from vpo_engine.config_file import load_config
from vpo_engine.data.sprites.assets import Sprites
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.traffic import step_transfers
from vpo_engine.planning.exchanged import division, exchanged
from vpo_engine.planning.parts import Assumed, blueprint_of
from vpo_engine.rewards.wire import Wire

LIMIT = 0.05
SMALL = 100.0
"""Bytes of flags and sums in which processes agree; the formulas leave them out."""
IN_TWO = (
    "data parallel, bfloat16",
    "data parallel, adapter",
    "ZeRO 0",
    "ZeRO 1, sequential, bfloat16",
    "ZeRO 2, micro-batches",
    "ZeRO 3, sequential, bfloat16",
    "ZeRO 3, checkpointed blocks",
    "ZeRO 3, micro-batches",
    "ZeRO 3, adapter",
    "candidates over 2, ZeRO 2",
    "guidance over 2, pruned",
)
IN_FOUR = (
    "data parallel",
    "ZeRO 1",
    "ZeRO 2, sequential",
    "ZeRO 3, checkpointed blocks, sequential",
    "candidates over 2, pruned",
    "guidance over 2",
)


def test_the_cases_are_those_of_the_scaling_page() -> None:
    assert {*IN_TWO, *IN_FOUR} <= {*CASES}


def show_latents(model: object, latents: Tensor) -> Tensor:
    """Make pixels of latents without the decoder, which takes as long as all else and sends nothing."""
    return (32 * latents[:, :3, :1].clamp(-3.9, 3.9) + 128).permute(0, 2, 3, 4, 1).to(torch.uint8)


def in_group(folder: Path, cases: Sequence[str]) -> None:
    processes = Processes.start("cpu")
    small = (*ALL, write_small_policy(folder / f"policy_{processes.rank}"))
    with patch("scaling_counts.ALL", small), patch.object(Sprites, "to_video", show_latents):
        for number, case in enumerate(cases):
            found = compared(case, processes, folder)
            (folder / f"{number} {processes.rank}.json").write_text(json.dumps(found))
    processes.stop()


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_counted_bytes_are_within_five_percent_of_the_formulas(count: int, tmp_path: Path) -> None:
    cases = IN_FOUR if count == 4 else IN_TWO
    run_in_group(tmp_path, count, in_group, tmp_path, cases)
    for number, case in enumerate(cases):
        if "ZeRO" in case:
            pytest.importorskip("deepspeed")
        for rank in range(count):
            found = json.loads((tmp_path / f"{number} {rank}.json").read_text())
            for purpose, (counted, formula) in found.items():
                allowed = LIMIT * formula + SMALL
                assert abs(counted - formula) <= allowed, (case, count, rank, purpose, counted, formula)


def test_videos_go_to_the_process_of_the_reward_model_in_8_bits() -> None:
    """Counted are the bytes that come out of the socket, of the videos that a process of four has in a step."""
    config = load_config(None, ["pairs_per_step=4", "rollout.candidates=4", "processes.reward=true"])
    (sent,) = [
        one for one in step_transfers(exchanged(config), division(config, 4)) if one.purpose == "videos"
    ]
    frames, height, width = blueprint_of(config, Assumed()).model.video_size or (0, 0, 0)
    mine, theirs = socket.socketpair()

    def count() -> int:
        return sum(len(part) for part in iter(lambda: theirs.recv(2**16), b""))

    with ThreadPoolExecutor(1) as thread:
        counted = thread.submit(count)
        wire = Wire(mine)
        videos = torch.zeros(4, frames, height, width, 3, dtype=torch.uint8)
        wire.send("score", {"prompts": ["a red circle moving left"] * 4}, {"videos": videos})
        wire.close()
        assert counted.result(30) == pytest.approx(sent.nbytes, rel=LIMIT)
    assert sent.ranks == 5
