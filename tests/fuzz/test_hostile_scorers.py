"""Folders of published scorers from strangers: settings that lie, in any of their JSON files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from fuzz_driver import clear_errors, flip, fuzz, trusted
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "rewards"))

from tiny_scorers import IMAGES, PUBLISHED
from tiny_videos import noise

from vpo_engine.rewards.frames import VideoOfFrames

SCORERS = (
    "videoscore",
    "videoscore2",
    "videoalign",
    "q_align",
    "vjepa",
    "laion_aesthetic",
    "imagereward",
    "mps",
    "pickscore",
)
"""Those that read JSON files beside their weights."""
JUDGES = ("videoscore2",)
VALUES = st.one_of(
    st.sampled_from([0, -1, 1, 3, 2**20, 2**31, 2**62, 1e300, 0.5, None, True, "", "x", "a/b", [], {}]),
    st.lists(st.sampled_from([0, 1, 2, -1, 2**40, "x", None]), max_size=4),
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the tiny checkpoints, which are made when an example first needs them."""
    return tmp_path_factory.mktemp("checkpoints")


def copy_of(name: str, checkpoints: Path, folder: Path) -> Path:
    with trusted():
        if not (checkpoints / name).exists():
            written = PUBLISHED[name].write(checkpoints / f"{name} made")
            assert scored(name, written)
            written.rename(checkpoints / name)
    return Path(shutil.copytree(checkpoints / name, folder / "scorer"))


def scored(name: str, folder: Path) -> dict[str, Any]:
    scorer = PUBLISHED[name].load(folder, **({"frames": 4} if name == "q_align" else {}))
    if name in JUDGES:  # random weights write answers without an end
        return {"loaded": scorer}
    videos = VideoOfFrames(scorer) if name in IMAGES else scorer
    scores: dict[str, Any] = videos.score(noise(2, 17, 24, 30, 3), ["w3 a cat", "w7 w9 the red dog"])
    return scores


def objects(content: Any) -> list[dict[str, Any]]:
    """Return an object and all objects in it that have settings."""
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
    found = [content] if isinstance(content, dict) and content else []
    return found + [each for value in inner for each in objects(value)]


@fuzz(
    name=st.sampled_from(SCORERS),
    file=st.integers(0, 5),
    changes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60), VALUES), min_size=1, max_size=2),
)
def test_settings_of_scorers(
    folder: Path, checkpoints: Path, name: str, file: int, changes: list[tuple[int, int, Any]]
) -> None:
    scorer = copy_of(name, checkpoints, folder)
    files = sorted(path for path in scorer.rglob("*.json") if path.name != "tokenizer.json")
    path = files[file % len(files)]
    content = json.loads(path.read_text())
    for place, key, value in changes:
        held = objects(content)
        chosen = held[place % len(held)]
        chosen[sorted(chosen)[key % len(chosen)]] = value
    path.write_text(json.dumps(content))
    with clear_errors(FileNotFoundError):
        scored(name, scorer)


@fuzz(
    name=st.sampled_from(SCORERS),
    file=st.integers(0, 9),
    places=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=3),
    kept=st.integers(0, 2000),
)
def test_damaged_files_of_scorers(
    folder: Path, checkpoints: Path, name: str, file: int, places: list[tuple[int, int]], kept: int
) -> None:
    scorer = copy_of(name, checkpoints, folder)
    files = sorted(path for path in scorer.rglob("*") if path.is_file())
    path = files[file % len(files)]
    path.write_bytes(flip(path.read_bytes()[: kept if kept < 1000 else None], places))
    with clear_errors(FileNotFoundError):
        scored(name, scorer)
