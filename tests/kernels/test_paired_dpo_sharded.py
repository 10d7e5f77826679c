"""The loss with sharded parameters: FSDP, and DeepSpeed ZeRO where it is installed. Two processes, gloo."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from process_group import run_in_group
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent))
from pair_tensors import random_tensors  # a process of a group has no conftest
from vpo_kernels import paired_dpo_loss

WORLD = 2


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 12))


def loss_of(policy: Callable[[Tensor], Tensor], pairs: slice) -> Tensor:
    """Return the loss of some of four pairs; policy predicts, the other tensors are fixed."""
    tensors = random_tensors(4, 12)
    winner, loser = (tensor.detach()[pairs] for tensor in tensors[:2])
    both = policy(torch.cat([winner, loser]))
    return paired_dpo_loss(*both.chunk(2), *(tensor[pairs] for tensor in tensors[2:]), beta=5.0).loss


def expected_gradients() -> list[Tensor]:
    policy = network()
    loss_of(policy, slice(0, 4)).backward()
    return [parameter.grad for parameter in policy.parameters()]


def run(work: Callable[[slice], list[Tensor]]) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        gradients = work(slice(2 * rank, 2 * rank + 2))
        for actual, expected in zip(gradients, expected_gradients(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    finally:
        dist.destroy_process_group()


def fsdp(pairs: slice) -> list[Tensor]:
    policy = network()
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for layer in (policy[0], policy[2], policy):
        fully_shard(layer, mesh=mesh)
    loss_of(policy, pairs).backward()
    return [parameter.grad.full_tensor() for parameter in policy.parameters()]


def deepspeed_zero2(pairs: slice) -> list[Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    # Without its own operation, which compiles C++ for a minute, gloo sums.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None

    policy = network()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=policy, config=config, dist_init_required=False)
    engine.backward(loss_of(engine, pairs))
    return [safe_get_full_grad(parameter) for parameter in policy.parameters()]


@pytest.mark.long
def test_under_fsdp(tmp_path: Path) -> None:
    run_in_group(tmp_path, WORLD, run, fsdp)


@pytest.mark.long
def test_under_deepspeed_zero2(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run_in_group(tmp_path, WORLD, run, deepspeed_zero2)
