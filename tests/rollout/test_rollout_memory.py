"""A rollout that runs out of memory: once with half of the rows, then no more."""

from __future__ import annotations

import weakref

import pytest
import torch
from rollout_case import CPU, Failing, settings, sprites
from torch import Tensor

from vpo_engine.config import RolloutConfig
from vpo_engine.rollout.candidates import Rollout
from vpo_engine.rollout.rows import Group, Rows


def sample(config: RolloutConfig, network: object, rows: Rows) -> Tensor:
    model, text = sprites()
    return Rollout(model, config, 0, CPU, rows).begin(network, text, [7, 8]).latents  # type: ignore[arg-type]


def test_half_of_the_rows_sample_the_same() -> None:
    said: list[str] = []
    network = Failing(sprites()[0].network, 2)
    rows = Rows(None, said.append)
    config = settings(steps=2, guidance=1.0)
    found = sample(config, network, rows)
    assert network.rows == [8, 8, 4, 4, 4, 4]
    assert said == [
        "out of memory with 8 rows at once: going on with 4, with the same samples; set rollout.rows=4 to start so"
    ]
    assert rows.limit == 4
    whole = sample(config, sprites()[0].network, Rows(None))
    assert torch.equal(found, sample(config.model_copy(update={"rows": 4}), sprites()[0].network, Rows(4)))
    assert (found - whole).abs().max() <= 2e-5
    network.rows.clear()
    network.calls = ()
    sample(config, network, rows)  # of the next step
    assert network.rows == [4, 4, 4, 4]


def test_groups_already_sampled_are_kept() -> None:
    network = Failing(sprites()[0].network, 3)
    sample(settings(steps=2, guidance=1.0, rows=4), network, Rows(4, lambda _: None))
    assert network.rows == [4, 4, 4, 2, 2, 2, 2]


def test_a_second_time_names_the_setting() -> None:
    network = Failing(sprites()[0].network, 1, 2)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"set rollout\.rows to 2, or .*Tried to allocate 2\.00 GiB"
    ):
        sample(settings(steps=2, guidance=1.0), network, Rows(None, lambda _: None))


def test_one_row_cannot_be_halved() -> None:
    network = Failing(sprites()[0].network, 1)
    with pytest.raises(torch.OutOfMemoryError, match="1 rows at once do not fit"):
        sample(settings(steps=2, guidance=1.0, rows=1), network, Rows(1))


def test_other_errors_pass() -> None:
    def work(_: Group) -> None:
        raise RuntimeError("a kernel failed")

    with pytest.raises(RuntimeError, match="a kernel failed"):
        list(Rows(None).run(work, 2, 2))


def test_what_failed_is_let_go_before_it_is_tried_again() -> None:
    held: list[weakref.ref[Tensor]] = []
    gone: list[bool] = []

    def work(group: Group) -> int:
        if held:
            return len(group)
        large = torch.zeros(4)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("full")

    rows = Rows(None, lambda _: gone.append(held[0]() is None))
    assert list(rows.run(work, 2, 2)) == [2, 2]
    assert gone == [True]
