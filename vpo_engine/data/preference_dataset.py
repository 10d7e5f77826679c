"""The preference dataset of a run: the candidates of every prompt with their scores, and the pair that was chosen.

    RUN/preference_dataset/pairs_0000.jsonl                         a line for every prompt of every step, of process 0
    RUN/preference_dataset/latents/step_00000012_0000.safetensors   `winner`, `loser` [p, C, T, H, W] of its pairs

From 16 MiB on the lines of a process are in several parts: pairs_0000.0001.jsonl, then 0002, and pairs_0000.jsonl last
(see ``line_files``).

A line is an object with the fields of ``StoredPair``. `row` is the pair's position in its file of latents, null if its
latents were not stored. Candidate c of a prompt was sampled from noise that is a function of (seed, position, c) alone,
so it can be sampled again with the policy of that step.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vpo_engine.full_disk import sync_file, write_by, writing
from vpo_engine.line_files import Line, LineFile, read_lines
from vpo_engine.texts import parse_json, shortened


@dataclass(frozen=True)
class StoredPair:
    """The stored results of one prompt in one step.

    position: the prompt's position in the stream. seed: the run's seed. candidates: the numbers of all candidates that
    were scored. scores: {dimension: score of each candidate}. selected: the score of each candidate from which the pair
    was chosen. winner, loser: candidate numbers. gap: the difference of their selected scores. kept: False for a tie,
    which was not trained on. weight: the weight of the pair's loss, 0 for a tie. latents_file: the file of its latents,
    None if they were not stored. row: its position in that file.
    """

    step: int
    position: int
    prompt: str
    seed: int
    candidates: tuple[int, ...]
    scores: dict[str, tuple[float, ...]]
    selected: tuple[float, ...]
    winner: int
    loser: int
    gap: float
    kept: bool
    weight: float
    row: int | None = None
    latents_file: Path | None = None

    def score(self, candidate: int) -> dict[str, float]:
        """Return {dimension: score} of the candidate with this number."""
        place = self.candidates.index(candidate)
        return {name: values[place] for name, values in self.scores.items()}

    def latents(self) -> tuple[Tensor, Tensor]:
        """Read the clean latents [C, T, H, W] of winner and loser. Raise ValueError if they were not stored."""
        if self.latents_file is None or self.row is None:
            raise ValueError(
                f"the pair of step {self.step}, position {self.position} has no latents in the preference dataset; "
                "pairs.dataset=latents stores those of all pairs that are not ties"
            )
        with self._open() as file:
            winner, loser = (file.get_slice(name)[self.row] for name in ("winner", "loser"))
        return winner, loser

    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape (C, T, H, W) of the stored latents, which are not read; errors as in ``latents``."""
        with self._open() as file:
            return tuple(file.get_slice("winner").get_shape()[1:])

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.latents_file, framework="pt") as file:
                shapes = {tuple(file.get_slice(name).get_shape()[1:]) for name in ("winner", "loser")}
                if len(shapes) > 1:
                    raise IndexError(f"its winners and losers have different shapes, {sorted(shapes)}")
                yield file
        except Exception as error:  # a damaged or hostile file can raise nearly anything
            raise ValueError(
                f"'{self.latents_file}' does not have pair {self.row}, although the preference dataset says so: {error}"
            ) from error


_FIELDS = tuple(field.name for field in fields(StoredPair) if field.name != "latents_file")


class DatasetWriter:
    """Writes the pairs of one process. When ``write`` returns, latents and lines are with the operating system."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Make ``folder``, the run's preference dataset, if it does not exist."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._rank = folder, rank
        self._unsynced: list[Path] = []

    def write(
        self, step: int, pairs: Sequence[StoredPair], latents: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Append the pairs of one step. latents: winners and losers [p, C, T, H, W], at the positions ``row``."""
        if latents is not None and len(latents[0]):
            path = _latents_file(self._folder, step, self._rank)
            path.parent.mkdir(exist_ok=True)
            winner, loser = (part.detach().cpu().contiguous() for part in latents)
            write_by(path, lambda unfinished: save_file({"winner": winner, "loser": loser}, unfinished))
            self._unsynced.append(path)
        lines = (json.dumps(_line(pair), ensure_ascii=False, allow_nan=False) + "\n" for pair in pairs)
        data = "".join(lines).encode()
        with closing(LineFile(_pairs_file(self._folder, self._rank))) as file:
            file.append(data)

    def sync(self) -> None:
        """Bring all pairs and latents to the disk, where they outlive a power cut."""
        lines, latents = _pairs_file(self._folder, self._rank), self._folder / "latents"
        for path in (*self._unsynced, lines, self._folder, latents):
            if path.exists():
                with writing(path):
                    sync_file(path)
        self._unsynced.clear()


