"""The choice of the attention backend, its reason, and the calls of each package; the packages are stand-ins."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from after_torch import run_after_torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from vpo_kernels.attention import (
    attention,
    choose,
    choose_attention,
    packages,
    plan_text,
    text,
    text_attention,
)
from vpo_kernels.attention.packages import flash_kernels, xformers_kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HOPPER, BLACKWELL, TURING, VOLTA = (9, 0), (10, 0), (7, 5), (6, 0)
LENGTHS = [3, 1, 8, 8]
STDIT = {"device": GPU, "dtype": torch.bfloat16, "head_dim": 72}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget all choices and imports, and pretend to be on a Hopper GPU without any package."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: HOPPER)
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(packages, "_loaded", {})
    for cache in (choose_attention, packages.import_package):
        cache.cache_clear()
    yield
    for cache in (choose_attention, packages.import_package):
        cache.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, module: str, **symbols: Any) -> None:
    stand_in = types.ModuleType(module)
    for name, value in symbols.items():
        setattr(stand_in, name, value)
    monkeypatch.setitem(sys.modules, module, stand_in)


def flash_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v)


def flash_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor:
    """Attend sample by sample: q, k, v are [tokens, heads, D], with the ends of the samples."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max(queries), max(keys)) == (max_seqlen_q, max_seqlen_k)
    samples = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([attention(q[None], k[None], v[None])[0] for q, k, v in samples])


@dataclass
class Diagonal:
    queries: Sequence[int]
    keys: Sequence[int]

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int], *, device: torch.device
    ) -> Diagonal:
        assert device == CPU
        return cls(q_seqlen, kv_seqlen)


def memory_efficient(q: Tensor, k: Tensor, v: Tensor, attn_bias: Diagonal | None = None) -> Tensor:
    if attn_bias is None:
        return attention(q, k, v)
    assert q.shape[0] == k.shape[0] == v.shape[0] == 1
    parts = zip(
        q[0].split(attn_bias.queries), k[0].split(attn_bias.keys), v[0].split(attn_bias.keys), strict=True
    )
    return torch.cat([attention(q[None], k[None], v[None])[0] for q, k, v in parts])[None]


# --- Choice ---


def test_a_cpu_takes_torchs_and_says_why() -> None:
    choice = choose_attention("auto", device=CPU, dtype=torch.float32, head_dim=32)
    assert str(choice) == "attention: sdpa (cpu; flash2, flash3, flash4, xformers need a CUDA device)"


def test_a_gpu_without_packages_takes_torchs_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("flash_attn", "xformers", "xformers.ops"):
        monkeypatch.delitem(sys.modules, module)
    choice = choose_attention("auto", **STDIT)
    assert choice.name == "sdpa"
    assert "flash2: No module named 'flash_attn'" in str(choice)
    assert "xformers: No module named 'xformers'" in str(choice)


def test_a_package_without_a_measured_win_stays_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not choose.WINNERS
    install(monkeypatch, "flash_attn", flash_attn_func=flash_dense, flash_attn_varlen_func=flash_varlen)
    choice = choose_attention("auto", **STDIT)
    assert choice.name == "sdpa"
    assert "flash2: no measured win on sm90 at head dim 72" in choice.reason


def test_a_measured_winner_is_taken_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn", flash_attn_func=flash_dense, flash_attn_varlen_func=flash_varlen)
    monkeypatch.setitem(choose.WINNERS, (90, 72), "flash2")
    choice = choose_attention("auto", **STDIT)
    assert str(choice) == "attention: flash2 (the fastest measured on sm90 at head dim 72)"
    assert choose_attention("auto", **{**STDIT, "head_dim": 64}).name == "sdpa"


def test_a_measured_winner_that_does_not_import_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choose.WINNERS, (90, 72), "flash3")
    assert choose_attention("auto", **STDIT).name == "sdpa"


def test_an_order_is_followed_and_a_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn", flash_attn_func=flash_dense, flash_attn_varlen_func=flash_varlen)
    assert str(choose_attention("flash2", **STDIT)) == "attention: flash2 (as configured)"
    assert str(choose_attention("sdpa", **STDIT)) == "attention: sdpa (as configured)"
    monkeypatch.delitem(sys.modules, "flash_attn")
    assert choose_attention("flash2", **STDIT).name == "flash2"


def test_an_order_that_cannot_be_followed_says_why_and_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn", flash_attn_func=flash_dense, flash_attn_varlen_func=flash_varlen)
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    message = (
        r"attention='flash3' cannot run here: No module named 'flash_attn_interface'; .*: auto, sdpa, flash2$"
    )
    with pytest.raises(ValueError, match=message):
        choose_attention("flash3", **STDIT)


