"""Previews that are decoded and scored by their first frames only: which families can, and what a run makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flow_case import load_model
from flow_folders import wan_folder
from power_cut import copy_cut
from safetensors.torch import load_file
from tiny_diffusers import cogvideox_pipeline
from torch import Tensor

from vpo_engine import train as entry
from vpo_engine.config_file import load_config
from vpo_engine.data.preference_dataset import read_dataset
from vpo_engine.models.registry import check_model
from vpo_engine.planning.trace import trace_step
from vpo_engine.rewards.builtin import Builtin
from vpo_engine.train import train

PROMPTS = "a red cat\ntwo blue dogs\na green hill\nthe old house\n"
PRUNE = "rollout.prune={after: 0.5, keep: 2, frames: 2}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    (root / "train.txt").write_text(PROMPTS)
    (root / "held_out.txt").write_text("a white horse\n")
    wan_folder(root / "wan")
    return root


def overrides(root: Path, run: Path, *more: str) -> list[str]:
    return [
        "model.kind=wan",
        f"model.policy={root / 'wan'}",
        "model.height=96",
        "model.width=192",
        "model.num_frames=9",
        f"prompts.train={root / 'train.txt'}",
        f"prompts.held_out={root / 'held_out.txt'}",
        "reward.kind=builtin",
        "reward.dimensions=[temporal_consistency]",
        "steps=2",
        "pairs_per_step=1",
        "rollout.candidates=3",
        "rollout.steps=2",
        "rollout.guidance=1",
        PRUNE,
        "optimizer.warmup_steps=0",
        "evaluation.every=null",
        "evaluation.prompts=1",
        "evaluation.samples_per_prompt=1",
        "checkpoint.every=1",
        f"run_dir={run}",
        *more,
    ]


# --- families that decode a beginning on its own ---


def assert_prefix(model: Any, asked: int, expected: tuple[int, int]) -> None:
    """The first latents decode to the first frames of the whole video, whatever comes after them."""
    random = torch.Generator().manual_seed(3)
    latents = torch.randn(1, *model.latent_shape, generator=random)
    length, frames = found = model.prefix(asked)
    assert found == expected
    whole, cut = model.decode(latents), model.decode(latents[:, :, :length])
    assert whole.shape[1] > cut.shape[1] == frames
    assert torch.equal(cut, whole[:, :frames])
    latents[:, :, length:] = torch.randn(latents[:, :, length:].shape, generator=random)
    other = model.decode(latents)
    assert torch.equal(other[:, :frames], whole[:, :frames])
    assert not torch.equal(other[:, frames:], whole[:, frames:])


@pytest.mark.parametrize("wide", [False, True], ids=["2.1", "2.2"])
def test_a_beginning_of_wan_is_that_of_the_whole_video(tmp_path: Path, wide: bool) -> None:
    model = load_model("wan", wan_folder(tmp_path / "wan", wide=wide), height=32, width=32)
    for asked, expected in ((1, (1, 1)), (5, (2, 5))):
        assert_prefix(model, asked, expected)
    assert model.prefix(2) == (2, 5)
    assert model.prefix(6) == model.prefix(9) == (3, 9)


@pytest.mark.parametrize(
    ("frames", "beginnings"),
    [(17, {1: (3, 9), 9: (3, 9)}), (24, {1: (2, 8), 8: (2, 8), 9: (4, 16)})],
    ids=["odd", "even"],
)
def test_a_beginning_of_cogvideox_is_made_of_whole_groups(
    tmp_path: Path, frames: int, beginnings: dict[int, tuple[int, int]]
) -> None:
    cogvideox_pipeline().save_pretrained(tmp_path)
    settings = {"height": 32, "width": 32, "num_frames": frames, "negative_prompt": None}
    model = load_model("cogvideox", tmp_path, **settings)
    for expected in set(beginnings.values()):
        assert_prefix(model, expected[1], expected)
    assert {asked: model.prefix(asked) for asked in beginnings} == beginnings
    assert model.prefix(frames) == (model.latent_shape[1], frames)


@pytest.mark.parametrize("kind", ["sprites", "opensora", "ltx"])
def test_other_families_refuse_it(root: Path, tmp_path: Path, kind: str) -> None:
    folders = [f"model.{name}={tmp_path}" for name in ("policy", "vae", "text_encoder")]
    folders += [f"prompts.{name}={root / name}.txt" for name in ("train", "held_out")]
    with pytest.raises(
        ValueError, match=f"rollout.prune.frames=5 is not supported by model.kind={kind}.*=null"
    ):
        check_model(
            load_config(
                None,
                [
                    f"model.kind={kind}",
                    f"reward.kind={'sprites' if kind == 'sprites' else 'builtin'}",
                    *(folders if kind != "sprites" else ()),
                    *(["model.num_frames=9"] if kind == "ltx" else ()),
                    "rollout.steps=4",
                    "rollout.prune={after: 0.5, keep: 2, frames: 5}",
                ],
            )
        )


# --- refusals at the start ---


def test_more_frames_than_a_video_has_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main(overrides(root, tmp_path / "run", "rollout.prune.frames=10")) != 0
    said = capsys.readouterr().err
    assert "rollout.prune.frames=10 is more than a video has with model.num_frames=9" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ((), "reward.kind=builtin does not score previews of 1 frame.*temporal_consistency compares 3"),
        (
            ("reward.dimensions=[visual_quality]", "guards.motion_floor=0.1"),
            "guards.motion_floor does not score previews of 1 frame",
        ),
    ],
    ids=["reward", "motion"],
)
def test_previews_that_are_too_short_for_the_scores_are_refused(
    root: Path, tmp_path: Path, settings: tuple[str, ...], reason: str
) -> None:
    config = load_config(None, overrides(root, tmp_path / "run", "rollout.prune.frames=1", *settings))
    with pytest.raises(ValueError, match=reason):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_plan_counts_short_previews(root: Path, tmp_path: Path) -> None:
    """A plan of previews of 5 of 9 frames for 3 candidates, and of 2 whole videos."""
    short, whole = (
        trace_step(load_config(None, overrides(root, tmp_path / "run", frames)), on_gpu=False).flops("decode")
        for frames in ("rollout.prune.frames=2", "rollout.prune.frames=null")
    )
    assert 2 / 5 * whole < short < 4 / 5 * whole


# --- runs ---


Seen = list[tuple[tuple[int, int], list[float]]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Return what reaches the reward: (videos, frames) of each call, and the scores."""
    calls: Seen = []
    score = Builtin.score

    def recorded(self: Builtin, videos: Tensor, prompts: Any) -> dict[str, Tensor]:
        scores = score(self, videos, prompts)
        calls.append(((videos.shape[0], videos.shape[1]), scores["temporal_consistency"].tolist()))
        return scores

    monkeypatch.setattr(Builtin, "score", recorded)
    return calls


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
def test_previews_are_short_and_finished_candidates_whole(
    root: Path, tmp_path: Path, seen: Seen, overlap: bool
) -> None:
    run = tmp_path / "run"
    more = ("pairs.dataset=latents", f"rollout.overlap={str(overlap).lower()}")
    assert entry.main(overrides(root, run, *more)) == 0
    training = [call for call in seen if call[0][0] in (2, 3)]
    assert [shape for shape, _ in training] == [(3, 5), (2, 9)] * 2
    for line, (_, previews) in zip(read_dataset(run / "preference_dataset"), training[::2], strict=True):
        kept = {previews.index(max(previews)), previews.index(min(previews))}
        assert set(line.candidates) == kept


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_a_run_with_short_previews_resumes_bit_for_bit(root: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert entry.main(overrides(root, whole)) == 0
    copy_cut(whole, cut, 1)
    assert entry.main(overrides(root, cut, "checkpoint.resume=true")) == 0
    one, other = (load_file(next(run.glob("checkpoints/*2/policy/*.safetensors"))) for run in (whole, cut))
    start = load_file(next((root / "wan" / "transformer").glob("*.safetensors")))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert any(not torch.equal(value, start[name]) for name, value in one.items())
