"""Errors that end a run for a reason outside of its settings. Commands print them as one line."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved. Earlier checkpoints are unchanged."""


class DiskFullError(OSError):
    """The disk is full for a file of the run. What was saved before is unchanged."""


class NotFiniteError(ValueError):
    """A loss, a gradient or latents are not finite, and were not used."""


class RewardProcessError(RuntimeError):
    """The process of a reward model died, or was ended because it gave no answer in time."""


class LostProcessError(RuntimeError):
    """Another process of the run ended while this one waited for it."""
