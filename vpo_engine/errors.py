"""Errors that end a run for a reason outside of its settings. Commands print them as one line."""

from __future__ import annotations


class RewardProcessError(RuntimeError):
    """The process of a reward model died, or was ended because it gave no answer in time."""
