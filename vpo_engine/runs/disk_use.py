"""The room that a run takes on its disk while it runs, and when it must stop for want of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vpo_engine.full_disk import free_bytes

SPARE_BYTES = 64 * 2**20
"""Bytes that a run leaves free for what its last minutes write: rows of the log, galleries and the report."""
_GIB = 2**30
_LATENTS = Path("preference_dataset", "latents")


def bytes_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder; 0 for what does not exist."""
    return sum(_sizes(path))


class DiskWatch:
    """Tells when a run must stop because its disk, or disk.limit_gib, has no room for another checkpoint.

    Latents, of which each step writes files, are counted as they come; the other files are few.
    """

    def __init__(self, root: Path, checkpoint: int, limit_gib: float | None, writers: int) -> None:
        """``checkpoint``: the bytes of one. ``writers``: how many processes write latents in steps, from rank 0 on."""
        self._root, self._limit_gib, self._writers = root, limit_gib, writers
        self._need = checkpoint + SPARE_BYTES
        self._latents, self._counted = 0, -1

    def exhausted(self, step: int) -> str | None:
        """Return, after ``step``, why the run must stop now, while it can still be saved; None: it need not."""
        need = f"less than the next checkpoint and {SPARE_BYTES / _GIB:.2f} GiB to spare ({self._need / _GIB:.2f} GiB)"
        free = free_bytes(self._root)
        if free < self._need:
            return (
                f"the disk of {self._root} has {free / _GIB:.2f} GiB free, {need}; free some space, and give the same "
                "command again"
            )
        if self._limit_gib is None:
            return None
        parts = self._parts(step)
        left = self._limit_gib * _GIB - sum(parts.values())
        if left >= self._need:
            return None
        largest = max(parts, key=lambda name: parts[name])
        return (
            f"disk.limit_gib={self._limit_gib:g} leaves {max(0.0, left) / _GIB:.2f} GiB for {self._root}, {need}; most "
            f"is taken by {largest} ({parts[largest] / _GIB:.2f} GiB). Raise the limit, and give the same command again"
        )

    def _parts(self, step: int) -> dict[str, int]:
        """Return the bytes of the run directory by its entries, after ``step``."""
        newest = self._latents_of(step)  # others may still be writing it
        if self._counted < 0:
            self._latents = bytes_of(self._root / _LATENTS) - newest
        else:
            self._latents += sum(map(self._latents_of, range(self._counted + 1, step)))
        self._counted, found = step - 1, {}
        for entry in os.scandir(self._root):
            path = Path(entry.path)
            if path.name == _LATENTS.parts[0]:
                lines = sum(map(bytes_of, path.glob("*.jsonl")))
                found[path.name] = self._latents + newest + lines
            else:
                found[path.name] = bytes_of(path)
        return found

    def _latents_of(self, step: int) -> int:
        names = (f"step_{step:08d}_{rank:04d}.safetensors" for rank in range(self._writers))
        return sum(bytes_of(self._root / _LATENTS / name) for name in names)


def _sizes(path: Path) -> Iterator[int]:
    """Yield the sizes of a file, or of all files below a folder; those that vanish meanwhile are left out."""
    try:
        if not path.is_dir():
            yield path.lstat().st_size
            return
        for entry in os.scandir(path):
            yield from _sizes(Path(entry.path))
    except FileNotFoundError:
        return
