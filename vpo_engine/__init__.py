"""vpo-engine: online video preference optimization for text-to-video diffusion models (arXiv 2412.15159)."""

import logging

__version__ = "0.1.0"


def _needed_here(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


# diffusers and peft import bitsandbytes themselves, so every run does. On CPUs with AVX-512 BF16 it then warns that it
# has no fast 4-bit matrix product. The engine never calls that product (rewards/quantize.py dequantises first), so this
# one message is dropped; all others are shown.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_needed_here)
