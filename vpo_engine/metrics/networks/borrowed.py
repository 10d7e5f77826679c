"""Networks whose licences forbid commercial use: their code is taken from packages that the user has installed.

AMT-S (CC BY-NC 4.0) lies in the package vbench, MUSIQ (PolyForm Noncommercial) in pyiqa.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vpo_engine.metrics.catalogue import AMT_INSTALL, MUSIQ_INSTALL
from vpo_engine.metrics.networks.checkpoints import read_state
from vpo_engine.metrics.networks.raft import padded
from vpo_engine.weights import load_strict

AMT, AMT_FILE = "AMT-S", "amt-s.pth"
MUSIQ, MUSIQ_FILE = "MUSIQ (SPAQ)", "musiq_spaq_ckpt-358bb6af.pth"
_AMT_STRIDE = 16


def load_amt(path: Path, device: torch.device) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """Return a function that makes the frame between two, uint8 [H, W, 3], and the network's name with its package.

    Raise ValueError, with what it needs, if the package vbench cannot be used, and for a file of another network.
    """
    module = _borrow("vbench", "vbench.third_party.amt.networks.AMT-S", AMT, AMT_INSTALL)
    network = module.Model(corr_radius=3, corr_lvls=4, num_flows=3)
    try:
        weights = read_state(path, AMT, ("state_dict",))
    except ValueError as error:
        raise ValueError(
            f"{path} has other objects than tensors in it, which reading would run ({error}). If you trust the file, "
            f"write its weights anew: python -c \"import torch; torch.save(torch.load('{path}', weights_only=False)"
            f"['state_dict'], '{path}')\""
        ) from error
    remedy = f"give the file {AMT_FILE} of lalala125/AMT"
    load_strict(network, weights, where=path, model=AMT, remedy=remedy)
    network = network.to(device).eval().requires_grad_(False)
    return frame_between(network, device), f"{AMT} of vbench {_version('vbench')}"


def frame_between(network: Any, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that makes the frame halfway between two with an AMT, as VBench does on a CPU."""
    halfway = torch.full((1, 1, 1, 1), 0.5, device=device)

    def between(before: Tensor, after: Tensor) -> Tensor:
        height, width = before.shape[:2]
        pair = torch.stack([before, after]).to(device).permute(0, 3, 1, 2) / 255
        images = padded(pair, _AMT_STRIDE)
        made = network(images[:1], images[1:], halfway, scale_factor=1.0, eval=True)["imgt_pred"]
        if not bool(made.isfinite().all()):
            raise ValueError(
                f"{AMT} made a frame that is not finite; its weights are damaged: fetch them again"
            )
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        kept = made[0, :, top : top + height, left : left + width].permute(1, 2, 0)
        return (kept * 255).clamp(0, 255).to(torch.uint8).to(before.device)

    return between


def load_musiq(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Tensor], str]:
    """Return a network that scores images [B, 3, H, W] in 0..1, and its name with its package.

    Raise ValueError, with what it needs, if the package pyiqa cannot be used, and for a file of another network.
    """
    module = _borrow("pyiqa", "pyiqa.archs.musiq_arch", MUSIQ, MUSIQ_INSTALL)
    network = module.MUSIQ(pretrained=False)
    remedy = f"give the file {MUSIQ_FILE} of chaofengc/IQA-PyTorch"
    load_strict(network, read_state(path, MUSIQ, ("params",)), where=path, model=MUSIQ, remedy=remedy)
    return network.to(device).eval().requires_grad_(False), f"{MUSIQ} of pyiqa {_version('pyiqa')}"


def _borrow(package: str, module: str, network: str, install: str) -> Any:
    """Import a module of an installed package. Raise ValueError, with what it needs, if that fails."""
    found = find_spec(package)
    assert found is not None, "the registry checks that the package is installed"
    with _without_its_init(package, list(found.submodule_search_locations or [])):
        try:
            return importlib.import_module(module)
        except Exception as error:  # the import of another package may raise anything
            raise ValueError(
                f"{network} of the package {package} cannot be imported ({error}); install what it needs: {install}"
            ) from error


@contextmanager
def _without_its_init(package: str, places: list[str]) -> Iterator[None]:
    """Let a package's modules be imported without its own ``__init__``, which needs many more packages."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = ModuleType(package)
    sys.modules[package].__path__ = places
    try:
        yield
    finally:
        del sys.modules[package]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
