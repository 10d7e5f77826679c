"""The tracker against counts made by hand, and on real tensors against fake ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vpo_engine.planning.repeats import repeated
from vpo_engine.planning.tracker import BLOCK, Tracker

KIB = 1024


def test_peak_is_the_largest_sum_of_live_storages_in_whole_blocks():
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker, tracker.phase() as phase:
        first = torch.empty(KIB, dtype=torch.uint8)
        second = torch.empty(3 * KIB, dtype=torch.uint8)
        del first
        third = torch.empty(1, dtype=torch.uint8)
        del second
        fourth = torch.empty(2 * KIB, dtype=torch.uint8)
    assert tracker.peak(phase) == {"other": 4 * KIB}
    assert tracker.live() == 2 * KIB + BLOCK
    del third, fourth
    assert tracker.live() == 0


def test_views_and_detached_tensors_are_counted_once_and_live_as_long_as_the_last():
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker:
        base = torch.empty(64, 64)
        view, alias = base.t()[3:], base.detach()
        assert tracker.live() == 4 * 64 * 64
        del base, alias
        assert tracker.live() == 4 * 64 * 64
        del view
        assert tracker.live() == 0


def test_a_phase_counts_what_was_there_before_and_leaves_out_what_is_absent():
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker:
        with tracker.making("weights"):
            weights = torch.empty(256)
        with tracker.making("reference"):
            reference = torch.empty(512)
        with tracker.phase() as phase, tracker.making("activations"):
            product = weights * 2
    assert tracker.peak(phase) == {"weights": KIB, "reference": 2 * KIB, "activations": KIB}
    assert tracker.peak(phase, frozenset({"reference"})) == {"weights": KIB, "activations": KIB}
    assert tracker.peak_of(phase, "reference") == 2 * KIB
    del reference, product


def test_a_storage_may_be_named_after_it_was_made():
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker, tracker.phase() as phase:
        gradient = torch.empty(256)
        tracker.label([gradient], "gradients")
    assert tracker.peak(phase) == {"gradients": KIB}


def test_in_place_operations_allocate_nothing_and_move_what_they_touch():
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker:
        x = torch.empty(256)
        with tracker.phase() as phase:
            x.mul_(2)
            x.t()
    assert tracker.peak(phase) == {"other": KIB}
    assert phase.traffic == 2 * KIB  # read and written
    assert phase.flops == 0


def test_values_of_fakes_are_what_the_program_is_told():
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker:
        assert float(torch.empty(3).sum()) == 1.0
        assert bool(torch.empty(3).isfinite().all()) is True
        tracker.answer = lambda: 7
        assert int(torch.empty(3, dtype=torch.int64).sum()) == 7
        assert float(torch.tensor(2.5)) == 2.5


class Network(nn.Module):
    """Two blocks with a wide middle."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def step(tracker: Tracker) -> list[int]:
    """Bytes at the peaks of forward, backward and optimizer step, and what is left."""
    network, peaks = Network(), []
    optimizer = torch.optim.AdamW(network.parameters(), foreach=False)
    x = torch.ones(64, 32)
    with tracker.phase() as phase:
        loss = network(x).square().mean()
        loss.backward()
    peaks.append(sum(tracker.peak(phase).values()))
    del loss
    with tracker.phase() as phase:
        optimizer.step()
    peaks.append(sum(tracker.peak(phase).values()))
    optimizer.zero_grad()
    return [*peaks, tracker.live()]


def test_fake_tensors_take_the_bytes_of_real_ones():
    with Tracker() as real:
        expected = step(real)
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as fake:
        found = step(fake)
    weights = sum(parameter.numel() for parameter in Network().parameters())
    assert found == expected
    assert expected[2] > 4 * 3 * weights  # weights and two moments stay


def test_peaks_of_real_tensors_are_those_of_torchs_profiler():
    """The profiler counts bytes without rounding to blocks, so sizes are whole blocks here."""
    x = torch.ones(128, 128)
    with torch.profiler.profile(profile_memory=True) as trace:
        y = (x @ x).relu_() + x
        del y
    totals, most = 0, 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            totals += event.nbytes()
            most = max(most, totals)
    with Tracker() as tracker, tracker.phase() as phase:
        y = (x @ x).relu_() + x
        del y
    assert sum(tracker.peak(phase).values()) == most == 2 * x.nbytes


@pytest.mark.parametrize("grad", [False, True])
def test_repeated_modules_count_as_if_each_were_run(grad: bool):
    def run(repeat: bool) -> tuple[dict[str, int], int, int]:
        with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker, torch.set_grad_enabled(grad):
            network = Network()
            x = torch.empty(64, 32)
            with repeated(tracker, [], network.blocks if repeat else []), tracker.phase() as phase:
                network(x)
        return tracker.peak(phase), phase.flops, phase.traffic

    assert run(True) == run(False)
    assert run(True)[1] == 3 * 2 * 2 * 64 * 32 * 128
