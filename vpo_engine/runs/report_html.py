"""Pieces of HTML that the report's sections, and other pages in its look, share."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path


def page(title: str, body: str, style: str, script: str, videos: str = "'none'") -> str:
    """Return a whole page in the look of the report, which loads nothing from elsewhere.

    style: what is added to the report's own. Its security policy allows the page's own script and inline images, and
    videos from the source ``videos``, and nothing else.
    """
    common = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"media-src {videos}",
            "style-src 'unsafe-inline'",
            f"script-src 'sha256-{digest}'",
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{common}{style}</style></head>\n"
        f"<body><main>\n{body}\n</main><script>{script}</script></body></html>\n"
    )


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
