"""The fused ops without their kernels: formulas, choice of backend, registration, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from after_torch import run_after_torch
from cases import HEADS, MODULATED, Case, modulated, normed_heads, residual, results, short_sequences
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from vpo_kernels import fused_ops, token_layout
from vpo_kernels.fused_ops import AUTO, Verdict
from vpo_kernels.gated_residual import gated_residual
from vpo_kernels.modulated_norm import modulated_norm
from vpo_kernels.qk_norm_rope import qk_norm_rope
from vpo_kernels.temporal_attention import temporal_attention

MAKE = {
    "modulated_norm": lambda dtype: modulated((2, 2, 3, 6), (2, 1, 1, 6), dtype, True),
    "gated_residual": lambda dtype: residual((2, 2, 3, 6), (2, 2, 1, 6), dtype, True),
    "qk_norm_rope": lambda dtype: normed_heads((2, 3, 1, 4), dtype, True, True),
    "temporal_attention": lambda dtype: short_sequences((2, 3, 1, 4), dtype, True),
}


def make(name: str, dtype: torch.dtype) -> Case:
    return MAKE[name](dtype)


# --- the formulas, against others ------------------------------------------------------------------------


def test_modulated_norm_is_the_formula() -> None:
    x, shift, scale = (torch.randn(2, 3, 4, 10, dtype=torch.float64) for _ in range(3))
    centred = x - x.sum(-1, keepdim=True) / 10
    expected = centred / ((centred**2).sum(-1, keepdim=True) / 10 + 1e-6).sqrt() * (1 + scale) + shift
    torch.testing.assert_close(modulated_norm(x, shift, scale), expected)


def test_heads_turn_as_complex_numbers() -> None:
    x, weight = torch.randn(3, 5, 2, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    angles = torch.randn(5, 1, 3, dtype=torch.float64)
    normed = x / ((x**2).sum(-1, keepdim=True) / 6 + 1e-6).sqrt() * weight
    turned = torch.view_as_complex(normed.unflatten(-1, (3, 2))) * torch.polar(
        torch.ones_like(angles), angles
    )
    out = qk_norm_rope(x, weight, angles.cos(), angles.sin())
    torch.testing.assert_close(out, torch.view_as_real(turned).flatten(-2))
    torch.testing.assert_close(qk_norm_rope(x, weight), normed)


def test_attention_is_the_formula() -> None:
    q, k, v = (torch.randn(2, 3, 5, 2, 6, dtype=torch.float64) for _ in range(3))
    scores = torch.einsum("brihd,brjhd->brhij", q, k) / 6**0.5
    expected = torch.einsum("brhij,brjhd->brihd", scores.softmax(-1), v)
    torch.testing.assert_close(temporal_attention(q, k, v), expected)
    torch.testing.assert_close(temporal_attention(q[0], k[0], v[0]), expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_plain_torch_bit_for_bit(dtype: torch.dtype) -> None:
    """This is what the model computed before it had these operations."""
    x, y = (torch.randn(2, 3, 4, 72).to(dtype) for _ in range(2))
    shift, scale = (torch.randn(2, 1, 1, 72).to(dtype) for _ in range(2))
    normed = torch.addcmul(shift, F.layer_norm(x, (72,), eps=1e-6), 1 + scale)
    assert torch.equal(modulated_norm(x, shift, scale), normed)
    assert torch.equal(gated_residual(x, shift, y), torch.addcmul(x, shift, y))
    q, k, v = torch.randn(6, 5, 3, 4, 72).to(dtype).unbind(2)
    weight = torch.randn(72)
    assert torch.equal(qk_norm_rope(q, weight), F.rms_norm(q, (72,), weight.to(dtype), 1e-6))
    plain = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    assert torch.equal(temporal_attention(q, k, v), plain.transpose(1, 2))


# --- the registered operations, which compute the formula on a CPU ---------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_gradcheck(name: str) -> None:
    case = make(name, torch.float64)
    assert torch.autograd.gradcheck(lambda *leaves: case.registered(*case.view(*leaves)), case.inputs)


@pytest.mark.parametrize("name", MAKE)
def test_opcheck(name: str) -> None:
    """The trace of the forward operator for a compiler has the backward one in it."""
    case = make(name, torch.bfloat16)
    tensors = [tensor.detach().requires_grad_() for tensor in case.view(*case.inputs)]
    extra = {"modulated_norm": (1e-6,), "qk_norm_rope": (None, None, 1e-6)}.get(name, ())
    torch.library.opcheck(getattr(torch.ops.vpo_kernels, name), (*tensors, *extra))
    out = getattr(torch.ops.vpo_kernels, name)(*tensors, *extra)
    if name == "gated_residual":
        tensors = tensors[1:]
    backward = getattr(torch.ops.vpo_kernels, f"{name}_backward")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(backward, (out.detach(), *(t.detach() for t in tensors), *extra), test_utils=checks)


@pytest.mark.parametrize("name", MAKE)
def test_registered_gradients_equal_autograd(name: str) -> None:
    case = make(name, torch.float64)
    for ours, plain in zip(results(case), results(case, backend="reference"), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(("x_shape", "shape"), MODULATED)
@pytest.mark.parametrize("function", [modulated, residual])
def test_every_broadcast(function, x_shape, shape) -> None:
    """Grouped modulations are views, and say the same of each token as the broadcast ones."""
    case = function(x_shape, shape, torch.float64, True)
    joint = [tensor.detach().requires_grad_() for tensor in case.view(*case.inputs)]
    x, *modulations = joint if function is modulated else joint[:2]
    for view in token_layout.group_modulations(x, *modulations):
        assert view.shape[-1] == x.shape[-1]
        assert view.untyped_storage().data_ptr() in {m.untyped_storage().data_ptr() for m in modulations}
        by_token = view.expand(x.shape).reshape(-1, x.shape[-1])
        members = by_token.shape[0] // view.shape[:-1].numel()
        assert torch.equal(token_layout.flatten_modulation(view).repeat_interleave(members, 0), by_token)


@pytest.mark.parametrize("shape", HEADS)
def test_sequences_and_alignment(shape: tuple[int, int, int, int]) -> None:
    case = normed_heads(shape, torch.float32, rope=False, exchanged=True)
    keys, _ = case.view(*case.inputs)
    assert token_layout.as_sequences(keys).data_ptr() == keys.data_ptr()
    steps = token_layout.as_sequences(keys).stride()[:-1]
    align = token_layout.alignment(token_layout.as_sequences(keys))
    assert all(step % align == 0 for step in steps)
    assert align == 16 or any(step % (2 * align) for step in steps)


@pytest.mark.parametrize("name", MAKE)
def test_saves_its_inputs_and_nothing_else(name: str) -> None:
    case = make(name, torch.float32)
    tensors = [tensor.detach().requires_grad_() for tensor in case.view(*case.inputs)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.registered(*tensors)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    new = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in inputs]
    assert sum(tensor.numel() for tensor in new) <= (2 * 3 * 2 if name == "qk_norm_rope" else 0)  # its tables
    assert saved


@pytest.mark.parametrize("name", MAKE)
def test_no_second_derivative(name: str) -> None:
    case = make(name, torch.float64)
    out = case.registered(*case.view(*case.inputs))
    (grad,) = torch.autograd.grad(out.square().sum(), case.inputs[-1:], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative; use backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.long
def test_fullgraph_compile_and_checkpointing(name: str, registered: bool) -> None:
    case = make(name, torch.float32)

    def loss(*leaves: Tensor) -> Tensor:
        tensors = case.view(*leaves)
        out = case.registered(*tensors) if registered else case.operation(*tensors, backend="auto")
        return out.square().sum()

    def checkpointed(*leaves: Tensor) -> Tensor:
        return checkpoint(loss, *leaves, use_reentrant=False)

    plain = torch.autograd.grad(loss(*case.inputs), case.inputs)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for function in (compiled, checkpointed):
        for ours, expected in zip(
            torch.autograd.grad(function(*case.inputs), case.inputs), plain, strict=True
        ):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", MAKE)
def test_autocast_leaves_the_registered_operation_alone(name: str) -> None:
    case = make(name, torch.float32)
    outside = results(case)
    with torch.autocast("cpu", torch.bfloat16):
        inside = results(case)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


# --- the choice of backend, and the errors ---------------------------------------------------------------


def test_auto_takes_kernels_only_where_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, dtype, device = True, torch.bfloat16, "cuda:0"

    for name, verdict in AUTO.items():
        assert fused_ops.uses_triton(name, "auto", OnGpu()) is (verdict.backend == "triton")
        assert verdict.reason
        monkeypatch.setitem(fused_ops.AUTO, name, Verdict("triton", "measured"))
        assert fused_ops.uses_triton(name, "auto", OnGpu())
        assert not fused_ops.uses_triton(name, "auto", torch.ones(1))
        assert not fused_ops.uses_triton(name, "reference", OnGpu())
    assert set(AUTO) == set(MAKE)


@pytest.mark.parametrize("name", MAKE)
def test_backends_that_do_not_run_here(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make(name, torch.float32)
    tensors = case.view(*case.inputs)
    with pytest.raises(
        ValueError, match=rf"'triton' of {name} got a tensor on cpu, .*set TRITON_INTERPRET=1"
    ):
        case.operation(*tensors, backend="triton")
    with pytest.raises(ValueError, match=rf"backend='cuda' of {name} is unknown; .*auto, reference, triton"):
        case.operation(*tensors, backend="cuda")


X = torch.randn(2, 3, 4, 8)
HEAD = torch.randn(3, 5, 2, 8)
TABLE = torch.ones(5, 1, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: modulated_norm(X.long(), X, X),
            r"x of modulated_norm has dtype torch.int64, .*x\.float\(\)",
        ),
        (
            lambda: modulated_norm(X, X.to("meta"), X),
            r"shift of modulated_norm is on meta, .*shift\.to\('cpu'\)",
        ),
        (
            lambda: modulated_norm(X, X[..., :1], X),
            r"shift of modulated_norm has shape \[2, 3, 4, 1\], .*all 8",
        ),
        (lambda: modulated_norm(X, X, X[:, :2]), r"scale of modulated_norm has shape \[2, 2, 4, 8\], .*give"),
        (lambda: modulated_norm(X[:0], X, X), r"x of modulated_norm has shape \[0, 3, 4, 8\], .*one element"),
        (
            lambda: gated_residual(X, X[None], X),
            r"gate of gated_residual has shape \[1, 2, 3, 4, 8\], but must",
        ),
        (
            lambda: gated_residual(X, X, X[:1]),
            r"y of gated_residual has shape \[1, 3, 4, 8\], .*expand y first",
        ),
        (lambda: qk_norm_rope(X[0, 0], X[0, 0, 0]), r"x of qk_norm_rope has shape \[4, 8\], .*unflatten"),
        (lambda: qk_norm_rope(HEAD, torch.ones(4)), r"weight of qk_norm_rope has shape \[4\], .*\[8\]"),
        (lambda: qk_norm_rope(HEAD, torch.ones(8), TABLE), r"sin of qk_norm_rope is None while .*give both"),
        (
            lambda: qk_norm_rope(HEAD, torch.ones(8), TABLE[:4], TABLE),
            r"cos of qk_norm_rope has shape \[4, 1, 4\], but must be \[N, 1, D / 2\] .*\[3, 5, 2, 8\]; make",
        ),
        (
            lambda: qk_norm_rope(HEAD, torch.ones(8), TABLE, TABLE.clone().requires_grad_()),
            r"sin of qk_norm_rope requires a gradient, .*sin\.detach\(\)",
        ),
        (lambda: temporal_attention(X[0], X[0], X[0]), r"q of temporal_attention has shape \[3, 4, 8\], but"),
        (
            lambda: temporal_attention(X, X, X[:1]),
            r"v of temporal_attention has shape \[1, 3, 4, 8\], .*self-",
        ),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_limits_of_the_attention_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    long, wide, short = torch.ones(1, 65, 1, 8), torch.ones(1, 4, 1, 129), torch.ones(1, 4, 1, 8)
    for tensor in (long, wide):
        with pytest.raises(ValueError, match=r"got N=\d+ and D=\d+, but .*N up to 64 and D up to 128; use"):
            temporal_attention(tensor, tensor, tensor, backend="triton")
        assert temporal_attention(tensor, tensor, tensor).shape == tensor.shape
    with pytest.raises(
        ValueError, match=r"k of temporal_attention has dtype torch.bfloat16, .*k\.to\(q\.dtype\)"
    ):
        temporal_attention(short, short.bfloat16(), short, backend="triton")


def test_plain_paths_import_no_triton() -> None:
    """The first call of a registered operation does: torch.library imports torch._dynamo, which imports triton."""
    probe = (
        "import sys, torch; from vpo_kernels.modulated_norm import modulated_norm as f; "
        "import vpo_kernels.gated_residual, vpo_kernels.qk_norm_rope, vpo_kernels.temporal_attention; "
        "x = torch.ones(2, 3, requires_grad=True); f(x, x, x).sum().backward(); "
        "print('triton' in sys.modules)"
    )
    assert run_after_torch(probe) == (0, "False\n")
