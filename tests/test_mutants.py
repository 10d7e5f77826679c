"""Test the command that tries mutations: what is stale is refused, with a line that says why."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import mutants
import pytest

FILE = "vpo_engine/seeding.py"
FITS = ("fits", FILE, "repr((seed, *key))", "repr((0, *key))", ("tests/none.py",))
STALE = [
    (("gone", FILE, "a text that is nowhere", "x", ()), "gone: its old text occurs 0 times"),
    (("twice", FILE, "torch.Generator", "x", ()), "twice: its old text occurs 2 times"),
    (("no file", "vpo_engine/nothing.py", "x", "y", ()), "no file: "),
    (("no code", FILE, "repr((seed, *key))", "repr((seed", ()), "no code: "),
]


@pytest.mark.parametrize(("mutation", "line"), STALE)
def test_nothing_is_tried_while_a_mutation_is_stale(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mutation: tuple[str, str, str, str, tuple[str, ...]],
    line: str,
) -> None:
    monkeypatch.setitem(sys.modules, "a_list", SimpleNamespace(MUTATIONS=[FITS, mutation]))
    assert mutants.main(["--from", "a_list"]) == 1
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"STALE {line}")


def test_line_breaks_and_a_trailing_comma_do_not_make_a_mutation_stale() -> None:
    mutation = mutants.Mutation("one", "some.py", "f(a, b)", "f(b, a)", ())
    assert mutants.mutated("y = f(\n    a,\n    b,\n)\n", mutation) == "y = f(b, a)\n"


def test_all_mutations_of_the_list_fit_the_code() -> None:
    from mutations import MUTATIONS

    assert mutants.stale_ones([mutants.Mutation(*row) for row in MUTATIONS]) == []
    assert len({row[0] for row in MUTATIONS}) == len(MUTATIONS) >= 60
