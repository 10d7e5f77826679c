"""Folders of videos, and files that name videos: of evaluations, rankings and preferences."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fuzz_driver import clear_errors, fuzz, trusted
from hypothesis import strategies as st

from vpo_engine.data.clips import PromptRecord, find_clips, read_preferences
from vpo_engine.data.preference_file import PreferenceFile
from vpo_engine.evaluation.folders import holds_videos, read_folder, suite_of, video_name
from vpo_engine.evaluation.suites import given_suite

ODD = st.sampled_from(
    ["a fox-0.mp4", "a fox-1.mp4", "a fox-00.mp4", "a fox-٣.mp4", "0003-a-fox-1.mp4", "-0.mp4", ".mp4", "-.mp4",
     "a\nb-0.mp4", "a'\"-0.mp4", "<script>-0.mp4", "a\x1b[2J-0.mp4", "\u202ea-0.mp4", ".hidden.mp4", "__MACOSX",
     "a.txt", "a fox-0.MP4", "e\u0301-0.mp4", "é-0.mp4", "%s-0.mp4", "$x-0.mp4", " -0.mp4", "a" * 240 + ".mp4",
     "-" + "9" * 200 + ".mp4"]
)  # fmt: skip
NAMES = ODD.map(os.fsencode) | st.binary(min_size=1, max_size=12).map(lambda name: name + b"-0.mp4")
KINDS = st.sampled_from(["file", "file", "file", "folder", "loop", "gone", "pipe", "device", "up"])
ENTRIES = st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=2), KINDS), min_size=1, max_size=5)
TEXTS = (
    ODD
    | st.text(max_size=8)
    | st.sampled_from(["../a.mp4", "/etc/passwd", "/dev/zero", "x" * 5000, "a/../a fox-0.mp4"])
)


def make(folder: Path, entries: list[tuple[list[bytes], str]]) -> None:
    """Make files, folders, links, pipes and devices of odd names, as far as the file system takes them.

    What is there is left as it is: to open an earlier pipe or device and write to it would wait, or write elsewhere.
    """
    for parts, kind in entries:
        parts = [part.replace(b"/", b"_").replace(b"\0", b"_") for part in parts]
        parts = [part if part not in (b".", b"..") else b"_" for part in parts]
        path = os.path.join(os.fsencode(folder), *parts)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if kind == "file":
                with open(path, "xb") as file:
                    file.write(b"video")
            elif kind == "folder":
                os.mkdir(path)
            elif kind == "pipe":
                os.mkfifo(path)
            else:
                targets = {
                    "loop": path,
                    "gone": b"/nowhere",
                    "device": b"/dev/zero",
                    "up": os.fsencode(folder),
                }
                os.symlink(targets[kind], path)
        except OSError:
            continue


@fuzz(
    entries=ENTRIES,
    prompts=st.lists(st.text(min_size=1, max_size=8).map(str.strip).filter(bool), max_size=2, unique=True),
)
def test_folders_of_videos(folder: Path, entries: Any, prompts: list[str]) -> None:
    with trusted():
        make(folder, entries)
    if not holds_videos(folder):
        return
    with clear_errors():
        videos = read_folder(folder)
        suite = suite_of([videos], str(folder), None)
        assert sorted(suite.given) == sorted({video.key for video in videos})
        json.dumps([video.name for video in videos], ensure_ascii=False).encode()
        read_folder(folder, given_suite([*suite.prompts, *prompts][:3], "prompts", 1))


@fuzz(prompt=TEXTS.filter(bool), number=st.integers(0, 10**6), index=st.integers(0, 99))
def test_the_name_of_a_video_stays_in_its_folder(prompt: str, number: int, index: int) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        return
    name = video_name(number, prompt, index)
    assert Path(name).name == name
    assert name.isprintable()
    assert len(name.encode()) <= 250
    assert not name.startswith(".")


@fuzz(
    rows=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=3),
    suffix=st.sampled_from([".csv", ".tsv", ".jsonl"]),
    header=st.sampled_from(["winner,loser,prompt", "winner,loser", "prompt,winner,winner", ""]),
)
def test_files_of_preferred_videos(folder: Path, rows: Any, suffix: str, header: str) -> None:
    make(folder, [([b"a fox-0.mp4"], "file"), ([b"a fox-1.mp4"], "file"), ([b"a fox-00.mp4"], "pipe")])
    names = header.split(",")
    if suffix == ".jsonl":
        text = "\n".join(json.dumps(dict(zip(names, row, strict=False))) for row in rows)
    else:
        mark = "," if suffix == ".csv" else "\t"
        text = "\n".join(mark.join(row) for row in [names, *rows])
    path = folder / f"pairs{suffix}"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with clear_errors(naming=path.name):
        for row in PreferenceFile(path):
            assert row.winner.is_file()
            assert row.loser.is_file()


VALUE = st.recursive(
    TEXTS | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)


@fuzz(
    rows=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "prompt": VALUE,
                "videos": VALUE | st.lists(ODD, max_size=3),
                "preferred": VALUE,
                "video": VALUE,
            },
        ),
        max_size=3,
    )
)
def test_lines_about_videos(folder: Path, rows: Any) -> None:
    make(folder, [([b"a fox-0.mp4"], "file"), ([b"a fox-1.mp4"], "file")])
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with clear_errors():
        read_preferences(folder / "prompts.jsonl", folder)
    with clear_errors():
        find_clips(folder)
    with clear_errors():
        PromptRecord(folder).begin(["b.mp4"])
