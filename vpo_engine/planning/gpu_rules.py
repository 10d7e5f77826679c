"""Make CPU tensors follow the rules of a GPU, for steps that are traced with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

_IN_FLOAT32 = ("layer_norm", "group_norm", "softmax", "log_softmax")
"""Functions of torch.nn.functional that CUDA's autocast computes in float32 (aten/src/ATen/autocast_mode.h,
AT_FORALL_FP32) and the CPU's leaves in the type that they get: those of them that these models use."""


@contextmanager
def as_on_gpu(enabled: bool) -> Iterator[None]:
    """Let these functions round under the CPU's autocast as under CUDA's, in this process, inside the context."""
    originals = {name: getattr(F, name) for name in _IN_FLOAT32}
    try:
        for name, original in originals.items() if enabled else ():
            setattr(F, name, _in_float32(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(F, name, original)


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def cast(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _float32, (args, kwargs))
        return function(*args, **kwargs)

    return cast


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
