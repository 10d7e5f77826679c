"""The paired loss of batches [2P, ...] as public trainers hold them."""

import inspect
from typing import Any

import pytest
import torch
from pair_tensors import random_tensors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vpo_kernels import batched_paired_dpo_loss, paired_dpo_loss
from vpo_kernels.paired_dpo.contract import PairTensors


def batches(tensors: PairTensors) -> list[Tensor]:
    """Return policy, reference and target as batches; the policy's is a leaf that requires gradients."""
    policy, *rest = (torch.cat(tensors[i : i + 2]).detach() for i in (0, 2, 4))
    return [policy.requires_grad_(), *rest]


def test_it_takes_the_options_of_the_loss_of_pairs() -> None:
    batched, paired = (inspect.signature(f).parameters for f in (batched_paired_dpo_loss, paired_dpo_loss))
    assert list(batched)[:3] == ["policy", "reference", "target"]
    assert list(batched.values())[3:] == list(paired.values())[6:]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"mask": torch.arange(11) < 7, "pair_weight": torch.tensor([1.0, 0.5, 2.0])},
    {"target_noise": torch.ones(3, 4, 11), "target_scales": (1.0, torch.tensor([-1.0, -0.5, 0.0]))},
    {"beta": torch.tensor([1.0, 20.0, 300.0]), "winner_anchor": 0.1, "loser_scaling": 0.3},
    {"reduction": "sum", "beta": 0.1, "margin_graph": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_loss_of_its_halves_to_the_bit(options: dict, dtype: torch.dtype, backend: str) -> None:
    tensors = random_tensors(3, 4, 11, dtype=dtype)
    policy, reference, target = batches(tensors)
    ours = batched_paired_dpo_loss(policy, reference, target, backend=backend, **options)
    theirs = paired_dpo_loss(*tensors, backend=backend, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for out in (ours, theirs):
        (out.loss + torch.relu(1 - out.margin).sum() if "margin_graph" in options else out.loss).backward()
    assert torch.equal(policy.grad, torch.cat([tensors.policy_winner.grad, tensors.policy_loser.grad]))


@pytest.mark.parametrize("layout", ["channels last", "sliced", "expanded"])
def test_batches_of_any_layout(layout: str, backend: str) -> None:
    tensors = random_tensors(2, 4, 3, 5)
    policy, reference, target = (batch.detach() for batch in batches(tensors))
    if layout == "channels last":
        policy = policy.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        policy = torch.cat([policy, torch.full_like(policy, torch.nan)], dim=1)[:, :4]
    else:
        target = target[:1].expand(4, 4, 3, 5)
    policy.requires_grad_()
    halves = [half.detach().requires_grad_() for half in policy.chunk(2)]
    batched_paired_dpo_loss(policy, reference, target, backend=backend).loss.backward()
    paired_dpo_loss(*halves, *reference.chunk(2), *target.chunk(2), backend=backend).loss.backward()
    assert torch.equal(policy.grad, torch.cat([half.grad for half in halves]))


class _Large(TorchDispatchMode):
    """Records the operators that return a tensor of at least ``size`` elements, by name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(each, Tensor) and each.numel() >= self.size for each in tree_leaves(out)):
            self.names.append(func.overloadpacket.__name__)
        return out


def test_nothing_but_the_gradient_is_made_in_the_backward_pass(backend: str) -> None:
    """Halves of a batch make autograd put their gradients together, which this saves."""
    policy, reference, target = batches(random_tensors(2, 3000))
    out = batched_paired_dpo_loss(policy, reference, target, backend=backend)
    with _Large(policy.numel()) as made:
        torch.autograd.grad(out.loss, policy)
    assert made.names == ["paired_dpo_gradient"]
    out = paired_dpo_loss(*policy.chunk(2), *reference.chunk(2), *target.chunk(2), backend=backend)
    with _Large(policy.numel()) as made:
        torch.autograd.grad(out.loss, policy)
    assert "paired_dpo_gradient" not in made.names
    assert made.names


def test_through_a_network_the_gradients_are_the_halves(backend: str) -> None:
    torch.manual_seed(0)
    network, pair = nn.Linear(6, 6), torch.randn(4, 6)
    reference, target = torch.randn(4, 6), torch.randn(4, 6)
    batched_paired_dpo_loss(network(pair), reference, target, beta=3.0, backend=backend).loss.backward()
    ours = network.weight.grad.clone()
    network.zero_grad()
    halves = (*network(pair).chunk(2), *reference.chunk(2), *target.chunk(2))
    paired_dpo_loss(*halves, beta=3.0, backend=backend).loss.backward()
    assert torch.equal(ours, network.weight.grad)


def test_opcheck_of_both_operators(backend: str) -> None:
    """The trace of the loss for a compiler has the gradient in it."""
    tensors = batches(random_tensors(2, 4, 5))
    numbers = (1.0, None) * 4
    inputs = (tensors, None, None, *numbers, "mean", 0.1, 0.5, backend)
    torch.library.opcheck(torch.ops.vpo_kernels.paired_dpo, inputs)
    coefficient = torch.rand(2, 2, dtype=torch.float64)
    policy, target = [tensors[0].detach()], [tensors[2]]
    rest = (None, None, *numbers[:4], coefficient, torch.tensor(2.0), True, True, backend)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = (policy, target, *rest)
    torch.library.opcheck(torch.ops.vpo_kernels.paired_dpo_gradient, inputs, test_utils=checks)


def test_compiles_as_one_graph(backend: str) -> None:
    def step(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
        out = batched_paired_dpo_loss(policy, reference, target, backend=backend, margin_graph=True)
        return out.loss + out.margin.sum()

    torch._dynamo.reset()
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        policy, reference, target = batches(random_tensors(2, 12))
        loss = run(policy, reference, target)
        loss.backward()
        results.append((loss.detach(), policy.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_fake_tensors_have_the_shapes(backend: str) -> None:
    with FakeTensorMode():
        policy = torch.empty(6, 4, dtype=torch.bfloat16, requires_grad=True)
        out = batched_paired_dpo_loss(policy, torch.empty(6, 4), torch.empty(6, 4), backend=backend)
        out.loss.backward()
    assert out.margin.shape == out.reference_loser_error.shape == (3,)
    assert policy.grad.shape == (6, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"policy": torch.zeros(3, 5)},
            r"^reference has shape \[4, 5\], but must have that of policy, \[3, 5\]",
        ),
        (
            dict.fromkeys(("policy", "reference", "target"), torch.zeros(3, 5)),
            r"^policy has shape \[3, 5\], but must be \[2P, ...\], .*drop the sample without a partner",
        ),
        (
            dict.fromkeys(("policy", "reference", "target"), torch.zeros(0, 5)),
            r"^policy has shape \[0, 5\], but must be \[2P, ...\] with at least one pair",
        ),
        ({"target": [1.0]}, r"^target is list, but must be a tensor"),
        (
            {"target_noise": torch.zeros(4, 5), "target_scales": (1, -1)},
            r"^target_noise has shape \[4, 5\], but must have that of half of policy, \[2, 5\]; .*slice target_noise",
        ),
        ({"pair_weight": torch.ones(4)}, r"^pair_weight is \[4\], but must be .* tensor \[2\], one per pair"),
        ({"mask": torch.ones(4, 5) > 0}, r"^mask has shape \[4, 5\], but must broadcast to \[2, 5\]"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    given = {name: torch.zeros(4, 5) for name in ("policy", "reference", "target")}
    with pytest.raises(ValueError, match=message):
        batched_paired_dpo_loss(**given | change)
