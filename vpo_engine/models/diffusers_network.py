"""Run a diffusers transformer with the engine's options, without changing what its layers compute.

``prepare_network`` exchanges the classes of the transformer, of its repeating blocks and of some modules inside for
subclasses of the same names. Modules, parameters and keys stay what they are, copies of the network (the reference, for
example) run in the same way, and diffusers saves the network as before. The subclasses act only while the transformer's
forward pass is called; ``_Pass`` is what one such call knows.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vpo_kernels.attention import AttentionName, BackendName, Choice, attention, choose_attention

from vpo_engine.distributed.sequence import SequenceGroup, alone
from vpo_engine.memory.checkpointing import Activations, checkpointed, in_separate_parts
from vpo_engine.memory.offload import OffloadedInputs
from vpo_engine.models.class_exchange import exchange
from vpo_engine.models.compiling import check_compiler, compiled
from vpo_engine.models.diffusers_sequence import Slices
from vpo_engine.models.step_cache import BlockCache
from vpo_engine.video_model import repeating_blocks

Outputs = Tensor | tuple[Tensor, ...]
"""What a block returns: the tokens of the video, alone or followed by those of the text."""
RunBlock = Callable[..., Outputs]
"""A function that computes a block: of the block and its arguments."""


@dataclass(frozen=True)
class TextLayers:
    """Layers whose results depend on the text alone, so that all steps of a sampling loop share them.

    owner: the end of the names of the modules that call the layers. layers: the names of the layers in such a module,
    each with the name of the layer that follows at once, or None.
    """

    owner: str
    layers: tuple[tuple[str, str | None], ...]


CROSS_ATTENTION_LAYERS: tuple[tuple[str, str | None], ...] = (("to_k", "norm_k"), ("to_v", None))
"""The layers of a cross-attention of diffusers that make keys and values of the text."""


ATTENTION_BACKENDS = {"sdpa": "native", "flash2": "flash", "flash3": "_flash_3", "xformers": "xformers"}
"""{an implementation of attention as ``vpo_kernels.attention`` calls it: the backend of diffusers that uses it}."""


class Processor:
    """The base class of processors of diffusers that compute attention through ``vpo_kernels.attention``.

    backend: the implementation; see there.
    """

    backend: BackendName = "sdpa"

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention of q to k and v, [B, N, heads, channels]."""
        return attention(q, k, v, self.backend)


class Loop:
    """Values that the calls of one sampling loop share. It is an argument of each; the first call fills it.

    It serves one network with unchanged weights, one text and one batch, without gradients. ``repeat``: the number of
    samples of a prompt, which stand next to each other: results of text layers are computed once for each prompt.
    cache: None, or the threshold of ``BlockCache``. run: computes a block in place of its forward. shared: the
    processes that hold slices of the tokens, if there are any.
    """

    def __init__(
        self,
        repeat: int,
        cache: float | None = None,
        run: RunBlock | None = None,
        shared: SequenceGroup | None = None,
    ) -> None:
        self.filled = False
        self.repeat = repeat
        self.blocks = None if cache is None else BlockCache(cache, shared)
        self.run = run
        self._results: dict[tuple[int, str], Tensor] = {}

    def result(
        self, owner: nn.Module, name: str, compute: Callable[[Tensor], Tensor], text: Tensor
    ) -> Tensor:
        """Return what ``compute`` makes of the text of all samples; it is called for the first call only."""
        assert not torch.is_grad_enabled(), "what sampling steps share has no gradient"
        key = (id(owner), name)
        if key not in self._results:
            self._results[key] = compute(text[:: self.repeat].contiguous())
        return self._results[key].repeat_interleave(self.repeat, dim=0)


