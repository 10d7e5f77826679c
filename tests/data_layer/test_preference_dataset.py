"""Test The preference dataset on disk: reading what was written, killed and resumed runs, and damaged files."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vpo_engine.data.preference_dataset import DatasetWriter, StoredPair, read_dataset, truncate_dataset
from vpo_engine.rollout.preference_dataset import StoredPairs
from vpo_engine.runs.alarms import read_alarms
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.values import Prompt


def pair(step: int, position: int, row: int | None = None) -> StoredPair:
    numbers = torch.rand(3, generator=torch.Generator().manual_seed(position)).tolist()
    return StoredPair(
        step=step,
        position=position,
        prompt=f"a “red” circle \n {position}",
        seed=7,
        candidates=(0, 1, 5),
        scores={"visual_quality": tuple(numbers), "b": (0.1, 1 / 3, 1e-30)},
        selected=tuple(numbers),
        winner=5,
        loser=0,
        gap=abs(numbers[2] - numbers[0]),
        kept=row is not None,
        weight=1.25,
        row=row,
    )


def latents(count: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    winner = torch.randn(count, 2, 1, 2, 3, generator=generator)
    return winner, winner.flip(0) * 0.1


def write(root: Path, steps: int, ranks: int = 2, kept: bool = True) -> list[StoredPair]:
    """Two prompts of each process and step, of which the second of each has latents."""
    folder, expected = root / "preference_dataset", []
    writers = [DatasetWriter(folder, rank) for rank in range(ranks)]
    for step in range(1, steps + 1):
        for rank, writer in enumerate(writers):
            first = (step - 1) * 2 * ranks + 2 * rank
            pairs = [pair(step, first), pair(step, first + 1, 0 if kept else None)]
            writer.write(step, pairs, latents(1, first) if kept else None)
            expected += pairs
    return expected


def test_what_is_written_is_read_in_the_order_of_positions(tmp_path: Path) -> None:
    expected = write(tmp_path, 3)
    found = list(read_dataset(tmp_path))
    assert [replace(one, latents_file=None) for one in found] == expected
    assert [one.position for one in found] == list(range(12))
    assert list(read_dataset(tmp_path / "preference_dataset")) == found
    assert found[3].score(5) == {"visual_quality": found[3].selected[2], "b": 1e-30}


def test_latents_are_bitwise_those_that_were_sampled(tmp_path: Path) -> None:
    write(tmp_path, 2)
    for one in read_dataset(tmp_path):
        if not one.kept:
            with pytest.raises(ValueError, match=rf"step {one.step}, position {one.position} has no latents"):
                one.latents()
            continue
        winner, loser = latents(1, one.position - 1)
        found = one.latents()
        assert torch.equal(found[0], winner[0])
        assert torch.equal(found[1], loser[0])


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """Prompts from web pages hold U+2028 and U+0085; the log of alarms is read alike."""
    write(tmp_path, 1, ranks=1)
    pair = replace(
        next(read_dataset(tmp_path)), prompt="a \u2028 b \x85 c \x0c d", row=None, latents_file=None
    )
    other = tmp_path / "other"
    DatasetWriter(other, 0).write(1, [pair])
    assert list(read_dataset(other)) == [pair]
    run = RunDirectory.create_at(tmp_path / "run", "")
    run.alarms.write_text('{"step": 1, "kind": "style", "text": "a \u2028 b"}\n', encoding="utf-8")
    assert read_alarms(run) == [{"step": 1, "kind": "style", "text": "a \u2028 b"}]


def test_reading_leaves_out_a_line_that_was_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever it was cut: a run killed while it writes loses that line and nothing else."""
    expected = write(tmp_path, 2, ranks=1)
    path = tmp_path / "preference_dataset/pairs_0000.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (*range(1, len(lines[-1]), 9), len(lines[-1]) - 1):
        path.write_bytes(whole[:-cut])
        assert [replace(one, latents_file=None) for one in read_dataset(tmp_path)] == expected[:-1]
    assert "the last line was not finished when the run stopped" in caplog.text


