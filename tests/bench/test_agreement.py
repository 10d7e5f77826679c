"""Test the table of agreement against numbers computed by hand, and that exact settings agree with themselves."""

from __future__ import annotations

import pytest
import torch
from agreement import END, START, Found, interval, line, main, measure
from report import replaced

EXACT = Found(
    winner=[torch.tensor([0, 1]), torch.tensor([2, 3])],
    loser=[torch.tensor([3, 0]), torch.tensor([1, 2])],
    scores=[
        torch.tensor([[4.0, 3.0, 2.0, 0.0], [1.0, 5.0, 2.0, 3.0]]),
        torch.tensor([[3.0, 1.0, 5.0, 4.0], [3.0, 2.0, 1.0, 7.0]]),
    ],
    sampling=4.0,
    seconds=8.0,
)


def shares(cells: list[str]) -> list[str]:
    return [cell.partition(" (")[0] for cell in cells]


def test_pairs_winners_losers_and_gaps_are_counted_apart() -> None:
    found = Found(
        winner=[torch.tensor([0, 1, 3, 2])],
        loser=[torch.tensor([3, 2, 1, 3])],
        scores=[],
        sampling=3.0,
        seconds=2.0,
    )
    # Gaps in exact scores: 4, 3, 3 and -6, of 4, 4, 4 and 6.
    assert shares(line("x", found, EXACT)) == ["`x`", "25 %", "50 %", "50 %", "22 %", "0.75", "0.25"]


def test_the_exact_pairs_keep_their_whole_gap() -> None:
    assert shares(line("x", EXACT, EXACT)) == ["`x`", "100 %", "100 %", "100 %", "100 %", "1.00", "1.00"]


def test_an_interval_covers_the_mean_of_many_and_has_no_width_where_nothing_varies() -> None:
    values = (torch.arange(400) % 4 == 0).double()
    text = interval(values)
    assert text.startswith("25 % (")
    low, high = (float(number) for number in text[len("25 % (") : -1].split(" to "))
    # A share of 0.25 of 400 has a standard error of 2.17 per cent.
    assert low == pytest.approx(25 - 1.96 * 2.17, abs=0.8)
    assert high == pytest.approx(25 + 1.96 * 2.17, abs=0.8)
    assert interval(torch.ones(9).double()) == "100 % (100 to 100)"


@pytest.mark.long
def test_smaller_batches_and_previews_of_the_last_step_agree() -> None:
    sets = [
        "rollout.batch_size=4",
        "rollout.prune.after=0.9 rollout.prune.keep=3",
        "rollout.explore.steps=11",
    ]
    table = measure(sets, prompts=2, candidates=4)
    assert [shares(cells)[1:5] for cells in table.lines] == [["100 %"] * 4] * 3


def test_the_page_needs_its_markers() -> None:
    page = "before\n<!-- agreement -->\nold\n<!-- end of agreement -->\nafter\n"
    assert replaced(page, "new\n", START, END) == (
        "before\n<!-- agreement -->\n\nnew\n\n<!-- end of agreement -->\nafter\n"
    )
    with pytest.raises(ValueError, match="must hold one line '<!-- agreement -->'"):
        replaced("no markers", "new", START, END)


def test_wrong_settings_are_one_clear_line(capsys) -> None:
    assert main(["rollout.stepz=3"]) == 1
    assert "unknown key rollout.stepz; did you mean rollout.steps?" in capsys.readouterr().err