def prepare_network(network: Any, text_layers: Sequence[TextLayers]) -> None:
    """Let a diffusers transformer and its copies take the engine's options.

    After this the forward pass takes one more argument, ``loop``, a ``Loop`` or None. ``network.activations`` says how
    blocks are run, and ``network.offloaded`` holds inputs of blocks on the host. text_layers: see ``TextLayers``.
    """
    from diffusers.models.attention import FeedForward

    blocks: list[Any] = [block for members in repeating_blocks(network).values() for block in members]
    for number, block in enumerate(blocks):
        exchange(block, _Block)
        block.first, block.last = number == 0, number == len(blocks) - 1
    for name, module in network.named_modules():
        if isinstance(module, FeedForward):
            exchange(module, _FeedForward)
        for kind in text_layers:
            if f".{name}".endswith(f".{kind.owner}"):
                exchange(module, _TextOwner)
                module.text_layers = kind
    exchange(network, _Transformer)
    network.activations = Activations()
    network.offloaded = OffloadedInputs()
    network.sequence = alone()


def set_activations(network: Any, activations: Activations) -> None:
    """Set how the blocks of a prepared network are run."""
    network.activations = activations
    for module in network.modules():
        if isinstance(module, _FeedForward):
            module.parts = activations.mlp_chunks


class CompiledBlocks:
    """Runs blocks without gradients through torch.compile; all blocks of a kind share what is compiled.

    Modules in blocks that keep results of the text are not compiled: they look for what the loop has kept.
    """

    def __init__(self, network: Any, device: torch.device, backend: str = "inductor") -> None:
        """Raise ValueError where torch.compile needs a C++ compiler and finds none."""
        if backend == "inductor":
            check_compiler(device)
        blocks = [block for members in repeating_blocks(network).values() for block in members]
        kinds = {type(part) for block in blocks for part in block.modules() if isinstance(part, _TextOwner)}
        for kind in kinds:
            if "forward" not in vars(kind):
                kind.forward = torch.compiler.disable(kind.forward)  # type: ignore[method-assign]
        self._forward = compiled(_forward, backend, whole=not kinds and network.sequence.count == 1)

    def __call__(self, block: nn.Module, *inputs: Any) -> Outputs:
        """Compute the block's forward, up to rounding."""
        assert not torch.is_grad_enabled()
        from torch.fx.experimental import _config as shapes

        # Sizes that happen to be equal must not be taken to be so always.
        with shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return self._forward(block, *inputs)


def _forward(block: nn.Module, *inputs: Any) -> Outputs:
    made: Outputs = block.forward(*inputs)
    return made


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


class _Pass:
    """One call of the transformer: how its blocks are run, and what they have in common."""

    def __init__(self, network: Any, loop: Loop | None) -> None:
        self._activations: Activations = network.activations
        self._sender = network.offloaded.forward_pass()
        self.loop = loop
        group = network.sequence
        self.slices = Slices(group, network.token_inputs) if group.count > 1 else None
        self._after_first: Outputs | None = None
        self._rest: Tensor | None = None

    def block(self, block: nn.Module, call: Callable[..., Outputs], inputs: tuple[Any, ...]) -> Outputs:
        """Run a block, or take what it would add from the cache of the loop. The tokens are the first input."""
        if self.slices is not None:
            kind: Any = type(block)
            names = list(_signature(kind).parameters)[1:]
            inputs = self.slices.of(names, inputs, first=bool(block.first))
        cache = None if self.loop is None else self.loop.blocks
        if cache is None:
            return self._compute(block, call, inputs)
        if block.first:
            made = self._compute(block, call, inputs)
            self._after_first = made
            self._rest = cache.after_first(_tokens(made) - inputs[0])
            return made
        assert self._after_first is not None
        if self._rest is not None:
            tokens = inputs[0] + self._rest if block.last else inputs[0]
            return tokens if isinstance(self._after_first, Tensor) else (tokens, *self._after_first[1:])
        made = self._compute(block, call, inputs)
        if block.last:
            cache.keep(_tokens(made) - _tokens(self._after_first))
        return made

    def _compute(self, block: nn.Module, call: Callable[..., Outputs], inputs: tuple[Any, ...]) -> Outputs:
        if self.loop is not None and self.loop.run is not None:
            return self.loop.run(block, *inputs)
        settings = self._activations
        sending = settings.offload and torch.is_grad_enabled()
        if self.slices is not None:  # the backward pass may compute the block again, outside of this call
            call = self.slices.running()(call)
        with self._sender.sending(inputs[0]) if sending else nullcontext():
            made: Outputs = checkpointed(call, *inputs, checkpointing=settings.checkpointing)  # type: ignore[arg-type]
        return made


