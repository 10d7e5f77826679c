"""Pieces of HTML that the report's sections share."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def missing(title: str, text: str) -> str:
    """Return a section that says why it is empty."""
    return f'<section><h2>{escape(title)}</h2><p class="missing">{escape(text)}</p></section>'


def cells(texts: Sequence[str], heads: Sequence[str]) -> str:
    """Return cells of numbers. On narrow screens each is shown beside its head."""
    return "".join(
        f'<td class="num" data-head="{escape(head)}">{escape(text)}</td>'
        for text, head in zip(texts, heads, strict=True)
    )


def table(heads: Sequence[str], body: str) -> str:
    """Return a table of rows that each begin with a cell of text; ``heads`` are those of all columns."""
    first, *others = (escape(head) for head in heads)
    row = f'<th scope="col">{first}</th>' + "".join(
        f'<th scope="col" class="num">{head}</th>' for head in others
    )
    return f'<div class="table"><table><thead><tr>{row}</tr></thead><tbody>{body}</tbody></table></div>'


def command(text: str) -> str:
    """Return a block with a command that can be copied."""
    return (
        f'<div class="command"><pre><code>{escape(text)}</code></pre>'
        '<button type="button" class="copy" hidden>Copy</button></div>'
    )
