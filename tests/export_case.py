"""Published folders with runs of them, and the export command, for tests of exports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_pipelines import FOLDERS, LORA, NEGATIVE, run_config, sized, trained

from vpo_engine import export


@dataclass(frozen=True)
class Case:
    """A published folder and two runs of it: one trained all weights, one an adapter of scale 1.5."""

    kind: str
    published: Path
    full: Path
    lora: Path


def make_case(kind: str, root: Path) -> Case:
    published = FOLDERS[kind](root / "published")
    given = [*sized(kind), f"model.negative_prompt={NEGATIVE}"]
    full = trained(run_config(kind, published, root / "full", *given), 2, 4)
    return Case(kind, published, full, trained(run_config(kind, published, root / "lora", *given, *LORA), 2))


def exported(run: Path, out: Path, *options: str) -> Path:
    assert export.main([str(run), "--out", str(out), *options]) == 0
    return out


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Return the one line of error of an export that must fail."""
    assert export.main([str(argument) for argument in arguments]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    return shown
