"""The reference network: a frozen copy of the policy's modules, some of whose weights are stored in encoded form."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpo_engine.memory.quantised_base import block_linears, frozen_layers
from vpo_engine.reference.weights import HeldWeight, Scratch

_PLAIN = (bool, int, float, str, type(None))


def block_matrices(policy: nn.Module) -> dict[str, nn.Linear]:
    """Return those of ``block_linears`` whose weights are trained."""
    return {name: layer for name, layer in block_linears(policy).items() if layer.weight.requires_grad}


class HeldLinear(nn.Module):
    """A linear layer whose weight is decoded when the layer runs; the product is that of the policy's layer."""

    def __init__(
        self, weight: HeldWeight, bias: nn.Parameter | None, dtype: torch.dtype, scratch: Scratch
    ) -> None:
        super().__init__()
        self.held, self.bias = weight, bias
        self._dtype, self._scratch = dtype, scratch

    def forward(self, x: Tensor) -> Tensor:
        dtype = self._dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        return F.linear(x, self.held.decode(dtype, self._scratch), self.bias)


class ReferenceNetwork:
    """A copy of the policy's modules, frozen and in evaluation mode.

    Parameters that are not trained are shared with the policy, on whatever device they are, and so is a frozen base in
    8 or 4 bits. Other parameters are copied, except the weights in ``held``: {name of an nn.Linear: how its weight is
    stored}.
    Numbers, strings and frozen dataclasses that the policy's modules have as attributes (backends, for example) are
    copied again at every call, so that both networks compute in the same way even if those of the policy changed.
    """

    def __init__(self, policy: nn.Module, held: Mapping[str, HeldWeight]) -> None:
        self._scratch = Scratch()
        self._scratch.numel = max((weight.scratch_numel for weight in held.values()), default=0)
        linears = {name: layer for name, layer in block_matrices(policy).items() if name in held}
        encoded = {id(linear.weight) for linear in linears.values()}
        self._shared = {id(parameter) for parameter in policy.parameters() if not parameter.requires_grad}
        base = {id(one): one for layer in frozen_layers(policy) for one in layer.buffers()}
        memo: dict[int, object] = {id(buffer): buffer.detach().clone() for buffer in policy.buffers()}
        memo |= base
        for parameter in policy.parameters():
            if id(parameter) in self._shared:
                memo[id(parameter)] = parameter
            elif id(parameter) not in encoded:
                memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, weight in held.items():
            bias, dtype = copy.deepcopy(linears[name].bias, memo), linears[name].weight.dtype
            memo[id(linears[name])] = HeldLinear(weight, bias, dtype, self._scratch)
        self.network = copy.deepcopy(policy, memo).eval()
        own = dict(self.network.named_modules())
        self._pairs = [(module, own[name]) for name, module in policy.named_modules() if name not in held]

    @torch.no_grad()
    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        for theirs, ours in self._pairs:
            ours.__dict__.update(_settings(theirs))
        try:
            return self.network(*args, **kwargs)
        finally:
            self._scratch.release()

    def copied(self) -> dict[str, Tensor]:
        """Return the parameters and buffers that are not shared with the policy, by name."""
        tensors = self.network.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in tensors.items() if id(tensor) not in self._shared}


def _settings(module: nn.Module) -> Iterator[tuple[str, object]]:
    for name, value in vars(module).items():
        if name != "training" and (isinstance(value, _PLAIN) or _is_frozen(value)):
            yield name, value


def _is_frozen(value: object) -> bool:
    parameters = getattr(type(value), "__dataclass_params__", None)
    return parameters is not None and parameters.frozen