def _tokens(outputs: Outputs) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


_running: ContextVar[_Pass | None] = ContextVar("running", default=None)
"""The call that is running in this thread."""


class _Transformer(nn.Module):
    """A transformer whose forward pass takes a ``Loop``."""

    def forward(self, *args: Any, loop: Loop | None = None, **kwargs: Any) -> Any:
        this = _Pass(self, loop)
        token = _running.set(this)
        try:
            if this.slices is None:
                out = super().forward(*args, **kwargs)
            else:
                with this.slices.running():
                    out = super().forward(this.slices.group.enter(args[0]), *args[1:], **kwargs)
        finally:
            _running.reset(token)
        if loop is not None:
            loop.filled = True
        return out

    def choose_backends(
        self, attention: AttentionName = "auto", fused_ops: str = "reference", *, dtype: torch.dtype
    ) -> Choice:
        """Choose the implementation of attention from now on, and return the choice with its reason.

        attention: as for ``vpo_kernels.attention.choose_attention``. There are no fused ops. dtype: that of the
        arithmetic. Raise ValueError for an implementation that diffusers does not offer or the device does not run.
        """
        network: Any = self
        device, head_dim = next(network.parameters()).device, network.config.attention_head_dim
        choose = functools.partial(choose_attention, device=device, dtype=dtype, head_dim=head_dim)
        choice = choose(attention)
        if not _offered(network, choice.name):
            if attention != "auto":
                raise ValueError(
                    f"model.attention={choice.name} is not offered by diffusers for this transformer; set it to auto, "
                    f"{', '.join(ATTENTION_BACKENDS)}"
                )
            choice = choose("sdpa")
        _set_attention(network, choice.name)
        return choice


def _processors(network: nn.Module) -> Iterator[Any]:
    return (module.processor for module in network.modules() if hasattr(module, "processor"))


def _offered(network: nn.Module, name: BackendName) -> bool:
    return name in ATTENTION_BACKENDS or all(isinstance(one, Processor) for one in _processors(network))


def _set_attention(network: nn.Module, name: BackendName) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    for processor in _processors(network):
        if isinstance(processor, Processor):
            processor.backend = name
        elif hasattr(processor, "_attention_backend"):
            processor._attention_backend = AttentionBackendName(ATTENTION_BACKENDS[name])


class _Block(nn.Module):
    """A block that is run as the transformer's call says. ``first`` and ``last`` tell its place among all blocks."""

    first: bool
    last: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = _running.get()
        if running is None:
            return super().__call__(*args, **kwargs)
        kind: Any = type(self)
        bound = _signature(kind).bind(self, *args, **kwargs)
        bound.apply_defaults()
        return running.block(self, super().__call__, bound.args[1:])


class _FeedForward(nn.Module):
    """A feed-forward layer that goes over the tokens, dimension 1, in ``parts`` parts."""

    parts = 1

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.parts == 1:
            return super().forward(hidden_states, *args, **kwargs)
        return in_separate_parts(super().forward, hidden_states, dim=1, parts=self.parts)


class _TextOwner(nn.Module):
    """A module some of whose layers see only the text."""

    text_layers: TextLayers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        running = _running.get()
        if running is None or running.loop is None:
            return super().forward(*args, **kwargs)
        forward: Any = super().forward
        return forward.__func__(_Shared(self, running.loop), *args, **kwargs)


class _Shared:
    """Stands for a module: everything is that module's, but its text layers give what the loop has kept."""

    def __init__(self, owner: _TextOwner, loop: Loop) -> None:
        self._owner, self._loop = owner, loop
        self._layers = dict(owner.text_layers.layers)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._owner, name)
        if found is None:
            return None
        if name in self._layers:
            return functools.partial(self._text_layer, name)
        return _same if name in self._layers.values() else found

    def _text_layer(self, name: str, text: Tensor) -> Tensor:
        def compute(rows: Tensor) -> Tensor:
            following = self._layers[name]
            made: Tensor = getattr(self._owner, name)(rows)
            layer = None if following is None else getattr(self._owner, following)
            return made if layer is None else layer(made)

        return self._loop.result(self._owner, name, compute, text)


def _same(x: Tensor) -> Tensor:
    return x
