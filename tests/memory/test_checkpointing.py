"""Test activation checkpointing of STDiT3's blocks: equal results bit for bit, and the expected bytes and FLOPs."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from block_case import Case, Storages, flops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vpo_engine.build import build_model
from vpo_engine.config import ActivationCheckpointing, Config
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.checkpointing import ATTENTION, PRODUCTS, Activations, checkpointed

POLICIES: tuple[ActivationCheckpointing, ...] = get_args(ActivationCheckpointing)
LENGTHS = {"dense": (5, 5), "masked": (5, 4), "runs": (7, 2)}


def kept_values(case: Case, checkpointing: ActivationCheckpointing, parts: int) -> int:
    """Values that a block's graph holds between forward and backward, beside its input and what all blocks share.

    N video tokens of B samples, L text tokens of all samples, C channels, M hidden ones of the MLP, H heads.
    """
    N, C, H, L, M, B = case.N, case.C, case.H, case.L, case.M, case.B
    attentions = 2 * (N * C + N * H)  # results, and a log-sum-exp per query and head
    products = 3 * N * C + N * C + N * C + 2 * L * C + N * C  # qkv, proj; q, kv, proj
    norm = N * C + 2 * N + N * C + B * C  # normed, mean and rstd, modulated; 1 + scale
    if checkpointing == "block":
        return 0
    if checkpointing == "all_but_attention":
        return attentions
    if checkpointing == "pointwise":
        return attentions + products + (N * M + N * C if parts == 1 else 0)
    heads = 2 * (N * H + N * C + N * C)  # of q and of k: rstd, normed, times its weight (and turned)
    residuals = 2 * N * C  # after each attention
    unneeded = N * C  # the cross-attention's projection is only added
    whole = 6 * B * C + norm + products - unneeded + heads + attentions + residuals
    return whole + (norm + 2 * N * M + N * C if parts == 1 else 0)


def spent_flops(case: Case, checkpointing: ActivationCheckpointing, parts: int) -> int:
    """Of one forward and one backward pass, by products of matrices."""
    N, C, L, M = case.N, case.C, case.L, case.M
    mlp = 2 * N * 2 * C * M
    linear = 2 * N * 6 * C * C + 2 * L * 2 * C * C + mlp
    attention = 2 * 2 * case.attended * C
    nothing = 3 * linear + attention + 5 * attention // 2
    again = {"none": 0, "pointwise": 0, "all_but_attention": linear, "block": linear + attention}[
        checkpointing
    ]
    if parts > 1 and checkpointing in ("none", "pointwise"):
        again += mlp
    return nothing + again


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("checkpointing", POLICIES)
@pytest.mark.parametrize("temporal", [False, True], ids=["spatial", "temporal"])
def test_bytes_and_flops_are_the_closed_forms(
    temporal: bool, checkpointing: ActivationCheckpointing, parts: int
) -> None:
    for case in (
        Case(temporal),
        Case(temporal, B=1, T=2, S=12, C=64, H=2, lengths=(3,), dtype=torch.float64),
    ):
        with flops() as counter, Storages() as storages:
            out = case.forward(checkpointing, parts)
            held = storages.alive(besides=[out, *case.shared()])
            out.sum().backward()
        assert held == kept_values(case, checkpointing, parts) * case.x.element_size()
        assert counter.get_total_flops() == spent_flops(case, checkpointing, parts)


@pytest.mark.parametrize("checkpointing", POLICIES[1:])
@pytest.mark.parametrize("way", LENGTHS)
@pytest.mark.parametrize("temporal", [False, True], ids=["spatial", "temporal"])
def test_every_policy_gives_the_same_bits(
    temporal: bool, way: str, checkpointing: ActivationCheckpointing
) -> None:
    for dtype in (torch.float32, torch.float64):
        case = Case(temporal, lengths=LENGTHS[way], dtype=dtype)
        assert case.plan.way == way
        expected, found = case.outcome("none"), case.outcome(checkpointing)
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("checkpointing", POLICIES[1:])
def test_autocast_is_the_same_when_computed_again(checkpointing: ActivationCheckpointing, parts: int) -> None:
    case = Case(temporal=True)
    results = []
    for policy in ("none", checkpointing):
        with torch.autocast("cpu", torch.bfloat16):
            out = case.forward(policy, parts)
        out.square().sum().backward()
        results.append([out.detach(), *case.gradients()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


class Calls(TorchDispatchMode):
    """Count how often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[Any] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[op] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("checkpointing", "times"), [*zip(POLICIES, (1, 1, 1, 2), strict=True)])
