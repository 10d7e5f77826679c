"""Checks of files that others have made, before they are used: names stay in their folder, sizes can be true.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vpo_engine.texts import Decoder, read_text

LARGEST_JSON = 256 << 20
"""Bytes of the largest JSON file that is read. The index of a model of a million tensors has about 100 MB."""
MOST_LAYERS = 4096
LARGEST_NUMBER = 2**31
_COUNTS_LAYERS = ("layers", "depth", "blocks")
"""Words in the names of settings that say how many layers a network has."""
_LONGEST_NAME = 255
"""Bytes that a file system lets a name have."""
_CHOOSES_ATTENTION = ("attn_implementation", "_attn_implementation", "experts_implementation")
"""Settings of transformers that choose code; with a slash they name a repository, whose code is fetched and run."""


def read_object(path: Path, remedy: str = "fetch it again") -> dict[str, Any]:
    """Return the object in a JSON file. ``remedy`` ends the error.

    Raise ValueError for what is no regular file, is no JSON object, or is larger than LARGEST_JSON.
    """
    text = read_text(path, "JSON file", LARGEST_JSON)
    try:
        found = Decoder().decode(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected an object; {remedy}")
    return found


def read_settings(path: Path, remedy: str = "fetch it again") -> dict[str, Any]:
    """Return the settings of a model, or of a part of it, in a JSON file.

    Raise ValueError as ``read_object``, ``refuse_fetched_code`` and ``refuse_sizes`` do.
    """
    found = read_object(path, remedy)
    refuse_fetched_code(found, path)
    refuse_sizes(found, path, remedy)
    return found


def refuse_sizes(config: Mapping[str, Any], where: Path | str, remedy: str = "fetch it again") -> None:
    """Raise ValueError for a number of layers, or any other whole number, that no model has.

    Networks are built before their weights are read, and a layer takes time and memory even without weights.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            refuse_sizes(value, where, remedy)
        most = MOST_LAYERS if any(word in name for word in _COUNTS_LAYERS) else LARGEST_NUMBER
        numbers = value if isinstance(value, list) else [value]
        if "length" in name:  # tokenizers write 10**30 for texts of any length
            continue
        for number in numbers:
            if isinstance(number, int) and abs(number) > most:
                raise ValueError(f"{where} sets {name} to {value}, expected at most {most}; {remedy}")


def file_inside(folder: Path, name: object, named_by: Path, remedy: str = "fetch the folder again") -> Path:
    """Return the path of a file in ``folder`` that the file ``named_by`` names; the file need not be there.

    Raise ValueError for a name that leads out of the folder: an absolute one, one with "..", or that of a symbolic link
    to somewhere else. Links in the Hugging Face cache may lead to the blobs of the same repository.
    """
    if not _is_plain(name):
        raise ValueError(
            f"{named_by} names the file {str(name)[:200]!r}, expected a name inside of {folder}; {remedy}"
        )
    assert isinstance(name, str)
    path = folder / name
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(_home(folder)):
        raise ValueError(
            f"{path} is a symbolic link to {real}, outside of {folder}; put the file itself in its place, or "
            f"{remedy}"
        )
    return path


def refuse_fetched_code(config: Mapping[str, Any], where: Path | str) -> None:
    """Raise ValueError if the settings of a model, or of a part of it, make transformers fetch and run code.

    Of code that lies beside a checkpoint (``auto_map``) nothing is run, so such settings are not refused.
    """
    for name in _CHOOSES_ATTENTION:
        value = config.get(name)
        chosen = value.values() if isinstance(value, Mapping) else [value]
        named = next((each for each in chosen if isinstance(each, str) and "/" in each), None)
        if named is not None:
            raise ValueError(
                f"{where} sets {name} to {named!r}, a repository whose code would be fetched and run; take {name} out "
                "of the file"
            )
    for value in config.values():
        if isinstance(value, Mapping):
            refuse_fetched_code(value, where)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of transformers in a local folder; Python files that lie there are not run.

    Raise ValueError for a folder whose files cannot be read, or that asks for code of its own.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # parsers of damaged files can raise nearly anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({reason}); fetch the folder again, without code of its own"
        ) from error


def check_archive(path: Path, most: int = 0) -> None:
    """Raise ValueError if a zip file says that it holds more bytes than it has itself, and more than ``most``.

    torch.save and numpy.savez pack nothing. What is packed can become a thousand times larger in memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except Exception as error:  # a damaged directory can raise nearly anything
        raise ValueError(f"{path} cannot be read as a zip file ({error}); fetch it again") from error
    size = path.stat().st_size
    if unpacked > max(size, most):
        raise ValueError(
            f"{path} has {size} bytes and says that it holds {unpacked}, expected at most {max(size, most)}; fetch it "
            "again"
        )


def _is_plain(name: object) -> bool:
    """Return whether a name is a relative path that goes down only, and that a file system can hold."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    try:
        parts = [os.fsencode(part) for part in PurePosixPath(name).parts]
    except UnicodeEncodeError:
        return False
    fits = len(os.fsencode(name)) < 4096 and all(len(part) <= _LONGEST_NAME for part in parts)
    return fits and bool(parts) and b".." not in parts and not PurePosixPath(name).is_absolute()


def _home(folder: Path) -> Path:
    """Return the real folder that a folder's files must lie in: itself, or the repository in the Hugging Face cache."""
    real = Path(os.path.realpath(folder))
    for parent in real.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return real
