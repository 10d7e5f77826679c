"""Calls of a command that say what is wrong before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SCRIPT = """
import contextlib, importlib, io, json, sys
module, heavy, calls = sys.argv[1], set(sys.argv[2].split(",")), json.loads(sys.argv[3])
main, said = importlib.import_module(module).main, []
for words in calls:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    said.append([code, out.getvalue(), errors.getvalue(), sorted(heavy & set(sys.modules))])
print(json.dumps(said))
"""


class Said(NamedTuple):
    """The result and the output of a call, and the heavy modules that were there after it."""

    code: Any
    out: str
    errors: str
    heavy: list[str]


def call_each(
    module: str, calls: Sequence[Sequence[str]], folder: Path, heavy: Sequence[str] = ("torch",)
) -> list[Said]:
    """Call ``main`` of a module with each list of words, one after the other in one process that starts in a folder."""
    command = [sys.executable, "-c", SCRIPT, module, ",".join(heavy), json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return [Said(*each) for each in json.loads(done.stdout)]
