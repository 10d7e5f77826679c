"""Latents of preference datasets from strangers: files whose headers lie, and that do not have what lines promise."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fuzz_driver import clear_errors, flip, fuzz
from hypothesis import strategies as st
from safetensors.torch import save

from vpo_engine.data.preference_dataset import read_dataset

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
    row=st.integers(0, 9) | st.sampled_from([2**31, 2**62, 2**63, 2**64]),
    latents=st.sampled_from([None, *LATENTS]),
    places=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    kept=st.integers(0, 1000),
)
def test_latents_that_lie(
    folder: Path, row: int, latents: str | None, places: list[tuple[int, int]], kept: int
) -> None:
    dataset = folder / "preference_dataset"
    (dataset / "latents").mkdir(parents=True)
    (dataset / "pairs_0000.jsonl").write_text(json.dumps(GOOD | {"row": row}) + "\n")
    if latents is not None:
        content = flip(LATENTS[latents][: kept if kept < 400 else None], places)
        (dataset / "latents" / "step_00000001_0000.safetensors").write_bytes(content)
    with clear_errors(naming="step_00000001_0000.safetensors"):
        for pair in read_dataset(folder):
            winner, loser = pair.latents()
            assert winner.shape == loser.shape == pair.latent_shape()
