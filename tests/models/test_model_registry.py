"""Kinds of models: where they are found, and what is refused before a weight is read."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from vpo_engine.config import ModelConfig, names
from vpo_engine.config_file import load_config
from vpo_engine.data.sprites.assets import Sprites
from vpo_engine.models import registry
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.models.registry import check_loaded, check_model, model_family
from vpo_engine.video_model import Option, SizeRule, repeating_blocks

MODULE = '''
from vpo_engine.data.sprites.assets import Sprites
from vpo_engine.models.base import BaseModel
from vpo_engine.video_model import ModelCard, SizeRule

class Bare(BaseModel):
    """Lacks most of the interface."""
    card = ModelCard(name="bare")

class Plain(Sprites):
    card = ModelCard(name="plain", files=("policy",), sizes=SizeRule(4, 1, exact=True))
    @classmethod
    def check(cls, settings):
        super(Sprites, cls).check(settings)

class NoModel: ...

number = 3
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "models_of_a_test.py").write_text(MODULE)
    (tmp_path / "broken_model_of_a_test.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("models_of_a_test", "broken_model_of_a_test"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "models_of_a_test"


def refused(*overrides: str) -> str:
    prompts = ["prompts.train=train.txt", "prompts.held_out=held_out.txt", "reward.kind=builtin"]
    with pytest.raises(ValueError) as error:  # noqa: PT011  (callers check the text)
        check_model(load_config(None, [*prompts, *overrides]))
    return str(error.value)


def test_kinds_are_found_by_name_by_place_and_by_entry_point(
    own_module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model_family("opensora") is OpenSora
    assert model_family("sprites") is Sprites
    assert model_family(f"{own_module}:Plain").card.name == "plain"
    entry = EntryPoint("installed", f"{own_module}:Plain", registry.ENTRY_POINTS)
    for module in (registry, names):
        monkeypatch.setattr(module, "entry_points", lambda group: EntryPoints([entry]).select(group=group))
    assert model_family("installed").card.name == "plain"
    assert (
        "there is no such model family. Known are opensora, sprites, cogvideox, wan, ltx, installed."
        in refused("model.kind=absent")
    )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("opensor", "model.kind=opensor: there is no such model family; did you mean opensora? Known are opensora"),
        ("absent_package.models:Mine", "there is no module absent_package; install its package, or start from"),
        ("models_of_a_test:Absent", "has no Absent; its models are Sprites, Plain"),
        ("models_of_a_test:NoModel", "NoModel is not a subclass of vpo_engine.video_model.VideoModel; derive it"),
        ("models_of_a_test:number", "3 is not a subclass of"),
        ("models_of_a_test:Bare", "Bare does not define draw_timesteps, load, noising_scales, null_text, predict, "
         "save_full_policy, solver, target_scales, to_video; docs/models.md"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused_with_the_remedy(own_module: str, kind: str, text: str) -> None:
    assert text in refused(f"model.kind={kind}")


def test_a_module_that_misses_an_import_says_which(own_module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        model_family("broken_model_of_a_test:Model")


@pytest.mark.parametrize("kind", ["a:b:c", "package.module:", ":Class", "a b", ""])
def test_a_kind_has_one_of_two_forms(kind: str) -> None:
    with pytest.raises(ValueError, match=r"model\.kind"):
        load_config(None, [f"model.kind='{kind}'"])


def test_missing_files_are_named() -> None:
    message = refused("model.kind=opensora", "model.vae=somewhere")
    assert "kind opensora needs local checkpoints, but these are not set: policy, text_encoder" in message


def test_sizes_that_a_model_cannot_represent_name_the_nearest(own_module: str) -> None:
    message = refused(f"model.kind={own_module}:Plain", "model.policy=p", "model.num_frames=34")
    assert "model.num_frames=34 must be 4k + 1 for this model; set it to 33 or 37" in message
    rule = SizeRule(side=16)
    rule.check_sides(240, 416)
    with pytest.raises(ValueError, match=r"240 x 426 pixels must be divisible by 16 .* is 240 x 432"):
        rule.check_sides(240, 426)
    assert "resolution is '241p'; known: 144p, 240p" in refused(
        "model.kind=opensora",
        "model.policy=p",
        "model.vae=v",
        "model.text_encoder=t",
        "model.resolution=241p",
    )


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["model.attention=sdpa"], "model.attention=sdpa is not supported by"),
        (["memory.activation_checkpointing=block"], "set memory.activation_checkpointing=none"),
        (
            ["memory.activation_checkpointing=block", "memory.offload_activations=true"],
            "memory.activation_checkpointing=block is not supported",
        ),
        (["memory.decode_frames=1"], "set memory.decode_frames=null"),
        (["rollout.cache=0.1"], "rollout.cache=0.1 is not supported"),
        (["rollout.explore={steps: 2, cache: 0.1}"], "rollout.cache=0.1 is not supported"),
        (["rollout.compile=blocks"], "rollout.compile=blocks is not supported"),
        (["rollout.compile=graphs"], "set rollout.compile=none"),
    ],
)
def test_options_that_a_family_does_not_have_are_refused(
    own_module: str, overrides: list[str], text: str
) -> None:
    kind = f"{own_module}:Plain"
    message = refused(f"model.kind={kind}", "model.policy=p", "model.num_frames=33", *overrides)
    assert text in message
    assert f"model.kind={kind} (plain)" in message


def test_the_shipped_families_support_every_option() -> None:
    check_model(
        load_config(
            None,
            ["memory.activation_checkpointing=block", "memory.offload_activations=true", "rollout.cache=0.1"],
        )
    )


def test_what_a_constructor_has_not_set_is_named() -> None:
    class Half(Sprites):
        def __init__(self) -> None:
            self.network, self.device = nn.Linear(1, 1), torch.device("cpu")  # type: ignore[assignment]

    with pytest.raises(ValueError, match=re.escape("a Half has no latent_shape, fps, text_rule, dtype")):
        check_loaded("half", Half())


def test_repeating_blocks_are_the_outermost_lists() -> None:
    inner = nn.Sequential(nn.ModuleList([nn.Linear(1, 1)]))
    network = nn.Sequential(nn.ModuleList([inner, inner]), nn.Sequential(nn.ModuleList([nn.Linear(1, 1)])))
    assert list(repeating_blocks(network)) == ["0", "1.0"]


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("opensora", "model.height=240"),
        ("opensora", "model.width=426"),
        ("opensora", "model.flow_shift=3.0"),
        ("opensora", "model.negative_prompt=dull"),
        ("cogvideox", "model.flow_shift=3.0"),
        ("cogvideox", "model.fused_ops=reference"),
        ("wan", "memory.decode_strip_height=16"),
        ("ltx", "model.attention=sdpa"),
        ("ltx", "rollout.compile=graphs"),
    ],
)
def test_a_setting_that_would_have_no_effect_is_refused(kind: str, setting: str) -> None:
    parts = [f"model.{name}=p" for name in ("policy", "vae", "text_encoder")]
    message = refused(f"model.kind={kind}", "model.num_frames=17", *parts, setting)
    assert f"{setting} is not supported by model.kind={kind}" in message


def test_videos_too_short_for_open_soras_times_are_refused_before_a_file_is_read() -> None:
    def settings(frames: int) -> ModelConfig:
        parts = {name: Path("absent") for name in ("policy", "vae", "text_encoder")}
        return ModelConfig(kind="opensora", num_frames=frames, **parts)

    for frames in (1, 17, 18):
        OpenSora.check(settings(frames))
    for frames in (2, 16):
        with pytest.raises(
            ValueError, match=rf"model\.num_frames={frames}: .* set it to 1, or to 17 or more"
        ):
            OpenSora.check(settings(frames))


ASKING: dict[Option, tuple[str, ...]] = {
    "model.height": ("model.height=64",),
    "model.width": ("model.width=64",),
    "model.flow_shift": ("model.flow_shift=3",),
    "model.negative_prompt": ("model.negative_prompt=dull",),
    "model.attention": ("model.attention=sdpa",),
    "model.fused_ops": ("model.fused_ops=reference",),
    "memory.activation_checkpointing": ("memory.activation_checkpointing=block",),
    "memory.offload_activations": ("memory.activation_checkpointing=block", "memory.offload_activations=true"),
    "memory.mlp_chunks": ("memory.mlp_chunks=2",),
    "memory.decode_frames": ("memory.decode_frames=1",),
    "memory.decode_strip_height": ("memory.decode_strip_height=16",),
    "rollout.guidance": ("rollout.guidance=3",),
    "rollout.guidance_interval": ("rollout.guidance=3", "rollout.guidance_interval=[0.2, 0.8]"),
    "rollout.cache": ("rollout.cache=0.1",),
    "rollout.compile=blocks": ("rollout.compile=blocks",),
    "rollout.compile=graphs": ("rollout.compile=graphs",),
    "rollout.prune.frames": ("rollout.prune={after: 0.5, keep: 2, frames: 5}",),
    "distributed.sequence_parallel": ("distributed.sequence_parallel=2",),
    "processes.split_guidance": (
        "processes.per_prompt=2", "rollout.guidance=4", "processes.split_guidance=true",
    ),
}  # fmt: skip


@pytest.mark.parametrize("option", sorted(set(get_args(Option)) - {"method=reward_gradient"}))
def test_each_option_is_asked_of_the_family(option: Option, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family with all others refuses it; one with all takes it."""
    config, name = load_config(None, list(ASKING[option])), option.partition("=")[0]
    families = [
        type(
            "Own", (Sprites,), {"card": replace(Sprites.card, supports=frozenset(get_args(Option)) - without)}
        )
        for without in (frozenset(), {option})
    ]
    monkeypatch.setattr(registry, "model_family", lambda kind: families[0])
    check_model(config)
    monkeypatch.setattr(registry, "model_family", lambda kind: families[1])
    with pytest.raises(ValueError, match=rf"{re.escape(name)}=\S.* is not supported by model\.kind=sprites"):
        check_model(config)
