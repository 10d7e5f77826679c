"""The pair ledger of a run: which candidates of which prompts were compared, and what came of it.

    RUN/ledger/pairs_0000.jsonl                         a line for every prompt of every step, of process 0
    RUN/ledger/latents/step_00000012_0000.safetensors   `winner`, `loser` [p, C, T, H, W] of the pairs it kept there

A line is an object with the fields of ``LedgerPair``, of which `row` is the pair's place in its file of latents, null
where none are kept. Candidate c of a prompt was sampled from noise that is a function of (seed, position, c) alone, so
that an audit can make it again from the policy of that step.
"""

from __future__ import annotations

import heapq
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LedgerPair:
    """One prompt of one step.

    position: of the prompt in the stream. seed: of the run. candidates: numbers of all that were scored. scores:
    {dimension: score of each of them}. selected: the scalar of each that pairs are made of. winner, loser: candidate
    numbers. gap: of their scalars. kept: False for a tie, which was not trained on. weight: of the pair's loss, 0 for a
    tie. latents_file: where its latents are, None if they were not stored; row: its place there.
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
        """{dimension: score} of a candidate number."""
        place = self.candidates.index(candidate)
        return {name: values[place] for name, values in self.scores.items()}

    def latents(self) -> tuple[Tensor, Tensor]:
        """Clean latents [C, T, H, W] of winner and loser, as they were sampled. ValueError if they are not stored."""
        if self.latents_file is None or self.row is None:
            raise ValueError(
                f"the pair of step {self.step}, position {self.position} has no latents in the ledger; they are kept "
                "for pairs that are no tie, by pairs.ledger=latents"
            )
        try:
            with safe_open(self.latents_file, framework="pt") as file:
                winner, loser = (file.get_slice(name)[self.row] for name in ("winner", "loser"))
        except (SafetensorError, FileNotFoundError, IndexError) as error:
            raise ValueError(
                f"'{self.latents_file}' does not hold pair {self.row}, as the ledger says: {error}"
            ) from error
        return winner, loser


_FIELDS = tuple(field.name for field in fields(LedgerPair) if field.name != "latents_file")


class LedgerWriter:
    """One process's lines. They are on disk (with the system) when ``write`` returns, the latents before them."""

    def __init__(self, folder: Path, rank: int) -> None:
        """``folder``: the run's ledger; made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._rank = folder, rank

    def write(
        self, step: int, pairs: Sequence[LedgerPair], latents: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Append the prompts of one step; latents: of winners and losers [p, C, T, H, W], which ``row`` counts."""
        if latents is not None and len(latents[0]):
            path = _latents_file(self._folder, step, self._rank)
            path.parent.mkdir(exist_ok=True)
            unfinished = path.with_name(f".{path.name}.tmp")
            winner, loser = (part.detach().cpu().contiguous() for part in latents)
            save_file({"winner": winner, "loser": loser}, unfinished)
            unfinished.replace(path)
        lines = (json.dumps(_line(pair), ensure_ascii=False, allow_nan=False) + "\n" for pair in pairs)
        data = memoryview("".join(lines).encode())
        with _pairs_file(self._folder, self._rank).open("ab", buffering=0) as file:
            while data:
                data = data[file.write(data) :]


def read_ledger(path: str | Path) -> Iterator[LedgerPair]:
    """Every pair of a ledger, of all processes, in the order of steps and positions; nothing is held in memory.

    path: a run directory or its ledger folder. A last line without its end is one whose writing was interrupted, and
    is left out with a warning. FileNotFoundError where there is no ledger, ValueError naming file and line for any
    other line that cannot be read.
    """
    folder = _folder_of(Path(path))
    files = sorted(folder.glob("pairs_*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"no pair ledger at {path}; a run writes one into its directory with pairs.ledger=scores or latents"
        )
    return heapq.merge(*(_read(file) for file in files), key=lambda pair: (pair.step, pair.position))


def truncate_ledger(folder: Path, step: int) -> None:
    """Forget everything after ``step``, of all processes: the resumed run will write it again. Atomic for each file."""
    for path in sorted(folder.glob("pairs_*.jsonl")):
        unfinished = path.with_name(f".{path.name}.tmp")
        with unfinished.open("wb") as file:
            file.writelines(line for line, values in _lines(path) if values["step"] <= step)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    for latents in folder.glob("latents/*"):
        if latents.name.startswith(".") or int(latents.name.split("_")[1]) > step:
            latents.unlink()


def _folder_of(path: Path) -> Path:
    return path / "ledger" if (path / "ledger").is_dir() else path


def _pairs_file(folder: Path, rank: int) -> Path:
    return folder / f"pairs_{rank:04d}.jsonl"


def _latents_file(folder: Path, step: int, rank: int) -> Path:
    return folder / "latents" / f"step_{step:08d}_{rank:04d}.safetensors"


def _line(pair: LedgerPair) -> dict[str, Any]:
    values = asdict(pair)
    return {name: values[name] for name in _FIELDS}


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Whole lines and what they say."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                _logger.warning("'%s': the last line was not finished when the run stopped; left out", path)
                return
            try:
                values = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"'{path}' line {number} is not JSON ({error}); remove or repair it"
                ) from error
            if not isinstance(values, dict) or set(values) != set(_FIELDS):
                raise ValueError(
                    f"'{path}' line {number} is no pair: it must be an object of {', '.join(_FIELDS)}; remove or "
                    "repair it"
                )
            yield line, values


def _read(path: Path) -> Iterator[LedgerPair]:
    rank = int(path.stem.rpartition("_")[2])
    for _, values in _lines(path):
        stored = None if values["row"] is None else _latents_file(path.parent, values["step"], rank)
        values["candidates"], values["selected"] = tuple(values["candidates"]), tuple(values["selected"])
        values["scores"] = {name: tuple(each) for name, each in values["scores"].items()}
        yield LedgerPair(**values, latents_file=stored)


def stack_latents(pairs: Sequence[LedgerPair]) -> tuple[Tensor, Tensor]:
    """Winners and losers [p, C, T, H, W] of pairs with latents, at least one."""
    winners, losers = zip(*(pair.latents() for pair in pairs), strict=True)
    return torch.stack(winners), torch.stack(losers)
