"""A second network beside the policy: the same modules, other weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpo_engine.reference.weights import HeldWeight, Scratch

_PLAIN = (bool, int, float, str, type(None))


def block_linears(policy: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers inside the transformer blocks, by name, without those of an adapter.

    The blocks are the members of the lists (nn.ModuleList) that the network itself has: so in STDiT3 and in the
    transformers of diffusers. Embedders, the time's projection and the final layer stand outside them.
    """
    return {
        f"{outer}.{name}": module
        for outer, blocks in policy.named_children()
        if isinstance(blocks, nn.ModuleList)
        for name, module in blocks.named_modules()
        if type(module) is nn.Linear and ".lora_" not in name
    }


def block_matrices(policy: nn.Module) -> dict[str, nn.Linear]:
    """Those of ``block_linears`` whose weights train."""
    return {name: layer for name, layer in block_linears(policy).items() if layer.weight.requires_grad}


class HeldLinear(nn.Module):
    """nn.Linear whose weight is decoded when it runs: then the same product as the policy's layer."""

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


class Mirror:
    """A copy of the policy's modules, frozen and in evaluation mode.

    Parameters that do not train are the policy's own objects, and follow it to other devices. All others are
    copied, but the weights given in ``held``: {name of an nn.Linear: how its weight is held}.
    Numbers, names and frozen dataclasses that the policy's modules have as attributes (backends, say) are read
    again at every call: both networks compute alike even if the policy was told otherwise since.
    """

    def __init__(self, policy: nn.Module, held: Mapping[str, HeldWeight]) -> None:
        self._scratch = Scratch()
        self._scratch.numel = max((weight.scratch_numel for weight in held.values()), default=0)
        linears = {name: layer for name, layer in block_matrices(policy).items() if name in held}
        encoded = {id(linear.weight) for linear in linears.values()}
        self._shared = {id(parameter) for parameter in policy.parameters() if not parameter.requires_grad}
        memo: dict[int, object] = {id(buffer): buffer.detach().clone() for buffer in policy.buffers()}
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
        """Parameters and buffers that are not the policy's, by name."""
        tensors = self.network.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in tensors.items() if id(tensor) not in self._shared}


def _settings(module: nn.Module) -> Iterator[tuple[str, object]]:
    for name, value in vars(module).items():
        if name != "training" and (isinstance(value, _PLAIN) or _is_frozen(value)):
            yield name, value


def _is_frozen(value: object) -> bool:
    parameters = getattr(type(value), "__dataclass_params__", None)
    return parameters is not None and parameters.frozen
