"""In which order checkpoints, logs and preference datasets reach the disk, and what a power cut at any moment
leaves."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from vpo_engine.data.preference_dataset import DatasetWriter, StoredPair, read_dataset, truncate_dataset
from vpo_engine.runs.checkpoint import load_checkpoint, newest_complete, save_checkpoint
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.log import RunLog, read_metrics


@dataclass(frozen=True)
class Event:
    """A call that orders what is on disk: kind, path, and the content of a file or the names in a folder."""

    kind: str
    path: Path
    content: object = None
    target: Path | None = None


@dataclass
class Disk:
    """Records events; before each, ``before`` is called, as a power cut might come there."""

    root: Path
    before: Callable[[], None] = lambda: None
    events: list[Event] = field(default_factory=list)

    def note(self, kind: str, path: str | Path, target: str | Path | None = None) -> None:
        path = Path(path)
        if path.is_relative_to(self.root):
            self.before()
            self.events.append(Event(kind, path, _content(path), None if target is None else Path(target)))

    def names(self) -> list[str]:
        """Events as "kind relative/path"."""
        return [f"{one.kind} {one.path.relative_to(self.root)}" for one in self.events]


def _content(path: Path) -> object:
    if path.is_dir():
        return sorted(item.name for item in path.iterdir())
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


@contextmanager
def watched(root: Path, before: Callable[[], None] = lambda: None) -> Iterator[Disk]:
    """Record fsync, rename, replace, unlink and rmtree below ``root``."""
    disk = Disk(root, before)
    with pytest.MonkeyPatch.context() as patch:
        real: dict[str, Any] = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "unlink")}
        rmtree = shutil.rmtree

        def fsync(descriptor: int) -> None:
            disk.note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            real["fsync"](descriptor)

        def moved(name: str) -> Callable[..., None]:
            def move(source: Any, target: Any, **options: Any) -> None:
                disk.note("rename", source, target)
                real[name](source, target, **options)

            return move

        def unlink(path: Any, **options: Any) -> None:
            disk.note("unlink", path)
            real["unlink"](path, **options)

        def removed(path: Any, *arguments: Any, **options: Any) -> None:
            if Path(path).exists():
                disk.note("rmtree", path)
            with pytest.MonkeyPatch.context() as inner:  # what is inside goes in any order
                inner.setattr(os, "unlink", real["unlink"])
                rmtree(path, *arguments, **options)

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "rename", moved("rename"))
        patch.setattr(os, "replace", moved("replace"))
        patch.setattr(os, "unlink", unlink)
        patch.setattr(shutil, "rmtree", removed)
        yield disk


def save(folder: Path, step: int, value: float = 1.0, keep: int = 5) -> Path:
    def write_policy(target: Path) -> None:
        (target / "config.json").write_text(f"{value}")
        (target / "parts").mkdir()
        (target / "parts" / "weights.bin").write_bytes(bytes(1000))

    return save_checkpoint(
        folder,
        step,
        tensors={"reference": {"w": torch.full((4,), value)}, "optimizer": {"m": torch.ones(3)}},
        state={"step": step, "value": value},
        write_policy=write_policy,
        keep=keep,
    )


def value_of(path: Path) -> float:
    loaded = load_checkpoint(path)
    value = float(loaded.tensors["reference"]["w"][0])
    assert loaded.state == {"step": loaded.step, "value": value}
    assert (loaded.policy / "config.json").read_text() == f"{value}"
    return value


FILES = (
    "optimizer.safetensors",
    "policy/config.json",
    "policy/parts/weights.bin",
    "reference.safetensors",
    "state.json",
)
FOLDERS = (".", "policy", "policy/parts")


def test_everything_is_synced_once_then_renamed_once_then_the_folder_is_synced(tmp_path: Path) -> None:
    with watched(tmp_path) as disk:
        final = save(tmp_path, 7)
    inside = Path(".step_00000007.unfinished")
    files = [f"fsync {inside / name}" for name in FILES]
    manifest = f"fsync {inside / 'manifest.json'}"
    folders = [f"fsync {inside / name}" for name in FOLDERS]
    names = disk.names()
    assert sorted(names[: len(files)]) == files
    assert names[len(files)] == manifest
    assert sorted(names[len(files) + 1 : -2]) == sorted(folders)
    assert names[-2:] == [f"rename {inside}", "fsync ."]
    assert disk.events[-2].target == final


def test_what_is_synced_is_what_stays(tmp_path: Path) -> None:
    """No file is written and no name is added after its sync; the manifest is written after all files were synced."""
    with watched(tmp_path) as disk:
        final = save(tmp_path, 7)
    unfinished = tmp_path / ".step_00000007.unfinished"
    for event in disk.events:
        if event.kind == "fsync" and event.path != tmp_path:
            assert event.content == _content(final / event.path.relative_to(unfinished)), event.path
    assert disk.events[-1].content == [final.name]
    first_folder = next(n for n, one in enumerate(disk.events) if isinstance(one.content, list))
    kinds = [one.path.name == "manifest.json" for one in disk.events[:first_folder]]
    assert kinds == [False] * len(FILES) + [True]


class Cuts:
    """Copies of a folder as a power cut would leave it, one before each event."""

    def __init__(self, folder: Path, to: Path) -> None:
        self.folder, self.to = folder, to
        self.copies: list[Path] = []

    def __call__(self) -> None:
        self.copies.append(self.to / f"{len(self.copies)}")
        shutil.copytree(self.folder, self.copies[-1])


def test_the_manifest_is_absent_until_every_file_is_synced(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    cuts = Cuts(folder, tmp_path / "cuts")
    with watched(folder, cuts):
        save(folder, 7)
    present = [(cut / ".step_00000007.unfinished" / "manifest.json").exists() for cut in cuts.copies]
    assert present[: len(FILES)] == [False] * len(FILES)


def test_a_power_cut_at_any_moment_leaves_the_earlier_or_the_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 5, 5.0)
    cuts = Cuts(folder, tmp_path / "cuts")
    with watched(folder, cuts):
        save(folder, 7, 7.0, keep=1)
    found = [newest_complete(cut) for cut in cuts.copies]
    values = [value_of(path) for path in found if path is not None]
    assert len(values) == len(cuts.copies)
    assert values == sorted(values)
    assert set(values) == {5.0, 7.0}
    for cut in cuts.copies:
        save(cut, 9, 9.0)  # and a run that goes on from there can save
        assert value_of(cut / "step_00000009") == 9.0
        assert not list(cut.glob(".step*"))


def test_a_power_cut_while_a_step_is_saved_again_leaves_one_of_both(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 7, 1.0)
    cuts = Cuts(folder, tmp_path / "cuts")
    with watched(folder, cuts) as disk:
        save(folder, 7, 2.0)
    for cut in cuts.copies:
        path = newest_complete(cut)
        assert path is not None
        assert value_of(path) in (1.0, 2.0)
    tail = [name for name in disk.names() if not name.startswith("fsync .step")]
    assert tail == [
        "rename step_00000007",
        "rename .step_00000007.unfinished",
        "fsync .",
        "rmtree .step_00000007.replaced",
    ]
    assert value_of(folder / "step_00000007") == 2.0


def test_older_ones_go_after_the_new_one_is_safe_and_lose_their_manifest_first(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, float(step))
    with watched(tmp_path) as disk:
        save(tmp_path, 4, 4.0, keep=2)
    names = disk.names()
    safe = names.index("fsync .")
    removals = [name for name in names[safe + 1 :] if not name.startswith("fsync")]
    assert sorted(removals[::2]) == [f"unlink step_0000000{step}/manifest.json" for step in (1, 2)]
    assert sorted(removals[1::2]) == [f"rmtree step_0000000{step}" for step in (1, 2)]
    for first, second in zip(removals[::2], removals[1::2], strict=True):
        assert first.split("/")[0].removeprefix("unlink ") == second.removeprefix("rmtree ")
    assert not [name for name in names[:safe] if name.startswith(("unlink", "rmtree"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]
    assert value_of(tmp_path / "step_00000003") == 3.0


def pair(step: int, row: int | None = 0) -> StoredPair:
    return StoredPair(
        step=step,
        position=step - 1,
        prompt="a circle",
        seed=0,
        candidates=(0, 1),
        scores={"a": (0.0, 1.0)},
        selected=(0.0, 1.0),
        winner=1,
        loser=0,
        gap=1.0,
        kept=row is not None,
        weight=1.0,
        row=row,
    )


def latents(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((1, 1, 1, 2, 2), float(step)), torch.full((1, 1, 1, 2, 2), -float(step))


def test_latents_of_the_dataset_are_in_place_before_their_line_is(tmp_path: Path) -> None:
    folder = tmp_path / "preference_dataset"
    writer = DatasetWriter(folder, 0)
    lengths = []
    with watched(folder, lambda: lengths.append((folder / "pairs_0000.jsonl").exists())) as disk:
        writer.write(3, [pair(3)], latents(3))
    (event,) = disk.events
    assert event.kind == "rename"
    assert event.target == folder / "latents" / "step_00000003_0000.safetensors"
    assert lengths == [False], "the line comes after the latents"
    (line,) = read_dataset(folder)
    winner, loser = line.latents()
    assert float(winner.mean()) == 3.0
    assert float(loser.mean()) == -3.0


def test_a_dataset_is_cut_by_a_synced_file_that_is_renamed(tmp_path: Path) -> None:
    folder = tmp_path / "preference_dataset"
    writer = DatasetWriter(folder, 0)
    for step in (1, 2, 3):
        writer.write(step, [pair(step)], latents(step))
    with watched(folder) as disk:
        truncate_dataset(folder, 2)
    assert disk.names()[:2] == ["fsync .pairs_0000.jsonl.tmp", "rename .pairs_0000.jsonl.tmp"]
    assert disk.events[0].content == _content(folder / "pairs_0000.jsonl")
    assert [line.step for line in read_dataset(folder)] == [1, 2]
    assert sorted(path.name for path in (folder / "latents").iterdir()) == [
        "step_00000001_0000.safetensors",
        "step_00000002_0000.safetensors",
    ]


def test_a_log_is_cut_by_a_synced_file_that_is_renamed(tmp_path: Path) -> None:
    run = RunDirectory.create_at(tmp_path / "run", "name: x\n")
    with RunLog(run) as log:
        for step in (1, 2, 3):
            log.write(step, "train", {"loss": float(step)})
    with watched(run.root) as disk, RunLog(run) as log:
        log.resume(2, 9)
    results = ["unlink summary.json", "unlink gallery/held_out.safetensors"]
    assert disk.names() == [*results, "fsync .metrics.jsonl.tmp", "rename .metrics.jsonl.tmp"]
    assert disk.events[2].content == _content(run.metrics)
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2]
