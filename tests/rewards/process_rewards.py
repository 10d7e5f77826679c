"""Scorers for processes of their own, well behaved and not; made there by name."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from vpo_engine.rewards.sprites import SpritesReward


class UnportableError(Exception):
    """Cannot be made from its arguments alone, which is what pickle does."""

    def __init__(self, step: int, total: int) -> None:
        super().__init__(f"{step} of {total}")


class Scripted:
    """Does what the first prompt says; else scores the mean of each video."""

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
            case ["facts"]:
                facts = (torch.get_num_threads(), os.getpid(), os.getppid())
                return {"mean": torch.tensor(facts, dtype=torch.float64)}
        return {"mean": videos.flatten(1).double().mean(1).float()}


def scripted() -> Scripted:
    return Scripted()


def sprites() -> SpritesReward:
    return SpritesReward()


def refused() -> Scripted:
    raise FileNotFoundError("no config.json in /absent; fetch it")


def dead() -> Scripted:
    sys.exit("no such device")


class _HangingSprites(SpritesReward):
    """The sprites reward, whose fourth score does not come."""

    calls = 0

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == 4:
            time.sleep(600)
        return super().score(videos, prompts)


def scorer_that_hangs(*_: object, **__: object) -> SpritesReward:
    reward = _HangingSprites()
    reward.calls = 3
    return reward


def sprites_that_hang(*_: object, **__: object) -> SpritesReward:
    return _HangingSprites()
