"""Read folders of videos with their prompts, and files that say which video people prefer.

The prompts are in one file in the folder, or else in the names of the videos:

    prompts.csv    a header with ``video`` and ``prompt``, then one row per video
    prompts.jsonl  one object per line: {"video": "a/b.mp4", "prompt": "a red circle moving left"}; ``sample`` writes it
    prompts.txt    one prompt per line, in the order of the sorted names of the videos
    (none of them) 0003-a-red-circle-moving-left-1.mp4: numbers at either end are left out, "-" and "_" become blanks

A subfolder may have its own file of prompts if no folder above it has one. Names of videos are relative to the folder
of the file. Hidden files and folders are left out. A file of preferences has one object per line, with the prompt:

    {"prompt": "a red circle moving left", "videos": ["a/0.mp4", "a/1.mp4", "a/2.mp4"], "preferred": 2}

where ``preferred`` is the position in ``videos``, counted from 0, of the video that people like best.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vpo_engine.data.prompt_lines import Lines
from vpo_engine.data.prompts import PromptFile
from vpo_engine.full_disk import write_whole
from vpo_engine.texts import one_line, parse_json, shortened, why_no_file

SUFFIXES = (
    ".mp4",
    ".webm",
    ".mkv",
    ".mov",
    ".avi",
    ".gif",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".flv",
    ".wmv",
    ".ogv",
    ".3gp",
)
PROMPT_FILES = ("prompts.csv", "prompts.jsonl", "prompts.txt")
_COPIED_METADATA = "__MACOSX"
"""The folder in which archives made on a Mac keep a file of metadata beside each video."""


@dataclass(frozen=True)
class Clip:
    """A video file and its prompt. ``name`` is the name of the file relative to the folder.

    named: the prompt comes from the file's name, which holds it only roughly.
    """

    path: Path
    name: str
    prompt: str
    named: bool = False


@dataclass(frozen=True)
class Preference:
    """A choice among at least two videos of one prompt, with the position of the one that people prefer."""

    clips: tuple[Clip, ...]
    preferred: int


def find_clips(folder: Path) -> list[Clip]:
    """Find the videos in a folder and its subfolders, in order of their names, with their prompts (see above).

    A prompt from a file's name can be empty. Raise ValueError for a folder without videos, for more than one prompt
    file in a folder, and if the prompts in a file do not belong to exactly the videos there.
    """
    names = _video_names(folder)
    prompts: dict[str, str] = {}
    for place, file in _prompt_files(folder, names).items():
        prefix = "" if place == PurePosixPath() else f"{place}/"
        below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        prompts |= {prefix + name: prompt for name, prompt in _read_prompts(file, below).items()}
    return [
        Clip(folder / name, name, prompts.get(name, prompt_of_name(name)), name not in prompts)
        for name in names
    ]


def prompt_of_name(name: str) -> str:
    """Return the prompt in a file name: ``a red circle`` for ``0003-a-red-circle-1.mp4``."""
    words = [word for word in re.split(r"[-_\s]+", Path(name).stem) if word]
    while words and words[0].isdigit():
        del words[0]
    while words and words[-1].isdigit():
        del words[-1]
    return " ".join(words)


def json_lines(file: Path) -> list[tuple[int, str]]:
    """Return number and text of the lines of a UTF-8 file that are not blank.

    Lines end at a newline byte and nowhere else: JSON strings may hold U+2028, U+2029 and U+0085. Raise ValueError,
    naming the line, for what is not UTF-8.
    """
    with file.open("rb") as opened:
        return [(lines.number, text) for lines in [Lines(file, opened)] for text in lines if text.strip()]


def read_preferences(file: Path, folder: Path) -> list[Preference]:
    """Read a file of preferences (see above). ValueError, naming file, line and remedy, for a bad line."""
    if not os.path.exists(file):
        raise ValueError(
            f"there is no file of preferences at {file}; check the path (relative to {Path.cwd()})"
        )
    if reason := why_no_file(file, "file of preferences"):
        raise ValueError(reason)
    rows = []
    for number, line in json_lines(file):
        try:
            rows.append(_preference(line, folder))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    if not rows:
        raise ValueError(f"{file} holds no preferences; give one object per line")
    return rows


class PromptRecord:
    """The prompts.jsonl of a folder that videos are written to, which keeps the rows of earlier videos.

    A row is there only if its video is. A video that is about to be replaced loses its row first.
    """

    def __init__(self, folder: Path) -> None:
        """Read the rows that are there.

        Raise ValueError for a row that cannot be read, and for a folder whose prompts are in another file.
        """
        self.folder, self.path = folder, folder / "prompts.jsonl"
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; give a folder for the videos")
        for name in PROMPT_FILES:
            if (folder / name).is_file() and name != self.path.name:
                raise ValueError(
                    f"{folder} has its prompts in {name}, beside which {self.path.name} would be a second list; give "
                    "another folder for the videos"
                )
        self._read()

    def begin(self, names: Collection[str]) -> None:
        """Make the folder, and take the rows of the videos out that are about to be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replaced = set(names)
        with self._alone():
            rows = [line.rstrip() for name, line in self._read().items() if name not in replaced]
            write_whole(self.path, "".join(f"{row}\n" for row in rows))

    def add(self, name: str, prompt: str, write: Callable[[Path], None]) -> Path:
        """Let ``write`` make the video under another name, put it in its place, add its row, and return its path."""
        unfinished, final = self.folder / f".{name}", self.folder / name
        try:
            write(unfinished)
            unfinished.replace(final)
        finally:
            unfinished.unlink(missing_ok=True)
        with self._alone(), self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"video": name, "prompt": prompt}, ensure_ascii=False) + "\n")
        return final

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes that sample into the folder from writing the file meanwhile."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _read(self) -> dict[str, str]:
        """Return the line of each video."""
        lines: dict[str, str] = {}
        for number, line in json_lines(self.path) if self.path.is_file() else ():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise self._bad_row(number, f"is not JSON ({error})") from error
            if not isinstance(row, dict) or not isinstance(row.get("video"), str):
                raise self._bad_row(number, 'is no object with a "video"')
            name = PurePosixPath(row["video"]).as_posix()
            if name in lines:
                raise self._bad_row(number, f"names video {name!r} a second time")
            lines[name] = line
        return lines

    def _bad_row(self, number: int, what: str) -> ValueError:
        return ValueError(
            f"{self.path}, line {number} {what}; repair the line, or give another folder for the videos"
        )


