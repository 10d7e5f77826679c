"""The deltas on a GPU: the common tests through Triton, what auto chooses, decoding without waiting.

python -m pytest tests/kernels -m gpu
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 keeps Triton off the GPU", allow_module_level=True)

from test_ordered_delta import *  # noqa: F403
from test_ordered_delta import bits, random_weights, same
from vpo_kernels import decode_delta, encode_delta

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device() -> str:
    return "cuda"


def test_gpu_and_cpu_agree() -> None:
    reference, policy = random_weights((1152, 4608), 1e-3, "cuda")
    ours = encode_delta(reference, policy)
    assert same(ours, encode_delta(reference.cpu(), policy.cpu(), backend="reference"))


def test_decoding_does_not_wait() -> None:
    reference, policy = random_weights((1152, 4608), 1e-3, "cuda")
    delta = encode_delta(reference, policy)
    assert delta.index.numel() > 0
    out = torch.empty_like(policy)
    decode_delta(delta, policy, out=out)  # compiles, and may wait for that
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_delta(delta, policy, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(bits(out), bits(reference))


def test_decoding_allocates_for_the_spilled_alone() -> None:
    reference, policy = random_weights((1152, 4608), 1e-3, "cuda")
    delta = encode_delta(reference, policy)
    out = torch.empty_like(policy)
    decode_delta(delta, policy, out=out)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    decode_delta(delta, policy, out=out)
    assert torch.cuda.max_memory_allocated() - before <= 32 * delta.index.numel() + 4096
