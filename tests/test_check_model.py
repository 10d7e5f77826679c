"""``python -m vpo_engine.check_model``: true descriptions pass, and each wrong entry is found and named."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import FOLDERS
from torch import Tensor

from vpo_engine import check_model
from vpo_engine.build import build_model
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.model_checks import own
from vpo_engine.model_checks import pipeline as pipeline_checks
from vpo_engine.model_checks.record import Recording, Sampling
from vpo_engine.model_checks.table import Row
from vpo_engine.models.cogvideox.model import CogVideoX
from vpo_engine.models.diffusers_model import DiffusersModel
from vpo_engine.models.ltx import LTXVideo
from vpo_engine.models.solvers import EulerFlow
from vpo_engine.models.wan.model import Wan
from vpo_engine.video_model import SizeRule

FAMILIES: dict[str, type[DiffusersModel]] = {"cogvideox": CogVideoX, "wan": Wan, "ltx": LTXVideo}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("published")
    return {kind: make(root / kind) for kind, make in FOLDERS.items()}


def rows(folder: Path, kind: str | None = None) -> list[Row]:
    return check_model.check_model(folder, kind)


@pytest.mark.parametrize(
    "kind", ["wan", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("cogvideox", "ltx"))]
)
def test_true_descriptions_pass(
    folders: Mapping[str, Path], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_model.main([str(folders[kind])]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == f"the description fits: {len(shown) - 1} entries were checked"
    assert all(line.endswith("ok") for line in shown[:-1])
    assert len(shown) > 25


def test_sprites_agree_with_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    """A family without a pipeline, whose folder does not say its kind."""
    from vpo_engine.data.sprites.assets import WEIGHTS

    assert check_model.main([str(WEIGHTS / "policy"), "--kind", "sprites"]) == 0
    shown = capsys.readouterr().out
    for name in (
        "target and solver",
        "guidance",
        "size of the videos",
        "policy equals reference",
        "LoRA targets",
    ):
        assert f"\n{name} " in f"\n{shown}"


@pytest.mark.parametrize(("scale", "wrong"), [(1.0, []), (1.01, ["guidance"])])
def test_rounding_that_depends_on_the_batch_is_not_taken_for_wrong_guidance(
    monkeypatch: pytest.MonkeyPatch, scale: float, wrong: list[str]
) -> None:
    """A trained network enlarges the rounding in which a batch of one differs from one of two."""
    from vpo_engine.data.sprites.assets import WEIGHTS
    from vpo_engine.models.opensora.model import OpenSora

    exact = OpenSora.predict

    def predict(
        self: OpenSora, network: Any, latents: Tensor, t: Tensor, text: Any, guidance: float = 1.0
    ) -> Tensor:
        if guidance != 1.0:
            return exact(self, network, latents, t, text, scale * guidance)
        return exact(self, network, latents, t, text) * (1 + 1e-3 * (len(latents) == 1))

    monkeypatch.setattr(OpenSora, "predict", predict)
    assert [row.name for row in rows(WEIGHTS / "policy", "sprites") if row.ok is False] == wrong


def _solver(steps: int) -> EulerFlow:
    return EulerFlow([1000 - 1000 * k / steps for k in range(steps)], [-1 / steps] * steps)


def _without(name: str) -> Callable[..., dict[str, Any]]:
    def arguments(self: Any, text: Any) -> dict[str, Any]:
        whole = super(type(self), self).arguments(text)
        return {key: value for key, value in whole.items() if key != name}

    return arguments


MUTATIONS: list[tuple[str, str, dict[str, Any], str]] = [
    ("cogvideox", "layout", {"facts": {"layout": (0, 1, 2, 3, 4)}}, "facts.layout"),
    ("wan", "layout of time", {"facts": {"layout": (0, 2, 1, 3, 4)}}, "facts.layout"),
    ("wan", "rows and columns", {"facts": {"layout": (0, 1, 2, 4, 3)}}, "facts.layout"),
    ("wan", "padding", {"facts": {"padding": "attended"}}, "facts.padding"),
    ("cogvideox", "padding", {"facts": {"padding": "zeros"}}, "facts.padding"),
    ("ltx", "padding", {"facts": {"padding": "attended"}}, "facts.padding"),
    ("wan", "mask of the encoder", {"facts": {"encoder_mask": False}}, "facts.encoder_mask"),
    ("cogvideox", "mask of the encoder", {"facts": {"encoder_mask": True}}, "facts.encoder_mask"),
    ("cogvideox", "order of guidance", {"facts": {"negative_first": False}}, "facts.negative_first"),
    ("ltx", "order of guidance", {"facts": {"negative_first": False}}, "facts.negative_first"),
    ("wan", "class of the VAE", {"facts": {"vae": "AutoencoderKLCogVideoX"}}, "facts.vae"),
    ("wan", "class of the text encoder", {"facts": {"text_encoder": "T5EncoderModel"}}, "facts.text_encoder"),
    ("wan", "class of the network", {"facts": {"transformer": "LTXVideoTransformer3DModel"}}, "facts.transformer"),
    ("wan", "class of the pipeline", {"card": {"pipelines": ("LTXPipeline",)}}, "card.pipelines"),
    ("wan", "steps of frames", {"card": {"sizes": SizeRule(8, 1, exact=True, side=16)}}, "card.sizes (frame"),
    ("wan", "first frames", {"card": {"sizes": SizeRule(4, 2, exact=True, side=16)}}, "card.sizes (frame"),
    ("cogvideox", "pairs of latents", {"card": {"sizes": SizeRule(4, 1, exact=True, side=16)}}, "card.sizes (frame"),
    ("cogvideox", "a side that is too fine", {"card": {"sizes": SizeRule(8, 1, True, 8, (8,))}}, "card.sizes.side"),
    ("wan", "a side that is too coarse", {"card": {"sizes": SizeRule(4, 1, exact=True, side=32)}}, "card.sizes.side"),
    ("wan", "targets of adapters", {"card": {"lora_targets": ("to_q", "to_out")}}, "card.lora_targets"),
    ("wan", "length of the text", {"text_size": classmethod(lambda cls, t: (226, t["text_dim"]))}, "text_size"),
    ("ltx", "length of the text", {"text_size": classmethod(lambda cls, t: (64, t["caption_channels"]))}, "text_size"),
    ("wan", "cleaning", {"rewrite": classmethod(lambda cls, prompt: prompt)}, "rewrite"),
    ("cogvideox", "cleaning", {"rewrite": classmethod(lambda cls, prompt: prompt.upper())}, "encoder"),
    ("wan", "strides", {"strides": classmethod(lambda cls, vae: (8, 8))}, "strides"),
    ("cogvideox", "strides", {"strides": classmethod(lambda cls, vae: (4, 16))}, "strides"),
    ("wan", "sign of the target", {"target_scales": lambda self, t: (1.0, -1.0)}, "target_scales"),
    ("ltx", "target of another kind", {"target_scales": lambda self, t: (0.0, 1.0)}, "target_scales"),
    (
        "cogvideox", "sign of the target",
        {"target_scales": lambda self, t: tuple(-scale for scale in CogVideoX.target_scales(self, t))},
        "target_scales",
    ),
    ("wan", "noising", {"noising_scales": lambda self, t: (1 - t / 980, t / 980)}, "noising_scales"),
    ("cogvideox", "noising", {"noising_scales": lambda self, t: (1 - t / 1000, t / 1000)}, "noising_scales"),
    ("wan", "rounding of times", {"network_time": lambda self, t: t / 1000}, "network_time"),
    ("ltx", "scale of times", {"network_time": lambda self, t: t + 1}, "network_time"),
    ("wan", "steps", {"solver": lambda self, steps: _solver(steps)}, "solver"),
    ("ltx", "levels", {"levels_from_one": False}, "solver"),
    ("ltx", "an argument", {"arguments": _without("rope_interpolation_scale")}, "arguments"),
    ("wan", "scale of latents", {"denormalised": lambda self, latents: latents}, "denormalised"),
    ("cogvideox", "scale of latents", {"denormalised": lambda self, latents: latents * 1.15258426}, "denormalised"),
    (
        "wan", "order of colours",
        {"pixels": lambda self, latents: Wan.pixels(self, latents).flip(1)}, "pixels",
    ),
    (
        "wan", "output of the network",
        {"from_layout": lambda self, latents: -latents}, "from_layout",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def remembered() -> tuple[Callable[..., Any], Callable[..., Recording]]:
    """Load the pipeline of a folder once, and let it sample the same once: neither depends on the description."""
    run, kept = pipeline_checks.run_pipeline, dict[str, Recording]()

    def run_once(pipeline: Any, settings: Sampling, **asked: Any) -> Recording:
        if asked.get("oracle") is not None:
            return run(pipeline, settings, **asked)
        latents = asked.get("latents")
        shown = None if latents is None else latents.numpy().tobytes()
        key = repr((id(pipeline), replace(settings, more=settings.more()), {**asked, "latents": shown}))
        if key not in kept:
            kept[key] = run(pipeline, settings, **asked)
        return kept[key]

    return functools.cache(pipeline_checks._load), run_once


@pytest.mark.parametrize(
    ("kind", "change", "entry"),
    [(kind, change, entry) for kind, _, change, entry in MUTATIONS],
    ids=[f"{kind}-{name}" for kind, name, _, _ in MUTATIONS],
)
@pytest.mark.long
def test_each_wrong_entry_is_named(
    folders: Mapping[str, Path],
    kind: str,
    change: dict[str, Any],
    entry: str,
    remembered: tuple[Callable[..., Any], Callable[..., Recording]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, function in zip(("_load", "run_pipeline"), remembered, strict=True):
        monkeypatch.setattr(pipeline_checks, name, function)
    family = FAMILIES[kind]
    changed = dict(change)
    for name in ("facts", "card"):
        if name in change:
            changed[name] = replace(getattr(family, name), **change[name])
    mutated = type("Mutated", (family,), changed)
    monkeypatch.setattr(sys.modules[__name__], "Mutated", mutated, raising=False)
    found = rows(folders[kind], f"{__name__}:Mutated")
    wrong = [row for row in found if row.ok is False]
    assert [row for row in wrong if entry in row.entry], [(row.name, row.entry, row.note) for row in wrong]
    assert len(wrong) == 1, [(row.name, row.entry, row.note) for row in wrong]
    assert wrong[0].note


def test_a_wrong_entry_ends_the_command(
    folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table goes on as far as it can, the entry is named, and the exit code is 1."""
    wrong = type("Mutated", (Wan,), {"denormalised": lambda self, latents: latents})
    monkeypatch.setattr(sys.modules[__name__], "Mutated", wrong, raising=False)
    assert check_model.main([str(folders["wan"]), "--kind", f"{__name__}:Mutated"]) == 1
    shown = capsys.readouterr()
    assert "WRONG: denormalised" in shown.out
    assert "not checked (needs: latents for the VAE)" in shown.out
    assert "wrong: denormalised: the latents that the VAE decodes differ" in shown.err


