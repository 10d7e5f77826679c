"""The watchdog: when a stage is too long, whose it is, and what is said."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from process_group import Group

from vpo_engine import train as entry
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.stages import Stages
from vpo_engine.distributed.stopping import StopPoints
from vpo_engine.distributed.watchdog import StageMinutes, Watchdog, group_limit


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Member:
    """A process of a run, as its watchdog sees it."""

    def __init__(
        self, clock: Clock, minutes: StageMinutes, rank: int = 0, count: int = 1, store: object = None
    ):
        self.stages = Stages(clock)
        self.watchdog = Watchdog(
            self.stages, minutes, lambda text: None, rank=rank, count=count, store=store, clock=clock
        )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def two(clock: Clock) -> list[Member]:
    store = dist.HashStore()
    return [Member(clock, 1.0, rank, 2, store) for rank in range(2)]


def test_a_stage_that_is_longer_than_its_limit_is_named(clock: Clock) -> None:
    one = Member(clock, 1.0)
    one.stages.begin_step(7)
    with one.stages("rollout"):
        clock.now += 59
        assert one.watchdog.look() is None
        clock.now += 2
        said = one.watchdog.look()
    assert said is not None
    assert re.fullmatch(
        r"rank 0 on \S+ is in rollout of step 7 for 61 s, longer than its limit of 60 s", said
    )
    assert one.watchdog.look() is None, "the stage has ended"


def test_time_counts_anew_when_a_stage_inside_begins_or_ends(clock: Clock) -> None:
    one = Member(clock, 1.0)
    with one.stages("rollout"):
        clock.now += 50
        with one.stages("decode"):
            clock.now += 50
            assert one.watchdog.look() is None
        assert one.stages.now.stage == "rollout"
        clock.now += 50
        assert one.watchdog.look() is None


def test_what_comes_before_the_first_stage_has_no_limit(clock: Clock) -> None:
    one = Member(clock, 1.0)
    clock.now += 1e6
    assert one.watchdog.look() is None
    with one.stages("text"):
        pass
    clock.now += 61
    assert "work between stages" in (one.watchdog.look() or "")


def test_auto_follows_the_longest_time_and_is_generous_with_the_first(clock: Clock) -> None:
    one = Member(clock, "auto")
    with one.stages("rollout"):
        clock.now += 5000
        assert one.watchdog.look() is None
    with one.stages("update"):
        clock.now += 2
    with one.stages("rollout"):
        clock.now += 49_999
        assert one.watchdog.look() is None
        clock.now += 2
        assert "limit of 50000 s" in (one.watchdog.look() or "")
    with one.stages("update"):
        clock.now += 1799
        assert one.watchdog.look() is None, "at least 30 minutes"
        clock.now += 2
        assert "limit of 1800 s" in (one.watchdog.look() or "")


def test_a_hang_in_the_very_first_stage_has_a_limit(clock: Clock) -> None:
    one = Member(clock, "auto")
    with one.stages("rollout"):
        clock.now += 180 * 60 - 1
        assert one.watchdog.look() is None
        clock.now += 2
        assert "is in rollout of step 0 for 10801 s, longer than its limit of 10800 s" in (
            one.watchdog.look() or ""
        )


def test_what_is_reached_inside_of_a_stage_counts(clock: Clock) -> None:
    """A first rollout of many passes may take days; later a pass that hangs has the limit of the passes before it."""
    one = Member(clock, "auto")
    points = StopPoints(replace(Processes.start("cpu"), stages=one.stages))
    with one.stages("rollout"):
        for _ in range(50):
            clock.now += 400
            points.check()
            assert one.watchdog.look() is None
        clock.now += 180 * 60
        assert one.watchdog.look() is None
        points.check()
    one.stages.longest["rollout"] = 400.0
    with one.stages("rollout"):
        clock.now += 3999
        assert one.watchdog.look() is None
        clock.now += 2
        assert "is in rollout of step 0 for 4001 s, longer than its limit of 4000 s" in (
            one.watchdog.look() or ""
        )


def test_auto_does_not_count_waiting_for_others(clock: Clock) -> None:
    one = Member(clock, "auto")
    with one.stages("update"), one.stages.waiting():
        clock.now += 9000
    with one.stages("update"):
        clock.now += 1801
        assert "limit of 1800 s" in (one.watchdog.look() or "")


def test_waiting_for_others_is_no_work_of_ones_own(clock: Clock, two: list[Member]) -> None:
    fast, slow = two
    with slow.stages("rollout"), fast.stages("update"), fast.stages.waiting():
        clock.now += 50
        assert slow.watchdog.look() is None
        with slow.stages("decode"):
            clock.now += 50
            assert slow.watchdog.look() is None
            assert fast.watchdog.look() is None, "the other is at work, and within its limit"
            clock.now += 11
            said = slow.watchdog.look()
    assert said is not None
    assert said.startswith("rank 1 on ")
    assert "is in decode of step 0 for 61 s, longer than its limit of 60 s; rank 0 on " in said
    assert said.endswith("waits for other processes in update of step 0 for 11 s") or "rank 0" in said


def test_a_process_that_is_silent_is_named_by_those_that_wait_for_it(clock: Clock, two: list[Member]) -> None:
    fast, silent = two
    silent.stages.begin_step(3)
    with silent.stages("rollout"), fast.stages("update"), fast.stages.waiting():
        clock.now += 10
        silent.watchdog.look()  # its last word
        fast.watchdog.look()
        clock.now += 51
        assert fast.watchdog.look() is None, "the other one is given time to say it itself"
        clock.now += 3
        said = fast.watchdog.look()
    assert said is not None
    assert re.match(
        r"rank 1 on \S+ is in rollout of step 3 for 64 s \(silent for 54 s\), longer than its limit of 60 s; rank 0 ",
        said,
    )


def test_a_process_that_was_frozen_while_it_waited_is_not_taken_for_one_that_waits(
    clock: Clock, two: list[Member]
) -> None:
    one, frozen = two
    with one.stages("update"), one.stages.waiting(), frozen.stages("reward"), frozen.stages.waiting():
        frozen.watchdog.look()
        one.watchdog.look()
        clock.now += 61
        assert one.watchdog.look() is None
        clock.now += 3
        said = one.watchdog.look()
    assert said is not None
    assert re.match(
        r"rank 1 on \S+ has said nothing for 64 s \(it was in reward of step 0\); rank 0 on ", said
    )


def test_processes_that_all_wait_for_each_other_are_noticed(clock: Clock, two: list[Member]) -> None:
    one, other = two
    with one.stages("update"), one.stages.waiting(), other.stages("reward"), other.stages.waiting():
        for _ in range(2):
            assert [each.watchdog.look() for each in two] == [None, None]
        clock.now += 61
        other.watchdog.look()
        assert (one.watchdog.look() or "").startswith(
            "all processes wait for each other and none works: rank 0 "
        )


def test_processes_that_meet_late_are_not_taken_for_a_deadlock(clock: Clock, two: list[Member]) -> None:
    """One waits for a long time; the other one has only just begun to."""
    one, late = two
    with one.stages("update"), one.stages.waiting(), late.stages("reward"):
        clock.now += 58
        with late.stages.waiting():
            clock.now += 4
            for _ in range(2):
                assert [each.watchdog.look() for each in two] == [None, None]


def test_auto_lets_all_wait_for_each_other_for_half_an_hour(clock: Clock) -> None:
    store = dist.HashStore()
    one, other = (Member(clock, "auto", rank, 2, store) for rank in range(2))
    with one.stages("update"), one.stages.waiting(), other.stages("reward"), other.stages.waiting():
        clock.now += 1799
        for _ in range(2):
            assert [each.watchdog.look() for each in (one, other)] == [None, None]
        clock.now += 2
        other.watchdog.look()
        assert (one.watchdog.look() or "").startswith("all processes wait for each other")


def test_a_process_that_is_gone_ends_the_others_after_some_seconds(
    clock: Clock, two: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, gone = two
    with gone.stages("rollout"):
        gone.watchdog.look()
    assert one.watchdog.look() is None
    monkeypatch.setattr("vpo_engine.distributed.board.is_running", lambda pid: False)
    assert one.watchdog.look() is None
    clock.now += 9
    assert one.watchdog.look() is None, "the main thread may notice by itself"
    clock.now += 2
    said = one.watchdog.look()
    assert said is not None
    assert re.match(
        rf"rank 1 on \S+ \(process {os.getpid()}\) has ended; it was in rollout of step 0; rank 0 on", said
    )


def assert_nobody_is_missed(one: Member, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for a minute and a half; no process that is looked for on this machine runs."""
    monkeypatch.setattr("vpo_engine.distributed.board.is_running", lambda pid: False)
    for _ in range(3):
        assert one.watchdog.look() is None
        clock.now += 30


