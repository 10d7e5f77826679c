"""Pairs that the policy of the start samples before the first step: their prompts, their processes, and stops."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import oracle
import pytest
import torch
from power_cut import disk_events

from vpo_engine.data.preference_dataset import StoredPair
from vpo_engine.data.prompts import PromptItem
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.stopping import StopPoints
from vpo_engine.offline_dpo import OfflineDPO
from vpo_engine.online_vpo import OnlineVPO

SAMPLED = (
    "method=offline_dpo",
    "pairs.dataset=none",
    "reference.refresh_every=200",
    "offline_dpo.pairs=12",
    "steps=3",
)


def check_rows(rows: Sequence[engine.Row], lines: Sequence[StoredPair]) -> None:
    """The videos of these pairs reached the loss, each with the caption that it was sampled for."""
    assert rows
    for row, line in zip(rows, lines, strict=True):
        assert all(map(torch.equal, (row.winner, row.loser), line.latents()))
        torch.testing.assert_close(row.caption.double(), oracle.caption(line.prompt), rtol=1e-5, atol=1e-5)


def test_pairs_of_other_prompts_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has saved nothing begins again, and may do so with other prompts; two steps of pairs are there."""
    choose, calls = OnlineVPO._choose, []

    def dies(self: OnlineVPO, prompts: Any) -> Any:
        calls.append(prompts)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return choose(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(OnlineVPO, "_choose", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            engine.train(engine.make_config(tmp_path, *SAMPLED))
    monkeypatch.setattr(engine, "PROMPTS", tuple(reversed(engine.PROMPTS)))
    rows = engine.train(engine.make_config(tmp_path, *SAMPLED)).rows
    check_rows(rows, [line for line in engine.lines_of(tmp_path / "run") if line.kept])


def test_what_is_left_of_a_step_whose_pairs_are_not_all_there_is_not_trained_on(tmp_path: Path) -> None:
    """A power cut took the last line, and a trained policy cannot sample it again: two whole steps go round."""
    settings = (*SAMPLED, "steps=5")
    engine.train(engine.make_config(tmp_path, *settings))
    engine.forget_after(tmp_path / "run", 2)
    lines = engine.lines_of(tmp_path / "run")[:8]
    file = tmp_path / "run/preference_dataset/pairs_0000.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    rows = engine.train(engine.make_config(tmp_path, *settings, "checkpoint.resume=true")).rows
    taken = [lines[position % 8] for position in range(8, 20)]
    check_rows(rows, [line for line in taken if line.kept])


def test_ties_among_stored_pairs_do_not_end_a_run_however_many_come_in_a_row(tmp_path: Path) -> None:
    """Of 24 pairs one is no tie; the run knows that from its start."""
    engine.train(engine.make_config(tmp_path / "online", "steps=6"))
    [file] = (tmp_path / "online/run/preference_dataset").glob("pairs_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    chosen = next(line for line in lines if line["kept"])
    for line in lines:
        line["kept"] = line is chosen
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    stored = f"offline_dpo.dataset={tmp_path / 'online/run'}"
    settings = (*engine.OFFLINE, stored, "pairs_per_step=1", "steps=48", "checkpoint.every=null")
    engine.train(engine.make_config(tmp_path / "offline", *settings))
    rows = engine.metrics_of(tmp_path / "offline/run")
    assert [row["pairs"] for row in rows] == 2 * [int(line["kept"]) for line in lines]


class Sampled:
    """A stream of ``count`` prompts, of which ``done`` steps of pairs are there."""

    def __init__(self, count: int, done: int, read: Callable[[], object] = lambda: None) -> None:
        self.count, self.done, self.when_read = count, done, read

    def __len__(self) -> int:
        return self.count

    def find(self, *_: object, **__: object) -> int:
        return self.done

    def take(self, cursor: int, count: int) -> list[PromptItem]:
        return [PromptItem(place, f"prompt {place}") for place in range(cursor, cursor + count)]

    def read(self, *_: object) -> None:
        self.when_read()


def sampling(folder: Path, processes: Processes, whole: Any, stoppable: Any) -> Any:
    """Return the method, as far as sampling before the first step looks at it."""
    method: Any = object.__new__(OfflineDPO)
    method.config, method.processes = engine.make_config(folder, *SAMPLED), processes
    method.optimizer = SimpleNamespace(steps=0, whole=whole)
    method.model = SimpleNamespace(prepare=lambda texts: None)
    method.stopping = SimpleNamespace(stoppable=stoppable)
    method.watched = SimpleNamespace(forget=lambda: None)
    method.selector = SimpleNamespace(pairs=lambda choices: [])
    return method


@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_two_teams_samples_and_records_its_own_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """It has the whole policy while it samples, and reads the pairs when the other one has recorded its own."""
    seen: list[Any] = []
    whole: list[bool] = []

    class Recorder:
        def __init__(self, seed: int, folder: Path, rank: int, with_latents: bool) -> None:
            self.rank = rank

        def record(self, step: int, choices: object, pairs: object) -> None:
            seen.append((self.rank, step, choices))

        def sync(self) -> None:
            seen.append("sync")

    @contextmanager
    def gathered() -> Iterator[None]:
        whole.append(True)
        yield
        whole.pop()

    def choose(self: OnlineVPO, prompts: object) -> object:
        assert whole, "sampled by a part of the policy"
        return prompts

    monkeypatch.setattr(OnlineVPO, "_choose", choose)
    monkeypatch.setattr(Processes, "wait", lambda self: seen.append("wait"))
    monkeypatch.setattr("vpo_engine.offline_dpo.PairRecorder", Recorder)
    monkeypatch.setattr(
        "vpo_engine.offline_dpo.embed_prompts",
        lambda model, texts, positions: list(zip(texts, positions, strict=True)),
    )
    processes = Processes(rank, 2, torch.device("cpu"))
    method = sampling(tmp_path, processes, gathered, lambda together: nullcontext())
    method._sample_pairs(Sampled(8, 1, lambda: seen.append("read")), tmp_path, print)
    own = [(f"prompt {place}", place) for place in (4 + 2 * rank, 5 + 2 * rank)]
    assert seen == [(rank, 2, own), "sync", "wait", "read"]


def test_a_signal_while_pairs_are_sampled_is_followed_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairs of a large run take hours, and a machine that is taken away gives minutes."""
    check, looks = StopPoints.check, []

    def counted(points: StopPoints) -> None:
        looks.append(points)
        if len(looks) == 3:
            signal.raise_signal(signal.SIGTERM)
        check(points)

    monkeypatch.setattr(StopPoints, "check", counted)
    engine.train(engine.make_config(tmp_path, *SAMPLED), exit_code=143)
    assert len(looks) == 3


@pytest.mark.parametrize("size", [1, 2])
def test_no_member_of_a_team_leaves_the_others_while_pairs_are_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The two of a couple wait for each other in every step of the sampling."""
    given: list[bool] = []

    @contextmanager
    def stoppable(together: bool) -> Iterator[None]:
        given.append(together)
        yield

    recorder = SimpleNamespace(record=lambda *_: None, sync=lambda: None)
    monkeypatch.setattr(OnlineVPO, "_choose", lambda self, prompts: [])
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    monkeypatch.setattr("vpo_engine.offline_dpo.PairRecorder", lambda *_, **__: recorder)
    monkeypatch.setattr("vpo_engine.offline_dpo.embed_prompts", lambda *_: [])
    here = torch.device("cpu")
    processes = Processes(0, 2, here, _team=Processes(0, size, here))
    sampling(tmp_path, processes, nullcontext, stoppable)._sample_pairs(Sampled(4, 0), tmp_path, print)
    assert given == [size > 1]


def test_sampled_pairs_are_on_the_disk_before_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = disk_events(monkeypatch)
    engine.train(engine.make_config(tmp_path, *SAMPLED, "checkpoint.every=1"))
    before = set(done[: done.index(".step_00000001.unfinished")])
    assert {"pairs_0000.jsonl", "step_00000001_0000.safetensors", "step_00000003_0000.safetensors"} <= before