def test_a_network_that_is_random_is_found(
    folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mutated(Wan):
        def predict(self, *args: Any, **kwargs: Any) -> Tensor:
            prediction = super().predict(*args, **kwargs)
            return prediction + 1e-7 * torch.randn_like(prediction)

    monkeypatch.setattr(sys.modules[__name__], "Mutated", Mutated, raising=False)
    wrong = [row.name for row in rows(folders["wan"], f"{__name__}:Mutated") if row.ok is False]
    assert wrong == ["policy equals reference"]


def test_weights_that_are_loaded_wrongly_are_found(
    folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mutated(Wan):
        def __init__(self, network: Any, *args: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                network.blocks[0].attn1.to_q.weight.mul_(1.001)
            super().__init__(network, *args, **kwargs)

    monkeypatch.setattr(sys.modules[__name__], "Mutated", Mutated, raising=False)
    [wrong] = [row for row in rows(folders["wan"], f"{__name__}:Mutated") if row.ok is False]
    assert (wrong.name, wrong.entry) == ("weights", "load")
    assert "blocks.0.attn1.to_q.weight differs" in wrong.note


class TestRefusals:
    def test_what_is_no_folder_needs_no_torch(self, tmp_path: Path) -> None:
        script = (
            "import sys; from vpo_engine.check_model import main\n"
            "print(main(sys.argv[1:])); print('torch' in sys.modules)"
        )
        given = [sys.executable, "-c", script, str(tmp_path / "nothing")]
        done = subprocess.run(given, capture_output=True, text=True, check=True)
        assert done.stdout == "1\nFalse\n"
        assert "there is no folder" in done.stderr

    def test_frames_and_sizes(self, folders: Mapping[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        for words, expected in (
            (
                ["--frames", "6"],
                "--frames 6: model.num_frames=6 must be 4k + 1 for this model; set it to 5 or 9",
            ),
            (["--size", "40x64"], "--size 40x64: 40 x 64 pixels must be divisible by 16"),
        ):
            assert check_model.main([str(folders["wan"]), *words]) == 1
            assert expected in capsys.readouterr().err

    def test_folders_of_other_families(
        self, folders: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert check_model.main([str(folders["wan"]), "--kind", "ltx"]) == 1
        assert "wrong: card.pipelines: the folder is of a WanPipeline" in capsys.readouterr().err
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "MochiPipeline"}))
        assert check_model.main([str(tmp_path)]) == 1
        assert "names MochiPipeline, a pipeline of no known kind" in capsys.readouterr().err

    def test_a_missing_file(
        self, folders: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = Path(shutil.copytree(folders["wan"], tmp_path / "folder"))
        (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
        capsys.readouterr()
        assert check_model.main([str(folder)]) == 1
        error = capsys.readouterr().err
        assert f"{folder / 'vae'} has neither diffusion_pytorch_model.safetensors" in error


def test_a_size_that_is_given_as_a_setting_is_that_of_the_videos(
    folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no word sets is small."""
    seen: list[Any] = []
    monkeypatch.setattr(
        "vpo_engine.model_checks.table.all_rows", lambda config, folder: seen.append(config.model) or []
    )
    check_model.check_model(folders["wan"], overrides=["model.num_frames=9", "model.height=32"])
    (found,) = seen
    assert (found.num_frames, found.height, found.width) == (9, 32, 96)


def test_a_family_that_contradicts_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its target is wrong in the last steps only, or its videos have another size than it says."""
    config = load_config(None, ["model.device=cpu"])
    model: Any = build_model(config, Processes.start("cpu"), say=lambda line: None)
    exact, late = type(model).target_scales, model.solver(own.STEPS).times[2]
    assert own._walk(model).error <= own.ROUNDING
    assert own._video_size(model).error == 0.0

    def wrong(self: Any, t: Tensor) -> tuple[Any, ...]:
        scales = exact(self, t)
        return scales if float(t) > late + 1e-3 else tuple(-scale for scale in scales)

    monkeypatch.setattr(type(model), "target_scales", wrong)
    assert own._walk(model).error > own.ROUNDING
    monkeypatch.setattr(model, "video_size", (1, 2, 3))
    assert own._video_size(model).error > 0.0
