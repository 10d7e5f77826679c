"""Sources of ``python -m vpo_engine.sample`` beside runs, the options that change them, and refusals."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import FOLDERS, LORA, PROMPT, run_config, sized, trained

from vpo_engine import export, sample
from vpo_engine.config_file import dump_config, load_config
from vpo_engine.data.clips import find_clips
from vpo_engine.models.registry import model_family
from vpo_engine.policy_source import PolicySource, find_source, record_text
from vpo_engine.runs.checkpoint import save_checkpoint
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.sample import SampleOptions, load_source, sample_frames, with_options

SMALL = ("--frames", "5", "--size", "32x48", "--steps", "2")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS["wan"](tmp_path_factory.mktemp("wan") / "Wan-tiny")


@pytest.fixture(scope="module")
def adapter(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported adapter of the published folder."""
    root = tmp_path_factory.mktemp("adapter")
    run = trained(run_config("wan", published, root / "run", *sized("wan"), *LORA))
    assert export.main([str(run), "--out", str(root / "adapter")]) == 0
    return root / "adapter"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Return the one line of error of a command that must fail before it has written anything."""
    capsys.readouterr()
    assert sample.main([str(argument) for argument in (*arguments, "--prompt", PROMPT)]) == 1
    shown = capsys.readouterr()
    assert ".mp4" not in shown.out
    lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert shown.err.endswith(lines[0] + "\n")
    return lines[0]


def test_an_untouched_folder_is_sampled_by_its_familys_defaults(published: Path) -> None:
    """Its kind is found by model_index.json."""
    config = find_source(published, None, []).config
    assert (config.model.kind, config.model.policy) == ("wan", published)
    assert (config.model.num_frames, config.model.fps) == (81, 16)
    assert (config.rollout.steps, config.rollout.guidance) == (50, 5.0)


@pytest.mark.parametrize("kind", sorted(FOLDERS))
def test_every_family_of_diffusers_says_how_a_published_folder_is_sampled(kind: str) -> None:
    family = model_family(kind)
    assert family.card.native.keys() == {"model.num_frames", "model.fps", "rollout.steps", "rollout.guidance"}
    family.card.sizes.check_frames(family.card.native["model.num_frames"])


def test_options_change_what_is_sampled(published: Path, tmp_path: Path) -> None:
    """Each option changes the frames; what is asked for is what comes out."""
    plain = SampleOptions(steps=2, frames=5, size=(32, 48))
    changed = {
        "steps": SampleOptions(steps=3, frames=5, size=(32, 48)),
        "guidance": SampleOptions(steps=2, guidance=1.0, frames=5, size=(32, 48)),
        "negative prompt": SampleOptions(steps=2, negative_prompt="bad", frames=5, size=(32, 48)),
        "frames": SampleOptions(steps=2, frames=9, size=(32, 48)),
        "size": SampleOptions(steps=2, frames=5, size=(48, 32)),
    }

    def frames(options: SampleOptions, seed: int = 0) -> torch.Tensor:
        source = with_options(find_source(published, None, []), options)
        model = load_source(source)
        model.prepare([PROMPT])
        (videos,) = sample_frames(model, source, [PROMPT], seed=seed)
        return videos

    first = frames(plain)
    assert first.shape == (1, 5, 32, 48, 3)
    assert torch.equal(first, frames(plain))
    assert not torch.equal(first, frames(plain, seed=1))
    found = {name: frames(options) for name, options in changed.items()}
    assert found["frames"].shape == (1, 9, 32, 48, 3)
    assert found["size"].shape == (1, 5, 48, 32, 3)
    assert not any(torch.equal(first, videos) for videos in found.values())


def test_the_command_writes_videos_of_a_published_folder(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "clips"
    words = [str(published), *SMALL, "--prompt", PROMPT, "--count", "2", "--out", str(out)]
    assert sample.main(words) == 0
    assert [clip.prompt for clip in find_clips(out)] == [PROMPT, PROMPT]


def test_settings_may_be_given_as_words(published: Path, tmp_path: Path) -> None:
    """A bare transformer's folder, which does not say its kind, with the parts beside it."""
    parts = [f"model.{part}={published / part}" for part in ("vae", "text_encoder")]
    words = [str(published / "transformer"), *SMALL, "model.kind=wan", "--prompt", PROMPT, *parts]
    assert sample.main([*words, "--out", str(tmp_path)]) == 0


