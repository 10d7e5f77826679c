"""Let tests not wait for the disk: importing this makes ``os.fsync`` return at once, in this process and its forks.

No test takes the power away, which is all that a sync is for; which files and folders are synced, and when, is checked
by tests that record the calls (``tests/runs/test_checkpoint_durability.py``). Commands that tests start as a process of
their own sync as ever.
"""

import os


def _return_at_once(descriptor: int) -> None:
    os.fstat(descriptor)  # a descriptor that is not open is still an error


os.fsync = _return_at_once
