"""A run that dies in the middle, for tests of what it goes on with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vpo_engine.online_vpo import OnlineVPO


@contextmanager
def power_cut(after: int) -> Iterator[None]:
    """Let the run that is started inside die at the beginning of the step after ``after`` optimizer steps."""
    whole_step = OnlineVPO.step

    def dies(self: OnlineVPO, prompts: object) -> object:
        if self.optimizer_steps == after:
            raise RuntimeError("power cut")
        return whole_step(self, prompts)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineVPO, "step", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            yield
