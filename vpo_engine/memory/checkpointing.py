"""Activation checkpointing of a network's blocks, with a choice of what is kept and what is computed again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

if TYPE_CHECKING:  # so that networks need no pydantic
    from vpo_engine.config import ActivationCheckpointing

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
"""Operators that ``vpo_kernels.attention`` and ``vpo_kernels.temporal_attention`` call: torch's own and those of other
packages. flash4 launches its kernels without an operator, so its results cannot be kept and are computed again."""

PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm")
"""Operators that linear layers call."""

KEPT: dict[ActivationCheckpointing, tuple[str, ...]] = {
    "pointwise": (*PRODUCTS, *ATTENTION),
    "all_but_attention": ATTENTION,
    "block": (),
}
"""The operators whose results are kept in addition to a block's input (attention: with the log-sum-exp)."""

_OFFLOADABLE = ("all_but_attention", "block")


@dataclass(frozen=True)
class Activations:
    """Settings of how blocks are run. ``checkpointing`` and ``offload`` have an effect with gradients only,
    ``mlp_chunks`` always has.

    checkpointing: ``none`` keeps everything. ``pointwise`` keeps a block's input and the outputs of its matrix
        products and attentions, ``all_but_attention`` its input and the outputs of its attentions, ``block`` its
        input. The loss is the same bit for bit, and so are the gradients where operations are deterministic.
    offload: the inputs of blocks wait for the backward pass in host memory; see ``vpo_engine.memory.offload``.
    mlp_chunks: the MLP, with its norm and its residual, processes the tokens in this many parts. With gradients each
        part is computed again in the backward pass, so that the hidden activations of one part exist at a time.
        Matrix products of fewer rows may round differently: predictions change by about one ulp, and the gradients of
        weights are summed in another order (relative norm 4e-7 in float32 on a CPU).

    Raise ValueError for an unknown mode, for fewer than one part, and for an offload with a mode that keeps more
    activations on the device than the offload saves.
    """

    checkpointing: ActivationCheckpointing = "none"
    offload: bool = False
    mlp_chunks: int = 1

    def __post_init__(self) -> None:
        known = ("none", *KEPT)
        if self.checkpointing not in known:
            raise ValueError(
                f"checkpointing={self.checkpointing!r} is unknown; it must be one of: {', '.join(known)}"
            )
        if self.mlp_chunks < 1:
            raise ValueError(
                f"mlp_chunks={self.mlp_chunks} must be at least 1; 1 computes the MLP in one part"
            )
        if self.offload and self.checkpointing not in _OFFLOADABLE:
            raise ValueError(
                f"offload=True moves the inputs of blocks to the host, but "
                f"checkpointing={self.checkpointing!r} keeps many times as much on the device; set "
                f"checkpointing to {' or '.join(_OFFLOADABLE)}, or offload=False"
            )


def checkpointed(
    function: Callable[..., Tensor], *inputs: Any, checkpointing: ActivationCheckpointing
) -> Tensor:
    """Call ``function(*inputs)``, keeping for the backward pass only what ``checkpointing`` says."""
    if checkpointing == "none" or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(_contexts, checkpointing),
    )


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Call ``function(*inputs)``, which draws no random numbers, and compute it again in the backward pass.

    Nothing but the inputs is kept. Functions in it may be ``checkpointed`` themselves.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def in_parts(
    function: Callable[..., Tensor], x: Tensor, constants: tuple[Tensor, ...], *, dim: int, parts: int
) -> Tensor:
    """Apply ``function(x, *constants)`` to ``parts`` parts of x along ``dim``, each independent of the others.

    Without gradients the result overwrites x, part by part, so x must not be needed afterwards. With gradients every
    part is checkpointed. Inside a function given to ``checkpointed`` this must be the last operation: when that
    function is computed again the parts are skipped, because the backward pass computes each part when it needs it.
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


def in_separate_parts(function: Callable[[Tensor], Tensor], x: Tensor, *, dim: int, parts: int) -> Tensor:
    """Do what ``in_parts`` does for a function that other operations of a block follow; the result is a new tensor.

    Where the block is checkpointed, its second computation needs the results of the parts, so with gradients every part
    is computed once more than by ``in_parts``.
    """
    if parts == 1:
        return function(x)

    def run(piece: Tensor) -> Tensor:
        # torch multiplies rows that are not contiguous otherwise by trained weights than by frozen ones.
        return function(piece.contiguous())

    pieces = x.tensor_split(min(parts, x.shape[dim]), dim)
    if torch.is_grad_enabled():
        outputs = [
            checkpoint(run, piece, use_reentrant=False, preserve_rng_state=False, context_fn=_part_contexts)
            for piece in pieces
        ]
        return torch.cat(outputs, dim)
    first = run(pieces[0])
    shape = list(first.shape)
    shape[dim] = x.shape[dim]
    out = first.new_empty(shape)
    targets = out.tensor_split(len(pieces), dim)
    targets[0].copy_(first)
    del first
    for target, piece in zip(targets[1:], pieces[1:], strict=True):
        target.copy_(run(piece))
    return out


def _skipped(x: Tensor, *_: Tensor) -> Tensor:
    return x


_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)
"""True while a checkpointed function is computed again."""
_in_part: ContextVar[bool] = ContextVar("in_part", default=False)
"""True while a part of ``in_parts`` is computed; none of its activations is kept."""


class _WithFlag:
    """Enters a context and sets a flag. It can be entered repeatedly: a retained graph is computed again each time."""

    def __init__(self, flag: ContextVar[bool], inner: AbstractContextManager[Any]) -> None:
        self._flag, self._inner = flag, inner
        self._tokens: list[Token[bool]] = []

    def __enter__(self) -> None:
        self._inner.__enter__()
        self._tokens.append(self._flag.set(True))

    def __exit__(self, *error: Any) -> None:
        self._flag.reset(self._tokens.pop())
        self._inner.__exit__(*error)


def _contexts(
    checkpointing: ActivationCheckpointing,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts for the first computation and for the repeated one in the backward pass."""
    kept = _operators(KEPT[checkpointing])
    if not kept:
        return nullcontext(), _WithFlag(_recomputing, nullcontext())
    first, again = create_selective_checkpoint_contexts(partial(_policy, kept))
    return first, _WithFlag(_recomputing, again)


def _part_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return _WithFlag(_in_part, nullcontext()), nullcontext()


def _policy(
    kept: frozenset[Any], _context: Any, operator: Any, *_args: Any, **_kwargs: Any
) -> CheckpointPolicy:
    keep = operator in kept and not _in_part.get()
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _operators(names: tuple[str, ...]) -> frozenset[Any]:
    """Return those of the named operators that this process has loaded."""
    found = []
    for name in names:
        namespace, _, operator = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            found.append(packet.default)
    return frozenset(found)
