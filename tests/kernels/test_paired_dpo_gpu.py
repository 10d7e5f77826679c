"""The paired loss on a GPU: the common tests through Triton, Triton's checks, graph capture, launches.

python -m pytest tests/kernels -m gpu
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 keeps Triton off the GPU", allow_module_level=True)

from pair_tensors import Loss, random_tensors
from paired_dpo_triton_checks import *  # noqa: F403
from paired_dpo_triton_checks import BF16, FP32, tensors_of
from test_paired_dpo import *  # noqa: F403
from test_paired_dpo_goldens import *  # noqa: F403
from test_paired_dpo_options import *  # noqa: F403
from test_paired_dpo_results import *  # noqa: F403
from vpo_kernels import PairedDPOLoss, available_backends, paired_dpo_loss
from vpo_kernels.paired_dpo.contract import PairTensors

pytestmark = pytest.mark.gpu


def moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(moved(v, device) for v in value) if isinstance(value, tuple) else value


@pytest.fixture
def dpo_loss(request: pytest.FixtureRequest) -> Loss:
    """Return a loss that moves its tensors from CPU to GPU and back, gradients too, for the common tests."""
    if "saves" in request.node.name:
        pytest.skip("compares the addresses of tensors, which moving them changes")

    def loss(*tensors: Tensor, **options: Any) -> PairedDPOLoss:
        on_gpu = {name: moved(value, "cuda") for name, value in options.items()}
        out = paired_dpo_loss(*moved(tensors, "cuda"), backend="triton", **on_gpu)
        return PairedDPOLoss(*moved(tuple(out), "cpu"))

    return loss


def leaves(*shape: int, seed: int = 0) -> PairTensors:
    tensors = tensors_of(*shape, dtypes=(BF16, BF16, FP32), seed=seed)
    return PairTensors(*(t.requires_grad_(i < 2) for i, t in enumerate(tensors)))


def test_triton_is_what_auto_chooses() -> None:
    assert available_backends("cuda")["triton"] == ""
    tensors = leaves(2, 4, 5, 6)
    a, b = paired_dpo_loss(*tensors), paired_dpo_loss(*tensors, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_interpreted_bits_are_the_gpus() -> None:
    """The tree of sums is the same everywhere, so that a GPU must give the interpreter's results to the bit."""
    tensors = random_tensors(2, 9001, dtype=torch.bfloat16)
    out = paired_dpo_loss(*(t.cuda() for t in tensors), backend="triton")
    m, r, x = (tensors[i].detach().float() for i in (0, 2, 4))
    assert torch.equal(out.winner_error_change.cpu(), (tree((m - r) * (m + r - 2 * x)) / 9001).float())  # noqa: F405


def test_forward_and_backward_in_a_cuda_graph() -> None:
    tensors = leaves(4, 4, 9, 30, 60)
    other = leaves(4, 4, 9, 30, 60, seed=1)

    def step(t: PairTensors) -> list[Tensor]:
        out = paired_dpo_loss(*t, backend="triton")
        return [*out, *torch.autograd.grad(out.loss, t[:2])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles outside of the capture
        expected = [[r.detach().clone() for r in step(t)] for t in (tensors, other)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors)
    for source, wanted in zip((tensors, other), expected, strict=True):
        with torch.no_grad():
            for mine, theirs in zip(tensors, source, strict=True):
                mine.copy_(theirs)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


def kernels_of(profile: torch.profiler.profile) -> list[str]:
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def test_the_profiler_sees_two_kernels_and_one() -> None:
    tensors = leaves(2, 4, 20, 90, 160)
    paired_dpo_loss(*tensors, backend="triton").loss.backward()
    grad = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as forward:
        out = paired_dpo_loss(*tensors, backend="triton")
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as backward:
        torch.autograd.grad(out.loss, tensors[:2], grad)
        torch.cuda.synchronize()
    assert [name.split("_0d")[0] for name in kernels_of(forward)] == ["partial_sums", "finish"]
    assert [name.split("_0d")[0] for name in kernels_of(backward)] == ["gradients"]


@pytest.mark.parametrize("shape", [(1, 4, 20, 90, 160), (64, 4, 9, 30, 60)])
def test_a_hundred_runs_give_the_same_bits(shape: tuple[int, ...]) -> None:
    tensors = leaves(*shape)

    def step() -> list[Tensor]:
        out = paired_dpo_loss(*tensors, backend="triton", winner_anchor=0.1, loser_scaling=0.5)
        return [*out, *torch.autograd.grad(out.loss, tensors[:2])]

    first = step()
    noise = torch.randn(4096, 4096, device="cuda")
    for _ in range(100):
        _ = noise @ noise  # other work on the same GPU
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_than_the_current_device() -> None:
    here = leaves(2, 4, 5, 6)
    there = PairTensors(*(t.detach().to("cuda:1").requires_grad_(i < 2) for i, t in enumerate(here)))
    outs = [paired_dpo_loss(*t, backend="triton") for t in (here, there)]
    for out in outs:
        out.loss.backward()
    assert torch.equal(outs[0].margin.cpu(), outs[1].margin.cpu())
    assert torch.equal(here.policy_winner.grad.cpu(), there.policy_winner.grad.cpu())
