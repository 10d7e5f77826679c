"""Clips of the sprites world and a failing command, for tests of ``python -m vpo_engine.rank``."""

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vpo_engine.data.sprites.world import Attributes, render
from vpo_engine.rank import main

CAPTIONS = ("a red circle moving left", "a blue square moving up")


def sprites(caption: str, seed: int = 0) -> Tensor:
    """A clean clip, uint8 [17, 32, 32, 3]."""
    return render(Attributes.of([caption]), torch.Generator().manual_seed(seed))[0]


def frozen(clip: Tensor) -> Tensor:
    return clip[:1].expand_as(clip).contiguous()


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of error of a command that must fail; a note about prompts of file names may stand before it."""
    assert main([str(argument) for argument in arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    *notes, error = shown.err.splitlines(keepends=True)
    assert all(note.startswith("note: the prompts of ") for note in notes)
    assert len(notes) <= 1
    assert error.startswith("error: ")
    assert error.endswith("\n")
    return error
