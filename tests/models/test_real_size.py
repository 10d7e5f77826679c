"""STDiT3-XL/2 at its real size, without its memory: on the meta device and in fake-tensor mode."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from vpo_kernels import paired_dpo_loss

from vpo_engine.memory.checkpointing import Activations
from vpo_engine.models.opensora.rectified_flow import RectifiedFlow
from vpo_engine.models.opensora.stdit3 import STDiT3

DATA = Path(__file__).parents[1] / "data" / "opensora"
CONFIG = json.loads((DATA / "stdit3_xl2_config.json").read_text())
PARAMETERS = 1_207_643_972
ROPE_PARAMETERS = 36
CAPTION_PARAMETERS = 6_048_000

FRAMES, HEIGHT, WIDTH, FPS = 68, 720, 1280, 24
LATENT = (4, 20, 90, 160)
FORWARD_FLOPS = 189_128_179_187_712
"""One sample with 300 text tokens, counted on the public model; equal to its closed form."""


def test_keys_shapes_and_parameters_are_the_published_ones():
    with torch.device("meta"):
        network = STDiT3.from_config(CONFIG)
    published = json.loads((DATA / "stdit3_xl2_keys.json").read_text())
    found = {
        key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for key, tensor in network.state_dict().items()
    }
    assert found == published
    assert len(found) == 973
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS
    assert network.num_trainable == PARAMETERS - ROPE_PARAMETERS - CAPTION_PARAMETERS
    assert {key: network.config[key] for key in CONFIG if key in network.config} == {
        key: value for key, value in CONFIG.items() if key in network.config
    }


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def real_size() -> STDiT3:
    torch.set_default_dtype(torch.bfloat16)
    try:
        return STDiT3.from_config(CONFIG)
    finally:
        torch.set_default_dtype(torch.float32)


def predict(network: STDiT3, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return network(x_t, t, y, fps=FPS, height=HEIGHT, width=WIDTH)[:, :4]


@pytest.mark.long
@pytest.mark.usefixtures("fake")
def test_a_dpo_step_runs_at_720p_and_68_frames():
    policy = real_size()
    policy.activations = Activations("block")
    reference = real_size().requires_grad_(False)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    flow = RectifiedFlow()
    latents, noise, t = (
        torch.randn(2, *LATENT),
        torch.randn(1, *LATENT).expand(2, -1, -1, -1, -1),
        torch.rand(2),
    )
    y = torch.randn(1, 1, 300, 4096).expand(2, -1, -1, -1)
    x_t, target = flow.add_noise(latents, noise, 1000 * t), flow.target(latents, noise)
    with torch.no_grad():
        reference_winner, reference_loser = predict(reference, x_t, 1000 * t, y).split(1)
    policy_winner, policy_loser = predict(policy, x_t, 1000 * t, y).split(1)
    assert policy_winner.shape == (1, *LATENT)
    out = paired_dpo_loss(
        policy_winner, policy_loser, reference_winner, reference_loser, target[:1], target[1:], beta=500.0
    )
    assert out.margin.shape == (1,)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in trained)
    assert sum(parameter.grad.numel() for parameter in trained) == policy.num_trainable
    optimizer.step()
    assert len(optimizer.state) == len(trained)


@pytest.mark.usefixtures("fake")
@pytest.mark.long
def test_forward_costs_the_flops_of_the_architecture_and_no_more():
    network = real_size()
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {attention: lambda q, k, v, *_, **__: 4 * math.prod(q) * k[-2]}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        predict(network, torch.randn(1, *LATENT), torch.rand(1), torch.randn(1, 1, 300, 4096))
    assert counter.get_total_flops() == FORWARD_FLOPS
