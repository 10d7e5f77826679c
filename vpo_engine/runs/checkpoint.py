"""Checkpoints that are either complete or absent.

A checkpoint is written into a hidden folder beside its final place. Every file is synced to disk, the manifest (size
and SHA-256 of every file) last, and then the folder is renamed. What an interrupted save leaves behind is hidden or
has no manifest.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpo_engine.errors import CheckpointError
from vpo_engine.foreign_files import file_inside, read_object
from vpo_engine.full_disk import is_disk_full, sync_file, tensor_writer_says

if TYPE_CHECKING:
    from torch import Tensor

_MANIFEST = "manifest.json"
_STATE = "state.json"
_POLICY = "policy"
_AVERAGE = "ema"
_STEP_NAME = re.compile(r"step_(\d{8,})")
_UNFINISHED = ".unfinished"
_REPLACED = ".replaced"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as ``save_checkpoint`` saved it, read back and verified; tensors are on the CPU."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    policy: Path
    """The folder that ``write_policy`` wrote; it does not exist if there was no ``write_policy``."""
    average: Path
    """The folder that ``write_average`` wrote; it does not exist if there was no ``write_average``."""


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(checkpoint: Path | None) -> int:
    """Return the step of a checkpoint by its name; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("_")[2])


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    write_policy: Callable[[Path], None] | None,
    keep: int,
    write_average: Callable[[Path], None] | None = None,
) -> Path:
    """Save the checkpoint ``folder/step_<step>`` atomically and return its path.

    tensors: {group: {name: tensor}}, written as ``<group>.safetensors``; any shape, dtype, layout and device.
    state: JSON data, written as ``state.json``; ValueError if it does not come back from JSON unchanged.
    write_policy: writes the policy into the folder it is given; write_average: likewise its moving average.
    keep: how many of the newest checkpoints to keep, this one included. Once this one is in place, older ones are
    deleted, and so are those of later steps, since the run was resumed from a step before them.

    Raise CheckpointError if the system does not let it be written, for example because the disk is full; the unfinished
    checkpoint is then removed.
    """
    if keep < 1:
        raise ValueError(
            f"keep must be at least 1, got {keep}: the checkpoint just saved must not be deleted"
        )
    state_text = _json_text(state)
    final = folder / checkpoint_name(step)
    unfinished = folder / f".{final.name}{_UNFINISHED}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _settle_interrupted(folder)
        unfinished.mkdir()
        from safetensors.torch import save_file

        for group, members in tensors.items():
            save_file(_storable(members), unfinished / f"{group}.safetensors")
        for name, write in ((_POLICY, write_policy), (_AVERAGE, write_average)):
            if write is not None:
                (unfinished / name).mkdir()
                write(unfinished / name)
        (unfinished / _STATE).write_text(state_text, encoding="utf-8")
        _write_manifest(unfinished, step)
        _put_in_place(unfinished, final)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if is_disk_full(error):
            raise CheckpointError(_disk_full_text(final, tensors)) from error
        if isinstance(error, OSError) or tensor_writer_says(error, "os error"):
            raise CheckpointError(
                f"could not save checkpoint '{final}': {error}. Earlier checkpoints are untouched. Make its folder "
                "writable and see that its disk works; the same command then goes on from the newest of them"
            ) from error
        raise
    _delete_superseded(folder, step, keep)
    return final


