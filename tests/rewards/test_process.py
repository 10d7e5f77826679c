"""A reward in a process of its own: the same scores, and every way in which it can fail to give any."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import process_rewards
import pytest
import torch

from vpo_engine.data.sprites.damage import sample_clean
from vpo_engine.errors import RewardProcessError
from vpo_engine.rewards.process import start_reward
from vpo_engine.rewards.refusals import refusals, size_refusal
from vpo_engine.rewards.registry import RewardSpec
from vpo_engine.rewards.remote import RemoteReward
from vpo_engine.rewards.sprites import DIMENSIONS, SpritesReward


def alive(pid: int) -> bool:
    """Return whether there is such a process; a finished one that nobody waited for counts."""
    return Path(f"/proc/{pid}").exists()


def gone(pid: int, seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


SCRIPTED = RewardSpec("process_rewards:Scripted")
VIDEOS = torch.arange(2 * 3 * 4 * 4 * 3).view(2, 3, 4, 4, 3).to(torch.uint8)


def ask(reward: RemoteReward, what: str, videos: torch.Tensor = VIDEOS) -> torch.Tensor:
    return reward.score(videos, [what] * len(videos))["mean"]


def fact(reward: RemoteReward, name: str) -> int:
    """Return a fact that the process of the scripted reward tells about itself."""
    return int(ask(reward, f"fact {name}")[0])


PRECISION = "high"
"""Of float32 matrix products in the process of ``reward``; torch's default is another."""


@pytest.fixture(scope="module")
def reward() -> Iterator[RemoteReward]:
    """Made by a process with another precision, and one thread more, than a fresh one has."""
    before, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    assert before != PRECISION
    torch.set_float32_matmul_precision(PRECISION)
    torch.set_num_threads(threads + 1)
    try:
        made = start_reward(SCRIPTED)
    finally:
        torch.set_float32_matmul_precision(before)
        torch.set_num_threads(threads)
    with made:
        yield made


@pytest.fixture
def mortal(request: pytest.FixtureRequest) -> Iterator[RemoteReward]:
    """A reward for a test that ends its process; ``request.param``: its time limit."""
    with start_reward(SCRIPTED, time_limit=getattr(request, "param", None)) as made:
        yield made


class TestScores:
    def test_are_those_of_the_reward_in_this_process_bit_for_bit(self) -> None:
        clips = sample_clean(5, torch.Generator().manual_seed(0))
        here = SpritesReward().score(clips.videos, clips.captions)
        with start_reward(RewardSpec("sprites")) as made:
            assert made.dimensions == DIMENSIONS
            for _ in range(2):
                there = made.score(clips.videos, clips.captions)
                assert list(there) == list(here)
                assert all(torch.equal(there[name], here[name]) for name in here)
            made._holder.kill()
            with pytest.raises(
                RewardProcessError,
                match="died with signal SIGKILL, as the system kills when memory runs out while",
            ):
                made.score(clips.videos, clips.captions)

    @pytest.mark.long
    def test_of_videos_of_any_size_and_layout(self, reward: RemoteReward) -> None:
        """One request after the other, larger and smaller ones."""
        generator = torch.Generator().manual_seed(1)
        for shape in ((1, 2, 4, 4, 3), (3, 5, 64, 64, 3), (2, 3, 8, 8, 3)):
            videos = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            for given in (videos, videos.flip(1), videos.transpose(2, 3), videos[:, ::2]):
                expected = given.flatten(1).double().mean(1).float()
                assert torch.equal(ask(reward, "score", given), expected)

    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.long
    def test_that_lie_apart_in_memory(self, count: int) -> None:
        """Of a single video they count as contiguous, whatever lies between them."""
        with start_reward(RewardSpec("process_rewards:Columns"), time_limit=30) as made:
            for _ in range(2):
                scores = made.score(VIDEOS[:count], ["a"] * count)
                assert {name: values.tolist() for name, values in scores.items()} == {
                    "first": [1.5] * count,
                    "second": [2.5] * count,
                }

    def test_as_many_threads_there_as_here(self, reward: RemoteReward) -> None:
        assert fact(reward, "threads") == torch.get_num_threads() + 1
        assert fact(reward, "pid") != os.getpid() == fact(reward, "parent")

    def test_with_the_matrix_precision_of_the_process_that_starts_it(self, reward: RemoteReward) -> None:
        assert process_rewards.PRECISIONS[fact(reward, "precision")] == PRECISION