@pytest.mark.parametrize("cut", [0, 5])
def test_a_resumed_dataset_equals_that_of_an_uninterrupted_run(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "whole", 4)
    write(tmp_path / "resumed", 4)
    folder = tmp_path / "resumed/preference_dataset"
    if cut:
        for path in folder.glob("*.jsonl"):
            os.truncate(path, path.stat().st_size - cut)
    truncate_dataset(folder, 2)
    assert {one.step for one in read_dataset(folder)} == {1, 2}
    assert {int(path.name.split("_")[1]) for path in folder.glob("latents/*")} == {1, 2}
    writers = [DatasetWriter(folder, rank) for rank in range(2)]
    for step in (3, 4):
        for rank, writer in enumerate(writers):
            first = (step - 1) * 4 + 2 * rank
            writer.write(step, [pair(step, first), pair(step, first + 1, 0)], latents(1, first))
    for path in (tmp_path / "whole/preference_dataset").rglob("*.*"):
        other = folder / path.relative_to(tmp_path / "whole/preference_dataset")
        if path.suffix == ".jsonl":
            assert path.read_bytes() == other.read_bytes()
        else:
            one, two = load_file(path), load_file(other)
            assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_run_resumed_on_fewer_processes_forgets_what_the_others_wrote(tmp_path: Path) -> None:
    write(tmp_path, 3, ranks=2)
    truncate_dataset(tmp_path / "preference_dataset", 1)
    writer = DatasetWriter(tmp_path / "preference_dataset", 0)
    writer.write(2, [pair(2, position) for position in range(4, 8)])
    assert [one.position for one in read_dataset(tmp_path)] == list(range(8))


def test_a_step_without_pairs_has_lines_and_no_latents(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "preference_dataset", 0)
    writer.write(1, [pair(1, 0)], latents(0, 0))
    assert len(list(read_dataset(tmp_path))) == 1
    assert not (tmp_path / "preference_dataset/latents").exists()


def test_damage_is_named_with_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no preference dataset at .*pairs\.dataset=scores or latents"
    ):
        read_dataset(tmp_path)
    write(tmp_path, 1, ranks=1)
    path = tmp_path / "preference_dataset/pairs_0000.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{", lines[1]]) + "\n")
    with pytest.raises(ValueError, match=r"pairs_0000\.jsonl' line 2 is not JSON"):
        list(read_dataset(tmp_path))
    fewer = {name: value for name, value in json.loads(lines[1]).items() if name != "gap"}
    path.write_text("\n".join([lines[0], json.dumps(fewer)]) + "\n")
    with pytest.raises(
        ValueError, match=r"pairs_0000\.jsonl' line 2 is not a pair: it must be an object with step,"
    ):
        list(read_dataset(tmp_path))


def test_latents_that_are_gone_are_named(tmp_path: Path) -> None:
    write(tmp_path, 1, ranks=1)
    found = list(read_dataset(tmp_path))[1]
    assert found.latents_file is not None
    with pytest.raises(ValueError, match="does not have pair 9, although the preference dataset says so"):
        replace(found, row=9).latents()
    found.latents_file.unlink()
    with pytest.raises(ValueError, match=r"step_00000001_0000\.safetensors' does not have pair 0"):
        found.latents()


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "preference_dataset", 0)
    with pytest.raises(ValueError, match="Out of range float values"):
        writer.write(1, [replace(pair(1, 0), gap=float("nan"))])
    assert not list((tmp_path / "preference_dataset").iterdir())


def test_a_score_is_found_by_the_number_of_its_candidate() -> None:
    """After pruning and more candidates for a tie numbers are no places."""
    numbers = (1, 2, 4, 7)
    one = replace(
        pair(1, 0), candidates=numbers, scores={"a": (0.1, 0.2, 0.4, 0.7), "b": (1.0, 2.0, 4.0, 7.0)}
    )
    assert [one.score(number) for number in numbers] == [{"a": n / 10, "b": float(n)} for n in numbers]


def test_ties_of_the_run_that_wrote_a_dataset_stay_ties(tmp_path: Path) -> None:
    """Whatever their gap: that run had a larger pairs.min_gap, or a floor of motion that nobody reached."""
    write(tmp_path, 2)
    DatasetWriter(tmp_path / "preference_dataset", 0).write(3, [pair(3, 8)])
    assert all(one.gap > 0 for one in read_dataset(tmp_path))
    stored = StoredPairs(tmp_path)
    assert (len(stored), stored.ties) == (9, 5)


def test_winner_and_loser_of_a_stored_pair_have_their_own_scores(tmp_path: Path) -> None:
    write(tmp_path, 1, ranks=1)
    stored = list(read_dataset(tmp_path))[1]
    prompt = Prompt(stored.prompt, None, 1)  # type: ignore[arg-type]
    [choice] = StoredPairs(tmp_path).choices([prompt], (2, 1, 2, 3), torch.device("cpu"))
    assert choice.winner.scores == stored.score(5)
    assert choice.loser.scores == stored.score(0) != stored.score(5)
    assert choice.selected == (stored.selected[2], stored.selected[0])


def test_a_line_without_a_selected_score_for_each_candidate_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1, ranks=1)
    path = tmp_path / "preference_dataset/pairs_0000.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[1]["selected"][0]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"pairs_0000\.jsonl' line 2: selected is \["):
        list(read_dataset(tmp_path))