def newest_complete(folder: Path, *, before: int | None = None) -> Path | None:
    """Return the complete checkpoint of the highest step (below ``before``), or None.

    A checkpoint is complete if it has a manifest and every file has the size given there (hashes are checked when
    loading). Incomplete ones are skipped, with a warning that says what is wrong.
    """
    for step, path in sorted(_all_saved(folder).items(), reverse=True):
        if before is not None and step >= before:
            continue
        fault = _fault(path)
        if fault is None:
            return path
        _logger.warning("skipping an incomplete checkpoint: %s", fault)
    return None


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the complete checkpoints in a folder by step; files and sizes are checked, hashes are not."""
    return {step: path for step, path in _all_saved(folder).items() if _fault(path) is None}


def unusable_checkpoints(folder: Path) -> list[str]:
    """Return what is wrong with each checkpoint in a folder that is not complete."""
    faults = [_fault(path) for _, path in sorted(_all_saved(folder).items())]
    return [fault for fault in faults if fault is not None]


def evaluated_policy(checkpoint: Path) -> Path:
    """Return the folder of the weights that the run evaluated: those of the moving average, or else the policy's."""
    average = checkpoint / _AVERAGE
    return average if average.is_dir() else checkpoint / _POLICY


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check every file's size and SHA-256 against the manifest, and return the manifest.

    Everything that reads a checkpoint calls this first. Raise ValueError for a missing, truncated, altered or added
    file; it names the file and the checkpoint to use instead.
    """
    try:
        manifest = _read_manifest(path)
        _check_sizes(path, manifest)
        _refuse_added(path, manifest)
        for name, entry in manifest["files"].items():
            actual = _known_sha256(path / name)
            if actual != entry["sha256"]:
                raise ValueError(
                    f"'{path / name}' was altered after it was saved: its SHA-256 is {actual}, "
                    f"but the manifest says {entry['sha256']}"
                )
    except ValueError as error:
        raise ValueError(f"{error}. {_remedy(path)}") from error
    return manifest


def verify_if_of_checkpoint(path: Path) -> None:
    """Verify the checkpoint that a folder of weights, or a file in it, belongs to; do nothing for any other path.

    Errors are those of ``verify_checkpoint``.
    """
    for folder in [path, *path.parents][:3]:
        if folder.name in (_POLICY, _AVERAGE) and (folder.parent / _MANIFEST).is_file():
            verify_checkpoint(folder.parent)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that ``verify_checkpoint`` accepts; errors are its errors."""
    from vpo_engine.weights import read_file

    manifest = verify_checkpoint(path)
    tensors = {
        name.removesuffix(".safetensors"): read_file(path / name)
        for name in manifest["files"]
        if name.endswith(".safetensors") and "/" not in name
    }
    state = read_object(path / _STATE, _remedy(path))
    return Checkpoint(manifest["step"], tensors, state, path / _POLICY, path / _AVERAGE)


