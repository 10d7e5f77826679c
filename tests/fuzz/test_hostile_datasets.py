"""Preference datasets from strangers: lines and files of latents that lie."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fuzz_driver import clear_errors, fuzz
from hypothesis import strategies as st
from safetensors.torch import save

from vpo_engine.data.preference_dataset import read_dataset

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=4), each, max_size=3),
    max_leaves=6,
)
GOOD = {
    "step": 1,
    "position": 0,
    "prompt": "a red circle",
    "seed": 0,
    "candidates": [0, 1],
    "scores": {"quality": [0.5, 1.0]},
    "selected": [0.5, 1.0],
    "winner": 1,
    "loser": 0,
    "gap": 0.5,
    "kept": True,
    "weight": 1.0,
    "row": 0,
}
LATENTS = {
    "good": save({name: torch.zeros(1, 2, 1, 4, 4) for name in ("winner", "loser")}),
    "flat": save({name: torch.zeros(3) for name in ("winner", "loser")}),
    "one": save({"winner": torch.zeros(1, 2, 1, 4, 4)}),
    "text": b"not a file of latents",
    "scalar": save({name: torch.tensor(1.0) for name in ("winner", "loser")}),
}


@fuzz(
    changes=st.dictionaries(
        st.sampled_from([*GOOD, "more"]), VALUES | st.sampled_from([-1, 7, 2**63, "../../x"]), max_size=3
    ),
    raw=st.none() | st.binary(max_size=30),
    latents=st.sampled_from([None, *LATENTS]),
)
def test_lines_and_latents_that_lie(
    folder: Path, changes: dict[str, object], raw: bytes | None, latents: str | None
) -> None:
    dataset = folder / "preference_dataset"
    (dataset / "latents").mkdir(parents=True)
    line = json.dumps(GOOD | changes).encode() if raw is None else raw
    (dataset / "pairs_0000.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    if latents is not None:
        (dataset / "latents" / "step_00000001_0000.safetensors").write_bytes(LATENTS[latents])
    with clear_errors():
        for pair in read_dataset(folder):
            pair.score(pair.winner)
            winner, loser = pair.latents()
            assert winner.shape == loser.shape == pair.latent_shape()
