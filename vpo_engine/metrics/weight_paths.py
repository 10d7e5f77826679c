"""Find the published weight files of metrics under a path that the user gives. Importing this loads no torch.

A user's path is the file, a folder with files side by side, or VBench's own cache folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CACHE_FOLDERS = (
    "",
    "dino_model",
    "clip_model",
    "aesthetic_model/emb_reader",
    "amt_model",
    "raft_model/models",
    "pyiqa_model",
)
"""The folders under VBENCH_CACHE_DIR (~/.cache/vbench) in which VBench keeps its files, and the folder itself."""
FOLDER_INSTEAD = {"ViT-B-32.pt": "clip-vit-base-patch32", "ViT-L-14.pt": "clip-vit-large-patch14"}
"""The names of folders in transformers' layout that hold the same weights as a file."""
_SHOWN = 6


def find_weights(path: Path, name: str) -> Path:
    """Return the file of this name: ``path`` if it is a file, or else the one under it.

    A folder with config.json is returned in its place where FOLDER_INSTEAD has one: ``path`` itself, or below it. Raise
    FileNotFoundError, naming the file, where there is none.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}; put {name} there")
    instead = FOLDER_INSTEAD.get(name)
    for folder in (path, path / instead) if instead else ():
        if (folder / "config.json").is_file():
            return folder
    for each in CACHE_FOLDERS:
        if (path / each / name).is_file():
            return path / each / name
    there = ", ".join(sorted(each.name for each in path.iterdir())[:_SHOWN])
    wanted = f"{name} or folder {instead}" if instead else name
    raise FileNotFoundError(
        f"no {wanted} in {path} or in the folders of VBench's cache below it; put it there (it holds "
        f"{there or 'nothing'})"
    )


def check_weights_found(path: Path, names: Sequence[str]) -> None:
    """Raise FileNotFoundError unless all these files are found under the path, a folder if there are several."""
    if path.is_file() and len(names) > 1:
        raise FileNotFoundError(
            f"{path} is one file, and {' and '.join(names)} are needed; give their folder"
        )
    for name in names:
        find_weights(path, name)
