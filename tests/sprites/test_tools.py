"""The scripts that train the sprites world's weights stay outside the installed package."""

from __future__ import annotations

import re
from pathlib import Path

import vpo_engine


def test_the_package_imports_nothing_from_tools() -> None:
    files = list(Path(vpo_engine.__file__).parent.rglob("*.py"))
    assert len(files) > 50
    imports = re.compile(r"^\s*(from|import) tools\b", re.MULTILINE)
    assert not [file for file in files if imports.search(file.read_text(encoding="utf-8"))]
