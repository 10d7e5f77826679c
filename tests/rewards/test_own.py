"""A reward of the user's own: the worked example in a run and in rank, and every way of getting it wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vpo_engine import rank as rank_module
from vpo_engine import train as entry
from vpo_engine.build import judged_dimensions
from vpo_engine.config import Config, names
from vpo_engine.config_file import load_config
from vpo_engine.rewards import kinds, own
from vpo_engine.rewards.registry import build_reward, check_reward, knows_frame_rate, reward_card
from vpo_engine.runs.log import read_metrics
from vpo_engine.runs.video import write_mp4

Make = Callable[..., Config]
ROOT = Path(__file__).parents[2]
EXAMPLE = "examples.own_reward:Colourfulness"
VIDEOS = torch.randint(0, 256, (2, 3, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a dog", "rain"]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module, importable for this test, and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        (tmp_path / "mine_to_test.py").write_text("import torch\n" + source)
        return "mine_to_test"

    yield write
    sys.modules.pop("mine_to_test", None)


def scoring(returned: str) -> str:
    """Source of a class whose score is an expression of ``videos`` and ``prompts``."""
    return f"""
class Mine:
    dimensions = ("one", "two")

    def score(self, videos, prompts):
        return {returned}
"""


GRADIENTS = """
class Mine:
    dimensions = ("one",)

    def score(self, videos, prompts):
        return {"one": videos.float().mean((1, 2, 3, 4))}

    def score_pixels(self, videos, prompts):
        return {"one": RETURNED}
"""


def test_a_reward_with_score_pixels_is_differentiable(write: Callable[[str], str]) -> None:
    kind = f"{write(GRADIENTS.replace('RETURNED', 'videos.square().mean((1, 2, 3, 4))'))}:Mine"
    assert reward_card(kind).differentiable
    reward: Any = build_reward(kind)
    pixels = torch.full((2, 3, 3, 8, 8), 0.5, requires_grad=True)
    scores = reward.score_pixels(pixels, PROMPTS)
    scores["one"].sum().backward()
    assert scores["one"].tolist() == [0.25, 0.25]
    assert pixels.grad is not None
    assert bool((pixels.grad == 2 * 0.5 / (3 * 3 * 64)).all())
    with pytest.raises(ValueError, match=r"expected \[B, F, 3, H, W\]"):
        reward.score_pixels(VIDEOS / 255, PROMPTS)


@pytest.mark.parametrize("returned", ["videos.mean()", "videos.mean((1, 2, 3, 4)) / 0"])
def test_its_wrong_scores_of_pixels_stop_the_run(write: Callable[[str], str], returned: str) -> None:
    reward: Any = build_reward(f"{write(GRADIENTS.replace('RETURNED', returned))}:Mine")
    with pytest.raises(ValueError, match=r"expected a (tensor of shape|finite number)"):
        reward.score_pixels(torch.ones(2, 3, 3, 8, 8), PROMPTS)


def test_a_reward_without_score_pixels_is_not_differentiable(write: Callable[[str], str]) -> None:
    kind = f"{write(scoring('{}'))}:Mine"
    assert not reward_card(kind).differentiable
    assert not hasattr(build_reward(kind), "score_pixels")


@pytest.mark.long
def test_the_example_trains_the_sprites_world(smallest: list[str], small_policy: str, tmp_path: Path) -> None:
    """As a user runs it, from the repository's root, with another reward of their own that is held out."""
    run = tmp_path / "run"
    brief = [small_policy, "steps=2", "evaluation.every=null", "checkpoint.every=null"]
    held_out = "guards.reward.kind=process_rewards:Scripted"
    settings = [f"reward.kind={EXAMPLE}", "reward.dimensions=global", held_out]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "vpo_engine.train", *smallest, *brief, *settings, f"run_dir={run}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    steps = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["reward/selected"] == row["reward/colourfulness"] > 0 for row in steps)
    assert all(row["reward/gap"] > 0 for row in steps)


