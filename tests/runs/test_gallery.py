import dataclasses
from types import SimpleNamespace

import pytest
import torch
from fake_run import clip, scores
from safetensors.torch import save_file

from vpo_engine.config_file import load_config
from vpo_engine.run_gallery import keep_pairs
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.gallery import (
    HeldOutGallery,
    PairGallery,
    pair_gaps,
    read_held_out,
    read_pairs,
    write_held_out,
    write_pairs,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def held_out(generator):
    clips = [torch.stack([clip(generator, 1.0, frames=5, side=9) for _ in range(2)]) for _ in range(2)]
    levels = [[scores(generator, 4.0) for _ in range(2)] for _ in range(2)]
    return HeldOutGallery(*clips, ["a <b>red</b> square", 'émeu, "quoted"'], *levels, 8, "12 steps")


def assert_same(first, second):
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_held_out_clips_come_back(tmp_path, held_out):
    path = tmp_path / "gallery" / "held_out.safetensors"
    write_held_out(path, held_out)
    assert_same(read_held_out(path), held_out)
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_pairs_come_back(tmp_path, held_out):
    pairs = PairGallery(
        held_out.before.transpose(2, 3),
        held_out.after,
        held_out.prompts,
        held_out.before_scores,
        held_out.after_scores,
        [0.25, 0.5],
        8,
    )
    path = tmp_path / "pairs.safetensors"
    write_pairs(path, pairs)
    assert_same(read_pairs(path), pairs)
    assert pair_gaps(path) == [0.25, 0.5]


def test_clips_of_another_shape_or_type_are_refused(tmp_path, held_out):
    for change in (
        {"after": held_out.after[:, :3]},
        {"after": held_out.after.float()},
        {"before": held_out.before[0], "after": held_out.after[0]},
    ):
        with pytest.raises(
            ValueError, match=r"needs uint8 clips \[M, F, H, W, 3\] of the same shape, got before"
        ):
            write_held_out(tmp_path / "g.safetensors", dataclasses.replace(held_out, **change))


def test_a_caption_too_few_is_refused(tmp_path, held_out):
    with pytest.raises(ValueError, match="has 2 clips but 1 entries of 'prompts'"):
        write_held_out(tmp_path / "g.safetensors", dataclasses.replace(held_out, prompts=["one"]))


def test_a_foreign_file_is_refused(tmp_path, held_out):
    save_file({"before": held_out.before}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="is not a gallery of before and after clips"):
        read_held_out(tmp_path / "foreign.safetensors")


def test_few_pairs_of_about_eight_steps_are_kept_however_long_a_run_is(tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(
        "vpo_engine.run_gallery.write_pairs", lambda path, pairs: kept.update({path.stem: pairs})
    )
    monkeypatch.setattr("vpo_engine.run_gallery._decoded", lambda *_: None)
    one, run = SimpleNamespace(scores={}), RunDirectory(tmp_path)
    pairs = [
        SimpleNamespace(gap=0.1 * number, winner=one, loser=one, prompt=SimpleNamespace(text=str(number)))
        for number in range(6)
    ]
    config = load_config(None, ["steps=100"])
    for step in range(1, 101):
        keep_pairs(config, SimpleNamespace(fps=8), run, step, SimpleNamespace(pairs=pairs))
    assert list(kept) == [f"step_{step:08d}" for step in (1, *range(12, 97, 12))]
    assert all(gallery.prompts == ["5", "4", "3", "2"] for gallery in kept.values())
