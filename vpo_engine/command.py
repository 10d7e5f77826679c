"""Parts that the commands share: words of the command line, and errors as one line of one process."""

from __future__ import annotations

import argparse
import errno
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from vpo_engine.config import Config
from vpo_engine.errors import CheckpointError, LostProcessError, RewardProcessError
from vpo_engine.texts import printable, refuse_undecodable, say, shortened

USER_ERRORS = (ValueError, OSError, CheckpointError, RewardProcessError, LostProcessError)
"""Errors that a command prints as one line."""
INTERRUPTED = 130
"""The exit code of a program that SIGINT ended."""
NOBODY_READS = 141
"""The exit code of a program that SIGPIPE ended: what reads the output, such as ``head``, has enough of it."""
_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path, of which a part is a file",
    errno.EISDIR: "give a file",
    errno.EEXIST: "give a path that is not taken",
    errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path",
    errno.EROFS: "give a path on a disk that can be written",
    errno.ENOSPC: "make room on the disk, or give a path on another one",
    errno.EDQUOT: "make room in the quota, or give a path on another disk",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "remove the link, or those that lead to one another",
}
"""What the user can do about an error of the file system."""


class Parser(argparse.ArgumentParser):
    """A parser of a command's words; its errors, too, keep control characters off the terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def is_first_process() -> bool:
    """Return whether this is the first process that torchrun started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def processes_that_train(config: Config) -> int:
    """Return how many of the processes that torchrun started train, without that of the reward model."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")) - int(config.processes.reward))


def split_words(words: Sequence[str], unknown: Sequence[str] = ()) -> tuple[str | None, list[str]]:
    """Return the configuration file and the overrides among the words of a command line, in any order.

    unknown: options that the command does not have. ValueError for these, and for a second file.
    """
    if unknown:
        option = unknown[0]
        name = option.lstrip("-").partition("=")[0].replace("-", "_")
        raise ValueError(
            f"{shortened(option)} is no option of this command; settings are given as key.path=value, for example "
            f"{shortened(name)}=... (--help settings lists all of them)"
        )
    refuse_undecodable(words)
    files = [word for word in words if "=" not in word or os.path.isfile(word)]
    if len(files) > 1:
        raise ValueError(
            f"{files[0]} and {files[1]} are both taken for configuration files; give one of them, and settings as "
            "key.path=value"
        )
    return (files[0] if files else None), [word for word in words if word not in files]


@contextmanager
def same_in_all_processes() -> Iterator[None]:
    """Mark work whose errors all processes of a machine have alike, so that only the first of them reports them."""
    try:
        yield
    except USER_ERRORS:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            raise
        raise SystemExit(0) from None


def report_errors(
    command: Callable[[], int | None], interrupted: str = "stopped at once, without saving"
) -> int:
    """Run a command and return its exit code; None counts as 0. A user's error is printed as one line.

    interrupted: what is printed on Ctrl-C.
    """
    try:
        code = command() or 0
        sys.stdout.flush()  # or Python does it at its end, and reports a reader that is gone as an exception
        return code
    except USER_ERRORS as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_the_output():
            return NOBODY_READS
        message = f"error: {_explained(error)}"
        say(message, sys.stderr)
        tell_torchrun(printable(message))
        return 1
    except KeyboardInterrupt as error:
        say(f"{interrupted}{f' ({error})' if str(error) else ''}", sys.stderr)
        return INTERRUPTED


def _nobody_reads_the_output() -> bool:
    """Return whether the reader of standard output is gone; what is still to be printed is then dropped."""
    output = select.poll()
    output.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _explained(error: BaseException) -> str:
    """Return the message of an error; of one that the file system reports, with the file and what can be done."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return str(error)
    remedy = _REMEDIES.get(error.errno, "check the path and the disk")
    return f"{shortened(os.fsdecode(error.filename))}: {error.strerror}; {remedy}"


def split_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the paths and the settings (key.path=value) among words; what exists is a path.

    ValueError for a word that is not UTF-8.
    """
    refuse_undecodable(words)
    settings = [word for word in words if "=" in word and not os.path.exists(word)]
    return [word for word in words if word not in settings], settings


def tell_torchrun(message: str) -> None:
    """Leave the message where torchrun looks for it, so that its own report, which comes last, ends with it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(path).write_text(json.dumps(content), encoding="utf-8")
