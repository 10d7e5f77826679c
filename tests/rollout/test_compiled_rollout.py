"""Sampling through compiled blocks and CUDA graphs: how often it compiles, what it samples, what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo
from rollout_case import CPU, PROMPTS, sampled, settings, sprites
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.metrics.throughput import CountedRows
from vpo_engine.models.opensora.compiled import CompiledBlocks
from vpo_engine.models.opensora.reuse import Reuse
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.models.step_graph import StepGraph
from vpo_engine.protocols import Compile, SamplerSettings
from vpo_engine.rewards.combine import combine
from vpo_engine.rewards.sprites import SpritesReward
from vpo_engine.selection import select_pairs


@torch.no_grad()
@pytest.mark.long
def test_three_functions_serve_all_sizes_and_three_more_a_single_row() -> None:
    """Over depths, rows, captions of all layouts, frames and patches; what is traced is what is computed."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = CompiledBlocks(CPU, backend="eager")
    small = {
        "hidden_size": 32,
        "num_heads": 2,
        "caption_channels": 8,
        "model_max_length": 32,
        "in_channels": 4,
    }
    torch.manual_seed(0)
    networks = [STDiT3.from_config({**small, "depth": depth}).eval() for depth in (1, 2)]
    graphs = []
    for rows, length, padding, frames, side in (
        (8, 20, 3, 5, 8),
        (4, 17, 0, 5, 8),
        (6, 9, 7, 4, 12),
        (2, 9, 1, 3, 4),
        (16, 16, 12, 16, 8),
        (1, 9, 0, 5, 8),
        (1, 11, 2, 4, 4),
    ):
        for network in networks:
            captions = 1 if rows == 1 else 2
            mask = torch.ones(captions, length)
            mask[0, length - padding :] = 0
            given = (
                torch.randn(rows, 4, frames, side, side),
                torch.full((rows,), 100.0),
                torch.randn(captions, 1, length, 8),
                mask,
            )
            size = {"fps": 24.0, "height": 64, "width": 64}
            plain = network(*given, **size, reuse=Reuse())
            assert torch.equal(network(*given, **size, reuse=Reuse(run=run)), plain)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [3] * 5 + [6] * 2


@pytest.mark.long
def test_compiled_blocks_sample_the_same_pairs_and_leave_training_alone() -> None:
    model, text = sprites()
    config = settings(guidance=1.0)
    before = model.network(torch.ones(1, *model.latent_shape), torch.ones(1), text.embeddings[:1, None], fps=8.0,
                           height=32, width=32).detach()  # fmt: skip
    plain, compiled = sampled(config), sampled(config.model_copy(update={"compile": "blocks"}))
    assert not torch.equal(plain, compiled)
    assert (plain - compiled).abs().max() <= 5e-5
    captions = [prompt for prompt in PROMPTS for _ in range(4)]
    picked = []
    for candidates in (plain, compiled):
        scores = SpritesReward().score(model.decode(candidates.flatten(0, 1)), captions)
        pairs = select_pairs(combine(scores, "global").unflatten(0, (2, 4)))
        picked.append((pairs.winner.tolist(), pairs.loser.tolist()))
    assert picked[0] == picked[1]
    after = model.network(torch.ones(1, *model.latent_shape), torch.ones(1), text.embeddings[:1, None], fps=8.0,
                          height=32, width=32)  # fmt: skip
    assert torch.equal(before, after)
    assert after.requires_grad


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match=r"rollout\.compile=blocks needs a C\+\+ compiler .* no-such-compiler, g\+\+"
    ):
        CompiledBlocks(CPU)


def test_graphs_need_a_gpu(small: Callable[..., Config]) -> None:
    from test_online_vpo import make_algorithm

    with pytest.raises(ValueError, match=r"rollout\.compile=graphs needs a CUDA device, but this is cpu"):
        make_algorithm(small("rollout.compile=graphs"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.compile=graphs", "rollout.cache=0.1"], "set compile=none, or cache=null"),
        (["rollout.compile=blocks", "rollout.source=reference"], "source=reference"),
        (["rollout.compile=blocks", "rollout.weights=int8"], "weights=int8"),
    ],
)
def test_what_excludes_each_other(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="compile") as refused:
        load_config(None, overrides)
    assert message in str(refused.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_step_is_the_step_bit_for_bit() -> None:
    from gpu_rollout import on_gpu

    config = settings(steps=5, guidance=3.0, guidance_interval=(0.2, 0.9))
    for rows in (None, 4):
        plain, rows_plain = on_gpu(config.model_copy(update={"batch_size": rows}))
        replayed, rows_replayed = on_gpu(config.model_copy(update={"batch_size": rows, "compile": "graphs"}))
        assert torch.equal(plain, replayed)
        assert rows_plain == rows_replayed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", ["none", "graphs"])
def test_the_sampler_loop_never_waits_for_the_gpu(compiled: Compile) -> None:
    from gpu_rollout import gpu_sprites

    model, text = gpu_sprites()
    given = SamplerSettings(5, 3.0, (0.2, 0.9), compile=compiled)
    state = model.start(torch.randn(8, *model.latent_shape, device="cuda"))
    model.denoise(model.network, state, text, given)  # layouts are sent to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.denoise(model.network, state, text, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_every_replayed_step_is_of_its_own_latents_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a CUDA graph: to replay is to compute again from the tensors that were there at the capture."""

    def formula(z: Tensor, t: Tensor) -> Tensor:
        return z * t[:, None] + 1

    class Graph:
        def replay(self) -> None:
            step._out.copy_(formula(step._z, step._t))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _, **named: nullcontext())
    network = CountedRows(formula)
    step = StepGraph(network, network)
    for number in (1.0, 2.0, 3.0, 4.0):
        z = torch.full((2, 3), number).as_subclass(OnGpu)
        t = torch.full((2,), 7 + number).as_subclass(OnGpu)
        assert torch.equal(step(z, t), formula(z, t))
    assert network.rows == 4 * 2
