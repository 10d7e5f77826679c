"""The bytes that processes exchange which hold slices of the same videos, as formulas. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Way = Literal["axes", "heads"]
"""How blocks exchange tokens. axes: blocks over space and over time take turns, and the divided axis is switched
between them. heads: in every self-attention each process has all tokens of some heads (Ulysses)."""

EXCHANGES: dict[Way, int] = {"axes": 1, "heads": 4}
"""All-to-alls of one block, forward: of its output, or of queries, keys, values and the attention's result."""


@dataclass(frozen=True)
class SequenceTraffic:
    """Bytes that one process sends to the others of its group, for one pass of one batch; it receives as many.

    exchange: one all-to-all. block_forward, block_backward: those of a block. gather: of the prediction, forward only.
    forward, backward: of the whole network.
    """

    exchange: float
    block_forward: float
    block_backward: float
    gather: float
    forward: float
    backward: float


def sequence_traffic(
    way: Way,
    *,
    processes: int,
    blocks: int,
    tokens: int,
    width: int,
    element_size: int,
    output_tokens: int,
    output_values: int,
    output_size: int,
    recomputed: bool = False,
) -> SequenceTraffic:
    """Return the bytes of a network of ``blocks`` blocks that ``processes`` processes compute together.

    tokens: N of the whole batch, those of the text included where they are divided too. width: D, the channels of a
    token; for ``heads`` those of all heads together. element_size: bytes of an activation. output_tokens: those of the
    video. output_values: numbers of the last layer for each of them; output_size: bytes of each. recomputed: whether
    blocks are computed again in the backward pass (memory.activation_checkpointing other than none). With ``axes`` that
    exchanges nothing anew, since exchanges lie between blocks.

    An all-to-all sends (P - 1) / P of the N D / P numbers that a process has, and its gradient as many. The gather
    sends a process's slice to all others, and its gradient nothing. Slices that are not equal change this by the share
    by which they differ.
    """
    others = (processes - 1) / processes
    exchange = tokens / processes * width * element_size * others
    forward = EXCHANGES[way] * exchange
    backward = forward * (2 if recomputed and way == "heads" else 1)
    gather = output_tokens * output_values * output_size * others
    return SequenceTraffic(exchange, forward, backward, gather, blocks * forward + gather, blocks * backward)
