"""A row of ``metrics.jsonl``, read and checked."""

from __future__ import annotations

from vpo_engine.texts import parse_json, shortened

Row = dict[str, int | float | str]
KINDS = ("train", "eval")
_LARGEST = 1e100
"""No number of a run comes near it; larger ones are no float any more where charts divide them."""


def parse_row(text: str, place: str) -> Row:
    """Return the row of a line. Raise ValueError, naming ``place``, for a line that no run has written."""
    try:
        row = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}); remove or repair it") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int) or "kind" not in row:
        raise ValueError(
            f"{place} is not a row of metrics: it must be an object with an integer 'step' and a 'kind'; remove or "
            "repair it"
        )
    for name, value in row.items():
        known = value in KINDS if name == "kind" else _is_number(value)
        if not known:
            raise ValueError(
                f"{place} has {shortened(f'{name}={value!r}')}, which no run logs; remove or repair it"
            )
    return row


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
