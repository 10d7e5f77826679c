"""The policy of Open-Sora 1.2 from a local copy of its published checkpoint, or of one that its training wrote."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vpo_engine.command import is_first_process
from vpo_engine.memory.quantised_base import HeldBase
from vpo_engine.models.opensora.checkpoint import CONFIG, find_weights, load_config, load_strict
from vpo_engine.models.opensora.published import STDIT3_XL2
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.texts import say
from vpo_engine.weights import config_file


def load_stdit3(path: Path, base: HeldBase | None = None) -> STDiT3:
    """Load STDiT3 as float32 from a folder or file that ``find_weights`` knows. Errors name what is missing.

    ``base``: how the base of an adapter is held. Open-Sora's training may leave no config.json; the published sizes are
    taken then, and the first process says so.
    """
    files = find_weights(path)
    if is_first_process():
        for note in _notes(path, files[0]):
            say(f"note: {note}", sys.stderr)
    known = config_file(path)
    with torch.device("meta"):
        network = (
            STDiT3.from_config(load_config(path), str(known)) if known else STDiT3.from_config(STDIT3_XL2)
        )
    base = base or HeldBase()
    mapped = base.mapped(network)
    if known:
        load_strict(network, path, mapped=mapped)
    else:
        remedy = f"{CONFIG} is missing, put that of its training beside the weights"
        load_strict(network, path, remedy=remedy, mapped=mapped)
    base.hold(network)
    return network.float()


def _notes(path: Path, file: Path) -> list[str]:
    """Return what is not plain about a policy's files."""
    notes = []
    averaged = sorted(entry for entry in path.glob("ema.*") if entry.is_file()) if path.is_dir() else []
    if averaged:
        notes.append(
            f"{path} holds trained weights and averaged ones; {file.parent} is used. To take the averaged ones set "
            f"model.policy={averaged[0]}"
        )
    if config_file(path) is None:
        notes.append(
            f"{path} has no {CONFIG}; it is taken for STDiT3-XL/2 of Open-Sora 1.2, and every shape is checked"
        )
    return notes
