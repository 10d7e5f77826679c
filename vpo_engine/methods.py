"""The training methods by the name that ``method`` gives them; a method's file is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vpo_engine.config.methods import MethodName

if TYPE_CHECKING:
    from vpo_engine.method import Method

_CLASSES: dict[MethodName, str] = {
    "online_vpo": "OnlineVPO",
    "offline_dpo": "OfflineDPO",
    "refl": "ReFL",
    "vader": "VADER",
    "instructvideo": "InstructVideo",
    "t2v_turbo": "T2VTurbo",
}
"""{method: the name of its class in the file of the method's name}"""


def method_class(name: MethodName) -> type[Method]:
    """Return the class of a method."""
    found: type[Method] = getattr(importlib.import_module(f"vpo_engine.{name}"), _CLASSES[name])
    return found
