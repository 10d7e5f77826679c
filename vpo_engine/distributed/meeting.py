"""A meeting place for the processes of one start of a run, in a store that outlives it."""

from __future__ import annotations

import json
import secrets
import time

import torch.distributed as dist

_LIMIT = 1800.0
"""Seconds in which all processes must have come."""
_PAUSE = 0.02


def meet(store: dist.Store, rank: int, count: int, seconds: float = _LIMIT) -> dist.Store:
    """Wait for all ``count`` processes, and return a part of the store that nobody used before.

    torchrun keeps one store for all starts of a job. Addresses that processes left there before they were killed would
    be taken for those of the processes that follow them, and no variable of torchrun numbers all starts. So each
    process leaves a random word, and the first one writes all words that it finds, until each process has seen its own.
    ValueError if a process does not come within ``seconds``.
    """
    own, until = secrets.token_hex(8), time.monotonic() + seconds
    store.set(f"word {rank}", own)
    while True:
        if rank == 0:
            words = [_read(store, f"word {other}") for other in range(count)]
            store.set("words", json.dumps(words))
            missing = [other for other in range(1, count) if not store.check([f"{own} {other}"])]
            if not missing:
                return dist.PrefixStore(own, store)
        else:
            missing = [0]
            words = json.loads(_read(store, "words") or "[]")
            if len(words) == count and words[rank] == own:
                store.set(f"{words[0]} {rank}", "here")
                return dist.PrefixStore(words[0], store)
        if time.monotonic() > until:
            raise ValueError(
                f"rank {rank} waited {seconds:.0f} s for the other {count - 1} processes, and missed rank "
                f"{', '.join(map(str, missing))}; start all of them, and see what those have printed"
            )
        time.sleep(_PAUSE)


def _read(store: dist.Store, key: str) -> str:
    """Return what is under ``key``, "" if there is nothing."""
    return store.get(key).decode() if store.check([key]) else ""