def test_the_short_attention_kernel_counts_as_attention(
    checkpointing: ActivationCheckpointing, times: int
) -> None:
    operator = torch.ops.vpo_kernels.temporal_attention
    weight = torch.randn(8, 8, requires_grad=True)

    def attend(x: Tensor) -> Tensor:
        q = (x @ weight).sin()
        return operator(q, q, q).square()

    with Calls() as calls:
        checkpointed(attend, torch.randn(6, 3, 2, 8), checkpointing=checkpointing).sum().backward()
    assert calls.count[operator.default] == times


GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        pytest.param("cuda", torch.bfloat16, marks=GPU),
        pytest.param("cuda", torch.float32, marks=GPU),
    ],
)
def test_attention_runs_once_unless_the_block_is_computed_again(
    device: str, dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    ran = []
    for checkpointing in POLICIES:
        case = Case(temporal=False, H=2, lengths=lengths, dtype=dtype, device=device)
        with Calls() as calls:
            case.forward(checkpointing).float().sum().backward()
        names = {op: op.name().removesuffix(".default") for op in calls.count}
        ran.append(sum(count for op, count in calls.count.items() if names[op] in ATTENTION))
    assert ran == [ran[0], ran[0], ran[0], 2 * ran[0]]
    assert ran[0] >= 2


def test_the_operators_that_are_kept_exist() -> None:
    ours = [name for name in (*PRODUCTS, *ATTENTION) if re.match("aten|torch_attn|vpo_kernels", name)]
    assert len(ours) >= 10
    importlib.import_module(
        "torch.nn.attention.varlen"
    )  # which attention over packed text imports when it is used
    for name in ours:
        namespace, operator = name.split("::")
        assert hasattr(getattr(getattr(torch.ops, namespace), operator), "default"), name


@torch.no_grad()
@pytest.mark.parametrize("checkpointing", POLICIES)
def test_without_grad_nothing_is_kept(checkpointing: ActivationCheckpointing) -> None:
    case = Case(temporal=False)
    with Storages() as storages:
        out = case.forward(checkpointing)
    assert storages.alive(besides=[out, *case.shared()]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"checkpointing": "everything"},
            "checkpointing='everything' is unknown; it must be one of: none, pointwise",
        ),
        ({"mlp_chunks": 0}, "mlp_chunks=0 must be at least 1"),
        ({"offload": True}, "offload=True moves .* checkpointing='none' keeps many times as much"),
        ({"offload": True, "checkpointing": "pointwise"}, "set checkpointing to all_but_attention or block"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Activations(**settings)


def test_the_configuration_reaches_the_network(small: Callable[..., Config]) -> None:
    config = small(
        "memory.activation_checkpointing=block", "memory.offload_activations=true", "memory.mlp_chunks=3"
    )
    model = build_model(config, Processes.start("cpu"), say=lambda _: None)
    assert model.network.activations == Activations("block", offload=True, mlp_chunks=3)


def test_the_decoder_takes_as_many_frames_and_rows_as_the_configuration_says(
    small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small("memory.decode_frames=2", "memory.decode_strip_height=16")
    model: Any = build_model(config, Processes.start("cpu"), say=lambda _: None)
    seen: list[tuple[Any, ...]] = []
    decode = model.vae.decode_uint8
    monkeypatch.setattr(model.vae, "decode_uint8", lambda z, *how: seen.append(how) or decode(z, *how))
    model.decode(torch.zeros(1, *model.latent_shape))
    assert seen == [(model.num_frames, 2, 16)]
