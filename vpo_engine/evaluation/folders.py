"""Folders of videos in VBench's layout, ``{prompt}-{number}.mp4``: the names of files, and reading what is there."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vpo_engine.data.clips import SUFFIXES, Clip, find_clips, prompt_of_name
from vpo_engine.evaluation.suites import Suite
from vpo_engine.full_disk import write_whole
from vpo_engine.policy_source import RECORD, is_published
from vpo_engine.runs.directory import CONFIG_NAME
from vpo_engine.sample import file_name

_MOST_BYTES = 240
"""Bytes of a name; file systems allow 255, and an unfinished file has a longer one."""
_PUBLISHED = re.compile(r"(.+)-(\d+)", re.DOTALL)


@dataclass(frozen=True)
class Video:
    """A video of an evaluation: the file, its prompt, and its number among the videos of that prompt.

    name: the file's name, relative to the folder of the videos.
    """

    path: Path
    prompt: str
    index: int
    name: str

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt, self.index


def video_name(number: int, prompt: str, index: int) -> str:
    """Return the name of a video's file: VBench's ``{prompt}-{index}.mp4`` where a file can have it.

    A prompt that is too long, begins with a dot, or holds a slash or a character that is not printed gets the name that
    ``vpo_engine.sample`` gives it, with the prompt's number.
    """
    published = f"{prompt}-{index}.mp4"
    fits = len(published.encode()) <= _MOST_BYTES and prompt.isprintable() and not prompt.startswith(".")
    return (
        published if fits and "/" not in prompt and "\\" not in prompt else file_name(number, prompt, index)
    )


def holds_videos(path: Path) -> bool:
    """Return whether a path is a folder of videos, and no run, checkpoint or model."""
    if not path.is_dir() or (path / CONFIG_NAME).is_file() or (path / "policy").is_dir():
        return False
    if (path / RECORD).is_file() or is_published(path):
        return False
    return any(file.suffix.lower() in SUFFIXES for file in path.rglob("*"))


def read_folder(folder: Path, suite: Suite | None = None) -> list[Video]:
    """Find the videos of a folder with their prompts: from its prompts file, or else from the files' names.

    suite: the prompts that are asked for; then the names are those of ``video_name``, and videos of other prompts are
    left out. Raise ValueError for a folder without videos, or with none of these prompts.
    """
    clips = find_clips(folder)
    if suite is None:
        for clip in clips:
            if not _prompt(clip):
                raise ValueError(
                    f"the name of {clip.name} leaves no prompt; rename it to PROMPT-NUMBER.mp4, or write a "
                    "prompts.jsonl that names its prompt"
                )
        return _numbered([(clip, _prompt(clip)) for clip in clips])
    expected = _expected_names(clips, suite)
    known = set(suite.prompts)
    chosen = [(clip, expected.get(Path(clip.name).name, _prompt(clip))) for clip in clips]
    found = _numbered([(clip, prompt) for clip, prompt in chosen if prompt in known])
    if not found:
        raise ValueError(
            f"none of the {len(clips)} videos in {folder} is of a prompt of {suite.source}; their names must be "
            f"PROMPT-NUMBER.mp4, such as {video_name(0, suite.prompts[0], 0)!r}, or a prompts.jsonl must name their "
            "prompts. Without --prompts, all videos of the folder are measured"
        )
    return found


def suite_of(folders: Sequence[Sequence[Video]], source: str, samples: int | None) -> Suite:
    """Return the prompts and the videos that folders have together; ``samples``: that many of each prompt."""
    keys = list(dict.fromkeys(video.key for videos in folders for video in videos))
    prompts = list(dict.fromkeys(prompt for prompt, _ in keys))
    numbers: dict[str, list[int]] = {prompt: [] for prompt in prompts}
    for prompt, index in keys:
        numbers[prompt].append(index)
    given = [(prompt, index) for prompt in prompts for index in sorted(numbers[prompt])[:samples]]
    return Suite(tuple(prompts), source, samples=samples, given=tuple(given))


def write_prompts(folder: Path, videos: Sequence[Video]) -> None:
    """Write ``prompts.jsonl`` beside folders of videos, which ``vpo_engine.rank`` reads."""
    rows = [
        json.dumps(
            {"video": video.path.relative_to(folder).as_posix(), "prompt": video.prompt}, ensure_ascii=False
        )
        for video in videos
    ]
    write_whole(folder / "prompts.jsonl", "".join(f"{row}\n" for row in rows))


def _expected_names(clips: Sequence[Clip], suite: Suite) -> dict[str, str]:
    """Return the prompt that each file's name is of, {name: prompt}, by the names that ``video_name`` gives."""
    by_stem = {prompt: prompt for prompt in suite.prompts}
    for number, prompt in enumerate(suite.prompts):
        found = _PUBLISHED.fullmatch(Path(video_name(number, prompt, 0)).stem)
        assert found is not None
        by_stem[found[1]] = prompt
    names = {}
    for clip in clips:
        name = Path(clip.name)
        found = _PUBLISHED.fullmatch(name.stem)
        if clip.named and found is not None and found[1] in by_stem:
            names[name.name] = by_stem[found[1]]
    return names


def _prompt(clip: Clip) -> str:
    """Return a video's prompt; a name with blanks is VBench's and holds the prompt as it is."""
    if not clip.named:
        return clip.prompt
    found = _PUBLISHED.fullmatch(Path(clip.name).stem)
    if found is not None and " " in found[1]:
        return found[1].strip()
    return prompt_of_name(clip.name)


def _numbered(clips: Sequence[tuple[Clip, str]]) -> list[Video]:
    """Give each video its number: the one at the end of its name, or the order of names where these are not unique."""
    by_prompt: dict[str, list[Clip]] = defaultdict(list)
    for clip, prompt in clips:
        by_prompt[prompt].append(clip)
    videos = []
    for prompt, same in by_prompt.items():
        found = [_PUBLISHED.fullmatch(Path(clip.name).stem) for clip in same]
        numbers = [int(match[2]) for match in found if match is not None]
        unique = len(numbers) == len(same) and len(set(numbers)) == len(numbers)
        for place, clip in enumerate(same):
            videos.append(Video(clip.path, prompt, numbers[place] if unique else place, clip.name))
    places = {prompt: place for place, prompt in enumerate(by_prompt)}
    return sorted(videos, key=lambda video: (places[video.prompt], video.index))
