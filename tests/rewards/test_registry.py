"""Every reward by name: cards that are complete, builders that refuse clearly, variants that differ as they should."""

import inspect
import json
import re
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch
from after_torch import run_after_torch

from vpo_engine.rewards import kinds, registry
from vpo_engine.rewards.builtin import Builtin
from vpo_engine.rewards.frames import VideoOfFrames
from vpo_engine.rewards.kinds import ENTRIES, NAMES, format_table
from vpo_engine.rewards.registry import (
    RewardSpec,
    build_reward,
    check_reward,
    format_card,
    knows_frame_rate,
    reward_card,
)

SHIPPED = ("sprites", "sprites_image", "builtin", "brisque")


@pytest.mark.parametrize("name", NAMES)
def test_card(name: str) -> None:
    card = reward_card(name)
    assert card.name == name
    assert card.dimensions
    for low, high in card.dimensions.values():
        assert low is None or high is None or low < high
    assert all((card.frames, card.resolution, card.licence, card.source))
    assert card.gib_bf16 == 2 * card.gib_8bit == 2 * card.parameters / 2**30
    assert (card.parameters > 10**8) == (name not in SHIPPED)


@pytest.mark.parametrize("name", NAMES)
def test_builder_fits_its_reward(name: str) -> None:
    """The keyword arguments that the registry gives exist, and image scorers score images."""
    entry = ENTRIES[name]
    scorer = getattr(registry._module(entry), entry.scorer)
    parameters = inspect.signature(scorer.from_pretrained).parameters
    assert {"device", "dtype", *entry.options} <= set(parameters)
    assert entry.timed == ("fps" in parameters)
    assert hasattr(scorer, "score_images") == entry.images
    assert hasattr(scorer, "score") != entry.images
    if reward_card(name).differentiable:  # VideoScore's gradients go through its logits
        assert any(hasattr(scorer, method) for method in ("score_pixels", "score_image_pixels", "logits"))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHIPPED])
def test_weights_are_never_downloaded(name: str, tmp_path: Path) -> None:
    fps = 8.0 if knows_frame_rate(name) else None
    with pytest.raises(
        ValueError, match=rf"reward '{name}' needs a path: a local folder with the weights published at"
    ):
        build_reward(name, fps=fps)
    with pytest.raises(FileNotFoundError, match="no folder at"):
        build_reward(name, tmp_path / "absent", fps=fps)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        build_reward(name, tmp_path, fps=fps)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped(name: str) -> None:
    assert build_reward(name).dimensions == tuple(reward_card(name).dimensions)
    with pytest.raises(
        ValueError, match=f"reward '{name}' has its weights in the package; leave out the path here"
    ):
        build_reward(name, "here")


def test_unknown_reward() -> None:
    message = "there is no reward 'videoscroe'; did you mean 'videoscore'? Known are sprites, sprites_image, builtin,"
    for ask in (reward_card, build_reward, knows_frame_rate):
        with pytest.raises(ValueError, match=re.escape(message)):
            ask("videoscroe")


def test_rewards_that_sample_by_seconds_want_the_frame_rate(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="reward 'videoalign' samples by seconds; give the videos' frames per second"
    ):
        build_reward("videoalign", tmp_path)


def test_the_configuration_knows_every_reward() -> None:
    from vpo_engine.config import reward as config

    assert config.KNOWN_REWARDS == NAMES
    assert tuple(name for name in NAMES if ENTRIES[name].shipped) == config._SHIPPED


@pytest.mark.parametrize("name", NAMES)
def test_settings_exist_and_others_are_refused(name: str, tmp_path: Path) -> None:
    """Every setting of the configuration either is an argument of the scorer or is refused by name."""
    entry = ENTRIES[name]
    scorer = VideoOfFrames if entry.images else getattr(registry._module(entry), entry.scorer).from_pretrained
    calls = kinds.OF_FRAMES if entry.images else registry._OF_SCORERS
    assert {calls[setting] for setting in entry.settings} <= set(inspect.signature(scorer).parameters)
    path = None if entry.shipped else tmp_path
    for setting in ("batch_size", "max_frames", "bits", "frames", "frame_reduce", "frame_decay"):
        if setting in entry.settings:
            check_reward(name, path, {setting: 8})
        else:
            with pytest.raises(ValueError, match=f"reward '{name}' has no setting {setting}: it takes"):
                check_reward(name, path, {setting: 8})


def test_judges_that_write_are_not_for_training() -> None:
    assert {name for name in NAMES if not reward_card(name).for_training} == {
        "videoscore2",
        "unified_reward",
    }


