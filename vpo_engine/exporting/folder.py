"""The folder of an export: refused if occupied, written beside its place, renamed when it is complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vpo_engine.foreign_files import file_inside

_GIB = 2**30
_SPARE = 16 * 2**20
"""Bytes for configurations and the file system's own needs."""


class ExportMismatchError(ValueError):
    """An export that was loaded back computes something else than the policy. Its folder is kept."""


def refuse_occupied(out: Path) -> None:
    """Raise ValueError unless an export can be written to ``out``: the path is free, or an empty folder."""
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty; give another folder, or delete this one")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if (left := _unfinished(out)).exists():
        raise ValueError(f"{left} is what an earlier export left behind; delete it, or give another --out")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir():
        raise ValueError(f"--out {out} cannot be made: {above} is a file; give another folder")


@contextmanager
def written_at(out: Path) -> Iterator[Path]:
    """Yield a folder to write to; afterwards it is renamed to ``out``.

    An error removes it, but for ``ExportMismatchError``, which leaves it where it is. OSError of a full disk becomes
    ValueError.
    """
    out, unfinished = out.resolve(), _unfinished(out)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        _sync(unfinished)
    except ExportMismatchError:
        raise
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"the disk of {out.absolute().parent} is full; nothing was exported") from error
        raise
    if out.exists():  # an empty folder, see ``refuse_occupied``; a shell may be in it
        for path in unfinished.iterdir():
            path.rename(out / path.name)
        unfinished.rmdir()
    else:
        unfinished.rename(out)


def check_space(out: Path, written: int, parts: Mapping[str, Path]) -> None:
    """Raise ValueError if the disk cannot hold ``written`` bytes, and the parts that cannot be linked there."""
    place = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    device = place.stat().st_dev
    copied = sum(file.stat().st_size for file in _files(parts).values() if os.stat(file).st_dev != device)
    needed, free = written + copied + _SPARE, shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"the disk of {place} has {free / _GIB:.2f} GiB free, but this export needs {needed / _GIB:.2f} GiB; free "
            "some space, or give an --out on another disk"
        )


def add_parts(folder: Path, parts: Mapping[str, Path]) -> tuple[int, int]:
    """Put files and folders, by their names in the export, into ``folder``; return how many were linked and copied.

    Hard links take no room. Files are copied where there can be none, on another disk for example.
    """
    linked = copied = 0
    for name, file in _files(parts).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if link_or_copy(file, target):
            linked += 1
        else:
            copied += 1
    return linked, copied


def link_or_copy(file: Path, target: Path) -> bool:
    """Let ``target`` have the content of ``file``, and return whether a hard link does it, which takes no room."""
    file = file.resolve()  # a model of the Hub's cache consists of symbolic links
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
        return False
    return True


def _files(parts: Mapping[str, Path]) -> dict[str, Path]:
    """Return every single file of parts, by its name in the export; hidden ones are left out.

    Raise ValueError for a symbolic link that leads out of its part: an export is published.
    """
    found = {}
    for name, path in parts.items():
        if path.is_file():
            found[name] = path
            continue
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in inside.parts):
                file_inside(path, inside.as_posix(), path, "take it out")
                found[f"{name}/{inside.as_posix()}"] = file
    return found


def _unfinished(out: Path) -> Path:
    return out.resolve().with_name(f"{out.resolve().name}.unfinished")


def _sync(folder: Path) -> None:
    """Bring every file to the disk, and let others read it as they may read other files of the user."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:
            path.chmod(0o666 & ~umask)  # the safetensors writer makes files that only their owner may read
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
