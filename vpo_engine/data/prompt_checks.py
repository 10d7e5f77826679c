"""Checks of prompts at the start of a run: rows that it cannot use, and oddities of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from vpo_engine.data.prompts import Prompts, PromptStream, place_of

LOOKED_AT = 10_000
"""Of a file with more prompts, the first of this number are looked at, and all that the run's steps take."""
_SHOWN = 5
"""Rows that a message names."""
_LONGEST = 60
"""Characters of a prompt that a message quotes."""


def rows_looked_at(prompts: Prompts, seed: int, taken: int) -> Sequence[int]:
    """Return the numbers of the prompts that are looked at before a run of this seed, which takes ``taken`` prompts."""
    if len(prompts) <= LOOKED_AT:
        return range(len(prompts))
    stream = PromptStream(prompts, seed)
    used = {stream.index(position) for position in range(min(taken, len(prompts)))}
    return sorted(used.union(range(LOOKED_AT)))


def refuse_rows(prompts: Prompts, reasons: Mapping[int, str], looked_at: int, remedy: str) -> None:
    """Raise ValueError if there is any reason not to use a prompt; it names the places of the first and the number."""
    if not reasons:
        return
    first, *others = sorted(reasons)
    more = "" if len(others) <= _SHOWN else f" and {len(others) - _SHOWN} more"
    also = (
        f"; likewise {', '.join(place_of(prompts, row) for row in others[:_SHOWN])}{more}" if others else ""
    )
    count = f"{len(reasons)} of {looked_at} prompts cannot be used"
    raise ValueError(f"{place_of(prompts, first)}: {reasons[first]}{also}. {count}: {remedy}")


def check_readable(
    prompts: Prompts, rows: Sequence[int], readable: Callable[[str], str], model: str
) -> list[str]:
    """Raise ValueError for prompts of which ``model`` reads no letter or digit; return a note about shortened ones.

    ``readable`` gives what the model reads of a prompt.
    """
    empty: dict[int, str] = {}
    short: dict[int, str] = {}
    for row in rows:
        prompt = prompts[row]
        left = readable(prompt)
        if not _letters(left):
            empty[row] = f"{shown(prompt)} has no letter or digit that {model} reads"
        elif 2 * _letters(left) < _letters(prompt):
            short[row] = f"{shown(prompt)} -> {shown(left)}"
    remedy = (
        f"delete these rows or write them in another way (the preparation of texts of {model} may drop scripts, links, "
        "sizes and file names)"
    )
    refuse_rows(prompts, empty, len(rows), remedy)
    if not short:
        return []
    row, example = next(iter(short.items()))
    return [
        f"note: {model} does not read more than half of the letters of {len(short)} of {len(rows)} prompts, such as "
        f"{place_of(prompts, row)}: {example}"
    ]


def describe_repeats(name: str, prompts: Prompts, rows: Sequence[int]) -> list[str]:
    """Return a note if prompts occur more than once."""
    counts = Counter(prompts[row] for row in rows)
    repeated = [prompt for prompt, count in counts.items() if count > 1]
    if not repeated:
        return []
    return [
        f"note: {name} has {len(rows) - len(counts)} prompts that repeat an earlier one, such as "
        f"{shown(repeated[0])} ({counts[repeated[0]]} times); each counts as a prompt of its own"
    ]


def describe_overlap(held_out: Prompts, train: Prompts, rows: Sequence[int]) -> list[str]:
    """Return a note if held-out prompts are trained on, too."""
    trained = {train[row]: row for row in reversed(rows)}
    both = [row for row in range(len(held_out)) if held_out[row] in trained]
    if not both:
        return []
    first = held_out[both[0]]
    return [
        f"note: {len(both)} of {len(held_out)} held-out prompts are training prompts, too, such as {shown(first)} "
        f"({place_of(held_out, both[0])}; {place_of(train, trained[first])}); on these the evaluation does not "
        "tell how the policy does on new prompts"
    ]


def shown(prompt: str) -> str:
    """Return a prompt in quotes, shortened if it is long."""
    return repr(prompt if len(prompt) <= _LONGEST else f"{prompt[: _LONGEST - 3]}...")


def _letters(text: str) -> int:
    return sum(character.isalnum() for character in text)
