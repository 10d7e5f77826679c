"""A disk that is full for one file of a run, for tests of what stays whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from tensorboard.summary.writer.record_writer import RecordWriter

from vpo_engine.trainer import Trainer


@contextmanager
def full_disk(name: str, step: int = 0) -> Iterator[None]:
    """Let the system take half of what is written to files with ``name`` in their path, and then say ENOSPC.

    step: of the run, from whose beginning on it is so; 0: from the start.
    """
    reached, train_step = [step == 0], Trainer._train_step

    def named(path: object) -> bool:
        return reached[0] and name in str(path)

    def steps(trainer: Trainer, number: int) -> None:
        reached[0] |= number == step
        train_step(trainer, number)

    write, write_bytes, write_text = os.write, Path.write_bytes, Path.write_text
    save_file, write_record = safetensors.torch.save_file, RecordWriter.write

    def full() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(descriptor: int, data: Any) -> int:
        if not named(os.readlink(f"/proc/self/fd/{descriptor}")):
            return write(descriptor, data)
        if len(data) < 2:
            raise full()
        return write(descriptor, bytes(data)[: len(data) // 2])

    def half_of_bytes(path: Path, data: bytes) -> int:
        if not named(path):
            return write_bytes(path, data)
        write_bytes(path, data[: len(data) // 2])
        raise full()

    def half_of_text(path: Path, data: str, *args: Any, **options: Any) -> int:
        return half_of_bytes(path, data.encode()) if named(path) else write_text(path, data, *args, **options)

    def half_of_tensors(tensors: Any, path: Any, *args: Any, **options: Any) -> None:
        save_file(tensors, path, *args, **options)
        if named(path):
            os.truncate(path, Path(path).stat().st_size // 2)
            raise full()

    def no_record(writer: RecordWriter, data: bytes) -> None:
        if named("tensorboard"):
            raise full()
        write_record(writer, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", steps)
        patch.setattr(os, "write", half)
        patch.setattr(Path, "write_bytes", half_of_bytes)
        patch.setattr(Path, "write_text", half_of_text)
        patch.setattr(RecordWriter, "write", no_record)
        for place in (
            "safetensors.torch",
            "vpo_engine.data.preference_dataset",
            "vpo_engine.data.embeddings",
        ):
            patch.setattr(f"{place}.save_file", half_of_tensors)
        yield