def test_a_process_that_took_its_leave_is_not_missed(
    clock: Clock, two: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, leaving = two
    leaving.watchdog.look()
    with leaving.watchdog:
        pass
    one.watchdog.look()
    assert_nobody_is_missed(one, clock, monkeypatch)


def test_the_group_waits_longer_than_any_watchdog() -> None:
    for minutes in (None, "auto", 0.5, 60.0, 5000.0):
        limit = group_limit(minutes)  # type: ignore[arg-type]
        assert limit >= timedelta(hours=24)
        assert not isinstance(minutes, float) or limit > timedelta(minutes=minutes)


def test_every_group_has_the_limit_that_the_run_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr("vpo_engine.distributed.processes.meet", lambda store, rank, count: store)
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(dist, name, lambda *_, timeout=None, **__: limits.append(timeout))
    given = timedelta(hours=30)
    Processes.start("cpu", per_team=2, limit=given)
    assert limits == [given, given], "of all processes, and of the one team"


class HaltedClock:
    """A clock that stands still until a file is there, and then runs at ``rate`` seconds a second.

    So a limit of seconds tells only how long the test takes: what comes before the hang takes no time.
    """

    def __init__(self, file: Path, rate: float) -> None:
        self._file, self._rate = file, rate
        self._began: float | None = None

    def __call__(self) -> float:
        if self._began is None and self._file.exists():
            self._began = time.monotonic()
        return 0.0 if self._began is None else self._rate * (time.monotonic() - self._began)


def hang(arguments: list[str], rank: str, how: str, mark: Path) -> int:
    """Train; the process ``rank`` makes the file ``mark`` and stops in the reward of its third step.

    If it is asleep, it has to notice that itself: the clock of the other one is slower.
    """
    from vpo_engine.online_vpo import OnlineVPO
    from vpo_engine.rewards import sprites

    clock = HaltedClock(mark, 0.2 if how == "asleep" and os.environ["RANK"] != rank else 1.0)
    Stages.__init__.__defaults__ = (clock,)
    Watchdog.__init__.__kwdefaults__["clock"] = clock  # type: ignore[index]
    score, begun = sprites.SpritesReward.score, []
    step = OnlineVPO.step

    def counted(algorithm: OnlineVPO, *prompts: object) -> object:
        begun.append(1)
        return step(algorithm, *prompts)  # type: ignore[arg-type]

    def stuck(reward: object, *inputs: object) -> object:
        if os.environ["RANK"] == rank and len(begun) == 3:
            mark.touch()
            if how == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3600)
        return score(reward, *inputs)  # type: ignore[arg-type]

    OnlineVPO.step = counted  # type: ignore[assignment,method-assign]
    sprites.SpritesReward.score = stuck  # type: ignore[assignment,method-assign]
    return entry.main(arguments)


