"""Deep networks planned from shallow ones, and the operations of the architecture in closed form."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.planning import extrapolate
from vpo_engine.planning.extrapolate import DEEPER, SHALLOW, Extrapolated, traced
from vpo_engine.planning.trace import Trace, trace_step
from vpo_engine.planning.tracker import Tracker

FORWARD_FLOPS = 189_128_179_187_712
"""Of a row at 720p x 68 frames with 300 text tokens (tests/models/test_real_size.py)."""

CHANNELS, TEXT_CHANNELS, TEXT, FREQUENCIES = 1152, 4096, 300, 256
FRAMES, PATCHES = 20, 45 * 80
TOKENS = FRAMES * PATCHES
PAIRS = 28
BLOCKS = 2 * PAIRS

TEXT_PROJECTION = 2 * TEXT * (TEXT_CHANNELS + CHANNELS) * CHANNELS
KEYS_VALUES = BLOCKS * 2 * TEXT * CHANNELS * 2 * CHANNELS
SCALAR = 2 * (FREQUENCIES + CHANNELS) * CHANNELS
"""Embedding a number: the time, the frame rate."""
MODULATION = 2 * CHANNELS * 6 * CHANNELS
PATCH_EMBEDDING = 2 * TOKENS * (4 * 2 * 2) * CHANNELS
FINAL = 2 * TOKENS * CHANNELS * (8 * 2 * 2)
ATTENTION = 4 * TOKENS * CHANNELS * PAIRS * (PATCHES + FRAMES + 2 * TEXT)
LINEAR = BLOCKS * 2 * TOKENS * CHANNELS * (3 + 1 + 1 + 1 + 4 + 4) * CHANNELS + KEYS_VALUES
"""qkv and proj, q and proj of the cross-attention, the MLP; keys and values of the text."""


def xl(*overrides: str) -> list[str]:
    return ["pairs_per_step=1", "rollout.steps=3", *overrides]


@functools.cache
def step_at(depth: int | None, overrides: tuple[str, ...]) -> Trace:
    """Of the recommended configuration at the least depth with text, decode and reward."""
    config = load_config("opensora_v1_2_720p.yaml", xl(*overrides))
    everything = depth == SHALLOW and not overrides
    return trace_step(config, on_gpu=True, depth=depth, network_only=not everything)


@pytest.mark.long
def test_operations_are_those_of_the_architecture():
    """720p x 68 frames, one prompt, 3 steps of 4 candidates with guidance, one at a time; winner after loser."""
    once = TEXT_PROJECTION + 2 * SCALAR + MODULATION + PATCH_EMBEDDING + LINEAR + ATTENTION + FINAL
    assert once == FORWARD_FLOPS
    found = Extrapolated(step_at(SHALLOW, ()), step_at(DEEPER, ()))

    shared = TEXT_PROJECTION + KEYS_VALUES + SCALAR  # text and frame rate, once in a sampling loop
    assert found.flops("rollout") == 4 * 2 * (shared + 3 * (once - shared))

    # The decoder's are those counted on the public model.
    assert found.flops("decode") / 4 == pytest.approx(760e12, rel=0.001)

    # Twice a linear layer, two and a half times an attention (scores again); the text's projection is frozen, so
    # nothing goes back into text, patches or frequencies.
    backward = 2 * (LINEAR + PATCH_EMBEDDING + FINAL + 2 * SCALAR + MODULATION) + 5 * ATTENTION // 2
    backward -= KEYS_VALUES + PATCH_EMBEDDING + 2 * 2 * FREQUENCIES * CHANNELS
    again = LINEAR + ATTENTION
    # The reference twice, the winner without a graph; then each member forward, its blocks again, and backward.
    assert found.flops("update") == 3 * once + 2 * (once + again + backward)


SMALL = ("model.resolution=240p", "model.num_frames=17")
SETTINGS = {
    "recommended": SMALL,
    "offload": (
        *SMALL,
        "memory.offload_activations=true",
        "memory.sequential=false",
        "memory.weights=stochastic_rounding",
    ),
}


def compare(depth: int, *overrides: str) -> None:
    """Bytes, operations and traffic of every phase: extrapolated, and traced at ``depth``."""
    shallow, deeper, expected = (step_at(pairs, overrides) for pairs in (SHALLOW, DEEPER, depth))
    found = Extrapolated(dataclasses.replace(shallow, depth=depth), deeper)
    for name in expected.names:
        assert found.peak(name) == expected.peak(name), name
        assert found.flops(name) == expected.flops(name), name
        # A sum of fractions of bytes, in another order.
        assert found.traffic(name) == pytest.approx(expected.traffic(name), rel=1e-12), name
        assert found.host(name) == expected.host(name), name


@pytest.mark.long
@pytest.mark.parametrize(("name", "depth"), [("recommended", 8), ("offload", 5)])
def test_extrapolated_depth_is_the_deeper_networks(name: str, depth: int):
    """Settings that load memory differently: all on the device, and block inputs on the host. Where peaks move with
    depth, they were seen to move between 5 and 7 pairs of blocks. A smaller video has the same blocks."""
    compare(depth, *SETTINGS[name])


@pytest.mark.parametrize(
    "overrides",
    [
        ("memory.activation_checkpointing=pointwise",),
        ("memory.weights=float32", "reference.storage=copy"),
        (
            "memory.step_in_backward=true",
            "memory.sequential=false",
            "objective.micro_batch_size=null",
            "optimizer.clip=null",
        ),
    ],
)
def test_where_peaks_move_with_depth_the_network_is_traced_in_full(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    depths: list[int | None] = []

    def recorded(config: Config, *, depth: int | None = None, **_: object) -> Trace:
        depths.append(depth)
        return Trace(Tracker())

    monkeypatch.setattr(extrapolate, "trace_step", recorded)
    traced(load_config("opensora_v1_2_720p.yaml", xl(*overrides)), on_gpu=True)
    assert depths == [None]
    traced(load_config("opensora_v1_2_720p.yaml", xl()), on_gpu=True)
    assert depths == [None, SHALLOW, DEEPER]