def test_the_example_ranks_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    grey = torch.full((17, 32, 32, 3), 128, dtype=torch.uint8)
    red = grey.clone()
    red[..., 0] = 255
    for name, video in (("grey", grey), ("red", red)):
        write_mp4(tmp_path / f"{name}.mp4", video, 8)
    assert rank_module.main([str(tmp_path), "--reward", EXAMPLE, "--out", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "scores.csv").read_text().splitlines()
    assert lines[0].split(",")[-1] == "colourfulness"
    found = {line.split(",")[0]: float(line.split(",")[-1]) for line in lines[1:]}
    assert found["red.mp4"] > found["grey.mp4"] + 0.3
    assert found["grey.mp4"] < 0.05


def test_the_page_shows_the_example() -> None:
    """The page's code is the example's, but for comments."""
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    shown = page.split("```python\n")[1].split("```")[0]
    names: list[dict[str, Any]] = [{}, {}]
    exec(shown, names[0])
    exec((ROOT / "examples" / "own_reward.py").read_text(encoding="utf-8"), names[1])
    one, other = (found["Colourfulness"]() for found in names)
    assert torch.equal(
        one.score(VIDEOS, PROMPTS)["colourfulness"], other.score(VIDEOS, PROMPTS)["colourfulness"]
    )
    assert (one.dimensions, one.reads_prompt) == (other.dimensions, other.reads_prompt)


def test_the_constructor_gets_what_it_names(write: Callable[[str], str], tmp_path: Path) -> None:
    module = write("""
class Mine:
    dimensions = ("given",)

    def __init__(self, path, fps, device, rows=3):
        self.network = torch.nn.Linear(1, 1)
        self.given = [str(path), fps, str(device), rows]

    def score(self, videos, prompts):
        raise ValueError(str(self.given))
""")
    kind = f"{module}:Mine"
    assert knows_frame_rate(kind)
    reward = build_reward(kind, tmp_path, fps=8.0, settings={"rows": 2})
    assert isinstance(reward.network, torch.nn.Linear)  # type: ignore[attr-defined]  # what an idle GPU gives up
    with pytest.raises(ValueError, match=r"8\.0, 'cpu', 2") as caught:
        reward.score(VIDEOS, PROMPTS)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match=r"needs path: set reward\.path"):
        check_reward(kind, None)
    with pytest.raises(FileNotFoundError, match="no folder at absent"):
        check_reward(kind, "absent")
    with pytest.raises(ValueError, match="takes no frames: its class is made with path, fps, device, rows"):
        check_reward(kind, tmp_path, {"frames": 2})


def test_a_parameter_that_is_never_given(write: Callable[[str], str]) -> None:
    module = write(
        scoring("{}").replace("    def score", "    def __init__(self, strength): ...\n\n    def score")
    )
    with pytest.raises(ValueError, match="needs strength: give the parameter a default"):
        check_reward(f"{module}:Mine", None)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("", "Mine", "mine_to_test has no class Mine; its classes with a score method are none"),
        (scoring("{}"), "Mien", "has no class Mien; its classes with a score method are Mine"),
        ("class Mine: dimensions = ('one',)", "Mine", r"Mine has no method score\(videos, prompts\)"),
        (
            "class Mine:\n def score(self, v, p): ...",
            "Mine",
            r"Mine\.dimensions is None, expected the different",
        ),
        (
            "class Mine:\n dimensions = 'one'\n def score(self, v, p): ...",
            "Mine",
            r"dimensions is 'one', expected",
        ),
        (
            "import no_such_package",
            "Mine",
            "cannot be imported, because no_such_package is missing; install it",
        ),
    ],
)
def test_classes_that_are_no_rewards(
    write: Callable[[str], str], source: str, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        reward_card(f"{write(source)}:{name}")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("torch.zeros(2)", "returned Tensor, expected a tensor for each of one, two"),
        ("{'one': torch.zeros(2)}", r"returned \['one'\], expected a tensor for each of one, two"),
        (
            "{'one': torch.zeros(2), 'two': torch.zeros(2, 1)}",
            r"returned \(2, 1\) for two, expected .* shape \(2,\)",
        ),
        ("{'one': torch.zeros(2), 'two': 0.5}", "returned float for two"),
        (
            "{'one': torch.zeros(2), 'two': torch.tensor([1.0, float('nan')])}",
            r"gave nan in two for video 1 \('rain'\), expected a finite number",
        ),
    ],
)
def test_scores_that_are_none(write: Callable[[str], str], returned: str, message: str) -> None:
    reward = build_reward(f"{write(scoring(returned))}:Mine")
    with pytest.raises(ValueError, match=message):
        reward.score(VIDEOS, PROMPTS)


