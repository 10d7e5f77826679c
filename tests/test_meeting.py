"""Processes of one start find each other in a store that earlier starts have used."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from vpo_engine.distributed.meeting import meet


def all_meet(store: dist.Store, order: list[int]) -> list[dist.Store]:
    """Let the ranks come in an order; return their parts of the store, by rank."""
    with ThreadPoolExecutor(len(order)) as threads:
        coming = {rank: threads.submit(meet, store, rank, len(order), 300.0) for rank in order}
        return [coming[rank].result() for rank in sorted(order)]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_each_start_has_a_part_of_the_store_of_its_own(order: list[int]) -> None:
    store = dist.HashStore()
    first = all_meet(store, order)
    first[0].set("address", "old")
    assert first[2].get("address") == b"old"
    for again in (order, order[::-1]):
        later = all_meet(store, again)
        assert not any(part.check(["address"]) for part in later), "nobody reads what a dead process has left"
        later[1].set("address", "new")
        assert later[0].get("address") == b"new"


def test_a_start_that_failed_while_its_processes_met_leaves_no_trace() -> None:
    store = dist.HashStore()
    for rank in (0, 1):
        with pytest.raises(
            ValueError, match=f"rank {rank} waited 0 s for the other 2 processes, and missed rank "
        ):
            meet(store, rank, 3, seconds=0.1)
    parts = all_meet(store, [1, 0, 2])
    parts[2].set("address", "new")
    assert parts[0].get("address") == b"new"


def test_fewer_processes_may_follow() -> None:
    store = dist.HashStore()
    all_meet(store, [0, 1, 2])
    parts = all_meet(store, [0, 1])
    parts[0].set("a", "b")
    assert parts[1].get("a") == b"b"
