"""Shared by the tests of the scorers, each of which has its own checkpoint ``folder``."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The test's own copy of the checkpoint, to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))