def test_variants_and_image_scorers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Test which arguments reach from_pretrained, and what it returns."""
    given: list[tuple] = []

    class Scorer:
        dimensions = ("hpsv2",)

        @classmethod
        def from_pretrained(cls, *folder: object, **options: object) -> "Scorer":
            given.append((*folder, options))
            return cls()

    for module, scorer in (("hpsv2", "HPSv2"), ("videoscore", "VideoScore"), ("videoalign", "VideoAlign")):
        monkeypatch.setattr(f"vpo_engine.rewards.{module}.{scorer}", Scorer)
    placed, w = {"device": "cpu", "dtype": torch.float32}, tmp_path
    assert isinstance(build_reward("hpsv2_1", w), VideoOfFrames)
    of_frames = build_reward("hpsv2", w, settings={"batch_size": 5, "frames": 3, "frame_reduce": "min"})
    assert isinstance(of_frames, VideoOfFrames)
    assert (of_frames.batch_size, of_frames.frames, of_frames.reduce) == (5, 3, "min")
    of_frames = build_reward(
        "hpsv2", w, settings={"frames": 3, "frame_reduce": "segments", "frame_decay": 0.5}
    )
    assert isinstance(of_frames, VideoOfFrames)
    assert (of_frames.frames, of_frames.segments, of_frames.decay) == (None, 3, 0.5)
    assert isinstance(build_reward("videoscore_v1_1", w, fps=24), Scorer)
    build_reward("videoscore_v1_1", w, settings={"batch_size": 2, "max_frames": 32, "bits": 8})
    build_reward("videoalign", w, fps=8)
    assert given == [
        (w, placed | {"version": "v2.1"}),
        (w, placed | {"version": "v2"}),
        (w, placed | {"version": "v2"}),
        (w, placed | {"max_frames": 48}),
        (w, placed | {"max_frames": 32, "batch_size": 2, "bits": 8}),
        (w, placed | {"fps": 8}),
    ]


def test_importing_registry_and_server_imports_no_reward_and_no_settings() -> None:
    """A child process starts in the time that torch takes; the settings would load compilers as well."""
    code = (
        "import sys, vpo_engine.rewards.server; "
        "print(*sorted(m for m in sys.modules if m.startswith('vpo_engine.'))); "
        "print({'transformers', 'torch._dynamo', 'av'} & set(sys.modules))"
    )
    returned, out = run_after_torch(code)
    assert returned == 0, out
    rooms = [
        "vpo_engine.errors",
        "vpo_engine.importing",
        "vpo_engine.model_values",
        "vpo_engine.protocols",
        "vpo_engine.rewards",
    ]
    names = ("card", "combine", "frames", "kinds", "own", "refusals", "registry", "server", "videos", "wire")
    assert out.splitlines() == [
        " ".join([*rooms, *(f"vpo_engine.rewards.{name}" for name in names)]),
        "set()",
    ]


def test_cards_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reward; one that cannot be imported says why."""
    monkeypatch.setitem(sys.modules, "vpo_engine.rewards.mps", None)
    blocks = {name: format_card(name) for name in NAMES}
    assert all(block.split("\n")[0] == name for name, block in blocks.items())
    assert "cannot be imported: " in blocks["mps"]
    assert "parameters      8.27 billion (15.4 GiB in bfloat16, 7.7 in 8 bits)" in blocks["videoscore"]
    dimensions = "visual_quality (unbounded), naturalness 0..1, temporal_consistency -1..1"
    assert f"dimensions      {dimensions}" in blocks["builtin"]
    assert "reads prompt    no" in blocks["builtin"]


def test_a_table_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each reward, also for one of an installed package; it fits a terminal of 80 columns."""
    point = EntryPoint("mine", "some.module:Mine", kinds.ENTRY_POINTS)
    monkeypatch.setattr(kinds, "entry_points", lambda group: EntryPoints([point]).select(group=group))
    lines = format_table().split("\n")
    assert [line.split()[0] for line in lines[1:-2]] == [*NAMES, "mine"]
    assert max(map(len, lines)) <= 80
    shipped = {line.split()[0] for line in lines if line.split()[1:2] == ["included"]}
    assert shipped == set(SHIPPED)
    assert "--list NAME" in lines[-1]


def test_builtin_is_built_on_the_device_asked_for() -> None:
    reward = build_reward("builtin", device="cpu")
    assert isinstance(reward, Builtin)
    assert reward.device == torch.device("cpu")


def test_everything_about_a_reward_reaches_another_process(tmp_path: Path) -> None:
    placed = {"device": torch.device("cuda", 1), "dtype": torch.bfloat16}
    spec = RewardSpec("q_align", tmp_path, **placed, fps=8.0, settings={"batch_size": 2, "frames": 4})
    assert RewardSpec.from_fields(json.loads(json.dumps(spec.to_fields()))) == spec
