"""The paired loss on every backend that runs here. Triton's runs where TRITON_INTERPRET=1; see interpreter.py."""

import functools
import os

import pytest
from pair_tensors import Loss
from vpo_kernels import available_backends, paired_dpo_loss

BACKENDS = ["reference", "native", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reason = available_backends("cpu")[request.param]
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def dpo_loss(backend: str) -> Loss:
    return functools.partial(paired_dpo_loss, backend=backend)
