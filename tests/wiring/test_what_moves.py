"""What a run hands to the part that moves weights between device and host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import pytest

from vpo_engine import training
from vpo_engine.memory.idle_offload import IdleOffload


def test_all_that_a_run_can_move_is_known_to_what_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[IdleOffload] = []
    parts: list[tuple[IdleOffload, str]] = []
    rewards: list[tuple[Any, ...]] = []
    from_config, build = IdleOffload.from_config, training._build_reward

    def make(*given: Any) -> IdleOffload:
        made.append(from_config(*given))
        return made[-1]

    def build_reward(*given: Any) -> Any:
        rewards.append(given[3:])
        return build(*given)

    monkeypatch.setattr(IdleOffload, "from_config", staticmethod(make))
    monkeypatch.setattr(IdleOffload, "register", lambda self, name, _: parts.append((self, name)))
    monkeypatch.setattr(training, "_build_reward", build_reward)
    engine.train(engine.make_config(tmp_path, "steps=1", "ema.decay=0.9"))
    assert {"reference", "optimizer", "ema"} <= {name for offload, name in parts if offload is made[-1]}
    assert rewards == [(made[-1],)]
