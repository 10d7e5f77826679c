"""A rollout that runs out of memory: once with half of the rows, then no more."""

from __future__ import annotations

import weakref

import pytest
import torch
from rollout_case import CPU, Failing, settings, sprites
from step_case import sample_candidates
from torch import Tensor

from vpo_engine.config import RolloutConfig
from vpo_engine.memory.batches import Batch, Batches


def sample(config: RolloutConfig, network: object, rows: Batches) -> Tensor:
    model, text = sprites()
    return sample_candidates(model, network, text, [7, 8], config, 0, CPU, batches=rows)  # type: ignore[arg-type]


def test_half_of_the_rows_sample_the_same() -> None:
    said: list[str] = []
    network = Failing(sprites()[0].network, 2)
    rows = Batches(None, said.append)
    config = settings(steps=2, guidance=1.0)
    found = sample(config, network, rows)
    assert network.rows == [8, 8, 4, 4, 4, 4]
    assert said == [
        "out of memory with a batch of 8 candidates: going on with 4, with the same samples; set "
        "rollout.batch_size=4 to start so"
    ]
    assert rows.size == 4
    whole = sample(config, sprites()[0].network, Batches(None))
    assert torch.equal(
        found, sample(config.model_copy(update={"batch_size": 4}), sprites()[0].network, Batches(4))
    )
    assert (found - whole).abs().max() <= 2e-5
    network.rows.clear()
    network.calls = ()
    sample(config, network, rows)  # of the next step
    assert network.rows == [4, 4, 4, 4]


def test_groups_already_sampled_are_kept() -> None:
    network = Failing(sprites()[0].network, 3)
    sample(settings(steps=2, guidance=1.0, batch_size=4), network, Batches(4, lambda _: None))
    assert network.rows == [4, 4, 4, 2, 2, 2, 2]


def test_a_second_time_names_the_setting() -> None:
    network = Failing(sprites()[0].network, 1, 2)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"set rollout\.batch_size to 2, or .*Tried to allocate 2\.00 GiB"
    ):
        sample(settings(steps=2, guidance=1.0), network, Batches(None, lambda _: None))


def test_one_row_cannot_be_halved() -> None:
    network = Failing(sprites()[0].network, 1)
    with pytest.raises(torch.OutOfMemoryError, match="a batch of 1 candidates does not fit"):
        sample(settings(steps=2, guidance=1.0, batch_size=1), network, Batches(1))


def test_other_errors_pass() -> None:
    def work(_: Batch) -> None:
        raise RuntimeError("a kernel failed")

    with pytest.raises(RuntimeError, match="a kernel failed"):
        list(Batches(None).run(work, 2, 2))


def test_what_failed_is_let_go_before_it_is_tried_again() -> None:
    held: list[weakref.ref[Tensor]] = []
    gone: list[bool] = []

    def work(group: Batch) -> int:
        if held:
            return len(group)
        large = torch.zeros(4)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("full")

    rows = Batches(None, lambda _: gone.append(held[0]() is None))
    assert list(rows.run(work, 2, 2)) == [2, 2]
    assert gone == [True]


def test_halved_batches_come_before_those_that_waited() -> None:
    """The first of three batches does not fit, and the last is small enough as it is; all keep their places."""

    def work(batch: Batch) -> list[tuple[int, int]]:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("full")
        return [(prompt, candidate) for prompt in batch.prompts for candidate in batch.candidates]

    found = [one for part in Batches(4, lambda _: None).run(work, 5, 2) for one in part]
    assert found == [(prompt, candidate) for prompt in range(5) for candidate in range(2)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 11, 12, None])
def test_batches_are_never_larger_than_the_limit_and_cover_every_candidate_once(size: int | None) -> None:
    sizes: list[int] = []
    seen: list[tuple[int, int]] = []

    def work(batch: Batch) -> None:
        sizes.append(len(batch))
        seen.extend((prompt, candidate) for prompt in batch.prompts for candidate in batch.candidates)

    list(Batches(size).run(work, 3, 4))
    assert max(sizes) <= (size or 12)
    assert len(sizes) == {None: 1, 12: 1, 11: 2, 8: 2, 7: 3, 5: 3, 4: 3, 3: 6, 2: 6, 1: 12}[size]
    assert seen == [(prompt, candidate) for prompt in range(3) for candidate in range(4)]


def test_two_that_run_out_of_memory_at_once_halve_once() -> None:
    """The scorer's thread fails while the sampler's batch is computed, which then fails too."""
    rows = Batches(None, lambda _: None)

    def score(batch: Batch) -> int:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("full")
        return len(batch)

    def sample(batch: Batch) -> int:
        if rows.size is None:
            assert list(rows.run(score, 2, 2)) == [2, 2]
        return score(batch)

    assert list(rows.run(sample, 2, 2)) == [2, 2]
