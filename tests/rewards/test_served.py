"""A reward that one process serves to others, here threads: the same scores, and one end for all."""

from __future__ import annotations

import json
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vpo_engine.errors import RewardProcessError
from vpo_engine.rewards import served
from vpo_engine.rewards.refusals import refusals
from vpo_engine.rewards.served import find_reward, serve

VIDEOS = torch.randint(
    0, 256, (3, 5, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)
CAPTIONS = ["a red circle", "ein Kreis, grün", ""]


class Scripted:
    """Scores by a function of the captions."""

    dimensions = ("temporal_consistency", "dynamic_degree")

    def __init__(self, answer: Callable[[Sequence[str]], float] = len) -> None:
        self.answer = answer

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        value = self.answer(prompts)
        return {name: videos.float().mean(dim=(1, 2, 3, 4)) * value for name in self.dimensions}


class Clients:
    """Threads that ask, and what came of each: its result or its error."""

    def __init__(self, *clients: Callable[[dist.Store], object]) -> None:
        self.store = dist.HashStore()
        self.came: list[object] = [None] * len(clients)
        self.threads = [
            threading.Thread(target=self._run, args=(number, client)) for number, client in enumerate(clients)
        ]
        for thread in self.threads:
            thread.start()

    def _run(self, number: int, client: Callable[[dist.Store], object]) -> None:
        try:
            self.came[number] = client(self.store)
        except Exception as error:
            self.came[number] = error

    def join(self) -> list[object]:
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()
        return self.came


def ask(
    rank: int, videos: Tensor = VIDEOS, captions: Sequence[str] = CAPTIONS
) -> Callable[[dist.Store], object]:
    def run(store: dist.Store) -> dict[str, Tensor]:
        with find_reward(store, rank) as reward:
            return reward.score(videos, captions)

    return run


@pytest.mark.parametrize(
    "videos",
    [VIDEOS, VIDEOS.transpose(2, 3), VIDEOS[:, ::2], VIDEOS[:0]],
    ids=["whole", "transposed", "every second", "none"],
)
def test_served_scores_are_the_rewards_own_bit_for_bit(videos: Tensor) -> None:
    captions = CAPTIONS[: len(videos)]
    clients = Clients(ask(0, videos, captions), ask(1, videos, captions))
    reward = Scripted(lambda prompts: 1.0 + sum(map(len, prompts)) / 3)
    serve(lambda: reward, clients.store, 2)
    expected = reward.score(videos, captions)
    for scores in clients.join():
        assert isinstance(scores, dict)
        assert scores.keys() == expected.keys()
        assert all(torch.equal(scores[name], value) for name, value in expected.items())


class Picky(Scripted):
    """Refuses what has no text."""

    def refuse_prompt(self, prompt: str) -> str | None:
        return None if prompt else "there is no text"


def test_everyone_is_told_which_prompts_are_refused() -> None:
    def asks(rank: int) -> Callable[[dist.Store], object]:
        def run(store: dist.Store) -> object:
            with find_reward(store, rank) as reward:
                return refusals(reward, CAPTIONS), reward.score(VIDEOS, CAPTIONS).keys()

        return run

    clients = Clients(asks(0), asks(1))
    serve(Picky, clients.store, 2)
    assert clients.join() == [({2: "there is no text"}, dict.fromkeys(Picky.dimensions).keys())] * 2


def fails(prompts: Sequence[str]) -> float:
    raise ValueError("the scorer saw a caption it cannot score")


def test_what_the_scorer_raises_reaches_everyone_at_once() -> None:
    """One asks and gets it; another is busy elsewhere and finds it when the failure has broken what it did."""

    def loses_the_others(store: dist.Store) -> object:
        with find_reward(store, 1) as reward:
            reward.wait_until_loaded()
            assert failed.wait(60)
            raise RuntimeError("Connection closed by peer")

    def fails_and_says_so(prompts: Sequence[str]) -> float:
        failed.set()
        return fails(prompts)

    failed = threading.Event()
    clients = Clients(ask(0), loses_the_others, ask(2))
    with pytest.raises(ValueError, match="a caption it cannot score"):
        serve(lambda: Scripted(fails_and_says_so), clients.store, 3)
    for error in clients.join():
        assert isinstance(error, ValueError)
        assert str(error) == "the scorer saw a caption it cannot score"
        assert "in fails" in error.__notes__[0]


def test_a_failure_reaches_one_whose_request_a_thread_makes() -> None:
    asked, lost = threading.Event(), threading.Event()

    def fails_slowly(prompts: Sequence[str]) -> float:
        asked.set()
        assert lost.wait(60)
        return fails(prompts)

    def asks_in_a_thread(store: dist.Store) -> object:
        with find_reward(store, 0) as reward, ThreadPoolExecutor(1) as pool:
            pool.submit(reward.score, VIDEOS, CAPTIONS)
            assert asked.wait(60)
            lost.set()
            raise RuntimeError("Connection closed by peer")

    clients = Clients(asks_in_a_thread)
    with pytest.raises(ValueError, match="a caption it cannot score"):
        serve(lambda: Scripted(fails_slowly), clients.store, 1)
    assert isinstance(clients.join()[0], ValueError)


def test_leaving_wakes_a_thread_that_waits_for_scores() -> None:
    """The scores come only after the thread has woken, or not at all."""
    asked, woken = threading.Event(), threading.Event()

    def leaves(store: dist.Store) -> object:
        with ThreadPoolExecutor(1) as pool:
            with suppress(ValueError), find_reward(store, 0) as reward:
                waiting = pool.submit(reward.score, VIDEOS, CAPTIONS)
                assert asked.wait(60)
                raise ValueError("its own mistake")
            error = waiting.exception(timeout=60)  # TimeoutError: it still waits
            woken.set()
            return [error]

    def slow(prompts: Sequence[str]) -> float:
        asked.set()
        assert woken.wait(60)
        return 1.0

    clients = Clients(leaves)
    with pytest.raises(RewardProcessError, match="process 0 ended before the run did"):
        serve(lambda: Scripted(slow), clients.store, 1)
    (came,) = clients.join()
    assert isinstance(came, list), came
    assert isinstance(came[0], Exception)


def test_what_loading_raises_reaches_everyone() -> None:
    def make() -> Scripted:
        raise FileNotFoundError("no checkpoint in /absent")

    clients = Clients(ask(0), ask(1))
    with pytest.raises(FileNotFoundError):
        serve(make, clients.store, 2)
    for error in clients.join():
        assert isinstance(error, FileNotFoundError)
        assert str(error) == "no checkpoint in /absent"


def test_the_death_of_one_that_asks_ends_the_server_and_the_others() -> None:
    def dies(store: dist.Store) -> object:
        with find_reward(store, 0) as reward:
            reward.score(VIDEOS, CAPTIONS)
            raise ValueError("its own mistake")

    def goes_on(store: dist.Store) -> object:
        with find_reward(store, 1) as reward:
            while True:
                reward.score(VIDEOS, CAPTIONS)
                time.sleep(0.01)

    clients = Clients(dies, goes_on)
    with pytest.raises(RewardProcessError, match="process 0 ended before the run did"):
        serve(Scripted, clients.store, 2)
    own, other = clients.join()
    assert isinstance(own, ValueError)
    assert isinstance(other, RewardProcessError)
    assert "process 0 ended before the run did" in str(other)


def test_an_error_of_ones_own_is_not_replaced() -> None:
    """Both make the same mistake at the same time, as processes of one run do."""

    def mistaken(store: dist.Store, rank: int) -> object:
        with find_reward(store, rank) as reward:
            reward.wait_until_loaded()
            raise ValueError(f"mistake of {rank}")

    clients = Clients(lambda store: mistaken(store, 0), lambda store: mistaken(store, 1))
    with pytest.raises(RewardProcessError):
        serve(Scripted, clients.store, 2)
    assert [str(error) for error in clients.join()] == ["mistake of 0", "mistake of 1"]


def test_a_server_that_is_killed_is_missed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(door: served._Door, error: Exception) -> None:
        """A killed process tells nobody."""

    monkeypatch.setattr(served._Door, "tell", killed)
    clients = Clients(ask(0))
    with pytest.raises(ValueError, match="cannot score"):
        serve(lambda: Scripted(fails), clients.store, 1)
    (error,) = clients.join()
    assert isinstance(error, RewardProcessError)
    assert "ended without a word" in str(error)


def test_a_signal_to_the_server_is_passed_on_and_served_to_the_end() -> None:
    def signalled(prompts: Sequence[str]) -> float:
        if prompts == ["stop"]:
            signal.raise_signal(signal.SIGTERM)
        return 1.0

    def asks_thrice(store: dist.Store) -> list[bool]:
        found = []
        with find_reward(store, 0) as reward:
            for caption in ("go", "stop", "go"):
                reward.score(VIDEOS[:1], [caption])
                found.append(reward.stopping)
        return found

    clients = Clients(asks_thrice)
    serve(lambda: Scripted(signalled), clients.store, 1)
    assert clients.join() == [[False, True, True]]


def header(content: str) -> bytes:
    return struct.pack("!QQ", len(content), 0) + content.encode()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        header('{"kind": "hello", "fields": {"token": "\\ud800", "rank": 0}, "tensors": []}'),
        header(
            '{"kind": "hello", "fields": {"token": 3}, "tensors": [{"name": 1, "dtype": "load", "shape": [-1]}]}'
        ),
        header("[" * 900),
        struct.pack("!QQ", 2**64 - 1, 2**64 - 1),
    ],
    ids=["http", "no text", "no tensor", "nested", "large"],
)
def test_a_stranger_is_turned_away(said: bytes) -> None:
    def knocks(store: dist.Store) -> bytes:
        host, port, _ = json.loads(store.get("reward"))
        with socket.create_connection((host, port)) as stranger:
            stranger.sendall(said)
            stranger.settimeout(60)
            try:
                return stranger.recv(1)
            except ConnectionError:
                return b""
            finally:
                gone.set()

    def comes_second(store: dist.Store) -> object:
        assert gone.wait(60)
        return ask(0)(store)

    gone = threading.Event()

    clients = Clients(knocks, comes_second)
    serve(Scripted, clients.store, 1)
    turned_away, scores = clients.join()
    assert turned_away == b""
    assert isinstance(scores, dict)


def test_one_that_never_comes_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has come before the time is up, which is as soon as the reward is made."""
    monkeypatch.setattr(served, "_ARRIVAL", 0.0)
    came = threading.Event()

    def comes(store: dist.Store) -> object:
        with find_reward(store, 0) as reward:
            came.set()
            return reward.score(VIDEOS, CAPTIONS)

    def make() -> Scripted:
        assert came.wait(60)
        return Scripted()

    clients = Clients(comes)
    with pytest.raises(RewardProcessError, match="1 of the processes that train did not come"):
        serve(make, clients.store, 2)
    (error,) = clients.join()
    assert "did not come" in str(error)
