"""The watchdog in groups of three, of several machines, and between stages."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack

import pytest
import torch.distributed as dist
from test_watchdog import Clock, Member, assert_nobody_is_missed


def members(clock: Clock, began: int, count: int) -> list[Member]:
    store = dist.HashStore()
    return [Member(clock, 1.0, rank, count, store) for rank in range(began)]


def test_a_process_of_another_machine_is_not_looked_for_here(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    one, far = members(clock, 2, 2)
    monkeypatch.setattr(far.watchdog, "_place", "another machine")
    far.watchdog.look()
    assert_nobody_is_missed(one, clock, monkeypatch)


def test_two_that_wait_for_a_third_which_works_do_not_blame_each_other() -> None:
    clock = Clock()
    one, other, busy = members(clock, 3, 3)
    waiting = one.stages.waiting(), other.stages.waiting()
    with one.stages("update"), other.stages("update"), busy.stages("rollout"), waiting[0], waiting[1]:
        for _ in range(4):
            clock.now += 40
            busy.stages.reached()
            assert [each.watchdog.look() for each in (busy, other, one)] == [None] * 3


def test_those_that_wait_for_one_who_has_not_begun_are_not_taken_for_a_deadlock() -> None:
    clock = Clock()
    one, other = members(clock, 2, 3)
    with one.stages("update"), one.stages.waiting(), other.stages("update"), other.stages.waiting():
        clock.now += 61
        for _ in range(2):
            assert [each.watchdog.look() for each in (one, other)] == [None, None]


def test_auto_limits_work_between_stages_like_a_stage_that_has_ended() -> None:
    clock = Clock()
    one = Member(clock, "auto")
    for stage in ("text", "rollout"):
        with one.stages(stage):
            pass
    clock.now += 1801
    said = one.watchdog.look() or ""
    assert "work between stages of step 0 for 1801 s, longer than its limit of 1800 s" in said


def test_a_process_says_where_it_is_as_soon_as_it_begins() -> None:
    """It may be frozen before it looks for the second time, and the others would wait for it for ever."""
    one, other = members(Clock(), 2, 2)
    board, interval = one.watchdog._board, other.watchdog._interval
    assert board is not None
    with other.watchdog:
        until = time.monotonic() + 0.9 * interval
        while board._get("1") is None and time.monotonic() < until:
            time.sleep(0.01)
        assert board._get("1") is not None


def test_a_process_that_fails_takes_no_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    one, failing = members(clock, 2, 2)
    failing.watchdog.look()
    with pytest.raises(KeyError), failing.watchdog:
        raise KeyError("a mistake")
    monkeypatch.setattr("vpo_engine.distributed.board.is_running", lambda pid: False)
    assert one.watchdog.look() is None
    clock.now += 11
    assert "has ended; it was in " in (one.watchdog.look() or "")


def test_words_that_many_processes_say_seldom_are_not_too_old_to_tell_that_all_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of 512 processes says one every 17 seconds."""
    clock = Clock()
    one, other = members(clock, 2, 2)
    for each in (one, other):
        monkeypatch.setattr(each.watchdog, "_interval", 17.0)
    with one.stages("update"), one.stages.waiting(), other.stages("update"), other.stages.waiting():
        clock.now += 49
        assert [each.watchdog.look() for each in (other, one)] == [None, None]
        clock.now += 12
        assert (one.watchdog.look() or "").startswith(
            "all processes wait for each other and none works: rank 0 "
        )


class Gone:
    """A store whose machine is gone."""

    def set(self, *_: object) -> None:
        raise RuntimeError("Connection reset by peer")

    check = get = set


def test_a_process_whose_store_is_gone_still_watches_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "PrefixStore", lambda name, store: Gone())
    clock = Clock()
    one, _ = members(clock, 2, 2)
    with one.stages("rollout"):
        clock.now += 61
        assert "is in rollout of step 0 for 61 s, longer than its limit" in (one.watchdog.look() or "")


def test_three_others_are_named_those_first_that_work_and_are_furthest_behind() -> None:
    clock = Clock()
    hung, *others = members(clock, 5, 5)
    with ExitStack() as stack:
        for other, (step, waits) in zip(others, ((7, False), (7, True), (6, False), (6, True)), strict=True):
            other.stages.begin_step(step)
            stack.enter_context(other.stages("rollout"))
            if waits:
                stack.enter_context(other.stages.waiting())
            other.watchdog.look()
        stack.enter_context(hung.stages("update"))
        clock.now += 61
        assert re.findall(r"; rank (\d) on ", hung.watchdog.look() or "") == ["3", "1", "4"]
