"""Checkpoint folders and exports from strangers: changed bytes, added files, manifests and records that lie."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from fuzz_driver import clear_errors, flip, fuzz, trusted
from hypothesis import strategies as st

from vpo_engine.policy_source import folder_config
from vpo_engine.runs.checkpoint import (
    complete_checkpoints,
    load_checkpoint,
    newest_complete,
    save_checkpoint,
    unusable_checkpoints,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=4), each, max_size=3),
    max_leaves=6,
)
FILES = (
    "reference.safetensors",
    "state.json",
    "policy/config.json",
    "policy/model.safetensors",
    "manifest.json",
)
NAMES = st.sampled_from(
    [*FILES, "../outside", "/etc/passwd", "policy/../../outside", "", ".", "x" * 300, "a\0", "link"]
)


@cache
def saved() -> dict[str, bytes]:
    """Return the files of a small checkpoint, by name."""
    with trusted():
        return _saved(Path(mkdtemp()))


def _saved(parent: Path) -> dict[str, bytes]:
    def write_policy(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text("{}")

    tensors = {"reference": {"w": torch.arange(8.0)}, "optimizer": {}}
    path = save_checkpoint(
        parent, 12, tensors=tensors, state={"step": 12, "cursor": [1]}, write_policy=write_policy, keep=1
    )
    found = {
        item.relative_to(path).as_posix(): item.read_bytes() for item in path.rglob("*") if item.is_file()
    }
    shutil.rmtree(parent)
    return found


def put(folder: Path, files: dict[str, bytes]) -> Path:
    """Write a checkpoint of these files, beside a file that is not its own."""
    path = folder / "checkpoints" / "step_00000012"
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    (folder / "checkpoints" / "outside").write_text("a secret")
    (path / "link").symlink_to(folder / "checkpoints" / "outside")
    (path / "link").rename(path / ".link")
    return path


def load(path: Path) -> None:
    """Load a checkpoint, and see either what was saved or a clear error. Looking for checkpoints never fails."""
    complete, newest = complete_checkpoints(path.parent), newest_complete(path.parent)
    assert (newest is None) == (not complete)
    unusable_checkpoints(path.parent)
    with clear_errors(naming=path.name):
        found = load_checkpoint(path)
        assert torch.equal(found.tensors["reference"]["w"], torch.arange(8.0))
        assert found.state == {"step": 12, "cursor": [1]}
        assert found.step == 12


@fuzz(
    name=st.sampled_from(FILES),
    places=st.lists(st.tuples(st.integers(0, 2**12), st.integers(0, 255)), max_size=3),
    kept=st.integers(0, 1000),
    added=st.none()
    | st.sampled_from(["policy/model.safetensors.index.json", "moments.safetensors", "ema/config.json"]),
)
def test_changed_files_are_found(
    folder: Path, name: str, places: list[tuple[int, int]], kept: int, added: str | None
) -> None:
    files = dict(saved())
    files[name] = flip(files[name][: kept if kept < 500 else None], places)
    if added is not None:
        files[added] = b"{}"
    path = put(folder, files)
    if name != "manifest.json":
        load(path)
    else:
        with clear_errors(naming=path.name):
            load_checkpoint(path)
    if added is not None:
        with clear_errors(naming=path.name):
            raise AssertionError(f"an added file was taken: {load_checkpoint(path)}")


@fuzz(
    manifest=st.fixed_dictionaries(
        {
            "step": VALUES,
            "files": st.dictionaries(
                NAMES, st.fixed_dictionaries({"bytes": VALUES, "sha256": VALUES}) | VALUES
            ),
        }
    )
    | VALUES
)
def test_manifests_that_lie(folder: Path, manifest: object) -> None:
    path = put(folder, saved() | {"manifest.json": json.dumps(manifest).encode()})
    complete_checkpoints(path.parent)
    newest_complete(path.parent)
    with clear_errors(naming=path.name):
        load_checkpoint(path)


@fuzz(
    state=st.binary(max_size=20) | VALUES.map(lambda value: json.dumps(value).encode()),
    tensors=st.binary(max_size=40),
)
def test_hostile_content_whose_hashes_are_right(folder: Path, state: bytes, tensors: bytes) -> None:
    files = saved() | {"state.json": state, "reference.safetensors": tensors}
    manifest = json.loads(files["manifest.json"])
    for name, entry in manifest["files"].items():
        entry |= {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
    path = put(folder, files | {"manifest.json": json.dumps(manifest).encode()})
    with clear_errors(naming=path.name):
        load_checkpoint(path)


KEYS = st.sampled_from(
    [
        "model.num_frames",
        "rollout.steps",
        "rollout.guidance",
        "model.policy",
        "run_dir",
        "reward.kind",
        "model.kind",
        "model",
    ]
) | st.text(max_size=8)
RECORDS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["sprites", "opensora", "os:system", "hostile:Model", "", "a b"]) | VALUES,
        "settings": st.dictionaries(KEYS, VALUES, max_size=3) | VALUES,
    }
)


@fuzz(record=RECORDS | VALUES)
def test_records_of_exports(folder: Path, record: Any) -> None:
    (folder / "hostile.py").write_text("raise SystemExit('code of a stranger was run')")
    (folder / "vpo_export.json").write_text(json.dumps(record))
    with clear_errors():
        config = folder_config(folder)
        assert config.model.policy == folder
        assert config.model.kind in ("sprites", "opensora")
