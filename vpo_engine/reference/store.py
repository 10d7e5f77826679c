"""The frozen reference: store it, refresh it from the policy, save it and load it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from vpo_engine.protocols import Gathered, at_hand
from vpo_engine.reference.exact import ExactWeight, check_on_grid, preserved
from vpo_engine.reference.network import ReferenceNetwork, block_matrices
from vpo_engine.reference.weights import BFloat16Weight, HeldWeight, Int8Weight, check_parts

Storage = Literal["copy", "bf16", "int8", "exact8", "adapter"]

_SIGNS = {".codes": "int8", ".difference": "exact8", ".bfloat16": "exact8", ".lora_A.": "adapter"}
"""Parts of names from which the storage of a saved reference is recognised."""


def build_reference(storage: Storage, policy: nn.Module, refresh_share: float = 1.0) -> HeldReference:
    """Build a reference that equals ``policy`` now, up to the rounding of the storage.

    refresh_share: see ``ReferenceConfig``; below 1 for copy and adapter only.
    Parameters that are not trained are shared with the policy. copy and adapter copy the others; the other storages
    encode the matrices of the transformer blocks (see ``weights``) and copy the rest.
    Raise ValueError for a policy that the storage does not fit.
    """
    if storage == "adapter" and all(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(
            "reference.storage=adapter shares the frozen base with the policy, but all parameters of this policy are "
            "trained; set model.lora, or use reference.storage=copy"
        )
    encodings: dict[Storage, Callable[[Tensor], HeldWeight]] = {
        "bf16": BFloat16Weight,
        "int8": Int8Weight,
        "exact8": ExactWeight,
    }
    if storage not in encodings:
        return HeldReference(storage, policy, {}, refresh_share)
    layers = block_matrices(policy)
    if not layers:
        raise ValueError(
            f"reference.storage={storage} encodes trained linear layers of transformer blocks, but the policy "
            f"({type(policy).__name__}) has none; use reference.storage=copy"
        )
    if storage == "exact8":
        check_on_grid({f"{name}.weight": layer.weight for name, layer in layers.items()})
    return HeldReference(
        storage, policy, {name: encodings[storage](layer.weight) for name, layer in layers.items()}
    )


class HeldReference:
    """A frozen copy of the policy; ``held`` says how some matrices are stored: {name of an nn.Linear: weight}.

    A call runs the same modules as the policy, in evaluation mode and without a graph. With an exact storage, equal
    inputs give bitwise equal predictions right after a refresh.
    """

    def __init__(
        self,
        storage: Storage,
        policy: nn.Module,
        held: Mapping[str, HeldWeight],
        refresh_share: float = 1.0,
    ) -> None:
        assert refresh_share == 1 or not held, "encoded weights do not move by a share of the way"
        self._storage, self._policy, self._share = storage, policy, refresh_share
        self._network = ReferenceNetwork(policy, held)
        self._copied = self._network.copied()
        self._held = {f"{name}.weight": weight for name, weight in held.items()}
        self._matrices = {
            f"{name}.weight": layer.weight.numel() for name, layer in block_matrices(policy).items()
        }
        self._exact = {
            id(weight.policy): weight for weight in held.values() if isinstance(weight, ExactWeight)
        }

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        return self._network(*args, **kwargs)

    @property
    def network(self) -> nn.Module:
        """Return the modules that a forward pass runs."""
        return self._network.network

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    @property
    def bytes_per_weight(self) -> float:
        """Return the bytes per weight of the trained matrices in the transformer blocks, which alone are encoded."""
        nbytes = sum(tensor.nbytes for name in self._matrices for tensor in self._parts(name).values())
        return nbytes / max(1, sum(self._matrices.values()))

    @property
    def outliers(self) -> float:
        """Return the share of the weights of exact8 that are stored in more than 8 bits."""
        weights = sum(weight.policy.numel() for weight in self._exact.values())
        return sum(weight.outliers for weight in self._exact.values()) / max(1, weights)

    def numbers(self) -> dict[str, float]:
        """Return numbers for the log: "bytes"; "bytes_per_weight" if matrices are encoded; "outliers" with exact8."""
        numbers: dict[str, float] = {"bytes": self.nbytes}
        if self._held:
            numbers["bytes_per_weight"] = self.bytes_per_weight
        if self._exact:
            numbers["outliers"] = self.outliers
        return numbers

    def tensors(self) -> list[Tensor]:
        """Return all tensors that a forward pass reads, shared ones included; their data may be moved elsewhere."""
        network = self.network
        held = [tensor for weight in self._held.values() for tensor in weight.tensors().values()]
        policy = [weight.policy for weight in self._exact.values()]
        return [*network.parameters(), *network.buffers(), *held, *policy]

    @torch.no_grad()
    def refresh(self, policy: nn.Module, gathered: Gathered = at_hand) -> None:
        """Set the reference to the policy, or move it by ``refresh_share`` of the way, in place. It must be the policy
        that the reference was built for.

        ``gathered`` brings the weights of one block after the other here, from other processes that hold parts.
        """
        assert policy is self._policy, "a reference is tied to the policy that it was built for"
        if self._storage == "exact8":
            check_on_grid({name: policy.get_parameter(name) for name in self._held})
        source = policy.state_dict(keep_vars=True)
        for names in _by_block(source):
            stored = [name for name in names if name in self._copied or name in self._held]
            with gathered([one for name in stored if isinstance(one := source[name], nn.Parameter)]):
                for name in stored:
                    if name in self._held:
                        self._held[name].refresh()
                    elif self._share < 1 and source[name].is_floating_point():
                        self._copied[name].lerp_(source[name], self._share)
                    else:
                        self._copied[name].copy_(source[name])

    def preserve(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Return a context in which these parameters of the policy may change while the reference keeps its values.

        exact8 stores differences from the policy: its matrices are decoded to bfloat16 at the start, and encoded
        again from the changed parameters at the end. Other storages do not depend on the policy's values.
        """
        return preserved([self._exact[id(one)] for one in parameters if id(one) in self._exact])

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is stored under the policy's names; the parts of an encoded matrix are named NAME.PART."""
        return {
            f"{name}.{part}" if part else name: tensor.detach()
            for name in (*self._copied, *self._held)
            for part, tensor in self._parts(name).items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a ``state_dict``; load the policy first. ValueError, with nothing changed, if it does not fit."""
        try:
            parts = self._split(state)
        except ValueError as error:
            signs = (sign for sign in _SIGNS if any(sign in name for name in state))
            found = next((_SIGNS[sign] for sign in signs), "copy or bf16")
            raise ValueError(
                f"the saved reference does not fit reference.storage={self._storage}: {error}. By its names it "
                f"was saved with reference.storage={found}; resume with that, or start a new run"
            ) from None
        for name, found_parts in parts.items():
            if name in self._held:
                self._held[name].load(found_parts)
            else:
                self._copied[name].copy_(found_parts[""])

    def _parts(self, name: str) -> dict[str, Tensor]:
        return self._held[name].tensors() if name in self._held else {"": self._copied[name]}

    def _split(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Check ``state`` and return {name: {part: tensor}} for every stored name; ValueError if it does not fit."""
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in (*self._copied, *self._held)}
        unexpected = []
        for key, tensor in state.items():
            name, part = (key, "") if key in parts else key.rpartition(".")[::2]
            if name in parts:
                parts[name][part] = tensor
            else:
                unexpected.append(key)
        if unexpected:
            raise ValueError(f"{unexpected[0]} is not stored here ({len(unexpected)} such names)")
        for name, found in parts.items():
            if not found:
                raise ValueError(f"{name} is missing")
            try:
                if name in self._held:
                    self._held[name].check(found)
                else:
                    check_parts(found, {"": self._copied[name]})
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return parts


def _by_block(names: Iterable[str]) -> list[list[str]]:
    """Group the names of a network's tensors: those of each block of a list, and those of each other part."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        outer, *inner = name.split(".")
        key = (outer, inner[0]) if inner and inner[0].isdigit() else (outer,)
        groups.setdefault(key, []).append(name)
    return list(groups.values())
