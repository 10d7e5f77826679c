"""Import a heavy package when it is first used, where other packages import it without need."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


def import_when_used(name: str) -> None:
    """Put a module into ``sys.modules`` that loads the package ``name`` at the first use of one of its attributes.

    ``import name`` alone then costs nothing. Nothing happens if the package is not installed, or is loaded already.
    (Modules of ``importlib.util.LazyLoader`` load as soon as anyone looks for their spec, as diffusers and peft do to
    see what is installed.)
    """
    spec = None if name in sys.modules else find_spec(name)
    if spec is None:
        return
    module = module_from_spec(spec)
    module.__class__ = _Unloaded
    # The import system looks the path up before it imports a submodule, and so loads the package first.
    del module.__path__
    sys.modules[name] = module


class _Unloaded(ModuleType):
    """A module whose code has not run yet."""

    def __getattr__(self, attribute: str) -> Any:
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        try:
            spec.loader.exec_module(self)
        except BaseException:
            sys.modules.pop(spec.name, None)
            raise
        return getattr(self, attribute)
