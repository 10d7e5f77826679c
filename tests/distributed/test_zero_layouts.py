"""DeepSpeed with teams that share candidates, with couples that share guidance, and with a process for the reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import zero_runs
from process_group import run_in_group
from safetensors.torch import load_file
from zero_runs import MICRO, SEQUENTIAL, divided_fully, zero

from vpo_engine.config import Config
from vpo_engine.distributed.processes import Processes
from vpo_engine.train import train

# Not imported here: that takes seconds in every worker, also where these tests are left out.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

ROUNDING = 1e-3
"""Of the distance that weights have moved: a process that samples fewer candidates at once rounds them otherwise, by
1e-4 at most (see test_teams.py), and a step is nearly linear in them."""
SPLIT = ("rollout.guidance=4", "processes.split_guidance=true", "processes.per_prompt=2")
TEAM = ("processes.per_prompt=2",)


def cases(folder: Path, count: int) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return settings of both runs, and what divides the second one."""
    three = zero(3, divided_fully(folder))
    if count == 4:
        return [((), (*zero(2), *TEAM)), (SEQUENTIAL, (*three, *TEAM)), (SPLIT[:1], (*zero(1), *SPLIT))]
    return [
        ((), (*zero(0), *TEAM)),
        (MICRO, (*zero(1), *TEAM)),
        (SEQUENTIAL, (*zero(2), *TEAM)),
        ((), (*three, *TEAM)),
        (SPLIT[:1], (*three, *SPLIT)),
    ]


def in_group(folder: Path, count: int) -> None:
    start = Processes.start("cpu", 2)
    for number, (settings, divided) in enumerate(cases(folder, count)):
        processes = start.in_couples() if SPLIT[1] in divided else start
        found = zero_runs.run((*settings, *divided), processes)
        torch.save(found, folder / f"{number} {start.rank}.pt")
    start.stop()


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_a_team_whose_state_is_divided_trains_as_one_process(count: int, tmp_path: Path) -> None:
    divided_fully(tmp_path)
    run_in_group(tmp_path, count, in_group, tmp_path, count)
    for number, (settings, _) in enumerate(cases(tmp_path, count)):
        members = [torch.load(tmp_path / f"{number} {rank}.pt", weights_only=True) for rank in range(count)]
        alone = zero_runs.run(settings, Processes.start("cpu"))
        moved = (alone["after"] - alone["before"]).norm()
        for member in members:
            assert torch.equal(member["after"], members[0]["after"]), number
            assert torch.equal(member["reference"], members[0]["reference"]), number
            assert member["metrics"] == members[0]["metrics"], number
        assert float(moved) > 0.1
        assert float((members[0]["after"] - alone["after"]).norm()) <= ROUNDING * float(moved), number
        for mine, expected in zip(members[0]["metrics"], alone["metrics"], strict=True):
            assert mine == pytest.approx(expected, rel=1e-2, abs=1e-4), number


def policy_of(config: Config) -> dict[str, torch.Tensor]:
    assert config.run_dir is not None
    return load_file(config.run_dir / "checkpoints/step_00000002/policy/model.safetensors")


@pytest.mark.long
def test_a_process_for_the_reward_is_not_one_of_those_that_divide(
    small: Callable[..., Config], small_policy: str, tmp_path: Path
) -> None:
    """Its scores are the same bits, so that two processes train the same with it and without."""

    def run(name: str, count: int, more: Sequence[str]) -> dict[str, torch.Tensor]:
        config = small(small_policy, "steps=2", *zero(2), f"run_dir={tmp_path / name}", *more)
        run_in_group(tmp_path, count, train, config)
        return policy_of(config)

    found, expected = run("with", 3, ["processes.reward=true"]), run("without", 2, [])
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
