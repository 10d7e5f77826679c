"""Rewards for child processes, well behaved and not, which are made there as ``process_rewards:Class``."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from vpo_engine.rewards.sprites import SpritesReward

PRECISIONS = ("highest", "high", "medium")
"""Those of float32 matrix products; a scripted reward tells the index of its own."""


class UnportableError(Exception):
    """Cannot be made again from the arguments that it holds."""

    def __init__(self, step: int, total: int) -> None:
        super().__init__(f"{step} of {total}")


class Scripted:
    """Does what the first prompt says; otherwise scores the mean of each video."""

    dimensions = ("mean",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        match prompts[0].split():
            case ["hang"]:
                print("waiting for a lock", file=sys.stderr, flush=True)
                time.sleep(600)
            case ["exit", code]:
                print("first words\nlicence expired", file=sys.stderr, flush=True)
                os._exit(int(code))
            case ["signal", name]:
                os.kill(os.getpid(), signal.Signals[name])
            case ["raise"]:
                raise ValueError(f"prompt {prompts[0]!r} is one of {len(videos)} bad ones")
            case ["unportable"]:
                raise UnportableError(2, 3)
            case ["fact", name]:
                facts = {
                    "threads": torch.get_num_threads(),
                    "precision": PRECISIONS.index(torch.get_float32_matmul_precision()),
                    "pid": os.getpid(),
                    "parent": os.getppid(),
                }
                return {"mean": torch.full((len(videos),), float(facts[name]))}
        return {"mean": videos.flatten(1).double().mean(1).float()}


class Columns:
    """Scores whose values lie apart in memory, as the columns of a table do."""

    dimensions = ("first", "second")

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        table = torch.tensor([[1.5, 2.5]]).expand(len(videos), 2).contiguous()
        return dict(zip(self.dimensions, table.unbind(1), strict=True))


class Picky(Scripted):
    """Refuses prompts that ask something; about one it gives no sensible answer, about another it fails."""

    def refuse_prompt(self, prompt: str) -> str | None:
        if prompt == "fail":
            raise RuntimeError("the word list is gone")
        if prompt == "wrong":
            return False  # type: ignore[return-value]
        return f"{prompt!r} asks something" if "?" in prompt else None

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        return f"{frames} of {height} x {width} are too many" if frames > 8 else None


class Refused(Scripted):
    """Cannot be made."""

    def __init__(self) -> None:
        raise FileNotFoundError("no config.json in /absent; fetch it")


class Dead(Scripted):
    """Ends its process instead of being made."""

    def __init__(self) -> None:
        sys.exit("no such device")


class SpritesThatHang(SpritesReward):
    """The sprites reward, whose fourth score does not come."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == 4:
            time.sleep(600)
        return super().score(videos, prompts)


class ScorerThatHangs(SpritesThatHang):
    """The sprites reward, whose first score does not come."""

    calls = 3