def test_scores_are_float32_and_without_a_graph(write: Callable[[str], str]) -> None:
    returned = "{'two': torch.ones(2, dtype=torch.float64), 'one': torch.ones(2, requires_grad=True) * 2}"
    scores = build_reward(f"{write(scoring(returned))}:Mine").score(VIDEOS, PROMPTS)
    assert list(scores) == ["one", "two"]
    assert all(values.dtype == torch.float32 and not values.requires_grad for values in scores.values())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "no_such_module:Mine",
            "there is no module no_such_module; install its package, or start from the folder",
        ),
        ("videoscroe", r"there is no such reward; did you mean videoscore\? Known are sprites"),
        ("examples.own_reward", r"given as package\.module:Class \(see docs/rewards\.md\)"),
    ],
)
@pytest.mark.parametrize("setting", ["reward.kind", "guards.reward.kind"])
def test_wrong_kinds_end_a_run_with_one_line(
    kind: str, message: str, setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert entry.main([f"{setting}={kind}", f"run_dir={run}"]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not run.exists()


def test_an_installed_package_offers_a_name(
    small: Make, monkeypatch: pytest.MonkeyPatch, write: Callable[[str], str]
) -> None:
    module = write(scoring("{'one': torch.ones(2), 'two': torch.ones(2)}"))
    point = EntryPoint("mine", f"{module}:Mine", "vpo_engine.rewards")
    for reader in (names, own, kinds):
        monkeypatch.setattr(reader, "entry_points", lambda group: EntryPoints([point]).select(group=group))
    assert small("reward.kind=mine", "reward.dimensions=one").reward.kind == "mine"
    assert reward_card("mine").reads_prompt
    assert build_reward("mine").dimensions == ("one", "two")


@pytest.mark.parametrize(
    ("dimensions", "judged"),
    [("colourfulness", ("global",)), ("temporal_consistency", None), ("global", None)],
)
def test_the_judge_of_the_sprites_world_averages_all_where_it_has_no_such_dimension(
    dimensions: str, judged: tuple[str, ...] | None
) -> None:
    config = load_config(None, [f"reward.dimensions={dimensions}"])
    judge = SimpleNamespace(dimensions=("visual_quality", "temporal_consistency"))
    assert judged_dimensions(config, judge) == judged


@pytest.mark.parametrize("name", ["motion", "selected", "gap"])
def test_the_name_of_a_number_of_the_engine_is_no_dimension(write: Callable[[str], str], name: str) -> None:
    """The motion would be left out of "global", and with guards.motion_floor replaced by the optical flow."""
    source = scoring("{}").replace('("one", "two")', f'("{name}", "two")')
    with pytest.raises(ValueError, match=rf"Mine\.dimensions has '{name}', which is the engine's name"):
        reward_card(f"{write(source)}:Mine")


def test_an_answer_about_a_size_is_a_text_or_none(write: Callable[[str], str]) -> None:
    more = (
        "\n    def refuse_size(self, frames, height, width):\n        return False if frames > 8 else None\n"
    )
    reward: Any = build_reward(f"{write(scoring('{}') + more)}:Mine")
    assert reward.refuse_size(8, 32, 32) is None
    with pytest.raises(ValueError, match=r"refuse_size\(17, 32, 32\) returned False, expected a text"):
        reward.refuse_size(17, 32, 32)


def test_the_page_names_no_dimension_that_is_refused() -> None:
    page = (ROOT / "docs/how_to/own_reward.md").read_text()
    groups = re.findall(r"reward\.dimensions=\{([^}]*)\}", page)
    names = {name for group in groups for name in re.findall(r"(\w+):", group)}
    assert names
    assert not names & own._TAKEN