def test_an_export_is_sampled_as_its_run_was(adapter: Path, published: Path, tmp_path: Path) -> None:
    config = find_source(adapter, published, []).config
    assert (config.model.num_frames, config.model.height, config.model.width) == (5, 32, 48)
    assert (config.rollout.steps, config.rollout.guidance) == (3, 3.0)
    words = [str(adapter), "--base", str(published), "--prompt", PROMPT, "--out", str(tmp_path)]
    assert sample.main(words) == 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--frames", "80"], "--frames 80: model.num_frames=80 must be 4k + 1 for this model; set it to 77 or 81"),
            (["--size", "100x832"], "--size 100x832: 100 x 832 pixels must be divisible by 16"),
            (["--size", "100x832"], "the nearest size is 96 x 832"),
            (["--steps", "0"], "--steps 0 is too small; give at least 1"),
            (["--frames", "0"], "--frames 0 is too small"),
            (["--guidance", "-1"], "--guidance -1.0 is no scale; give a number from 0"),
            (["--guidance", "nan"], "--guidance nan is no scale"),
        ],
    )  # fmt: skip
    def test_what_the_model_cannot_represent(
        self, published: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert words in fails(capsys, published, *options)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--frames", "9"], "model.num_frames=9 has no meaning for model.kind=sprites"),
            (["--size", "64x64"], "--size 64x64: clips of the sprites world have 32 x 32 pixels; leave the size out"),
            (["--negative-prompt", "bad"], "--negative-prompt: the sprites world takes none; leave it out"),
        ],
    )  # fmt: skip
    def test_what_a_family_does_not_have(
        self, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert words in fails(capsys, *options)

    def test_sizes_with_names(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = [f"model.{part}={tmp_path}" for part in ("vae", "text_encoder")]
        (tmp_path / "config.json").write_text("{}")
        error = fails(capsys, tmp_path, "model.kind=opensora", *words, "--size", "240x400")
        assert "240 x 400 pixels is not among the published sizes; the nearest is 252 x 404" in error

    def test_a_size_that_is_none(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            sample.main(["--size", "480"])
        assert "'480' is no size; write HEIGHTxWIDTH, such as 480x832" in capsys.readouterr().err

    def test_adapters_and_bases(
        self, adapter: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = adapter / "pytorch_lora_weights.safetensors"
        for path in (adapter, file):
            assert f"{path} is an adapter; give the folder of the model" in fails(capsys, path)
        assert f"--base {published} is for an adapter, but {published} is none" in fails(
            capsys, published, "--base", published
        )
        assert f"--base {adapter} is an adapter itself" in fails(capsys, file, "--base", adapter)
        other = tmp_path / "renamed_lora.safetensors"
        tensors = {name.replace("blocks.", "block_"): weight for name, weight in load_file(file).items()}
        save_file(tensors, other)
        assert "does not fit Wan 2.1: none of its tensors belongs to a linear layer" in fails(
            capsys, other, "--base", published, *SMALL
        )
        ltx = FOLDERS["ltx"](tmp_path / "ltx")
        error = fails(capsys, file, "--base", ltx, "--frames", "9", "--size", "64x64")
        assert "does not fit LTX-Video: none of its tensors belongs to a linear layer" in error

    def test_folders_of_no_known_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "config.json").write_text("{}")
        assert "does not say which family of models it is of; add model.kind=KIND" in fails(capsys, tmp_path)
        (tmp_path / "model_index.json").write_text('{"_class_name": "MochiPipeline"}')
        assert "names MochiPipeline, a pipeline of no known kind of model" in fails(capsys, tmp_path)

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            ("shard", "fetch the folder again"),
            ("shape", "proj_out.weight is [8, 24], expected [16, 24]"),
            ("zeros", "holds zeros only, so every prompt would mean the same"),
            ("family", "LTXVideoTransformer3DModel"),
        ],
    )
    def test_wrong_folders(
        self, published: Path, tmp_path: Path, spoil: str, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = Path(shutil.copytree(published, tmp_path / "folder"))
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        table = folder / "text_encoder" / "model.safetensors"
        if spoil == "shard":
            index = {"weight_map": {"proj_out.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
            weights.unlink()
            weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
            words = "diffusion_pytorch_model-00001-of-00002.safetensors"
        elif spoil == "shape":
            tensors = load_file(weights)
            save_file(tensors | {"proj_out.weight": tensors["proj_out.weight"][:8].contiguous()}, weights)
        elif spoil == "zeros":
            tensors = load_file(table)
            save_file({name: tensor * ("shared" not in name) for name, tensor in tensors.items()}, table)
        else:
            config = folder / "transformer" / "config.json"
            config.write_text(
                config.read_text().replace("WanTransformer3DModel", "LTXVideoTransformer3DModel")
            )
        assert words in fails(capsys, folder, *SMALL)


def test_words_win_over_what_an_adapter_records(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    record = {"kind": "wan", "settings": {"rollout.steps": 3, "rollout.guidance": 2.0}}
    for folder, name, content in (
        (base, "model_index.json", {"_class_name": "WanPipeline"}),
        (adapter, "adapter_config.json", {}),
        (adapter, "vpo_export.json", record),
    ):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    rollout = find_source(adapter, base, ["rollout.steps=7"]).config.rollout
    assert (rollout.steps, rollout.guidance) == (7, 2.0)


def test_a_run_keeps_the_parts_that_it_names(tmp_path: Path) -> None:
    """Those that it does not name are those of the pipeline that it started from."""
    base, own = tmp_path / "published", tmp_path / "vae"
    for folder in (base, own):
        folder.mkdir()
    (base / "model_index.json").write_text("{}")
    config = run_config("wan", base, tmp_path / "run", f"model.vae={own}")
    run = RunDirectory.create_at(tmp_path / "run", dump_config(config))

    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(b"weights")

    save_checkpoint(run.checkpoints, 2, tensors={}, state={}, write_policy=write, keep=1)
    model = find_source(run.root, None, []).config.model
    assert (model.vae, model.text_encoder) == (own, base)
    assert model.policy == run.checkpoints / "step_00000002" / "policy"


def test_an_adapter_is_sampled_at_its_runs_frame_rate_also_where_that_is_the_default(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    config = run_config("ltx", base, tmp_path / "run", "model.num_frames=9", *LORA)
    config = config.model_copy(update={"model": config.model.model_copy(update={"fps": 24})})
    for folder in (base, adapter):
        folder.mkdir()
    (base / "model_index.json").write_text(json.dumps({"_class_name": "LTXPipeline"}))
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "vpo_export.json").write_text(record_text(PolicySource(config), "diffusers"))
    assert config.model.fps == type(config.model).model_fields["fps"].default
    assert config.model.fps != model_family("ltx").card.native["model.fps"]
    found = find_source(adapter, base, []).config.model
    assert (found.fps, found.num_frames) == (config.model.fps, 9)


def test_a_configuration_whose_weights_a_plan_chooses_may_be_sampled() -> None:
    config = load_config("opensora_v1_2_720p.yaml", ["memory.preset=balanced"])
    assert sample.changed_config(config, SampleOptions(steps=7)).rollout.steps == 7


def test_videos_may_be_shorter_than_the_previews_of_the_training(published: Path) -> None:
    words = ["rollout.steps=2", "rollout.prune={after: 0.5, keep: 2, frames: 9}"]
    source = with_options(find_source(published, None, words), SampleOptions(frames=5, size=(32, 48)))
    assert load_source(source, lambda line: None).video_size == (5, 32, 48)


def test_the_folders_of_a_checkpoint_are_the_weights_that_they_hold(tmp_path: Path) -> None:
    """A checkpoint is its moving average, which its run has evaluated; a folder in it is what its name says."""
    run = RunDirectory.create_at(tmp_path / "run", dump_config(run_config("sprites", None, tmp_path / "run")))

    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    saved = save_checkpoint(
        run.checkpoints, 2, tensors={}, state={}, write_policy=write, write_average=write, keep=1
    )
    for place, expected in (("", "ema"), ("policy", "policy"), ("ema", "ema")):
        assert find_source(saved / place, None, []).config.model.policy == saved / expected


RATES = {"cogvideox": (49, 8), "wan": (81, 16), "ltx": (161, 25)}
"""Frames, and frames a second, of the published examples; not every pipeline has them as defaults."""


@pytest.mark.parametrize("kind", sorted(FOLDERS))
def test_a_published_folder_is_sampled_as_its_pipeline_samples(kind: str) -> None:
    card = model_family(kind).card
    (name,) = card.pipelines
    signature = inspect.signature(getattr(diffusers, name).__call__).parameters
    asked = {"num_inference_steps": "rollout.steps", "guidance_scale": "rollout.guidance"}
    assert {own: card.native[own] for own in asked.values()} == {
        own: signature[theirs].default for theirs, own in asked.items()
    }
    assert (card.native["model.num_frames"], card.native["model.fps"]) == RATES[kind]
    for theirs, own in (("num_frames", "model.num_frames"), ("frame_rate", "model.fps")):
        default = signature[theirs].default if theirs in signature else None
        assert default in (None, card.native[own])


def test_a_folder_without_a_file_of_an_adapter_that_is_read_is_named(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As PEFT wrote adapters before it took safetensors."""
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").touch()
    error = fails(capsys, folder, "--base", published, *SMALL)
    assert str(folder) in error
    assert ".safetensors" in error
