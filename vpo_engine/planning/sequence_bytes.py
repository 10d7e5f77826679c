"""Bytes that processes of one video exchange: one pass of the network on tensors without values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vpo_engine.config import Config
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.sequence import SequenceGroup
from vpo_engine.models.policy import prepare_policy
from vpo_engine.planning.parts import CPU, Assumed, blueprint_of, materialise
from vpo_engine.protocols import TextEmbedding


class _Counted(SequenceGroup):
    """A group whose other processes are not there, which counts what it would send to them."""

    def exchange(
        self, x: Tensor, split: int, joined: int, split_sizes: Sequence[int], joined_sizes: Sequence[int]
    ) -> Tensor:
        own = x.split(list(split_sizes), split)[self.rank].numel()
        self.sent += (x.numel() - own) * x.element_size()
        return super().exchange(x, split, joined, split_sizes, joined_sizes)

    def join(self, x: Tensor, dim: int, total: int) -> Tensor:
        numbers = x.numel() // x.shape[dim] * max(self.sizes(total))
        self.sent += (self.count - 1) * numbers * x.element_size()
        return super().join(x, dim, total)


def sequence_bytes(config: Config) -> tuple[float, float]:
    """Return what a process sends to those that hold slices of the same video, for one sample without guidance.

    They are the bytes of a forward pass, and those of a backward pass, blocks that are computed again included.
    Networks of one block and of two are traced; blocks repeat.
    """
    memory = config.memory.model_copy(update={"offload_activations": False})
    config = config.model_copy(update={"memory": memory})
    one, two = _traced(config, 1), _traced(config, 2)
    more = blueprint_of(config, Assumed(), 1).depth - 1
    forward, backward = (low + more * (high - low) for low, high in zip(one, two, strict=True))
    return forward, backward


def _traced(config: Config, depth: int) -> tuple[int, int]:
    model = blueprint_of(config, Assumed(), depth).model
    if config.model.lora is not None:
        prepare_policy(model.network, config, model.card, model.dtype)
    group = _Counted(Processes(0, config.distributed.sequence_parallel, CPU))
    model.share_sequence(group)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.device = CPU
        materialise(model.network)
        rule = model.text_rule
        text = TextEmbedding(
            torch.zeros(1, rule.max_tokens, rule.channels, dtype=model.dtype),
            torch.ones(1, rule.max_tokens, dtype=torch.bool),
        )
        prediction = model.predict(model.network, torch.zeros(1, *model.latent_shape), torch.zeros(1), text)
        forward = group.sent
        prediction.sum().backward()
    return forward, group.sent - forward