@pytest.mark.long
@pytest.mark.parametrize("how", ["asleep", "frozen"])
def test_a_rank_that_hangs_ends_the_run_within_its_limit(
    how: str, smallest: list[str], small_policy: str, tmp_path: Path, start: Callable[..., Group]
) -> None:
    run = tmp_path / "run"
    limit = 11.0 if how == "frozen" else 4.0
    settings = [
        *smallest,
        small_policy,
        f"run_dir={run}",
        f"distributed.stage_minutes={limit / 60}",
        "evaluation.every=null",
    ]
    group = start(settings, "1", how, tmp_path / "mark")
    ended = group.processes[0 if how == "frozen" else 1]
    ended.join(600)
    assert ended.exitcode == 124, group.printed()
    said = group.printed()
    named = r"is in reward of step 3 for \d+ s, longer than its limit of 4 s"
    silent = (
        r"(has said nothing for \d+ s \(it was in .+ of step \d\)|is in .+ \(silent for \d+ s\), longer than)"
    )
    assert re.search(rf"error: rank 1 on \S+ {silent if how == 'frozen' else named}", said), said
    assert "the same command goes on from its newest checkpoint" in said
    assert '"error": "rank 1 on ' in (run / "attempts.jsonl").read_text()
    if how == "asleep":
        group.processes[0].join(600)
        assert group.processes[0].exitcode == 1
        assert "rank 0 lost another process while it waited for all of them in " in group.printed()
        assert "Traceback" not in group.printed()


@pytest.fixture
def start(tmp_path: Path) -> object:
    groups: list[Group] = []

    def begin(*arguments: object) -> Group:
        groups.append(Group(tmp_path, 2, hang, *arguments))
        return groups[-1]

    yield begin
    for group in groups:
        for process in group.processes:
            process.kill()
