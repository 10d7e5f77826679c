"""The fingerprint of a list of prompts, by which a resumed run knows whether its prompts are still the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol


class Prompts(Protocol):
    """A list of prompts, or an object that can be indexed like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


@dataclass(frozen=True)
class Fingerprint:
    """The number of prompts, and the SHA-256 of their texts in order. How a file writes them does not matter."""

    count: int
    digest: str


class FingerprintMaker:
    """Makes a ``Fingerprint`` of prompts that come one after the other."""

    def __init__(self) -> None:
        self._count, self._hash = 0, hashlib.sha256()

    def add(self, prompt: str) -> None:
        self._count += 1
        self._hash.update(prompt.encode(errors="surrogatepass") + b"\0")  # no prompt has a NUL

    def finish(self) -> Fingerprint:
        return Fingerprint(self._count, self._hash.hexdigest())


def fingerprint(prompts: Prompts, count: int | None = None) -> Fingerprint:
    """Return the fingerprint of the prompts, or of the first ``count`` of them."""
    known = getattr(prompts, "fingerprint", None)
    if isinstance(known, Fingerprint) and count in (None, known.count):
        return known
    maker = FingerprintMaker()
    for index in range(len(prompts) if count is None else count):
        maker.add(prompts[index])
    return maker.finish()
