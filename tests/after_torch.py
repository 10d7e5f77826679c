"""Run code in a process that has imported torch and nothing else.

To import torch takes two seconds, to fork a process that did so almost nothing: a server per pytest worker imports it
once, and forks for every call.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = """
import json, os, sys, time
start = time.process_time()
import torch
TORCH_SECONDS = time.process_time() - start
for line in sys.stdin:
    call = json.loads(line)
    child = os.fork()
    if child == 0:
        output = os.open(call["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        exec(call["code"], {"__name__": "__main__", "TORCH_SECONDS": TORCH_SECONDS})
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Start the server, which ends when this process does and closes the pipe to it."""
    return subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def run_after_torch(code: str) -> tuple[int, str]:
    """Run ``code`` as a module named __main__; return its exit code and what it printed, errors included.

    The code finds ``TORCH_SECONDS``, the processor time that the import of torch took.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        server.stdin.write(json.dumps({"code": code, "output": str(output)}) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), output.read_text(errors="replace")
