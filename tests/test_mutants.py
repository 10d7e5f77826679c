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


def test_pieces_are_the_whole_list_and_keep_tests_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"number {row}", *FITS[1:4], (f"tests/{row % 3}.py",)) for row in range(11)]
    monkeypatch.setitem(sys.modules, "a_list", SimpleNamespace(MUTATIONS=rows))
    pieces = []
    for number in range(1, 5):
        assert mutants.main(["--from", "a_list", "--list", "--piece", f"{number}/4"]) == 0
        pieces.append(capsys.readouterr().out.splitlines()[:-1])
    assert [len(piece) for piece in pieces] == [2, 3, 3, 3]
    names = [name for piece in pieces for name in piece]
    assert sorted(names) == sorted(row[0] for row in rows)
    assert [int(name.split()[1]) % 3 for name in names] == [0] * 4 + [1] * 4 + [2] * 3
    for wrong in ("0/4", "5/4", "half"):
        with pytest.raises(SystemExit):
            mutants.main(["--from", "a_list", "--list", "--piece", wrong])
        assert "is no piece; give K/N with K from 1 to N" in capsys.readouterr().err


def test_line_breaks_and_a_trailing_comma_do_not_make_a_mutation_stale() -> None:
    mutation = mutants.Mutation("one", "some.py", "f(a, b)", "f(b, a)", ())
    assert mutants.mutated("y = f(\n    a,\n    b,\n)\n", mutation) == "y = f(b, a)\n"


def test_all_mutations_of_the_list_fit_the_code() -> None:
    from mutations import MUTATIONS

    assert mutants.stale_ones([mutants.Mutation(*row) for row in MUTATIONS]) == []
    assert len({row[0] for row in MUTATIONS}) == len(MUTATIONS) >= 60