def _preference(line: str, folder: Path) -> Preference:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}); write one object per line") from error
    if not isinstance(row, dict) or not {"prompt", "videos", "preferred"} <= set(row):
        raise ValueError('expected an object with "prompt", "videos" and "preferred"')
    prompt, names, preferred = row["prompt"], row["videos"], row["preferred"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt is {shortened(repr(prompt))}, expected text")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"videos is {shortened(repr(names))}, expected a list of file names")
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"videos is {shortened(repr(names))}, expected at least two different files")
    if type(preferred) is not int or not 0 <= preferred < len(names):
        raise ValueError(f"preferred is {preferred!r}, expected a position from 0 to {len(names) - 1}")
    for name in names:
        if "\0" in name or why_no_file(folder / name):
            raise ValueError(
                f"there is no video {shortened(repr(name))} in {folder}; names are relative to it"
            )
    return Preference(tuple(Clip(folder / name, name, prompt.strip()) for name in names), preferred)


def _video_names(folder: Path) -> list[str]:
    """Return the names of the videos in order; hidden ones are no videos of the user's."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give the folder that holds the videos")
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder of videos at {folder}; check the path (relative to {Path.cwd()})"
        )
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    seen = [name for name in names if not is_hidden(name)]
    if not seen:
        hidden = f" ({len(names)} hidden ones are left out)" if names else ""
        raise ValueError(f"{folder} holds no videos{hidden}; they must end in {', '.join(SUFFIXES)}")
    for name in seen:
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError(
                f"{folder}: the name {os.fsencode(name)!r} is not UTF-8; rename the file (convmv -f latin1 -t utf-8 -r "
                "--notest FOLDER does it for Western European names)"
            )
        if not os.path.exists(folder / name):
            raise ValueError(
                f"{one_line(str(folder / name))} is a link to a file that is not there; repair or remove it"
            )
        if reason := why_no_file(folder / name, "video"):
            raise ValueError(f"{reason}; or take it out of {folder}")
    return seen


def is_hidden(name: str) -> bool:
    """Return whether a file, or a folder on the way to it, is one that people do not see, such as ``._a.mp4``."""
    return any(part.startswith(".") or part == _COPIED_METADATA for part in PurePosixPath(name).parts)


def _prompt_files(folder: Path, names: Sequence[str]) -> dict[PurePosixPath, Path]:
    """Return the prompt file of each folder that has one and lies below no other such folder."""
    found: dict[PurePosixPath, Path] = {}
    places = {place for name in names for place in PurePosixPath(name).parents}
    for place in sorted(places, key=lambda each: (len(each.parts), each)):
        files = [path for name in PROMPT_FILES if (path := folder / place / name).is_file()]
        if len(files) > 1:
            raise ValueError(
                f"{folder / place} has {' and '.join(file.name for file in files)}; keep one prompt file"
            )
        if files and not any(above in found for above in place.parents):
            found[place] = files[0]
    return found


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
    videos, prompts = (
        PromptFile(file, column, choose=f"give the name {column!r}") for column in ("video", "prompt")
    )
    listed: dict[str, str] = {}
    for index in range(len(videos)):
        name = PurePosixPath(videos[index]).as_posix()
        if name in listed:
            raise ValueError(f"{file} names video {name!r} twice; keep one row for each")
        listed[name] = prompts[index]
    known = set(names)
    for name in listed:
        if name not in known:
            raise ValueError(
                f"{file} names video {name!r}, which is not in {file.parent}; remove the row or add the file"
            )
    for name in names:
        if name not in listed:
            raise ValueError(f"{file} has no prompt for video {name!r}; add a row for it, or remove the file")
    return listed
