"""``python -m vpo_engine.export``: diffusers and PEFT load what it writes, and compute what the policy does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from export_case import Case, exported, fails, make_case
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import FOLDERS, LORA, NEGATIVE, PROMPT, run_config, sized, trained
from torch import Tensor

from vpo_engine import sample
from vpo_engine.exporting import write
from vpo_engine.exporting.folder import _files
from vpo_engine.exporting.options import ExportOptions
from vpo_engine.memory.quantised_base import frozen_layers
from vpo_engine.models.opensora.checkpoint import save_pretrained_layout
from vpo_engine.models.opensora.load import load_stdit3
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.models.opensora.vae import OpenSoraVAE
from vpo_engine.policy_source import find_source

KINDS = ["wan", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("cogvideox", "ltx"))]
"""Exports of a family differ in what its description says; the code is the same for all."""
ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("wan", tmp_path_factory.mktemp("one"))


def engine_frames(path: Path, base: Path | None = None) -> tuple[Tensor, Tensor]:
    """Return the frames that ``sample`` makes of a source, [F, height, width, 3], and the noise they start from."""
    source = find_source(path, base, [])
    model = sample.load_source(source)
    model.prepare([PROMPT])
    (videos,) = sample.sample_frames(model, source, [PROMPT])
    return videos[0], sample.starting_noise(model, 0, 0, 1)


def load_pipeline(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def pipeline_frames(pipeline: Any, kind: str, noise: Tensor) -> Tensor:
    """Return the frames that a diffusers pipeline makes with the settings of the runs, [F, height, width, 3]."""
    frames, height, width = (int(word.partition("=")[2]) for word in sized(kind)[:3])
    order = {"cogvideox": lambda z: z.transpose(1, 2), "ltx": lambda z: z.flatten(2).transpose(1, 2)}
    more = {"frame_rate": 8} if kind == "ltx" else {}
    made = pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=3,
        guidance_scale=3.0,
        latents=order.get(kind, lambda z: z)(noise),
        output_type="np",
        **more,
    )
    return torch.from_numpy(made.frames[0] * 255).round().to(torch.uint8)


def largest_difference(one: Tensor, other: Tensor) -> int:
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


class TestFrames:
    """Frames of the run, of ``sample`` on the export, and of diffusers on the export are the same."""

    def test_a_full_policy(self, case: Case, tmp_path: Path) -> None:
        out = exported(case.full, tmp_path / "out")
        run, noise = engine_frames(case.full)
        own, again = engine_frames(out)
        assert torch.equal(noise, again)
        assert torch.equal(run, own)
        assert largest_difference(own, pipeline_frames(load_pipeline(out), case.kind, noise)) <= 1
        untouched = pipeline_frames(load_pipeline(case.published), case.kind, noise)
        assert largest_difference(own, untouched) > 1  # training has changed what is compared

    @pytest.mark.long
    def test_an_adapter(self, case: Case, tmp_path: Path) -> None:
        out = exported(case.lora, tmp_path / "out")
        run, noise = engine_frames(case.lora)
        own, _ = engine_frames(out, case.published)
        assert largest_difference(run, own) <= 1
        pipeline = load_pipeline(case.published)
        pipeline.load_lora_weights(out)
        assert largest_difference(run, pipeline_frames(pipeline, case.kind, noise)) <= 1
        pipeline.unload_lora_weights()
        assert largest_difference(run, pipeline_frames(pipeline, case.kind, noise)) > 1

    def test_a_merged_one(self, case: Case, tmp_path: Path) -> None:
        out = exported(case.lora, tmp_path / "out", "--merge")
        run, noise = engine_frames(case.lora)
        own, _ = engine_frames(out)
        assert largest_difference(run, own) <= 1
        assert largest_difference(own, pipeline_frames(load_pipeline(out), case.kind, noise)) <= 1

    def test_the_names_of_comfyui(self, wan: Case, tmp_path: Path) -> None:
        out = exported(wan.lora, tmp_path / "out", "--format", "original")
        names = load_file(out / ADAPTER).keys()
        assert "diffusion_model.blocks.1.cross_attn.o.lora_B.weight" in names
        assert all(name.startswith("diffusion_model.blocks.") for name in names)
        run, noise = engine_frames(wan.lora)
        own, _ = engine_frames(out / ADAPTER, wan.published)
        assert largest_difference(run, own) <= 1
        pipeline = load_pipeline(wan.published)
        pipeline.load_lora_weights(out)
        assert largest_difference(run, pipeline_frames(pipeline, "wan", noise)) <= 1


class TestFiles:
    def test_untouched_parts_are_linked(
        self, wan: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = exported(wan.full, tmp_path / "out")
        shown = capsys.readouterr().out
        assert f"scheduler, text_encoder, tokenizer, vae are those of {wan.published}" in shown
        assert "loaded back: all weights are equal, and the prediction differs by" in shown
        assert f"done: the policy (float32) at {out}" in shown
        inside = {file.relative_to(out): file for file in out.rglob("*") if file.is_file()}
        for name, file in inside.items():
            if name.parts[0] not in ("transformer", "vpo_export.json"):
                assert file.samefile(wan.published / name)
        published = {file.relative_to(wan.published) for file in wan.published.rglob("*") if file.is_file()}
        assert published <= inside.keys()
        assert not (tmp_path / "out.unfinished").exists()

    def test_parts_are_copied_where_there_are_no_links(
        self, wan: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def refuse(*paths: Path) -> None:
            raise OSError("other disk")

        monkeypatch.setattr(os, "link", refuse)
        out = exported(wan.full, tmp_path / "out")
        assert "0 files were linked" in capsys.readouterr().out
        file = Path("vae/diffusion_pytorch_model.safetensors")
        assert (out / file).read_bytes() == (wan.published / file).read_bytes()

    def test_the_checkpoint_of_a_step(self, wan: Case, tmp_path: Path) -> None:
        """Also one that is named itself; the newest is the default."""
        weights = Path("transformer/diffusion_pytorch_model.safetensors")
        earlier = wan.full / "checkpoints" / "step_00000002"
        asked = exported(wan.full, tmp_path / "asked", "--step", "2")
        named = exported(earlier, tmp_path / "named")
        newest = exported(wan.full, tmp_path / "newest")
        saved = load_file(earlier / "policy" / weights.name)
        for out, same in ((asked, True), (named, True), (newest, False)):
            loaded = load_file(out / weights)
            assert all(torch.equal(loaded[name], weight) for name, weight in saved.items()) is same
        assert json.loads((asked / "vpo_export.json").read_text())["step"] == 2

    def test_the_scale_is_written_once(self, wan: Case, tmp_path: Path) -> None:
        """Into B, 1.5 times that of the checkpoint; neither alphas nor metadata say it again."""
        out = exported(wan.lora, tmp_path / "out")
        saved = load_file(wan.lora / "checkpoints/step_00000002/policy/adapter_model.safetensors")
        written = load_file(out / ADAPTER)
        assert len(written) == len(saved)
        for name, weight in saved.items():
            scale = 1.5 if ".lora_B." in name else 1.0
            assert torch.equal(written[name.replace("base_model.model.", "transformer.")], scale * weight)
        with safe_open(out / ADAPTER, framework="pt") as content:
            assert content.metadata() == {"format": "pt"}

    def test_peft_loads_its_own_format(self, wan: Case, tmp_path: Path) -> None:
        out = exported(wan.lora, tmp_path / "out", "--format", "peft")
        assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 6
        run, noise = engine_frames(wan.lora)
        own, _ = engine_frames(out, wan.published)
        assert largest_difference(run, own) <= 1
        pipeline = load_pipeline(wan.published)
        peft.PeftModel.from_pretrained(pipeline.transformer, str(out))
        assert largest_difference(run, pipeline_frames(pipeline, "wan", noise)) <= 1

    @pytest.mark.parametrize("options", [("full",), ("lora", "--merge"), ("lora",)], ids="-".join)
    def test_a_type_of_the_weights(
        self, wan: Case, tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """All weights are in it, but for those that the family needs in float32; the change is told."""
        run, *more = options
        out = exported(getattr(wan, run), tmp_path / "out", "--dtype", "bfloat16", *more)
        assert "rounding to bfloat16 has moved the prediction by" in capsys.readouterr().out
        file = (
            out / ADAPTER if options == ("lora",) else out / "transformer/diffusion_pytorch_model.safetensors"
        )
        held = {name: tensor.dtype for name, tensor in load_file(file).items()}
        kept = {name for name, dtype in held.items() if dtype == torch.float32}
        assert torch.bfloat16 in held.values()
        assert ("scale_shift_table" in kept) is (options != ("lora",))
        assert not any(".attn1.to_q." in name for name in kept)

    def test_a_policy_that_was_not_published_whole(
        self, wan: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A second run starts from the bare transformer of the first; the parts beside it come from --base."""
        bare = wan.full / "checkpoints" / "step_00000004" / "policy"
        parts = [f"model.{part}={wan.published / part}" for part in ("vae", "text_encoder")]
        second = trained(run_config("wan", bare, tmp_path / "second", *sized("wan"), *parts))
        error = fails(capsys, second, "--out", tmp_path / "out")
        assert f"model.policy={bare} of the run has no model_index.json" in error
        assert "--base FOLDER" in error
        out = exported(second, tmp_path / "out", "--base", str(wan.published))
        own, _ = engine_frames(out)
        made = load_pipeline(out)
        assert own.shape[0] == 5
        saved = load_file(second / "checkpoints/step_00000002/policy/diffusion_pytorch_model.safetensors")
        assert all(torch.equal(made.transformer.state_dict()[name], weight) for name, weight in saved.items())

    @pytest.mark.parametrize(
        "changes",
        [
            {"attention: auto": "attention: flash2"},
            {"num_frames: 5": "num_frames: 9", "prune: null": "prune: {after: 0.5, keep: 2, frames: 9}"},
        ],
    )
    def test_settings_of_the_runs_device_and_of_its_rollouts(
        self, wan: Case, tmp_path: Path, changes: dict[str, str]
    ) -> None:
        run = Path(shutil.copytree(wan.full, tmp_path / "run"))
        text = (run / "config.yaml").read_text()
        for before, now in changes.items():
            assert text.count(before) == 1
            text = text.replace(before, now)
        (run / "config.yaml").write_text(text)
        assert (exported(run, tmp_path / "out") / "model_index.json").is_file()

    def test_the_moving_average(self, wan: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = Path(shutil.copytree(wan.full, tmp_path / "run"))
        assert "has no moving average" in fails(capsys, run, "--ema", "--out", tmp_path / "out")
        newest = run / "checkpoints" / "step_00000004"
        shutil.copytree(run / "checkpoints/step_00000002/policy", newest / "ema")
        assert "was added after" in fails(capsys, run, "--out", tmp_path / "out")
        manifest = json.loads((newest / "manifest.json").read_text())
        earlier = json.loads((newest.with_name("step_00000002") / "manifest.json").read_text())["files"]
        policy_files = {name: entry for name, entry in earlier.items() if name.startswith("policy/")}
        manifest["files"] |= {name.replace("policy", "ema", 1): entry for name, entry in policy_files.items()}
        (newest / "manifest.json").write_text(json.dumps(manifest))
        weights = Path("diffusion_pytorch_model.safetensors")
        average, policy = (load_file(newest / name / weights) for name in ("ema", "policy"))
        for options, expected in ((["--ema"], average), ([], policy)):
            out = exported(run, tmp_path / f"out{len(options)}", *options)
            written = load_file(out / "transformer" / weights)
            assert all(torch.equal(written[name], weight) for name, weight in expected.items())


class TestOtherFamilies:
    @pytest.mark.parametrize("options", [("full",), ("lora",), ("lora", "--merge")], ids="-".join)
    def test_sprites(self, tmp_path: Path, small_policy: str, options: tuple[str, ...]) -> None:
        """A policy, an adapter (in PEFT's format) and a merged one; whole ones are sampled as they are."""
        name, *more = options
        lora = LORA if name == "lora" else ()
        run = trained(run_config("sprites", None, tmp_path / name, small_policy, *lora))
        out = exported(run, tmp_path / "out", *more)
        if options == ("lora",):
            assert (out / "adapter_model.safetensors").is_file()
        else:
            assert largest_difference(engine_frames(run)[0], engine_frames(out)[0]) <= 1

    def test_a_dialect_that_nothing_would_read(
        self, tmp_path: Path, small_policy: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = trained(run_config("sprites", None, tmp_path / "lora", small_policy, *LORA))
        capsys.readouterr()
        error = fails(capsys, run, "--out", tmp_path / "x", "--format", "diffusers")
        assert (
            "the sprites world has no diffusers pipeline that would read it; leave it out for peft" in error
        )

    def test_opensora(self, tmp_path: Path) -> None:
        """Its own layout, whole and merged, which its loader and its public code read."""
        data = Path(__file__).parent / "data" / "opensora"
        torch.manual_seed(0)
        tiny = json.loads((data / "stdit3_tiny.json").read_text())["config"]
        network = STDiT3.from_config({**tiny, "freeze_y_embedder": True})
        save_pretrained_layout(network.state_dict(), network.config, tmp_path / "policy")
        sizes = json.loads((data / "vae_tiny.json").read_text())
        parts = {f"{part}_config": sizes[f"{part}_config"] for part in ("spatial", "temporal")}
        vae = OpenSoraVAE.from_config(parts | {name: sizes["constants"][name] for name in ("scale", "shift")})
        save_pretrained_layout(vae.state_dict(), vae.config, tmp_path / "vae")
        given = [f"model.vae={tmp_path / 'vae'}", f"model.text_encoder={tmp_path}"]
        for name, more, options in (("full", (), ()), ("lora", LORA, ("--merge",))):
            run = trained(run_config("opensora", tmp_path / "policy", tmp_path / name, *given, *more))
            out = exported(run, tmp_path / f"out-{name}", *options)
            assert (out / "model" / "model.safetensors.index.json").is_file()
            loaded = load_stdit3(out).state_dict()
            kind = "model" if name == "full" else "adapter_model"
            saved = load_file(run / f"checkpoints/step_00000002/policy/{kind}.safetensors")
            if name == "full":
                assert all(torch.equal(loaded[key], weight) for key, weight in saved.items())
                continue
            layer = "spatial_blocks.0.attn.qkv"
            down, up = (saved[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
            expected = network.state_dict()[f"{layer}.weight"] + 1.5 * up @ down
            torch.testing.assert_close(loaded[f"{layer}.weight"], expected)

    def test_formats_that_a_family_does_not_have(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        published = FOLDERS["cogvideox"](tmp_path / "published")
        run = trained(run_config("cogvideox", published, tmp_path / "run", *sized("cogvideox"), *LORA))
        capsys.readouterr()
        error = fails(capsys, run, "--out", tmp_path / "out", "--format", "original")
        assert "--format original: CogVideoX-2B has no other names of its layers" in error


class TestParts:
    def test_parts_that_a_run_names_stand_beside_its_policy(self, tmp_path: Path) -> None:
        """A part's folder is named, or that of a pipeline which holds it."""
        base, other, own = tmp_path / "base", tmp_path / "other", tmp_path / "encoder"
        for folder in (base, other):
            for part in ("transformer", "vae", "text_encoder", "scheduler"):
                (folder / part).mkdir(parents=True)
            (folder / "model_index.json").touch()
        config: Any = SimpleNamespace(model=SimpleNamespace(vae=other, text_encoder=own))
        assert write._parts(base, config) == {
            "scheduler": base / "scheduler",
            "model_index.json": base / "model_index.json",
            "vae": other / "vae",
            "text_encoder": own,
        }

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_a_whole_policy_keeps_the_type_of_most_of_its_weights(
        self, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        weights = {name: torch.ones(2, dtype=dtype) for name in ("a", "b")}
        save_file(weights | {"norm": torch.ones(2)}, tmp_path / "model.safetensors")
        model = SimpleNamespace(lora=None, policy=tmp_path)
        source: Any = SimpleNamespace(config=SimpleNamespace(model=model))
        assert write._dtype(source, ExportOptions()) == dtype

    @pytest.mark.parametrize("named", ["other", "other/text_encoder"])
    def test_a_text_encoder_of_another_pipeline_brings_its_tokenizer(
        self, tmp_path: Path, named: str
    ) -> None:
        """A run, too, reads prompts by the tokenizer beside its text encoder."""
        base, other = tmp_path / "base", tmp_path / "other"
        for folder in (base, other):
            for part in ("vae", "text_encoder", "tokenizer"):
                (folder / part).mkdir(parents=True)
            (folder / "tokenizer" / "tokenizer.json").touch()
            (folder / "model_index.json").touch()
        config: Any = SimpleNamespace(model=SimpleNamespace(vae=None, text_encoder=tmp_path / named))
        parts = write._parts(base, config)
        assert parts["text_encoder"] == other / "text_encoder"
        assert parts["tokenizer"] == other / "tokenizer"
        assert parts["vae"] == base / "vae"

    def test_a_text_encoder_that_holds_its_tokenizer_brings_it(self, tmp_path: Path) -> None:
        base, own = tmp_path / "base", tmp_path / "umt5"
        for part in ("vae", "text_encoder", "tokenizer"):
            (base / part).mkdir(parents=True)
        own.mkdir()
        for file in (base / "tokenizer/tokenizer.json", base / "model_index.json", own / "tokenizer.json"):
            file.touch()
        config: Any = SimpleNamespace(model=SimpleNamespace(vae=None, text_encoder=own))
        files = _files(write._parts(base, config))
        assert files["tokenizer/tokenizer.json"] == own / "tokenizer.json"

    def test_the_base_is_the_published_one_in_float32(self, wan: Case, tmp_path: Path) -> None:
        """Whatever the run held it and computed in."""
        held = ("memory.base_bits=4", "model.dtype=bfloat16")
        config = run_config("wan", wan.published, tmp_path / "run", *sized("wan"), *LORA, *held)
        model = write._load(config)
        assert frozen_layers(model.network) == []
        assert model.dtype == torch.float32
        assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}
