"""Importing the kernels into a trainer loads torch and nothing heavier."""

from after_torch import run_after_torch

PROBE = """
import sys
import vpo_kernels
from vpo_kernels import paired_dpo_loss
import torch
x = torch.ones(1, 2, requires_grad=True)
paired_dpo_loss(x, x, x, x, x, x).loss.backward()
heavy = ("triton", "deepspeed", "bitsandbytes", "vpo_engine", "diffusers", "transformers")
print(sorted(name for name in sys.modules if name.split(".")[0] in heavy))
"""


def test_import_and_cpu_use_load_nothing_heavy() -> None:
    assert run_after_torch(PROBE) == (0, "[]\n")


def test_public_names() -> None:
    import vpo_kernels

    assert {"PairedDPOLoss", "available_backends", "paired_dpo_loss"} <= set(vpo_kernels.__all__)
    assert all(hasattr(vpo_kernels, name) for name in vpo_kernels.__all__)


SECONDS = """
import time
start = time.process_time()
import vpo_kernels
print((time.process_time() - start) / TORCH_SECONDS)
"""


def test_importing_costs_little_more_than_torch() -> None:
    """One of three measurements must say so, because the machine may be busy."""
    assert any(float(run_after_torch(SECONDS)[1]) < 0.2 for _ in range(3))
