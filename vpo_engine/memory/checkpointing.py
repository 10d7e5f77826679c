"""What a network's blocks keep for the backward pass, and what that computes again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vpo_engine.config import Recompute

ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
    "vpo_kernels::temporal_attention",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
    "flash_attn_3::fwd",
    "xformers_flash::flash_fwd",
    "xformers_flash3::flash_fwd",
    "aten::_efficient_attention_forward",
)
"""Operators that ``vpo_kernels.attention`` and ``vpo_kernels.temporal_attention`` come down to: torch's, and those of
the packages. flash4 launches its kernels without an operator, so a policy cannot keep its results: they are computed
again."""

PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm")
"""Operators that linear layers come down to."""

KEPT: dict[Recompute, tuple[str, ...]] = {
    "pointwise": (*PRODUCTS, *ATTENTION),
    "all_but_attention": ATTENTION,
    "block": (),
}
"""By policy, the operators whose results (for attention: with the log-sum-exp) are kept beside a block's input."""

_OFFLOADABLE = ("all_but_attention", "block")


@dataclass(frozen=True)
class Activations:
    """How blocks are run. ``recompute`` and ``offload`` matter under grad only, ``mlp_chunks`` always.

    recompute: ``nothing`` keeps everything. ``pointwise`` keeps a block's input and the outputs of its matrix
        products and attentions, ``all_but_attention`` its input and those of its attentions, ``block`` its input.
        The loss is the same bit for bit, and so are the gradients where operations are deterministic.
    offload: inputs of blocks wait for the backward pass in host memory; see ``memory.offload``.
    mlp_chunks: the MLP, with its norm and its residual, goes over so many parts of the tokens; under grad each
        part is computed again in the backward pass, so that one part's hidden activations exist at a time. Products
        of fewer rows may round otherwise: predictions move by an ulp or so, gradients of weights are sums in another
        order (relative norm 4e-7 in float32 on a CPU).

    ValueError for an unknown policy, no part at all, or an offload under a policy that keeps more than it sends.
    """

    recompute: Recompute = "nothing"
    offload: bool = False
    mlp_chunks: int = 1

    def __post_init__(self) -> None:
        if self.recompute not in get_args(Recompute):
            raise ValueError(
                f"recompute={self.recompute!r} is unknown; it must be one of: {', '.join(get_args(Recompute))}"
            )
        if self.mlp_chunks < 1:
            raise ValueError(f"mlp_chunks={self.mlp_chunks} must be at least 1, which leaves the MLP whole")
        if self.offload and self.recompute not in _OFFLOADABLE:
            raise ValueError(
                f"offload=True sends the inputs of blocks to the host, but recompute={self.recompute!r} keeps many "
                f"times as much on the device; set recompute to {' or '.join(_OFFLOADABLE)}, or offload=False"
            )


def checkpointed(function: Callable[..., Tensor], *inputs: Any, recompute: Recompute) -> Tensor:
    """``function(*inputs)``, keeping for the backward pass what the policy says and nothing else."""
    if recompute == "nothing" or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(_contexts, recompute),
    )


def in_parts(
    function: Callable[..., Tensor], x: Tensor, constants: tuple[Tensor, ...], *, dim: int, parts: int
) -> Tensor:
    """``function(x, *constants)`` over ``parts`` parts of x along ``dim``; function maps each part by itself.

    x is the caller's own: without grad the result is written over it, part by part. Under grad every part is
    checkpointed. To be the last thing that a function given to ``checkpointed`` does: when that is computed
    again, parts are skipped, since the backward pass computes each of them when its turn comes.
    """
    if parts == 1:
        return function(x, *constants)
    pieces = x.tensor_split(min(parts, x.shape[dim]), dim)
    if not torch.is_grad_enabled():
        for piece in pieces:
            piece.copy_(function(piece, *constants))
        return x
    run = _skipped if _recomputing.get() else function
    outputs = [
        checkpoint(
            run, piece, *constants, use_reentrant=False, preserve_rng_state=False, context_fn=_part_contexts
        )
        for piece in pieces
    ]
    return torch.cat(outputs, dim)


def _skipped(x: Tensor, *_: Tensor) -> Tensor:
    return x


_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)
"""Whether a checkpointed function is being computed again."""
_in_part: ContextVar[bool] = ContextVar("in_part", default=False)
"""Whether a part of ``in_parts`` is being computed: nothing of it is kept."""


class _Within:
    """Enters a context with a flag up; as often as wanted, since a retained graph is computed again each time."""

    def __init__(self, flag: ContextVar[bool], inner: AbstractContextManager[Any]) -> None:
        self._flag, self._inner = flag, inner
        self._tokens: list[Token[bool]] = []

    def __enter__(self) -> None:
        self._inner.__enter__()
        self._tokens.append(self._flag.set(True))

    def __exit__(self, *error: Any) -> None:
        self._flag.reset(self._tokens.pop())
        self._inner.__exit__(*error)


def _contexts(recompute: Recompute) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of the first computation and of those in the backward pass."""
    kept = _operators(KEPT[recompute])
    if not kept:
        return nullcontext(), _Within(_recomputing, nullcontext())
    first, again = create_selective_checkpoint_contexts(partial(_policy, kept))
    return first, _Within(_recomputing, again)


def _part_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return _Within(_in_part, nullcontext()), nullcontext()


def _policy(
    kept: frozenset[Any], _context: Any, operator: Any, *_args: Any, **_kwargs: Any
) -> CheckpointPolicy:
    keep = operator in kept and not _in_part.get()
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _operators(names: tuple[str, ...]) -> frozenset[Any]:
    """Those of the named operators that this process has loaded."""
    found = []
    for name in names:
        namespace, _, operator = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            found.append(packet.default)
    return frozenset(found)
