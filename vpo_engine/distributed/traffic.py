"""The bytes that a process sends to others in a step, as formulas: what is sent, among how many, how often.

Counts confirm them (``counting.py``, tests/distributed/test_traffic.py). R processes share a tensor of S bytes: in a
reduction to all of them each sends 2 (R - 1) / R * S, and where it is gathered or scattered (R - 1) / R * S. Source:
nccl-tests, doc/PERFORMANCE.md. A few flags and sums, some 100 bytes a step, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Purpose = Literal[
    "gradients",
    "weights",
    "rollout",
    "refresh",
    "candidates",
    "guidance",
    "sequence",
    "videos",
    "checkpoint",
]


@dataclass(frozen=True)
class Transfer:
    """The data that a process sends for one purpose in a step: ``nbytes`` bytes, in a group of ``ranks`` processes.

    Processes of a group are neighbours, so that a small group is on one machine.
    """

    purpose: Purpose
    nbytes: float
    ranks: int


@dataclass(frozen=True)
class Exchanged:
    """The data that a step exchanges, for any number of processes.

    trained: number of trained weights. weight_bytes: of a trained weight as it computes, and of its gradient. whole:
    trained weights in small parameters, which stage 3 does not divide. recomputed: share of the trained weights in
    blocks whose activations are computed again. states: float32 numbers that are kept for a weight: moments, master,
    average. updates: optimizer steps of a step. refreshes: of the reference, in a step. sequential: memory.sequential.

    latents, scores, video: bytes of a candidate's. tensors: how many tensors of the size of latents a sampling state
    has. sampled: candidates of a prompt, over all passes of sampling. guided: predictions with guidance that they take
    together. predicted: predictions, a guided one being two. forward, backward: bytes that a process sends to those
    that hold slices of the same video, for a sample that goes through the network.
    """

    trained: int
    weight_bytes: int
    whole: int = 0
    recomputed: float = 0.0
    states: int = 2
    updates: int = 1
    refreshes: float = 0.0
    sequential: bool = False
    latents: int = 0
    video: int = 0
    tensors: int = 2
    scores: int = 0
    sampled: int = 0
    guided: int = 0
    predicted: int = 0
    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True)
class Division:
    """The division of a step among ``ranks`` processes.

    stage: of ZeRO; None: every process holds everything. team: processes with the same prompts. split: whether two of
    them share a guided prediction. sequence: processes that hold slices of the same videos; team counts them as one.
    prompts: of a team. samples, micro_batches: of a process in an optimizer step. reward: whether one more process
    scores all videos.
    """

    ranks: int
    stage: int | None = None
    team: int = 1
    split: bool = False
    sequence: int = 1
    prompts: int = 1
    samples: int = 1
    micro_batches: int = 1
    reward: bool = False


def reduced(nbytes: float, ranks: int) -> float:
    """Return what a process sends where a tensor of all processes is added up in all of them."""
    return 2 * gathered(nbytes, ranks)


def gathered(nbytes: float, ranks: int) -> float:
    """Return what a process sends where the whole, of ``nbytes``, is gathered from equal parts, or scattered."""
    return (ranks - 1) / ranks * nbytes


def step_transfers(step: Exchanged, division: Division) -> list[Transfer]:
    """Return what a process sends in a step of Algorithm 1, without evaluations and checkpoints."""
    ranks = division.ranks
    found = [
        Transfer("gradients", step.updates * _gradients(step, division), ranks),
        Transfer("weights", step.updates * _weights(step, division), ranks),
    ]
    if division.stage == 3:
        divided = gathered((step.trained - step.whole) * step.weight_bytes, ranks)
        found.append(Transfer("rollout", divided, ranks))
        found.append(Transfer("refresh", step.refreshes * divided, ranks))
    if division.team > 1:
        made = division.prompts * step.sampled
        each = step.latents * step.tensors + step.scores
        copies = 2 if division.split else 1
        found.append(Transfer("candidates", gathered(copies * made * each, division.team), division.team))
        if division.split:
            rows = division.prompts * step.guided / (division.team // 2)
            found.append(Transfer("guidance", gathered(2 * rows * step.latents, 2), 2))
    if division.sequence > 1:
        found.append(Transfer("sequence", _sequence(step, division), division.sequence))
    if division.reward:
        sharers = (division.team // 2 if division.split else division.team) * division.sequence
        videos = division.prompts * step.sampled / sharers * step.video
        found.append(Transfer("videos", videos, ranks + 1))
    return [transfer for transfer in found if transfer.nbytes]


def checkpoint_transfers(step: Exchanged, division: Division) -> list[Transfer]:
    """Return what a process sends for a checkpoint, which holds what a single process would write."""
    ranks, found = division.ranks, 0.0
    if division.stage in (1, 2, 3):
        found += reduced(4 * step.states * step.trained, ranks)
    if division.stage == 3:
        found += gathered((step.trained - step.whole) * step.weight_bytes, ranks)
    return [Transfer("checkpoint", found, ranks)] if found and ranks > 1 else []


def _gradients(step: Exchanged, division: Division) -> float:
    size, ranks = step.trained * step.weight_bytes, division.ranks
    passes = division.micro_batches * (2 if step.sequential else 1)
    if division.stage == 3:
        return passes * gathered(size, ranks)
    return (passes if division.stage == 2 else 1) * reduced(size, ranks)


def _sequence(step: Exchanged, division: Division) -> float:
    """Return what slices of videos take: predictions of rollouts, and those of winner and loser in the update, by the
    reference and by the policy, which makes one more forward pass with sequential pairs."""
    rollout = division.prompts * step.predicted / division.team * step.forward
    pair = (5 if step.sequential else 4) * step.forward + 2 * step.backward
    return rollout + step.updates * division.samples * pair


def _weights(step: Exchanged, division: Division) -> float:
    """Return what stages 1 and 2 gather after the step, and stage 3 for forward and backward passes.

    With sequential pairs the policy makes three forward passes and two backward passes. A block is gathered once more
    where a backward pass computes its activations again.
    """
    ranks = division.ranks
    if division.stage in (1, 2):
        return gathered(step.trained * step.weight_bytes, ranks)
    if division.stage != 3:
        return 0.0
    forward, backward = (3, 2) if step.sequential else (1, 1)
    times = division.micro_batches * (forward + backward * (1 + step.recomputed))
    return gathered((times * step.trained + step.whole) * step.weight_bytes, ranks)