class TestErrors:
    def test_arrive_as_they_were_with_their_traceback(self, reward: RemoteReward) -> None:
        with pytest.raises(ValueError, match="prompt 'raise' is one of 2 bad ones") as caught:
            ask(reward, "raise")
        assert str(caught.value) == "prompt 'raise' is one of 2 bad ones"
        (note,) = caught.value.__notes__
        assert note.startswith("in the process of reward 'process_rewards:Scripted':\nTraceback")
        assert "process_rewards.py" in note
        assert len(ask(reward, "score")) == 2  # it goes on

    def test_that_cannot_travel_are_told(self, reward: RemoteReward) -> None:
        with pytest.raises(RuntimeError, match="UnportableError: 2 of 3"):
            ask(reward, "unportable")

    @pytest.mark.long
    def test_while_it_is_made(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"no config\.json in /absent"):
            start_reward(RewardSpec("process_rewards:Refused"))
        with pytest.raises(
            RewardProcessError, match=r"died with exit code 1 while it was made; .*no such device"
        ):
            start_reward(RewardSpec("process_rewards:Dead"))

    @pytest.mark.parametrize("limit", [0, -1.0, float("inf"), float("nan")])
    def test_a_time_limit_is_a_time(self, limit: float) -> None:
        with pytest.raises(ValueError, match=f"the time limit is {limit} seconds, expected a finite number"):
            start_reward(SCRIPTED, time_limit=limit)


class TestDeath:
    @pytest.mark.long
    @pytest.mark.parametrize("mortal", [3.0], indirect=True)
    def test_a_scorer_that_hangs_is_ended(self, mortal: RemoteReward) -> None:
        """It would take ten minutes."""
        pid = fact(mortal, "pid")
        start = time.monotonic()
        with pytest.raises(RewardProcessError) as caught:
            ask(mortal, "hang")
        assert 3.0 <= time.monotonic() - start < 300.0
        message = str(caught.value)
        assert message.startswith(
            "reward 'process_rewards:Scripted' took longer than its time limit of 3 s while it scored 2 videos"
        )
        assert "raise the limit (reward.time_limit, or --time-limit of rank)" in message
        assert not alive(pid)
        with pytest.raises(
            RewardProcessError, match="the process of reward 'process_rewards:Scripted' has ended"
        ):
            ask(mortal, "score")

    def test_its_last_words(self, mortal: RemoteReward, capsys: pytest.CaptureFixture[str]) -> None:
        pid = fact(mortal, "pid")
        with pytest.raises(
            RewardProcessError,
            match=r"^the process of reward 'process_rewards:Scripted' died with exit code 7 while it scored 2 videos; "
            r"its last words: first words \| licence expired$",
        ):
            ask(mortal, "exit 7")
        assert "first words\nlicence expired\n" in capsys.readouterr().err  # also as they came
        assert not alive(pid)

    def test_a_crash_says_where(self, mortal: RemoteReward) -> None:
        with pytest.raises(
            RewardProcessError, match=r"died with signal SIGSEGV .*Segmentation fault.*process_rewards"
        ):
            ask(mortal, "signal SIGSEGV")


class TestLife:
    @pytest.mark.long
    def test_it_ends_when_it_is_forgotten(self) -> None:
        made = start_reward(SCRIPTED)
        pid = fact(made, "pid")
        assert alive(pid)
        del made
        gc.collect()
        assert not alive(pid)

    def test_it_leaves_signals_to_its_parent(self, reward: RemoteReward) -> None:
        pid = fact(reward, "pid")
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        assert len(ask(reward, "score")) == 2
        assert os.getpgid(pid) != os.getpgid(0)  # Ctrl-C in a terminal does not reach it

    @pytest.mark.long
    def test_it_ends_with_its_parent_even_in_the_middle_of_a_score(self) -> None:
        script = f"""
import sys; sys.path[:] = {[str(Path(process_rewards.__file__).parent), *sys.path]!r}
import torch
from vpo_engine.rewards.process import start_reward
from vpo_engine.rewards.refusals import refusals, size_refusal
from vpo_engine.rewards.registry import RewardSpec
reward = start_reward(RewardSpec("process_rewards:Scripted"))
videos = torch.zeros(1, 1, 1, 1, 3, dtype=torch.uint8)
print(int(reward.score(videos, ["fact pid"])["mean"][0]), flush=True)
reward.score(videos, ["hang"])
"""
        parent = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.communicate()
        assert gone(pid)


def test_refused_prompts_are_told_across_processes() -> None:
    prompts = ["a fox", "Füchse?", "a hare", "a cat?"]
    with start_reward(RewardSpec("process_rewards:Picky"), time_limit=60.0) as picky:
        assert refusals(picky, prompts) == {1: "'Füchse?' asks something", 3: "'a cat?' asks something"}
        assert size_refusal(picky, 8, 4, 6) is None
        assert size_refusal(picky, 9, 4, 6) == "9 of 4 x 6 are too many"
        with pytest.raises(
            ValueError, match=r"refuse_prompt\('wrong'\) returned False, expected a text that says why"
        ):
            refusals(picky, ["wrong"])
        with pytest.raises(RuntimeError, match="the word list is gone"):
            refusals(picky, ["fail"])
        assert ask(picky, "a fox").shape == (2,)


def test_a_reward_that_says_nothing_takes_every_prompt(reward: RemoteReward) -> None:
    assert refusals(reward, ["", "?"]) == {}
    assert size_refusal(reward, 1, 1, 1) is None
