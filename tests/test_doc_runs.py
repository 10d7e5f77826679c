"""The commands of tutorials and how-to pages, run on tiny models that lie where the page wants its files."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, Recipe, blocks, commands, engine_command, recipe
from test_opensora_run import checkpoints, write_video_score  # noqa: F401
from tiny_pipelines import FOLDERS

from vpo_engine.cli import COMMANDS

sys.path.insert(0, str(Path(__file__).parent / "rewards"))

from test_videoalign import write_checkpoint as write_video_reward

RUN = [page for page in PAGES if recipe(page) is not None]
PUBLISHED = {
    "cogvideox": ("CogVideoX-2b",),
    "wan": ("Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-T2V-14B-Diffusers"),
    "ltx": ("LTX-Video",),
}
"""The folders below checkpoints/ into which pages download each family."""


@pytest.mark.long
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_what_a_page_says_works(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    found = recipe(page)
    assert found is not None
    for name in found.folders:
        _lay_out(name, tmp_path, request)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.reason:
            continue
        if block.language == "python":
            exec(compile(found.read(block.text), f"{page.name}:{block.line}", "exec"), names)
            continue
        for line in commands(found.read(block.text)):
            _run(line, found)


def _run(line: str, found: Recipe) -> None:
    command = engine_command(line)
    if command is None:
        line = re.sub(r"^python ", f"{sys.executable} ", line)
        subprocess.run(["bash", "-ec", line], check=True, timeout=60)
        return
    name, words = command
    assert importlib.import_module(COMMANDS[name].module).main([*words, *found.added.get(name, ())]) in (
        0,
        None,
    ), line


def _lay_out(name: str, root: Path, request: pytest.FixtureRequest) -> None:
    """Put the tiny model ``name`` where pages put the published one; with it the tiny rewards of the tutorials."""
    if name == "sprites":
        return  # its weights are in the package
    folder = root / "checkpoints"
    folder.mkdir()
    if name == "opensora":
        made: Path = request.getfixturevalue("checkpoints")
        parts = {"policy": "OpenSora-STDiT-v3", "vae": "OpenSora-VAE-v1.2", "text_encoder": "t5-v1_1-xxl"}
        for part, published in parts.items():
            shutil.copytree(made / part, folder / published)
    else:
        for published in PUBLISHED[name]:
            FOLDERS[name](folder / published)
    write_video_score(folder / "VideoScore")
    write_video_reward(folder / "VideoReward")
