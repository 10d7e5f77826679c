"""Open-Sora 1.2: ``STDiT3`` and ``OpenSoraVAE`` by the names that their project gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vpo_engine.models.opensora.stdit3 import STDiT3
    from vpo_engine.models.opensora.vae import OpenSoraVAE

__all__ = ["OpenSoraVAE", "STDiT3"]


def __getattr__(name: str) -> object:
    """Import a class when it is asked for: the VAE loads diffusers, which not everything here needs."""
    if name == "STDiT3":
        from vpo_engine.models.opensora.stdit3 import STDiT3

        return STDiT3
    if name == "OpenSoraVAE":
        from vpo_engine.models.opensora.vae import OpenSoraVAE

        return OpenSoraVAE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