@pytest.mark.parametrize(
    ("name", "place", "capability", "message"),
    [
        ("flash2", {"device": CPU}, HOPPER, "it needs a CUDA device, not cpu; choose one of: auto, sdpa$"),
        ("xformers", {"device": CPU}, HOPPER, "it needs a CUDA device, not cpu"),
        ("flash4", {"dtype": torch.float32}, HOPPER, "it needs float16 or bfloat16, not float32"),
        (
            "xformers",
            {"dtype": torch.float64},
            HOPPER,
            "it needs float16 or bfloat16 or float32, not float64",
        ),
        ("flash2", {"head_dim": 36}, HOPPER, "a head dim up to 256 and a multiple of 8, not 36"),
        ("flash4", {"head_dim": 160}, BLACKWELL, "a head dim up to 128 and a multiple of 8, not 160"),
        ("flash3", {}, BLACKWELL, "it has no kernels for sm100"),
        ("flash2", {}, TURING, "it has no kernels for sm75"),
        ("xformers", {}, VOLTA, "it has no kernels for sm60"),
    ],
)
def test_limits_are_named(
    monkeypatch: pytest.MonkeyPatch,
    name: Any,
    place: dict[str, Any],
    capability: tuple[int, int],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    with pytest.raises(ValueError, match=f"attention='{name}' cannot run here: .*{message}"):
        choose_attention(name, **{**STDIT, **place})


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"attention='flash' is unknown; it must be one of: auto, sdpa, flash2"
    ):
        choose_attention("flash", **STDIT)  # type: ignore[arg-type]


def test_a_package_without_the_symbol_or_with_a_broken_build_is_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "flash_attn", flash_attn_func=flash_dense)

    def broken(_module: str) -> types.ModuleType:
        raise RuntimeError("undefined symbol: _ZN3c10\nmany more lines")

    assert packages.import_package("flash2") == "flash_attn has no flash_attn_varlen_func"
    monkeypatch.setattr(packages.importlib, "import_module", broken)
    assert packages.import_package("flash3") == "RuntimeError: undefined symbol: _ZN3c10"


PROBE = """
import importlib.abc, sys
class Asked(importlib.abc.MetaPathFinder):
    names = []
    def find_spec(self, name, path=None, target=None):
        self.names.append(name.split(".")[0])
sys.meta_path.insert(0, Asked())
import torch
from vpo_kernels.attention import attention, choose_attention
x = torch.ones(1, 2, 1, 8)
attention(x, x, x)
choose_attention(device=x.device, dtype=x.dtype, head_dim=8)
print(sorted({"flash_attn", "flash_attn_interface", "xformers"} & set(Asked.names)))
"""


def test_importing_and_choosing_on_a_cpu_looks_for_no_package() -> None:
    assert run_after_torch(PROBE) == (0, "[]\n")


# --- How the packages are called ---


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(LENGTHS), 5, 2, 8, generator=generator)
    return q, *torch.randn(2, sum(LENGTHS), 2, 8, generator=generator)


def with_log_sum_exp(function: Any) -> Any:
    return lambda *given, **named: (function(*given, **named), torch.zeros(()))


@pytest.mark.parametrize(
    "kernels",
    [
        flash_kernels(flash_dense, flash_varlen),
        flash_kernels(with_log_sum_exp(flash_dense), with_log_sum_exp(flash_varlen)),
        xformers_kernels(memory_efficient, Diagonal.from_seqlens),
    ],
    ids=["flash", "flash returning more", "xformers"],
)
def test_packages_get_packed_text_in_one_call(monkeypatch: pytest.MonkeyPatch, kernels: Any) -> None:
    monkeypatch.setitem(packages._loaded, "flash2", kernels)
    q, k, v = inputs()
    plan = plan_text(LENGTHS, queries=5, device=CPU, dtype=torch.float32, head_dim=8, backend="flash2")
    assert (plan.way, plan.backend) == ("packed", "flash2")
    expected = text_attention(q, k, v, LENGTHS)
    assert torch.allclose(text_attention(q, k, v, plan), expected, rtol=0, atol=1e-6)
    assert torch.allclose(text_attention(q, k, v, LENGTHS, "flash2"), expected, rtol=0, atol=1e-6)
    assert torch.equal(attention(q, q, q, "flash2"), attention(q, q, q))
    even = text_attention(q, k, v, [5] * 4, "flash2")
    assert torch.equal(even, text_attention(q, k, v, [5] * 4))


def test_torchs_variable_length_call_serves_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(q: Tensor, k: Tensor, v: Tensor, *rows: Any) -> Tensor:
        names = list(inspect.signature(varlen_attn).parameters)[:7]
        assert names == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
        keywords = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return flash_varlen(q, k, v, **dict(zip(keywords, rows, strict=True)))

    assert text._has_varlen(GPU, torch.bfloat16, 72)
    assert not text._has_varlen(GPU, torch.float32, 72)
    assert not text._has_varlen(GPU, torch.bfloat16, 36)
    assert not text._has_varlen(CPU, torch.bfloat16, 72)
    q, k, v = inputs()
    expected = text_attention(q, k, v, LENGTHS)
    monkeypatch.setattr(text, "_has_varlen", lambda *_: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    plan = plan_text(LENGTHS, queries=5, device=CPU, dtype=torch.float32, head_dim=8)
    assert (plan.way, plan.backend) == ("packed", "sdpa")
    assert torch.allclose(text_attention(q, k, v, plan), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("capability", "fits"), [(TURING, False), ((8, 0), True), (BLACKWELL, True)])
def test_torchs_variable_length_call_is_for_ampere_and_newer(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert text._has_varlen(GPU, torch.bfloat16, 72) is fits
    assert not text._has_varlen(GPU, torch.bfloat16, 264)
