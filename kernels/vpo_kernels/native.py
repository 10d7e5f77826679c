"""Loading of the C++ extension ``vpo_kernels._native``, which computes on CPUs.

Importing this module raises ImportError, with the reason, where the extension was not built or does not load.
"""

from __future__ import annotations

try:
    import vpo_kernels._native as extension
except ModuleNotFoundError as error:
    raise ImportError(
        "this installation is without it: it was built for every machine, or without a C++ compiler or Python's headers"
    ) from error
except ImportError as error:
    raise ImportError(f"its extension does not load: {error}") from error

INSTRUCTION_SET = extension.instruction_sets()[0]
"""The fastest instruction set that this processor has. Results do not depend on it."""

__all__ = ["INSTRUCTION_SET", "extension"]
