"""Test the refresh of a policy whose weights other processes hold in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from test_reference_store import move, policy_for
from torch import nn

from vpo_engine.reference.store import Storage, build_reference


@pytest.mark.parametrize("storage", ["copy", "bf16", "int8", "adapter"])
def test_a_refresh_reads_weights_where_they_are_gathered_and_those_of_one_block_at_a_time(
    storage: Storage,
) -> None:
    """Elsewhere they are zeros here, as those that other processes hold are missing."""
    policy = policy_for(storage)
    reference = build_reference(storage, policy)
    move(policy)
    expected = {name: value.clone() for name, value in build_reference(storage, policy).state_dict().items()}
    names = {id(one): name for name, one in policy.named_parameters() if one.requires_grad}
    whole = {id(one): one.detach().clone() for one in policy.parameters()}
    together: list[set[str]] = []

    @contextmanager
    def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        together.append({names[id(one)] for one in parameters})
        for one in parameters:
            one.data.copy_(whole[id(one)])
        yield
        for one in parameters:
            one.data.zero_()

    for one in policy.parameters():
        if one.requires_grad:
            one.data.zero_()
    reference.refresh(policy, gathered)
    found = reference.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    blocks = [{name.split(".")[1] for name in each if "_blocks." in name} for each in together]
    assert max(map(len, blocks)) == 1
    assert sum(map(len, together)) == len(names)
