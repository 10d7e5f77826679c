"""Ulysses for transformers of diffusers: tokens are divided among processes, and in self-attention the heads are.

diffusers 0.42.1 has context parallelism of its own (``enable_parallelism``). It is not used, because it does not start
without an accelerator, takes only numbers of tokens and heads that the number of processes divides where there are
gradients, and has no plan for CogVideoX's class. What is taken from diffusers is the arithmetic of its processors: they
call ``dispatch_attention_fn`` for the attention, and here another function in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vpo_engine.distributed.sequence import SequenceGroup
from vpo_engine.models.class_exchange import exchange

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function of queries, keys and values, each [B, N, heads, channels], that computes their attention."""

_DISPATCH = "dispatch_attention_fn"


@dataclass(frozen=True)
class TokenInputs:
    """The arguments of a block that have a row for each token, along dimension 1.

    carried: what blocks return, too; the video's tokens are the first. constant: what every block is given anew, such
    as rotary tables. attention: the end of the names of the modules whose attention is among the carried tokens.
    output: the name of the last layer, which works on each token by itself.
    """

    carried: tuple[str, ...]
    constant: tuple[str, ...] = ()
    attention: str = "attn1"
    output: str = "proj_out"


class Slices:
    """One call of a transformer whose tokens are divided: how many each process holds.

    sizes: of each process, of all carried tokens together. video: the number of the video's tokens.
    """

    def __init__(self, group: SequenceGroup, kind: TokenInputs) -> None:
        self.group, self._kind = group, kind
        self.sizes: list[int] = []
        self.video = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mark a block of code that computes a part of the call."""
        token = _slices.set(self)
        try:
            yield
        finally:
            _slices.reset(token)

    def of(self, names: Sequence[str], inputs: Sequence[Any], first: bool) -> tuple[Any, ...]:
        """Return a block's inputs with this process's slices of whole tokens; only the first block gets all whole."""
        made, group = dict(zip(names, inputs, strict=True)), self.group
        if first:
            whole = [made[name] for name in self._kind.carried]
            group.check(
                **{f"{name}_tokens": x.shape[1] for name, x in zip(self._kind.carried, whole, strict=True)}
            )
            self.video = whole[0].shape[1]
            self.sizes = [sum(each) for each in zip(*(group.sizes(x.shape[1]) for x in whole), strict=True)]
            # torch multiplies rows that are not contiguous otherwise by trained weights than by frozen ones.
            made |= {name: group.own(made[name], 1).contiguous() for name in self._kind.carried}
        made |= {name: tree_map(lambda x: group.own(x, 1), made[name]) for name in self._kind.constant}
        return tuple(made.values())


_slices: ContextVar[Slices | None] = ContextVar("slices", default=None)
"""The call that is running in this thread, also where a part of it is computed again."""


def divide(network: Any, kind: TokenInputs | None, group: SequenceGroup) -> None:
    """Let a prepared transformer (see ``diffusers_network``) compute on slices of its tokens from now on.

    Raise ValueError for processors of a version of diffusers that do not call what is exchanged here.
    """
    assert kind is not None, "a family whose card supports distributed.sequence_parallel names its tokens"
    for name, module in network.named_modules():
        if f".{name}".endswith(f".{kind.attention}"):
            own = hasattr(module.processor, "attend")
            exchange(module.processor, _AttendsToAll if own else _DispatchesToAll)
            if not own:
                _redirected(type(module.processor).__mro__[2].__call__)
    network.get_submodule(kind.output).register_forward_hook(_gathered)
    network.sequence, network.token_inputs = group, kind


def _gathered(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    slices = _slices.get()
    return output if slices is None else slices.group.gather(output, 1, slices.video)


@torch.compiler.disable
def attend_to_all(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the attention of divided tokens, [B, own tokens, heads, channels], to the tokens of all processes.

    Meanwhile this process has all tokens of some of the heads. Four exchanges; the gradient makes four more.
    """
    slices = _slices.get()
    if slices is None:
        return attend(q, k, v)
    group, tokens, heads = slices.group, slices.sizes, slices.group.sizes(q.shape[2])
    q, k, v = (group.switch(x, 2, 1, heads, tokens) for x in (q, k, v))
    return group.switch(attend(q, k, v), 1, 2, tokens, heads)


class _AttendsToAll:
    """A processor of the engine, whose ``attend`` reaches the tokens of all processes."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_to_all(super().attend, q, k, v)  # type: ignore[misc]


class _DispatchesToAll:
    """A processor of diffusers, whose attention reaches the tokens of all processes."""

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call: Any = super().__call__  # type: ignore[misc]
        return _redirected(call.__func__)(self, *args, **kwargs)


@functools.cache
def _redirected(call: FunctionType) -> Callable[..., Any]:
    """Return a processor's ``__call__`` with ``_dispatch`` in place of the function of diffusers."""
    if _DISPATCH not in call.__code__.co_names:
        import diffusers

        raise ValueError(
            f"distributed.sequence_parallel does not know the attention of diffusers {diffusers.__version__}: "
            f"{call.__qualname__} calls no {_DISPATCH}. Install diffusers 0.42.1, or set it to 1"
        )
    namespace = {**call.__globals__, _DISPATCH: _dispatch}
    made = FunctionType(call.__code__, namespace, call.__name__, call.__defaults__, call.__closure__)
    made.__kwdefaults__ = call.__kwdefaults__
    return made


def _dispatch(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    assert options.get("attn_mask") is None, "the tokens of a video have no mask"
    return attend_to_all(functools.partial(dispatch_attention_fn, **options), query, key, value)
