"""Write a study: a page of pairs of videos on which people vote without knowing which policy made which.

The page runs from a file, without a server. It holds no sign of the policies: its videos are copies under names of
random digits, and the key stands in a file outside of the folder that is handed out.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from vpo_engine.data.clips import SUFFIXES
from vpo_engine.evaluation.output import OutputFolder
from vpo_engine.full_disk import write_whole
from vpo_engine.runs.report_html import page
from vpo_engine.texts import read_json, why_no_file

SIDES = ("left", "right")
TIE = "tie"
QUESTION = "Which video is better, all in all?"
_ROLES = ("policy", "baseline")


@dataclass(frozen=True)
class StudyFiles:
    """The files of a study below the folder of an evaluation. ``key`` is for those who make the study alone."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "study"

    @property
    def page(self) -> Path:
        return self.folder / "index.html"

    @property
    def key(self) -> Path:
        return self.root / "study_key.json"

    @property
    def results(self) -> Path:
        return self.root / "study_results.json"

    def read_key(self) -> dict[str, Any]:
        """Read which side is whose. Raise ValueError where there is no study, or its key cannot be read."""
        if not self.key.is_file():
            raise ValueError(
                f"{self.root} has no {self.key.name}, so no study was written there; write one: "
                f"python -m vpo_engine.evaluate --study {self.root}"
            )
        try:
            key: dict[str, Any] = read_json(self.key)
            assert isinstance(key["study"], str)
            assert all(isinstance(key["arms"][role], str) for role in _ROLES)
            for pair in key["pairs"].values():
                assert {pair["left"], pair["right"]} == set(_ROLES)
                assert isinstance(pair["prompt"], str)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise ValueError(
                f"{self.key} is damaged ({error!r}); restore it from a copy, since the votes cannot be read without it"
            ) from error
        return key


def write_study(root: Path, seed: int, pairs: int | None) -> Path:
    """Write the study of a comparison in ``root``, and return its page.

    seed: decides sides and order, and which video of a prompt is shown; it is recorded in the key. pairs: how many
    pairs; None: one for each prompt. As many pairs have the policy on the left as on the right, or one more. Raise
    ValueError for an evaluation without a baseline, for more pairs than there are, and where a study is already.
    """
    results, files = OutputFolder(root).read_results(), StudyFiles(root)
    if "baseline" not in results["arms"]:
        raise ValueError(
            f"{root} is an evaluation of one policy, and a study needs pairs; evaluate with --baseline OTHER first"
        )
    if files.key.exists() or files.folder.exists():
        raise ValueError(
            f"{root} has a study already, which people may be voting on; remove {files.folder} and {files.key} to make "
            "another one, or read its votes by --votes FILE ..."
        )
    draw = random.Random(f"study {seed}")
    rows = _chosen(
        [row for row in results["videos"] if all(map(partial(_is_measured, row), _ROLES))], pairs, draw, root
    )
    lefts = [_ROLES[number % 2] for number in range(len(rows))]
    draw.shuffle(lefts)
    draw.shuffle(rows)
    names = random.SystemRandom()  # a name that could be computed would tell whose video it is
    videos = files.folder / "videos"
    videos.mkdir(parents=True)
    shown, key = [], {}
    for number, (row, left) in enumerate(zip(rows, lefts, strict=True)):
        sides = (left, "baseline" if left == "policy" else "policy")
        pair = {"id": f"pair-{number:03d}", "prompt": row["prompt"]}
        for side, role in zip(SIDES, sides, strict=True):
            source = root / row[role]["file"]
            name = f"{names.getrandbits(64):016x}{source.suffix}"
            shutil.copyfile(source, videos / name)
            pair[side] = f"videos/{name}"
        shown.append(pair)
        key[pair["id"]] = {
            "prompt": row["prompt"],
            "index": row["index"],
            **dict(zip(SIDES, sides, strict=True)),
        }
    study = f"{names.getrandbits(48):012x}"
    labels = {role: results["arms"][role]["label"] for role in _ROLES}
    content = {"study": study, "seed": seed, "arms": labels, "pairs": key}
    write_whole(files.key, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_whole(files.page, _page(study, shown, results["settings"]))
    return files.page


def _is_measured(row: Mapping[str, Any], role: str) -> bool:
    """Return whether the row of a pair has this side's video, and it could be measured."""
    return role in row and "problem" not in row[role]


def _chosen(
    rows: Sequence[Mapping[str, Any]], count: int | None, draw: random.Random, root: Path
) -> list[Mapping[str, Any]]:
    """Choose rows whose videos are there: a random one of each prompt first, then further ones of all prompts."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        for role in _ROLES:
            file = root / row[role]["file"]
            if file.suffix.lower() not in SUFFIXES:
                raise ValueError(
                    f"{file}, a video of the comparison, is none by its name; repair results.json, or start the "
                    "evaluation again"
                )
            if why_no_file(file):
                raise ValueError(
                    f"the video {file} of the comparison is gone; start the evaluation again, which makes it anew"
                )
        by_prompt.setdefault(row["prompt"], []).append(row)
    if not rows:
        raise ValueError(
            f"{root} has no prompt with a video of both policies that could be read, so there is nothing to vote on; "
            "repair the files that results.json names under problems, and start the evaluation again, which makes "
            "missing ones"
        )
    for same in by_prompt.values():
        draw.shuffle(same)
    wanted = len(by_prompt) if count is None else count
    if not 1 <= wanted <= len(rows):
        raise ValueError(
            f"--pairs {wanted}: the comparison has {len(rows)} pairs of videos; give from 1 to {len(rows)}"
        )
    turns = max(len(same) for same in by_prompt.values())
    ordered: list[Mapping[str, Any]] = []
    for turn in range(turns):
        rest = [same[turn] for same in by_prompt.values() if turn < len(same)]
        draw.shuffle(rest)
        ordered += rest
    return ordered[:wanted]


def _page(study: str, pairs: Sequence[Mapping[str, str]], settings: Mapping[str, Any]) -> str:
    here = Path(__file__).parent
    script = (here / "study.js").read_text(encoding="utf-8")
    style = (here / "study.css").read_text(encoding="utf-8")
    data = json.dumps({"study": study, "pairs": list(pairs)}, ensure_ascii=False)
    size = " small" if min(settings["height"], settings["width"]) <= 256 else ""
    size += " wide" if settings["width"] > settings["height"] else ""
    form = Template((here / "study.html").read_text(encoding="utf-8"))
    body = form.substitute(size=size, data=escape(data), question=escape(QUESTION), count=len(pairs))
    return page("Which video is better?", body, style, script, videos="file: 'self'")
