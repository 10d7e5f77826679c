"""Offline DPO through train(): pairs of a file, and pairs that the policy of the start samples once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import engine
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import SHAPE, ToyReward

from vpo_engine import train as entry
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.optimizer import PolicyOptimizer
from vpo_engine.offline_dpo import OfflineDPO
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.rollout.preference_dataset import SampledPairs, StoredPairs
from vpo_engine.rollout.preferred_files import FilePairs

PROMPTS = ("red", "green square", "white dog")
SAMPLED = ("method=offline_dpo", "pairs.dataset=none", "reference.refresh_every=200", "steps=5")
"""Pairs that are sampled once; K of engine.SETTINGS is not used."""


def write_latents(path: Path, seed: int, shape: Sequence[int] = SHAPE) -> torch.Tensor:
    latents = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    save_file({"latents": latents}, path)
    return latents


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    """A csv of three pairs of latents in a folder below it."""
    (tmp_path / "made").mkdir()
    rows = ["winner,loser,prompt"]
    for number, prompt in enumerate(PROMPTS):
        for kind in (0, 1):
            write_latents(tmp_path / f"made/{number}_{kind}.safetensors", 2 * number + kind)
        rows.append(f"made/{number}_0.safetensors,made/{number}_1.safetensors,{prompt}")
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def from_file(folder: Path, file: Path, *settings: str) -> object:
    own = (f"offline_dpo.file={file}", "steps=3", "optimizer.warmup_steps=0")
    return engine.make_config(folder, *engine.OFFLINE, *own, *settings)


def test_pairs_of_a_file_reach_the_loss_in_their_order_again_and_again(
    tmp_path: Path, preferences: Path
) -> None:
    rows = engine.train(from_file(tmp_path, preferences)).rows
    assert len(rows) == 12
    for place, row in enumerate(rows):
        number = place % 3
        for kind, latents in enumerate((row.winner, row.loser)):
            generator = torch.Generator().manual_seed(2 * number + kind)
            assert torch.equal(latents, torch.randn(*SHAPE, generator=generator))
        assert row.weight == 1.0
    assert len({row.time for row in rows}) == 12
    assert len({round(float(row.caption.sum()), 6) for row in rows}) == 3
    run = tmp_path / "run"
    first, *_, last = engine.metrics_of(run)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert last["reference_age"] == 3
    assert "reward/selected" not in first
    initial, final = engine.reference_of(run, 1), engine.reference_of(run, 3)
    assert all(torch.equal(value, final[name]) for name, value in initial.items())
    assert not all(torch.equal(value, engine.policy_of(run, 3)[name]) for name, value in final.items())


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_says_how_many_pairs_there_are_and_if_a_step_has_room_for_more(
    tmp_path: Path, preferences: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    engine.train(from_file(tmp_path, preferences, f"pairs_per_step={size}", "steps=1"))
    said = " ".join(capsys.readouterr().err.split())
    assert "pairs: 3 " in said
    assert ("that is fewer than pairs_per_step=4" in said) == (size == 4)
    assert ("each 1.3 times with noise of its own" in said) == (size == 4)


def test_a_json_file_gives_the_same_run(tmp_path: Path, preferences: Path) -> None:
    engine.train(from_file(tmp_path / "csv", preferences))
    lines = [line.split(",") for line in preferences.read_text().splitlines()[1:]]
    again = preferences.with_suffix(".jsonl")
    names = ("winner", "loser", "prompt")
    again.write_text("".join(json.dumps(dict(zip(names, line, strict=True))) + "\n" for line in lines))
    engine.train(from_file(tmp_path / "json", again))
    one, other = (engine.saved_tensors(tmp_path / name / "run", 3) for name in ("csv", "json"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def break_file(path: Path) -> None:
    path.write_bytes(b"no tensors")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda made: (made / "1_0.safetensors").unlink(), "line 3: there is no file"),
        (lambda made: break_file(made / "1_0.safetensors"), "line 3: .* is not a safetensors file"),
        (
            lambda made: write_latents(made / "2_1.safetensors", 0, (2, 3, 2, 4)),
            r"line 4: .* holds latents \[2, 3, 2, 4\], but the model's are \[2, 3, 2, 2\]",
        ),
        (
            lambda made: save_file({"a": torch.ones(1), "b": torch.ones(1)}, made / "0_1.safetensors"),
            "line 2: .* holds 2 tensors, expected one",
        ),
        (
            lambda made: save_file({"a": torch.full(SHAPE, torch.nan)}, made / "0_1.safetensors"),
            "line 2: .* are not finite",
        ),
    ],
)
def test_a_bad_file_is_named_with_its_line_before_the_first_step(
    tmp_path: Path, preferences: Path, spoil: Callable[[Path], object], text: str
) -> None:
    spoil(tmp_path / "made")
    with pytest.raises(ValueError, match=rf"pairs.csv, {text}"):
        engine.train(from_file(tmp_path, preferences))
    assert not (tmp_path / "run/metrics.jsonl").is_file() or not engine.metrics_of(tmp_path / "run")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("made/0_0.safetensors,made/0_0.safetensors,red", "line 2: winner and loser are the same file"),
        ("made/0_0.safetensors,pairs.csv,red", "line 2: .*pairs.csv is neither a video nor latents"),
        ("made/0_0.safetensors,made/0_1.safetensors,", "line 2"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, preferences: Path, line: str, text: str) -> None:
    preferences.write_text(f"winner,loser,prompt\n{line}\n")
    with pytest.raises(ValueError, match=rf"pairs.csv, {text}"):
        engine.train(from_file(tmp_path, preferences))
    assert not (tmp_path / "run").exists()


def test_a_changed_pair_is_noticed_when_the_run_is_resumed(tmp_path: Path, preferences: Path) -> None:
    engine.train(from_file(tmp_path, preferences))
    write_latents(tmp_path / "made/1_1.safetensors", 99)
    with pytest.raises(ValueError, match=r"offline_dpo\.file"):
        engine.train(from_file(tmp_path, preferences, "steps=4", "checkpoint.resume=true"))


def test_a_dataset_of_another_geometry_is_refused_before_the_first_evaluation(tmp_path: Path) -> None:
    engine.train(engine.make_config(tmp_path / "online", "steps=2"))
    stored = tmp_path / "online/run/preference_dataset/latents/step_00000002_0000.safetensors"
    pairs = load_file(stored)
    save_file({name: value[..., :1].contiguous() for name, value in pairs.items()}, stored)
    settings = (*engine.OFFLINE, f"offline_dpo.dataset={tmp_path / 'online/run'}")
    message = r"holds latents \[2, 3, 2, 1\], but the model's are \[2, 3, 2, 2\]"
    with pytest.raises(ValueError, match=message):
        engine.train(engine.make_config(tmp_path / "offline", *settings))
    assert not engine.metrics_of(tmp_path / "offline/run", "eval")


# --- pairs of the policy of the start ---


def test_pairs_are_sampled_once_and_are_those_of_online_vpo_at_its_start(tmp_path: Path) -> None:
    """OnlineVPO with a learning rate of nearly nothing samples from the policy of the start in every step."""
    offline = engine.train(engine.make_config(tmp_path / "offline", *SAMPLED))
    still = ("steps=5", "optimizer.lr=1e-30", "reference.refresh_every=null")
    online = engine.train(engine.make_config(tmp_path / "online", *still))
    ours, theirs = (engine.lines_of(tmp_path / name / "run") for name in ("offline", "online"))
    assert [line.scores for line in ours] == [line.scores for line in theirs]
    assert [row.time for row in offline.rows] == [row.time for row in online.rows]
    for one, other in zip(offline.rows, online.rows, strict=True):
        assert torch.equal(one.winner, other.winner)
        assert torch.equal(one.loser, other.loser)
    run = tmp_path / "offline/run"
    assert engine.metrics_of(run)[-1]["reference_age"] == 5
    assert len(offline.sampled) == len(online.sampled)


def test_fewer_pairs_are_taken_again_and_again(tmp_path: Path) -> None:
    rows = engine.train(engine.make_config(tmp_path, *SAMPLED, "offline_dpo.pairs=8")).rows
    lines = [line for line in engine.lines_of(tmp_path / "run") if line.kept]
    assert len(engine.lines_of(tmp_path / "run")) == 8
    assert 0 < len(lines) < len(rows)
    for number, row in enumerate(rows):
        winner, loser = lines[number % len(lines)].latents()
        assert torch.equal(row.winner, winner)
        assert torch.equal(row.loser, loser)


def test_a_resumed_run_reads_its_pairs_and_is_the_uninterrupted_one(tmp_path: Path) -> None:
    settings = (*SAMPLED, "offline_dpo.pairs=12")
    engine.train(engine.make_config(tmp_path, *settings))
    run, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(run, again)
    engine.forget_after(again, 2)
    config = engine.make_config(tmp_path, *settings, f"run_dir={again}", "checkpoint.resume=true")
    resumed = engine.train(config)
    saved, expected = engine.saved_tensors(again, 5), engine.saved_tensors(run, 5)
    assert all(torch.equal(value, saved[name]) for name, value in expected.items())
    assert engine.metrics_of(again) == engine.metrics_of(run)
    assert {who for who, *_ in resumed.sampled} == {"policy"}
    assert all(text in engine.HELD_OUT for _, text in resumed.scored)


def test_a_longer_run_takes_its_pairs_again_and_samples_none_by_the_trained_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.train(engine.make_config(tmp_path, *SAMPLED, "steps=1"))
    assert "taken again" not in str(capsys.readouterr())
    kept = [line for line in engine.lines_of(tmp_path / "run") if line.kept]
    rows = engine.train(engine.make_config(tmp_path, *SAMPLED, "steps=2")).rows
    said = " ".join("".join(capsys.readouterr()).split())
    assert "note: 8 pairs are asked for" in said
    assert "the 4 that it sampled are taken again" in said
    assert len(engine.lines_of(tmp_path / "run")) == 4
    assert len(rows) == len(kept) > 0
    for row, line in zip(rows, kept, strict=True):
        assert all(map(torch.equal, (row.winner, row.loser), line.latents()))


def test_sampling_goes_on_where_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After two of three steps of pairs, and in the middle of the third line."""
    settings = (*SAMPLED, "offline_dpo.pairs=12")
    engine.train(engine.make_config(tmp_path / "whole", *settings))
    choose, calls = OnlineVPO._choose, []

    def dies(self: OnlineVPO, prompts: object) -> object:
        calls.append(prompts)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return choose(self, prompts)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(OnlineVPO, "_choose", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            engine.train(engine.make_config(tmp_path / "cut", *settings))
    pairs = tmp_path / "cut/run/preference_dataset/pairs_0000.jsonl"
    lines = pairs.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    pairs.write_bytes(b"".join(lines[:7]))
    engine.train(engine.make_config(tmp_path / "cut", *settings))
    one, other = (engine.saved_tensors(tmp_path / name / "run", 5) for name in ("whole", "cut"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_pairs_that_are_gone_cannot_be_sampled_by_a_trained_policy(tmp_path: Path) -> None:
    config = engine.make_config(tmp_path, *SAMPLED)
    engine.train(config)
    engine.forget_after(tmp_path / "run", 2)
    shutil.rmtree(tmp_path / "run/preference_dataset")
    with pytest.raises(ValueError, match="the pairs that this run has sampled are not in"):
        engine.train(engine.make_config(tmp_path, *SAMPLED, "checkpoint.resume=true"))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["offline_dpo.pairs=10"], "offline_dpo.pairs=10 is no multiple of pairs_per_step=16"),
        (
            ["offline_dpo.file=a.csv", "offline_dpo.dataset=b"],
            "dataset=b and file=a.csv name different pairs",
        ),
        (["offline_dpo.cache=a"], "cache=a is for the videos of file, which is not given"),
        (["offline_dpo.file=a.csv"], "offline_dpo.file=a.csv: there is no such file"),
        (
            ["offline_dpo.file=a.csv", "pairs.min_gap=1"],
            "pairs.min_gap=1.0 has no meaning for method=offline_dpo",
        ),
        (["rollout.source=reference"], "rollout.source=reference has no meaning for method=offline_dpo"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    settings: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main(["method=offline_dpo", *settings, f"run_dir={tmp_path / 'run'}"]) == 1
    assert text in capsys.readouterr().err


def test_the_stream_of_sampled_pairs_goes_round() -> None:
    class Numbers:
        def take(self, cursor: int, count: int) -> list[int]:
            return list(range(cursor, cursor + count))

    assert SampledPairs(Numbers(), 3).take(2, 5) == [2, 0, 1, 2, 0]  # type: ignore[arg-type]


def test_processes_with_slices_of_the_same_videos_record_their_pairs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sampled:
        def __len__(self) -> int:
            return 4

        def find(self, *_: object, **__: object) -> int:
            return 1

        def read(self, *_: object) -> None: ...

    made: list[int] = []
    monkeypatch.setattr(
        "vpo_engine.offline_dpo.PairRecorder", lambda seed, folder, rank, with_latents: made.append(rank)
    )
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    for rank in range(2):
        slices = Processes(rank, 2, torch.device("cpu"))
        config = engine.make_config(tmp_path, *SAMPLED)
        method = SimpleNamespace(
            config=config, processes=replace(slices, _sequence=slices), optimizer_steps=0
        )
        OfflineDPO._sample_pairs(method, Sampled(), tmp_path, print)  # type: ignore[arg-type]
    assert made == [0]


def test_encoded_videos_are_kept_where_the_settings_say(
    tmp_path: Path, preferences: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    monkeypatch.setattr(FilePairs, "encode", lambda self, model, folder, *_: folders.append(folder))
    shared = tmp_path / "shared"
    engine.train(from_file(tmp_path / "one", preferences, "steps=1"))
    engine.train(from_file(tmp_path / "two", preferences, "steps=1", f"offline_dpo.cache={shared}"))
    assert folders == [tmp_path / "one/encoded_videos", shared]


def test_a_stored_pair_that_was_turned_round_is_told(tmp_path: Path) -> None:
    """The record of a run tells it, so that a resumed run refuses to go on with other pairs."""
    engine.train(engine.make_config(tmp_path, "steps=1"))
    [file] = (tmp_path / "run/preference_dataset").glob("pairs_*.jsonl")
    before = StoredPairs(tmp_path / "run").texts()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["winner"], lines[0]["loser"] = lines[0]["loser"], lines[0]["winner"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    after = StoredPairs(tmp_path / "run").texts()
    assert [one != other for one, other in zip(before, after, strict=True)] == [True, False, False, False]


def test_a_process_whose_pair_is_a_tie_makes_passes_that_add_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with DeepSpeed, where processes make equally many; here there is one more in every step."""
    engine.train(engine.make_config(tmp_path / "online", "steps=3"))
    stored = f"offline_dpo.dataset={tmp_path / 'online/run'}"
    settings = (*engine.OFFLINE, stored, "steps=12", "pairs_per_step=1", "checkpoint.every=null")
    assert not all(line.kept for line in engine.lines_of(tmp_path / "online/run"))
    engine.train(engine.make_config(tmp_path / "alone", *settings))
    monkeypatch.setattr(PolicyOptimizer, "in_lockstep", True)
    monkeypatch.setattr(OnlineVPO, "_passes_behind", lambda self, samples: 1)
    engine.train(engine.make_config(tmp_path / "together", *settings))
    one, other = (engine.policy_of(tmp_path / name / "run", 12) for name in ("alone", "together"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_log_of_pairs_that_were_sampled_once_tells_nothing_of_resampling(tmp_path: Path) -> None:
    """A stored pair holds winner and loser alone, so that nobody knows any more how many candidates there were."""
    engine.train(engine.make_config(tmp_path, *SAMPLED, "steps=1", "pairs.resample=1"))
    [row] = engine.metrics_of(tmp_path / "run")
    assert "tie_rate" in row
    assert "tie_rate_before_resample" not in row


class OtherReward(ToyReward):
    """Scores a dimension that the run which made the pairs does not have."""

    dimensions = ("sharpness",)

    def score(self, videos: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        return {"sharpness": super().score(videos, prompts)["visual_quality"]}


def test_pairs_that_another_reward_has_scored_are_trained_on(tmp_path: Path) -> None:
    engine.train(engine.make_config(tmp_path / "online", "steps=2"))
    other = ("reward.kind=test_offline_pairs:OtherReward", "reward.dimensions=sharpness", "steps=2")
    stored = f"offline_dpo.dataset={tmp_path / 'online/run'}"
    engine.train(engine.make_config(tmp_path / "offline", *engine.OFFLINE, *other, stored), OtherReward())
    rows = engine.metrics_of(tmp_path / "offline/run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["pairs"] for row in rows)


def test_pairs_that_are_sampled_once_name_their_seed(tmp_path: Path) -> None:
    engine.train(engine.make_config(tmp_path, *SAMPLED, "steps=1", "seed=1"))
    assert {line.seed for line in engine.lines_of(tmp_path / "run")} == {1}
