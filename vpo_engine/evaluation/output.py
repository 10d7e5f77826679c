"""The folder of an evaluation: what it was made of, its videos, records and results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpo_engine.evaluation.arms import Arm
from vpo_engine.full_disk import write_whole
from vpo_engine.texts import read_json

_IDENTITY = "evaluation.json"


@dataclass(frozen=True)
class OutputFolder:
    """The files of an evaluation below ``root``."""

    root: Path

    @property
    def videos(self) -> Path:
        return self.root / "videos"

    @property
    def records(self) -> Path:
        return self.root / "records"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def page(self) -> Path:
        return self.root / "evaluation.html"

    @property
    def vbench(self) -> Path:
        return self.root / "vbench"

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise ValueError, naming what differs, if the folder belongs to another evaluation, or to none."""
        file = self.root / _IDENTITY
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"--out {self.root} is a file; give a folder, or a name that is not taken")
        if not file.is_file():
            if self.root.is_dir() and any(self.root.iterdir()):
                raise ValueError(
                    f"--out {self.root} is not empty and holds no evaluation; give a new folder, or an empty one"
                )
            return
        try:
            before = _flat(read_json(file))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({error}); give another folder by --out") from error
        now = _flat(identity)
        different = [
            f"{name}: {_short(before.get(name))} -> {_short(now.get(name))}"
            for name in dict.fromkeys([*before, *now])
            if before.get(name) != now.get(name)
        ]
        if different:
            raise ValueError(
                f"{self.root} holds an evaluation of other settings ({'; '.join(different)}), whose results these "
                "would be mixed with; give another folder by --out, or the settings of before"
            )

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Make the folder, and record what it is of."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_whole(self.root / _IDENTITY, json.dumps(identity, indent=1, ensure_ascii=False) + "\n")

    def write_results(self, results: Mapping[str, Any]) -> None:
        write_whole(self.results, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def read_results(self) -> dict[str, Any]:
        """Read ``results.json``. Raise ValueError where there is none, or none that can be read."""
        if not self.results.is_file():
            raise ValueError(
                f"{self.root} holds no {self.results.name}; give the folder of an evaluation that has ended (its --out)"
            )
        try:
            results: dict[str, Any] = read_json(self.results)
            _check_results(results)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.results} is damaged ({error!r}); start the evaluation again, which writes it anew"
            ) from error
        return results


def default_folder(arms: Sequence[Arm]) -> Path:
    """Return evaluations/NAME for the arms; other steps of a run get other folders."""
    names = []
    for arm in arms:
        if arm.source is not None and arm.source.checkpoint is not None:
            root = arm.source.checkpoint.resolve().parent.parent
            names.append(f"{root.name}-step{arm.source.step}")
        elif arm.source is not None and "started from" in arm.label:
            names.append("base")
        else:
            names.append(Path(arm.label).resolve().name)
    plain = [re.sub(r"[^\w.-]+", "-", name).strip("-.") or "videos" for name in names]
    return Path("evaluations") / "-against-".join(plain)


def _check_results(results: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError unless results have what a study takes of them."""
    sizes = [results["settings"][name] for name in ("height", "width")]
    labels = [results["arms"]["policy"]["label"], *(arm["label"] for arm in results["arms"].values())]
    texts = [row["prompt"] for row in results["videos"]]
    files = [row[role]["file"] for row in results["videos"] for role in results["arms"] if role in row]
    whole = [*sizes, *(row["index"] for row in results["videos"])]
    if any(type(number) is not int for number in whole):
        raise TypeError("a size, or the number of a video, is no whole number")
    if any(not isinstance(text, str) or "\0" in text for text in (*labels, *texts, *files)):
        raise TypeError("a label, a prompt or the name of a file is no text")


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text