def read_dataset(path: str | Path) -> Iterator[StoredPair]:
    """Iterate over the pairs of all processes, in the order of steps and positions, without loading all of them.

    path: a run directory or its folder preference_dataset. If the last line of a file has no newline, its writing was
    interrupted, and it is left out, with a warning. Raise FileNotFoundError if there is no dataset; ValueError,
    naming file and line, for any other line that cannot be read.
    """
    files = _pairs_files(_folder_of(Path(path)))
    if not files:
        raise FileNotFoundError(
            f"no preference dataset at {path}; a run writes one into its directory with pairs.dataset=scores or latents"
        )
    return heapq.merge(*(_read(file) for file in files), key=lambda pair: (pair.step, pair.position))


def truncate_dataset(folder: Path, step: int) -> None:
    """Delete the pairs of all steps after ``step``; the resumed run will write them again. Atomic for each file."""

    def stays(line: Line) -> bool:
        values = _values(line)
        return values["step"] <= step

    for path in _pairs_files(folder):
        with closing(LineFile(path)) as file:
            file.cut(stays)
    for latents in folder.glob("latents/*"):
        if latents.name.startswith(".") or _step_of(latents) > step:
            latents.unlink()


def _step_of(latents: Path) -> int:
    """Return the step of a file of latents; 0 for another file, which is nobody's to remove."""
    found = re.fullmatch(r"step_(\d+)_\d+\.safetensors", latents.name)
    return 0 if found is None else int(found[1])


def _folder_of(path: Path) -> Path:
    return path / "preference_dataset" if (path / "preference_dataset").is_dir() else path


def _pairs_files(folder: Path) -> list[Path]:
    """Return the file of each process that wrote to the dataset; what is in its parts is not told apart."""
    return sorted({folder / f"{path.name.partition('.')[0]}.jsonl" for path in folder.glob("pairs_*.jsonl")})


def _pairs_file(folder: Path, rank: int) -> Path:
    return folder / f"pairs_{rank:04d}.jsonl"


def _latents_file(folder: Path, step: int, rank: int) -> Path:
    return folder / "latents" / f"step_{step:08d}_{rank:04d}.safetensors"


def _line(pair: StoredPair) -> dict[str, Any]:
    values = asdict(pair)
    return {name: values[name] for name in _FIELDS}


def _values(line: Line) -> dict[str, Any]:
    place = f"'{line.file}' line {line.number}"
    try:
        values = parse_json(line.content.decode())
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}); remove or repair it") from error
    if not isinstance(values, dict) or set(values) != set(_FIELDS):
        raise ValueError(
            f"{place} is not a pair: it must be an object with {', '.join(_FIELDS)}; remove or repair it"
        )
    if wrong := _wrong_value(values):
        raise ValueError(
            f"{place}: {wrong[0]} is {shortened(repr(wrong[1]))}, which no run writes; remove or repair the line"
        )
    return values


def _wrong_value(values: dict[str, Any]) -> tuple[str, Any] | None:
    """Return the name and the value of a field that has another type than ``DatasetWriter`` writes."""
    lists, scores = (values["candidates"], values["selected"]), values["scores"]
    kinds: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("step", "position", "seed", "winner", "loser"), (int,)),
        **dict.fromkeys(("gap", "weight"), (int, float)),
        "prompt": (str,),
        "kept": (bool,),
        "row": (int, type(None)),
        "candidates": (list,),
        "selected": (list,),
        "scores": (dict,),
    }
    for name, types in kinds.items():
        if type(values[name]) not in types:
            return name, values[name]
    for name in ("step", "position", "row"):
        if (values[name] or 0) < 0:
            return name, values[name]
    if any(type(number) is not int for number in lists[0]):
        return "candidates", lists[0]
    if len(lists[1]) != len(lists[0]) or any(type(number) not in (int, float) for number in lists[1]):
        return "selected", lists[1]
    for each in scores.values():
        if type(each) is not list or len(each) != len(lists[0]):
            return "scores", scores
        if any(type(number) not in (int, float) for number in each):
            return "scores", scores
    if not {values["winner"], values["loser"]} <= set(lists[0]):
        return "winner or loser", [values["winner"], values["loser"]]
    return None


def _read(path: Path) -> Iterator[StoredPair]:
    number = path.stem.rpartition("_")[2]
    if not (number.isascii() and number.isdigit()):
        raise ValueError(
            f"'{path}' is no file of a preference dataset, whose names are like {_pairs_file(path.parent, 0).name}; "
            "take it out of the folder"
        )
    rank = int(number)
    for values in map(_values, read_lines(path)):
        stored = None if values["row"] is None else _latents_file(path.parent, values["step"], rank)
        values["candidates"], values["selected"] = tuple(values["candidates"]), tuple(values["selected"])
        values["scores"] = {name: tuple(each) for name, each in values["scores"].items()}
        yield StoredPair(**values, latents_file=stored)


def stack_latents(pairs: Sequence[StoredPair]) -> tuple[Tensor, Tensor]:
    """Read the winners and losers [p, C, T, H, W] of at least one pair with stored latents."""
    winners, losers = zip(*(pair.latents() for pair in pairs), strict=True)
    return torch.stack(winners), torch.stack(losers)
