"""The memory layouts that the paired loss's Triton kernels are told."""

import torch
from vpo_kernels.paired_dpo.triton_layout import views


def inner(*tensors: torch.Tensor) -> tuple[list[object], tuple[int, ...]]:
    found, sizes = views(tensors)
    return [view and view[2] for view in found], sizes


def test_contiguous_samples_need_no_strides_whatever_lies_between_them() -> None:
    whole = torch.zeros(3, 8, 5, 6)
    assert inner(whole[:, :4], whole[:, 4:]) == ([(), ()], ())
    assert inner(torch.zeros(3), torch.zeros(3)) == ([(), ()], ())
    assert inner(torch.zeros(3, 1, 4, 1).transpose(1, 3)) == ([()], ())
    (view,), _ = views([whole[:, :4]])
    assert view is not None
    assert view[1] == 8 * 5 * 6


def test_dimensions_join_where_all_tensors_allow_it() -> None:
    shape = (2, 4, 3, 5, 6)
    frames = torch.ones(1, 1, 3, 1, 1, dtype=torch.bool).expand(shape)
    assert inner(torch.zeros(shape), frames) == ([(), (0, 1, 0)], (30, 3, 4))
    last = torch.zeros(2, 3, 5, 6, 4).permute(0, 4, 1, 2, 3)
    assert inner(last) == ([(4, 1)], (90, 4))
    assert inner(last, frames) == ([(4, 120, 1), (0, 1, 0)], (30, 3, 4))
    everything = torch.ones(1, 1, 1, 1, 1).expand(shape)
    assert inner(everything) == ([(0,)], (360,))


def test_absent_tensors_and_single_pairs() -> None:
    one = torch.zeros(1, 4)
    assert views([None, one]) == ([None, (one, 0, ())], ())
