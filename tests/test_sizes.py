"""Files and functions of the engine and the kernels stay short enough to be read at once (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [path for root in ("vpo_engine", "kernels/vpo_kernels") for path in (ROOT / root).rglob("*.py")]


def test_no_file_is_longer_than_400_lines_and_no_function_longer_than_60() -> None:
    assert len(FILES) > 300
    found = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > 400:
            found.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                found.append(f"{path.relative_to(ROOT)}: {node.name} from line {node.lineno}")
    assert not found
