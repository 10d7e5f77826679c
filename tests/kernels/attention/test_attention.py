"""Attention and text attention: their values and gradients; they never hold a matrix of scores."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from vpo_kernels.attention import attention, attention_dtype, op, plan_text, text_attention, text_places

CPU = torch.device("cpu")
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
WAYS = {  # lengths by the way that they are attended to
    "dense": [5, 5, 5],
    "masked": [4, 5, 5],
    "runs": [1, 1, 9, 2, 2],
}


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v on [B, N, heads, D] as it is written."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def qkv(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> tuple[Tensor, ...]:
    """Return strided views of one [B, N, 3, heads, D] tensor."""
    generator = torch.Generator().manual_seed(0)
    samples, tokens, heads, channels = shape
    fused = torch.randn(samples, tokens, 3, heads, channels, generator=generator).to(dtype)
    return fused.requires_grad_(grad).unbind(2)


def packed(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [B, 7, 2, 8], and k and v [tokens, 2, 8]."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(len(lengths), 7, 2, 8, generator=generator).to(dtype)
    k, v = torch.randn(2, sum(lengths), 2, 8, generator=generator).to(dtype)
    return q, k, v


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    samples = zip(q.split(1), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([formula(q, k[None], v[None]) for q, k, v in samples])


def plan(lengths: list[int], **changes: Any) -> Any:
    given = {"queries": 7, "device": CPU, "dtype": torch.float64, "head_dim": 8}
    return plan_text(lengths, **(given | changes))


class Operations(TorchDispatchMode):
    """Records the names of operators that run, and the number of elements of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        sizes = [item.numel() for item in torch.utils._pytree.tree_leaves(out) if isinstance(item, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


# --- Values ---


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (3, 7, 2, 72), (2, 65, 4, 16)])
def test_attention_equals_the_formula(shape: tuple[int, ...]) -> None:
    q, k, v = qkv(*shape)
    assert torch.allclose(attention(q, k, v), formula(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_in_low_precision_is_as_good_as_the_formula_in_it(dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 65, 4, 16, dtype=dtype)
    exact = formula(q.double(), k.double(), v.double())
    error = (attention(q, k, v).double() - exact).abs().max()
    eager = (formula(q, k, v).double() - exact).abs().max()
    assert error <= 2 * eager + torch.finfo(dtype).eps  # the formula rounds the weights as well


def test_attention_gradients() -> None:
    q, k, v = (tensor.detach().requires_grad_() for tensor in qkv(2, 5, 2, 4))
    assert torch.autograd.gradcheck(attention, (q, k, v))


@pytest.mark.parametrize("way", WAYS)
def test_text_attention_equals_the_formula_sample_by_sample(way: str) -> None:
    lengths = WAYS[way]
    q, k, v = packed(lengths)
    assert plan(lengths).way == way
    expected = one_by_one(q, k, v, lengths)
    assert torch.allclose(text_attention(q, k, v, lengths), expected, rtol=0, atol=1e-12)
    assert torch.equal(text_attention(q, k, v, plan(lengths)), text_attention(q, k, v, lengths))


@pytest.mark.parametrize("way", WAYS)
def test_text_attention_gradients(way: str) -> None:
    """Among other things, a token that fills padded places gets no gradient from them."""
    inputs = [tensor.requires_grad_() for tensor in packed(WAYS[way])]
    assert torch.autograd.gradcheck(lambda *given: text_attention(*given, plan(WAYS[way])), inputs)


@pytest.mark.parametrize("lengths", [*WAYS.values(), [3, 1, 8, 8, 2]])
def test_text_attention_equals_masked_attention_over_padded_text(lengths: list[int]) -> None:
    """The mask has holes, and the text is float32, as callers had it before packing."""
    samples, longest = len(lengths), max(lengths) + 3
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(samples, 7, 2, 8, generator=generator)
    k, v = torch.randn(2, samples, longest, 2, 8, generator=generator)
    mask = torch.zeros(samples, longest, dtype=torch.bool)
    for sample, length in enumerate(lengths):
        mask[sample, torch.randperm(longest, generator=generator)[:length]] = True
    heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads, attn_mask=mask[:, None, None]).transpose(1, 2)
    places = text_places(mask, CPU)
    k, v = (tensor.flatten(0, 1).index_select(0, places) for tensor in (k, v))
    found = text_attention(q, k, v, mask.sum(1).tolist())
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_a_sample_does_not_depend_on_the_others() -> None:
    q, k, v = packed([4, 5, 5])
    together = text_attention(q, k, v, [4, 5, 5])
    alone = text_attention(q[:1], k[:4], v[:4], [4])
    beside_a_long_one = text_attention(
        q[[0, 0]], k[[0, 1, 2, 3, *range(14)]], v[[0, 1, 2, 3, *range(14)]], [4, 14]
    )
    assert torch.allclose(together[:1], alone, rtol=0, atol=1e-12)
    assert torch.allclose(beside_a_long_one[:1], alone, rtol=0, atol=1e-12)


def test_little_padding_takes_one_masked_call_and_much_takes_runs() -> None:
    assert plan([6, 8]).way == "masked"  # 2 of 16 places are padding
    assert plan([4, 8]).way == "masked"  # 4 of 16, a quarter
    assert plan([3, 8]).way == "runs"
    assert plan([8, 8, 1, 1, 1, 8]).runs == ((2, 8), (3, 1), (1, 8))


# --- No scores ---


def test_forward_and_backward_run_the_fused_kernels_and_nothing_with_scores() -> None:
    shape = (1, 1800, 2, 16)
    q, k, v = qkv(*shape, dtype=torch.float32, grad=True)
    with Operations() as seen:
        attention(q, k, v).sum().backward()
    assert [name for name in seen.names if "attention" in name] == [FLASH, f"{FLASH}_backward"]
    assert not {"bmm", "_softmax", "softmax"} & set(seen.names)
    assert (
        seen.largest == 3 * 1800 * 2 * 16
    )  # the gradient of the fused projection; scores are 100 times that


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_float_dtype_takes_the_fused_kernel_even_from_odd_strides(dtype: torch.dtype) -> None:
    q, k, v = (tensor[..., ::2] for tensor in qkv(2, 9, 2, 16, dtype=dtype))
    with Operations() as seen:
        attention(q, k, v)
    assert FLASH in seen.names


def test_spatial_attention_at_720p_holds_no_scores() -> None:
    """One video has 20 latent frames of 45 x 80 patches; the scores of a layer would be 8.3 GB in bfloat16."""
    with FakeTensorMode(), Operations() as seen:
        qkv = torch.empty(20, 3600, 3, 16, 72, dtype=torch.bfloat16, requires_grad=True)
        attention(*qkv.unbind(2)).sum().backward()
    assert seen.largest == 20 * 3600 * 3 * 16 * 72


MEMORY_PROBE = """
import resource, torch
from vpo_kernels.attention import attention
def run(tokens):
    x = torch.ones(1, tokens, 1, 8, requires_grad=True)
    attention(x, x, x).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(-run(64) + run(8000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.long
def test_peak_memory_stays_far_below_the_scores() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY_PROBE], capture_output=True, text=True, check=True)
    scores_mib = 8000**2 * 4 / 2**20  # 244
    assert int(done.stdout) / 1024 < scores_mib / 5


def test_on_a_gpu_the_kernel_with_scores_is_refused() -> None:
    gpu = torch.device("cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with op._without_scores(gpu, dtype):
            assert not torch.backends.cuda.math_sdp_enabled()
            assert torch.backends.cuda.flash_sdp_enabled()
            assert torch.backends.cuda.cudnn_sdp_enabled()
            assert torch.backends.cuda.mem_efficient_sdp_enabled()
            scattered = torch.randn(1, 2, 4, 16)[..., ::2]  # which only that kernel takes
            with (
                pytest.warns(UserWarning, match="stride"),
                pytest.raises(RuntimeError, match="No available kernel"),
            ):
                F.scaled_dot_product_attention(scattered, scattered, scattered)
    with op._without_scores(gpu, torch.float64):
        assert torch.backends.cuda.math_sdp_enabled()


# --- Compile, autocast, checkpoints ---


def test_attention_compiles_into_one_graph() -> None:
    q, k, v = qkv(2, 6, 2, 8, dtype=torch.float32, grad=True)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), attention(q, k, v))
    compiled(q, k, v).sum().backward()


@pytest.mark.parametrize("way", WAYS)
def test_text_attention_compiles_into_one_graph(way: str) -> None:
    q, k, v = packed(WAYS[way])
    compiled = torch.compile(text_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, plan(WAYS[way])), text_attention(q, k, v, WAYS[way]))


def test_other_lengths_do_not_compile_again() -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(text_attention, fullgraph=True, backend=counter)
    for lengths in ([3, 4], [7, 8], [9, 8], [20, 19], [9, 12]):
        compiled(*packed(lengths), plan(lengths))
    assert counter.frame_count <= 2  # the second with symbolic sizes


def test_autocast_reaches_every_input() -> None:
    q, k, v = packed([4, 5, 5], torch.float32)
    half = [tensor.bfloat16() for tensor in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_dtype(q) == torch.bfloat16
        assert attention_dtype(q.double()) == torch.float64
        found = text_attention(q, k, half[2], [4, 5, 5])
        dense = attention(q, q, half[0])
    assert torch.equal(found, text_attention(*half, [4, 5, 5]))
    assert torch.equal(dense, attention(half[0], half[0], half[0]))
    assert attention_dtype(q) == torch.float32


@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_gives_the_same_gradients(way: str) -> None:
    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [tensor.requires_grad_() for tensor in packed(WAYS[way])]
        run(*inputs, plan(WAYS[way])).square().sum().backward()
        return [tensor.grad for tensor in inputs if tensor.grad is not None]

    again = gradients(lambda *given: checkpoint(text_attention, *given, use_reentrant=False))
    for one, other in zip(again, gradients(text_attention), strict=True):
        assert torch.equal(one, other)


# --- Errors ---


def test_sizes_that_do_not_fit_the_plan_are_named() -> None:
    q, k, v = packed([4, 5, 5])
    with pytest.raises(
        ValueError, match=r"q is \[2, 7, 2, 8\], but the text is planned for \[3, 7, heads, D\]"
    ):
        text_attention(q[:2], k, v, plan([4, 5, 5]))
    with pytest.raises(ValueError, match=r"v is \[13, 2, 8\], expected packed text \[14, 2, 8\]"):
        text_attention(q, k, v[1:], [4, 5, 5])


def test_samples_without_text_are_refused() -> None:
    with pytest.raises(ValueError, match="the text of sample 1 has 0 tokens, but must have at least 1"):
        plan([3, 0, 2])
    with pytest.raises(ValueError, match="at least one sample"):
        plan([])


def test_a_backend_that_was_not_chosen_is_refused() -> None:
    q, k, v = qkv(1, 3, 1, 8)
    with pytest.raises(ValueError, match=r"backend='flash3' has not been chosen.*choose_attention"):
        attention(q, k, v, "flash3")


@pytest.mark.parametrize("way", WAYS)
def test_other_video_tokens_than_planned_are_refused(way: str) -> None:
    q, k, v = packed(WAYS[way])
    with pytest.raises(
        ValueError, match=r"q is \[\d, 6, 2, 8\], but the text is planned for \[\d, 7, heads, D\]"
    ):
        text_attention(q[:, :6], k, v, plan(WAYS[way]))


# --- Limits of kernels on GPUs ---


@pytest.mark.parametrize(
    ("shape", "backward", "most"),
    [
        ((72_000, 20, 16, 72), True, 2**31 // (16 * 128 * 96)),
        ((200, 3600, 16, 72), True, 2**31 // (16 * 3712 * 96)),
        ((70_000, 1, 1, 8), True, 2**16 - 1),
        ((72_000, 20, 16, 72), False, 2**16 - 1),
    ],
    ids=["over time at 720p", "over space at 720p", "grid", "rollout"],
)
def test_a_gpu_gets_no_more_samples_in_a_call_than_flash_attention_can_count(
    shape: tuple[int, ...], backward: bool, most: int
) -> None:
    """It has samples along y of its grid; its backward pass counts the sums of dq, padded to 128 x 32, in int32."""
    with FakeTensorMode():
        assert op._samples_at_once(torch.empty(shape, dtype=torch.bfloat16, device="cuda"), backward) == most
        assert op._samples_at_once(torch.empty(shape, dtype=torch.bfloat16), backward) is None


@pytest.mark.parametrize("way", ["self", "text"])
def test_more_samples_than_that_take_several_calls_of_about_equally_many(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = qkv(7, 5, 2, 8, grad=True)

    def attend() -> Tensor:
        if way == "self":
            return attention(q, k, v)
        return text_attention(q, k.flatten(0, 1), v.flatten(0, 1), [5] * 7)

    whole = attend()
    expected = torch.autograd.grad(whole.square().sum(), (q, k, v))
    asked: list[bool] = []
    monkeypatch.setattr(op, "_samples_at_once", lambda q, backward: asked.append(backward) or 3)
    with torch.no_grad():
        assert torch.equal(attend(), whole)
    with Operations() as seen:
        found = attend()
    assert [name for name in seen.names if "attention" in name] == [FLASH] * 3
    assert torch.equal(found, whole)
    assert asked == [False, True]
    assert all(map(torch.equal, torch.autograd.grad(found.square().sum(), (q, k, v)), expected))
