"""The form of a command's help: its own docstring, filled to the width of the terminal."""

from __future__ import annotations

import argparse
import re
import textwrap


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Fill the paragraphs of a description to the terminal's width; indented lines stay lines of their own."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled: list[str] = []
        paragraph: list[str] = []
        for line in [*text.strip().splitlines(), ""]:
            if line and not line[0].isspace():
                paragraph.append(line)
                continue
            filled += textwrap.wrap(" ".join(paragraph), width, break_on_hyphens=False)
            paragraph = []
            filled += textwrap.wrap(
                line, width, subsequent_indent=" " * _second_column(line), break_on_hyphens=False
            ) or [""]
        return "\n".join(indent + line for line in filled[:-1])


def _second_column(line: str) -> int:
    """Return where the second column of an indented line of a table begins; of a command, four behind its indent."""
    start = len(line) - len(line.lstrip())
    columns = re.match(r"\s*\S+(?: \S+)*\s{2,}(?=\S)", line)
    return columns.end() if columns else start + 4
