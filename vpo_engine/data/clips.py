"""Read folders of videos with their prompts, and files that say which video people prefer.

The prompts are in one file in the folder, or else in the names of the videos:

    prompts.csv    a header with ``video`` and ``prompt``, then one row per video
    prompts.jsonl  one object per line: {"video": "a/b.mp4", "prompt": "a red circle moving left"}
    prompts.txt    one prompt per line, in the order of the sorted names of the videos
    (none of them) 0003-a-red-circle-moving-left-1.mp4, as ``vpo_engine.sample`` writes it: numbers at either end
                   are left out, "-" and "_" become blanks

Names of videos are relative to the folder. A file of preferences has one object per line, with the prompt:

    {"prompt": "a red circle moving left", "videos": ["a/0.mp4", "a/1.mp4", "a/2.mp4"], "preferred": 2}

where ``preferred`` is the position in ``videos``, counted from 0, of the video that people like best.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vpo_engine.data.prompts import PromptFile

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")
PROMPT_FILES = ("prompts.csv", "prompts.jsonl", "prompts.txt")


@dataclass(frozen=True)
class Clip:
    """A video file and its prompt. ``name`` is the name of the file relative to the folder."""

    path: Path
    name: str
    prompt: str


@dataclass(frozen=True)
class Preference:
    """A choice among at least two videos of one prompt, with the position of the one that people prefer."""

    clips: tuple[Clip, ...]
    preferred: int


def find_clips(folder: Path) -> list[Clip]:
    """Find the videos in a folder and its subfolders, in order of their names, with their prompts (see above).

    A prompt from a file's name can be empty. Raise ValueError for a folder without videos, for more than one prompt
    file, and if the prompts in the file do not belong to exactly these videos.
    """
    names = _video_names(folder)
    files = [folder / name for name in PROMPT_FILES if (folder / name).is_file()]
    if len(files) > 1:
        raise ValueError(f"{folder} has {' and '.join(file.name for file in files)}; keep one prompt file")
    prompts = _read_prompts(files[0], names) if files else {name: prompt_of_name(name) for name in names}
    return [Clip(folder / name, name, prompts[name]) for name in names]


def prompt_of_name(name: str) -> str:
    """Return the prompt in a file name: ``a red circle`` for ``0003-a-red-circle-1.mp4``."""
    words = [word for word in re.split(r"[-_\s]+", Path(name).stem) if word]
    while words and words[0].isdigit():
        del words[0]
    while words and words[-1].isdigit():
        del words[-1]
    return " ".join(words)


def read_preferences(file: Path, folder: Path) -> list[Preference]:
    """Read a file of preferences (see above). ValueError, naming file, line and remedy, for a bad line."""
    if not file.is_file():
        raise ValueError(
            f"there is no file of preferences at {file}; check the path (relative to {Path.cwd()})"
        )
    rows = []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(_preference(line, folder))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
    if not rows:
        raise ValueError(f"{file} holds no preferences; give one object per line")
    return rows


def _preference(line: str, folder: Path) -> Preference:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}); write one object per line") from error
    if not isinstance(row, dict) or not {"prompt", "videos", "preferred"} <= set(row):
        raise ValueError('expected an object with "prompt", "videos" and "preferred"')
    prompt, names, preferred = row["prompt"], row["videos"], row["preferred"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt is {prompt!r}, expected text")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"videos is {names!r}, expected a list of file names")
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"videos is {names!r}, expected at least two different files")
    if type(preferred) is not int or not 0 <= preferred < len(names):
        raise ValueError(f"preferred is {preferred!r}, expected a position from 0 to {len(names) - 1}")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"there is no video {name!r} in {folder}; names are relative to it")
    return Preference(tuple(Clip(folder / name, name, prompt.strip()) for name in names), preferred)


def _video_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder of videos at {folder}; check the path (relative to {Path.cwd()})"
        )
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    if not names:
        raise ValueError(f"{folder} holds no videos; they must end in {', '.join(SUFFIXES)}")
    return names


def _read_prompts(file: Path, names: Sequence[str]) -> dict[str, str]:
    """Read {name of a video: prompt}, for exactly ``names``."""
    if file.suffix == ".txt":
        lines = PromptFile(file)
        if len(lines) != len(names):
            raise ValueError(
                f"{file} has {len(lines)} prompts for {len(names)} videos; write one line for each, in the order of "
                "their sorted names, or use prompts.csv"
            )
        return {name: lines[index] for index, name in enumerate(names)}
    videos, prompts = PromptFile(file, "video"), PromptFile(file, "prompt")
    listed: dict[str, str] = {}
    for index in range(len(videos)):
        name = Path(videos[index]).as_posix()
        if name in listed:
            raise ValueError(f"{file} names video {name!r} twice; keep one row for each")
        listed[name] = prompts[index]
    for name in listed:
        if name not in set(names):
            raise ValueError(
                f"{file} names video {name!r}, which is not in {file.parent}; remove the row or add the file"
            )
    for name in names:
        if name not in listed:
            raise ValueError(f"{file} has no prompt for video {name!r}; add a row for it")
    return listed
