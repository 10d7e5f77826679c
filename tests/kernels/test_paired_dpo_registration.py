"""The loss under torch.compile, fake tensors, autocast and checkpointing, which its registration makes possible."""

import pytest
import torch
from pair_tensors import Loss, random_tensors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from vpo_kernels import paired_dpo_loss
from vpo_kernels.paired_dpo import operators
from vpo_kernels.paired_dpo.contract import PairTensors

NUMBERS = (1.0, None)


def operator_inputs(tensors: PairTensors, noise: Tensor | None, mask: Tensor | None, backend: str) -> tuple:
    scales = (torch.full((tensors[0].shape[0],), 0.5), 1.0, -1.0) if noise is not None else (None, 1.0, 1.0)
    return (
        [*tensors.policy, *(t.detach() for t in tensors[2:])],
        noise,
        mask,
        1.0,
        scales[0],
        scales[2],
        None,
        100.0,
        None,
        *NUMBERS,
        "mean",
        0.1,
        0.5,
        backend,
    )


def layouts(dtype: torch.dtype) -> dict[str, PairTensors]:
    plain = random_tensors(2, 4, 3, 5, dtype=dtype)
    sliced = random_tensors(2, 8, 3, 5, dtype=dtype)
    return {
        "contiguous": plain,
        "permuted": PairTensors(
            *(t.detach().permute(0, 3, 1, 2).requires_grad_(i < 2) for i, t in enumerate(plain))
        ),
        "sliced": PairTensors(*(t.detach()[:, :4].requires_grad_(i < 2) for i, t in enumerate(sliced))),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.long
def test_opcheck(layout: str, dtype: torch.dtype, extras: bool, backend: str) -> None:
    tensors = layouts(dtype)[layout]
    noise = torch.randn(tensors[0].shape).to(dtype) if extras else None
    mask = (torch.ones(1, *tensors[0].shape[1:]) > 0) if extras else None
    torch.library.opcheck(torch.ops.vpo_kernels.paired_dpo, operator_inputs(tensors, noise, mask, backend))


CHEAP = ("test_schema", "test_autograd_registration", "test_faketensor")
"""What ``opcheck`` tries without tracing the operator for a compiler."""
FOR_COMPILERS = {"contiguous": (True, True), "permuted": (True, False), "sliced": (False, True)}
"""Which gradients are wanted, by layout, where the operator is traced for a compiler too."""


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
def test_opcheck_of_the_gradient(layout: str, backend: str) -> None:
    """The trace for a compiler calls the kernel as the other checks do, so that one of them is enough for a layout."""
    tensors = PairTensors(*(t.detach() for t in layouts(torch.bfloat16)[layout]))
    coefficient = torch.rand(2, 2, dtype=torch.float64)
    rest = (None, None, *NUMBERS, *NUMBERS, coefficient, torch.tensor(2.0))
    for wanted in ((True, True), (True, False), (False, True)):
        inputs = (list(tensors.policy), list(tensors.target), *rest, *wanted, backend)
        checks = (*CHEAP, "test_aot_dispatch_dynamic") if wanted == FOR_COMPILERS[layout] else CHEAP
        torch.library.opcheck(torch.ops.vpo_kernels.paired_dpo_gradient, inputs, test_utils=checks)


class Toy(nn.Module):
    """A layer that predicts 2 x 4 channels, of which the first 4 count, as STDiT3 does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).chunk(2, dim=1)[0]


def toy_loss(
    policy: nn.Module, reference: nn.Module, pair: Tensor, target: Tensor, **options: object
) -> Tensor:
    with torch.no_grad():
        reference_winner, reference_loser = reference(pair).chunk(2)
    winner, loser = policy(pair).chunk(2)
    return paired_dpo_loss(
        winner, loser, reference_winner, reference_loser, *target.chunk(2), beta=50.0, **options
    ).loss


def toy() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Toy(), Toy(), torch.randn(6, 4, 10), torch.randn(6, 4, 10)


@pytest.mark.parametrize(
    ("engine", "dynamic"),
    [("aot_eager", True), pytest.param("inductor", False, marks=pytest.mark.long)],
)
def test_compiles_as_one_graph(engine: str, dynamic: bool, backend: str) -> None:
    if engine == "inductor" and backend == "triton":
        pytest.skip("under the interpreter aot_eager tells as much")
    policy, reference, pair, target = toy()
    options = {
        "backend": backend,
        "mask": torch.arange(10) < 9,
        "winner_anchor": 0.1,
        "pair_weight": torch.ones(3),
    }
    plain = toy_loss(policy, reference, pair, target, **options)
    plain.backward()
    expected = policy.layer.weight.grad.clone()
    policy.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(toy_loss, fullgraph=True, backend=engine, dynamic=dynamic)
    loss = compiled(policy, reference, pair, target, **options)
    loss.backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(policy.layer.weight.grad, expected)


def test_fake_tensors_have_the_shapes_dtypes_and_gradients(backend: str) -> None:
    with FakeTensorMode():
        policy, pair = torch.empty(4, 8, 3, dtype=torch.bfloat16, requires_grad=True), torch.empty(2, 4, 3)
        winner, loser = policy[:, :4].chunk(2)
        out = paired_dpo_loss(winner, loser, pair, pair, pair, pair, backend=backend)
        out.loss.backward()
    assert out.loss.shape == ()
    assert out.margin.shape == (2,)
    assert out.loss.dtype == torch.float32
    assert policy.grad.shape == policy.shape


def test_a_view_of_eight_channels_gets_its_gradient_in_its_own_half(dpo_loss: Loss) -> None:
    whole = torch.randn(2, 2, 8, 3, 5, requires_grad=True)
    copies = random_tensors(2, 4, 3, 5)
    views = (whole[0][:, :4], whole[1][:, :4])
    out = dpo_loss(*views, *copies[2:])
    out.loss.backward()
    plain = [view.detach().clone().requires_grad_() for view in views]
    dpo_loss(*plain, *copies[2:]).loss.backward()
    assert (whole.grad[:, :, 4:] == 0).all()
    assert torch.equal(whole.grad[0][:, :4], plain[0].grad)
    assert torch.equal(whole.grad[1][:, :4], plain[1].grad)


def test_autocast_changes_nothing(dpo_loss: Loss) -> None:
    inside, outside = random_tensors(2, 30), random_tensors(2, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a = dpo_loss(*inside)
        a.loss.backward()
    b = dpo_loss(*outside)
    b.loss.backward()
    assert torch.equal(a.margin, b.margin)
    assert a.loss.dtype == torch.float32
    assert torch.equal(inside.policy_loser.grad, outside.policy_loser.grad)


def test_under_activation_checkpointing(backend: str) -> None:
    policy, reference, pair, target = toy()
    toy_loss(policy, reference, pair, target, backend=backend).backward()
    expected = policy.layer.weight.grad.clone()
    policy.zero_grad()
    checkpoint(toy_loss, policy, reference, pair, target, use_reentrant=False, backend=backend).backward()
    assert torch.equal(policy.layer.weight.grad, expected)


def test_float16_gradient_scaling_keeps_small_gradients(dpo_loss: Loss) -> None:
    """GradScaler scales the loss, and the scale is applied before the gradient is rounded to float16."""
    tensors = random_tensors(1, 4000, dtype=torch.float16)
    out = dpo_loss(*tensors, beta=1e-4)
    (out.loss * 2.0**16).backward()
    share = (tensors.policy_winner.grad != 0).float().mean()
    assert share > 0.99


def test_the_operator_is_registered_for_every_device() -> None:
    assert operators.paired_dpo is torch.ops.vpo_kernels.paired_dpo.default
    meta = [torch.empty(2, 3, device="meta") for _ in range(6)]
    assert paired_dpo_loss(*meta).margin.device.type == "meta"


class Seen(TorchDispatchMode):
    """Notes the names of the operators of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "vpo_kernels" in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_modes_and_profilers_see_operators_that_plain_calls_do_without(dpo_loss: Loss) -> None:
    """The results are the same, bit for bit."""
    tensors = random_tensors(3, 10)

    def results() -> list[torch.Tensor]:
        out = dpo_loss(*tensors, beta=20.0)
        return [*out, *torch.autograd.grad(out.loss, tensors[:2])]

    plain = results()
    with Seen() as seen:
        watched = results()
    assert seen.names == ["vpo_kernels.paired_dpo.default", "vpo_kernels.paired_dpo_gradient.default"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled = results()
    assert {"vpo_kernels::paired_dpo", "vpo_kernels::paired_dpo_gradient"} <= {
        e.name for e in profile.events()
    }
    for one, other, third in zip(plain, watched, profiled, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