def _json_text(state: Mapping[str, Any]) -> str:
    for key, value in state.items():
        try:
            same = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError) as error:
            raise ValueError(f"state['{key}'] cannot be written as JSON: {error}") from error
        if not same:
            raise ValueError(
                f"state['{key}'] would be changed by JSON; use lists, not tuples, and string keys"
            )
    return json.dumps(state, allow_nan=False, indent=1)


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same values as contiguous CPU tensors that share no memory, as the file format requires."""
    taken: list[tuple[int, int]] = []
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        place = _bytes_of(plain)
        at = bisect.bisect(taken, place)
        if any(one[0] < place[1] and place[0] < one[1] for one in taken[max(0, at - 1) : at + 1]):
            plain = plain.clone()
            place = _bytes_of(plain)
        if plain.nbytes:
            bisect.insort(taken, place)
        result[name] = plain
    return result


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a contiguous tensor's first byte and of the byte behind its last."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _write_manifest(root: Path, step: int) -> None:
    mode = (root / _STATE).stat().st_mode
    files = {}
    for path in sorted(item for item in root.rglob("*") if item.is_file()):
        # The safetensors writer makes files that only their owner may read; give them the mode of the other files.
        path.chmod(mode)
        sync_file(path)
        files[path.relative_to(root).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = root / _MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
    sync_file(manifest)
    for folder in [root, *(item for item in root.rglob("*") if item.is_dir())]:
        sync_file(folder)


def _put_in_place(unfinished: Path, final: Path) -> None:
    """Rename into place. An existing checkpoint is renamed first, since a folder cannot replace another."""
    replaced = final.with_name(f".{final.name}{_REPLACED}")
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    sync_file(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _settle_interrupted(folder: Path, *, remove: bool = True) -> None:
    """Clean up after an interrupted save: restore a checkpoint that was being replaced, delete unfinished ones."""
    for path in folder.glob(f".step_*{_REPLACED}"):
        final = folder / path.name[1:].removesuffix(_REPLACED)
        if not final.exists():
            path.rename(final)
        elif remove:
            shutil.rmtree(path)
    if remove:
        for path in folder.glob(f".step_*{_UNFINISHED}"):
            shutil.rmtree(path)


def _delete_superseded(folder: Path, step: int, keep: int) -> None:
    saved = _saved(folder)
    complete = [s for s in sorted(saved, reverse=True) if s <= step and (saved[s] / _MANIFEST).is_file()]
    for other, path in saved.items():
        if other not in complete[:keep]:
            _delete(path)


def delete_after(folder: Path, step: int) -> None:
    """Delete all checkpoints of later steps than ``step``, which a run that goes back to it gives up.

    The newest goes last: as long as it is there, a restart knows that nothing was saved since (``attempts.has_saved``).
    """
    for other, path in sorted(_all_saved(folder).items()):
        if other > step:
            _delete(path)


def _delete(path: Path) -> None:
    """Delete a checkpoint, its manifest first, so that a half-deleted one counts as incomplete."""
    (path / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def _all_saved(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    _settle_interrupted(folder, remove=False)
    return _saved(folder)


def _fault(path: Path) -> str | None:
    """Return what is missing of a checkpoint; None if it is complete."""
    try:
        _check_sizes(path, _read_manifest(path))
    except ValueError as error:
        return str(error)
    return None


def _saved(folder: Path) -> dict[int, Path]:
    matches = ((_STEP_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return {int(match[1]): path for match, path in matches if match}


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint at '{path}'")
    manifest = path / _MANIFEST
    if not manifest.is_file():
        raise ValueError(f"'{path}' has no {_MANIFEST}, so its saving was interrupted")
    try:
        content = read_object(manifest, "copy the checkpoint again")
        _check_manifest(path, manifest, content)
    except ValueError as error:
        raise ValueError(f"'{manifest}' is not the manifest of a checkpoint: {error}") from error
    return content


def _check_manifest(path: Path, manifest: Path, content: dict[str, Any]) -> None:
    """Raise ValueError unless a manifest has a step and files inside of the checkpoint, each with size and hash."""
    if not isinstance(content.get("step"), int) or not isinstance(content.get("files"), dict):
        raise ValueError("it must have 'step' and 'files'")
    for name, entry in content["files"].items():
        file_inside(path, name, manifest, "copy the checkpoint again")
        kinds = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else ()
        if [type(kind) for kind in kinds] != [int, str]:
            raise ValueError(f"'{name}' must have 'bytes' and 'sha256'")
    if _STATE not in content["files"]:
        raise ValueError(f"it does not list {_STATE}")


def _check_sizes(path: Path, manifest: dict[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"'{file}' is missing; according to the manifest it has {entry['bytes']} bytes")
        actual = file.stat().st_size
        if actual != entry["bytes"]:
            raise ValueError(f"'{file}' has {actual} bytes, the manifest says {entry['bytes']}")


def _refuse_added(path: Path, manifest: dict[str, Any]) -> None:
    """Raise ValueError for a file that was not saved with the checkpoint: it could be read in place of a saved one."""
    listed = {_MANIFEST, *manifest["files"]}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if name not in listed and not file.name.startswith(".") and not file.is_dir():
            raise ValueError(
                f"'{file}' was added after the checkpoint was saved, since the manifest does not list it; move it "
                "elsewhere"
            )


def _remedy(path: Path) -> str:
    match = _STEP_NAME.fullmatch(path.name)
    earlier = newest_complete(path.parent, before=int(match[1])) if match else None
    if earlier is None:
        return "There is no earlier complete checkpoint: start the run again"
    return f"Use the earlier checkpoint '{earlier}'"


def _known_sha256(path: Path) -> str:
    """Return the SHA-256 of a file; it is read again only if the file has changed since this process read it."""
    found = path.stat()
    return _sha256_of(path, found.st_size, found.st_mtime_ns)


@cache
def _sha256_of(path: Path, size: int, changed: int) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _disk_full_text(final: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> str:
    needed = sum(tensor.nbytes for members in tensors.values() for tensor in members.values())
    free = shutil.disk_usage(final.parent).free
    return (
        f"the disk is full: could not save checkpoint '{final}' ({needed} bytes needed beside the policy, "
        f"{free} bytes free). Earlier checkpoints are untouched. Free some space, keep fewer checkpoints, "
        "or put the run directory on another disk"
    )
