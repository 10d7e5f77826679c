"""vpo-engine: online video preference optimization for text-to-video diffusion models (arXiv 2412.15159)."""

import logging

from vpo_engine.importing import import_when_used

__version__ = "0.1.0"


def _needed_here(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


# diffusers imports bitsandbytes, which takes longer to load than the engine itself; most runs never use it.
import_when_used("bitsandbytes")
# On CPUs with AVX-512 BF16 bitsandbytes warns when it is loaded that it has no fast 4-bit matrix product. The engine
# never calls that product (rewards/quantize.py dequantises first), so this one message is dropped.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_needed_here)
