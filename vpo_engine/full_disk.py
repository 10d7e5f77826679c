"""A disk that is full: how it is recognised, and what is said."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vpo_engine.errors import DiskFullError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that the disk, or the user's quota on it, is full."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(tensor_writer_says(error, f"os error {number}") for number in _FULL)


def tensor_writer_says(error: BaseException, text: str) -> bool:
    """Return whether this is an error of the safetensors writer, which reports the system's errors as text only."""
    return type(error).__name__ == "SafetensorError" and text in str(error)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise DiskFullError, which names ``path``, if the disk is full for what the block writes there."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(
            f"the disk is full: could not write '{path}' ({free_bytes(path)} bytes free). What was saved before is "
            "untouched. Free some space; the same command then goes on from the newest checkpoint"
        ) from error


def write_whole(path: Path, content: str | bytes, *, sync: bool = False) -> None:
    """Write a file that is complete or, after an error, as it was before. DiskFullError if the disk is full.

    sync: see ``write_by``.
    """
    data = content.encode() if isinstance(content, str) else content
    write_by(path, lambda unfinished: unfinished.write_bytes(data), sync=sync)


def write_by(path: Path, write: Callable[[Path], object], *, sync: bool = False) -> None:
    """Let ``write`` write a file under another name, and rename it to ``path``; errors are as for ``write_whole``.

    sync: bring the content to the disk first, so that a power cut leaves the file as it was or whole.

    Nothing is written through a link that lies under either name.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    with writing(path):
        if os.path.lexists(unfinished):
            unfinished.unlink()
        try:
            write(unfinished)
            if sync:
                sync_file(unfinished)
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def sync_file(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_of(path: Path) -> Path:
    """Return the nearest folder of ``path`` that exists, which is on the disk that ``path`` is, or will be, on."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk on which ``path`` is, or will be."""
    return shutil.disk_usage(disk_of(path)).free
