import dataclasses

import pytest
import torch
from fake_run import clip, scores
from safetensors.torch import save_file

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
