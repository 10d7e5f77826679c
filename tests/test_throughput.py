"""Test how well a step uses the device: operations against formulas and counts of passes, shares, seconds."""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vpo_engine.config import LoraConfig
from vpo_engine.data.sprites.assets import load_sprites
from vpo_engine.distributed.processes import Processes
from vpo_engine.metrics.throughput import (
    CountedRows,
    RowFlops,
    Throughput,
    Work,
    count_row_flops,
    matrix_rate,
)
from vpo_engine.models.lora import inject_adapter
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.models.opensora.rectified_flow import guided_velocity
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.protocols import TextEmbedding
from vpo_engine.runs.log import read_metrics
from vpo_engine.train import train
from vpo_engine.trainer import Trainer

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "depth": 2,
    "num_heads": 4,
    "caption_channels": 24,
    "model_max_length": 12,
}
SHAPE = (4, 5, 12, 10)
TOKENS = 7


def model_of(network: STDiT3) -> Any:
    """As much of a ``VideoModel`` as counting needs."""

    def predict(network: Any, latents: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        y = text.embeddings[:, None]
        return network(latents, t, y, text.mask, fps=24.0, height=96, width=80)[:, :4]

    return SimpleNamespace(network=network, latent_shape=SHAPE, predict=predict, row_flops=lambda _: None)


def captions(*lengths: int) -> TextEmbedding:
    mask = torch.arange(CONFIG["model_max_length"]) < torch.tensor(lengths)[:, None]
    return TextEmbedding(torch.randn(*mask.shape, CONFIG["caption_channels"]), mask)


def by_formula(depth: int) -> int:
    """Multiplications and additions of a prediction, written down layer by layer from the published architecture."""
    D, L = CONFIG["hidden_size"], TOKENS
    frames, patches = SHAPE[1], SHAPE[2] * SHAPE[3] // 4
    tokens = frames * patches
    embedders = tokens * 16 * D + 2 * (256 * D + D * D) + 6 * D * D
    text = L * (CONFIG["caption_channels"] * D + D * D)
    linear = tokens * (3 * D * D + D * D + D * D + D * D + 8 * D * D) + L * 2 * D * D
    attention = {"spatial": 2 * tokens * patches * D, "temporal": 2 * tokens * frames * D}
    pair = 2 * linear + sum(attention.values()) + 2 * (2 * tokens * L * D)
    return 2 * (embedders + text + depth * pair + tokens * D * 32)


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_a_prediction_counts_as_the_formula_says_at_any_depth(depth: int) -> None:
    model = model_of(STDiT3.from_config(CONFIG | {"depth": depth}))
    assert count_row_flops(model, captions(TOKENS)).forward == by_formula(depth)


def test_captions_count_with_their_mean_length() -> None:
    model = model_of(STDiT3.from_config(CONFIG))
    assert count_row_flops(model, captions(2, 12)) == count_row_flops(model, captions(TOKENS))


def test_a_real_prediction_of_the_sprites_policy_issues_as_many_operations() -> None:
    model = load_sprites(Processes.start("cpu"), torch.float32)
    model.prepare(["a red circle moving left"])
    text = model.embed(["a red circle moving left"])
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {flash: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        model.predict(model.network, torch.randn(1, *model.latent_shape), torch.tensor([500.0]), text)
    assert count_row_flops(model, text).forward == counter.get_total_flops()


def whole_pass(network: STDiT3) -> int:
    """Operations of forward and backward on the meta device, where attention is made of plain products."""
    network = network.to("meta")
    network._texts.clear()
    with FlopCounterMode(display=False) as counter:
        text = TextEmbedding(torch.empty(1, TOKENS, 24, device="meta"), torch.ones(1, TOKENS).bool())
        latents, times = torch.empty(1, *SHAPE, device="meta"), torch.empty(1, device="meta")
        model_of(network).predict(network, latents, times, text).sum().backward()
    return counter.get_total_flops()


def test_training_counts_a_backward_pass_within_one_per_cent() -> None:
    network = STDiT3.from_config(CONFIG)
    assert count_row_flops(model_of(network), captions(TOKENS)).training == pytest.approx(
        whole_pass(network), rel=0.01
    )


def test_training_an_adapter_leaves_out_the_gradients_of_frozen_weights() -> None:
    network = STDiT3.from_config(
        CONFIG | {"depth": 6}
    )  # the shallower, the more of it lies before any adapter
    inject_adapter(network, LoraConfig(rank=4, alpha=8.0), OpenSora.card.lora_targets, 0)
    counted = count_row_flops(model_of(network), captions(TOKENS))
    assert counted.training == pytest.approx(whole_pass(network), rel=0.03)
    assert counted.training < 2.4 * counted.forward


def test_counting_leaves_the_network_alone() -> None:
    network = STDiT3.from_config(CONFIG)
    model, text = model_of(network), captions(TOKENS)
    latents, times = torch.randn(1, *SHAPE), torch.tensor([500.0])
    with torch.no_grad():
        before = model.predict(network, latents, times, text)
        count_row_flops(model, text)
        assert torch.equal(model.predict(network, latents, times, text), before)
    assert not network._forward_pre_hooks
    assert len(network.spatial_blocks) == 2


def test_rows_are_counted_with_both_branches_of_guidance() -> None:
    network = STDiT3.from_config(CONFIG)
    counted, text, z = CountedRows(network), captions(TOKENS, 3), torch.randn(2, *SHAPE)
    null = torch.randn(CONFIG["model_max_length"], CONFIG["caption_channels"])
    geometry = {"fps": 24.0, "height": 96, "width": 80}
    for guidance, rows in ((1.0, 2), (7.0, 6)):
        arguments = (z, torch.full((2,), 500.0), text.embeddings, text.mask, null, guidance)
        with torch.no_grad():
            assert torch.equal(
                guided_velocity(counted, *arguments, **geometry),
                guided_velocity(network, *arguments, **geometry),
            )
        assert counted.rows == rows


def test_utilisation_is_operations_over_what_the_device_could_have_done() -> None:
    throughput = Throughput(RowFlops(forward=10.0, training=31.0), ceiling=100.0)
    seconds = {"rollout": 4.0, "update": 20.0}
    assert throughput.utilisation(seconds, Work(sampled=20, compared=5, trained=7)) == {
        "speed/rollout_mfu": 20 * 10 / (4 * 100),
        "speed/update_mfu": (5 * 10 + 7 * 31) / (20 * 100),
    }
    assert throughput.utilisation(seconds, Work(sampled=20)).keys() == {"speed/rollout_mfu"}


def test_rates_leave_out_evaluations_and_name_what_no_stage_took() -> None:
    throughput = Throughput(RowFlops(1.0, 3.0), 1.0)
    seconds = {"rollout": 6.0, "update": 3.0, "evaluate": 8.0, "checkpoint": 2.0, "step": 20.0}
    assert throughput.rates(seconds, Work(videos=30)) == {
        "speed/samples_per_second": 30 / 10.0,
        "speed/idle": pytest.approx(1 / 20),
    }


def test_the_ceiling_is_measured_in_less_than_a_second_and_draws_no_global_number() -> None:
    device = torch.device("cpu")
    state = torch.random.get_rng_state()
    a = torch.rand(512, 512, generator=torch.Generator().manual_seed(1))
    start = time.thread_time()
    rate = matrix_rate(device, torch.float32)
    assert time.thread_time() - start < 1.0
    assert torch.equal(torch.random.get_rng_state(), state)
    ratios = []
    for _ in range(5):  # one of them must agree, because the machine may be busy in any
        fastest = 0.0
        for _ in range(20):
            start = time.perf_counter()
            a @ a
            fastest = max(fastest, 2 * 512**3 / (time.perf_counter() - start))
        ratios.append(rate / fastest)
        if 0.5 < ratios[-1] < 4:
            break
        rate = matrix_rate(device, torch.float32)
    assert 0.5 < ratios[-1] < 4, ratios


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_a_run_logs_its_speed(small, small_policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device of 1 PFLOP/s; the operations of each step are the same, and so are the products of share and time."""
    monkeypatch.setattr("vpo_engine.trainer.matrix_rate", lambda device, dtype: 1e15)
    config = small(small_policy, "rollout.guidance=2.0", "steps=2")
    assert config.run_dir is not None
    assert train(config) == 0
    rows = [row for row in read_metrics(config.run_dir / "metrics.jsonl") if row["kind"] == "train"]
    assert len(rows) == 2
    for stage in ("rollout", "update"):
        first, second = (row[f"speed/{stage}_mfu"] * row[f"seconds/{stage}"] * 1e15 for row in rows)
        assert 0 < first == pytest.approx(second, rel=1e-6)
    for row in rows:
        assert 0 <= row["speed/idle"] < 1
        assert row["speed/samples_per_second"] > 0
        assert row["speed/ceiling"] == rows[0]["speed/ceiling"] > 1e8


def test_the_ceiling_is_measured_in_the_runs_arithmetic_and_some_prompts_stand_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def count(model: Any, text: Any) -> RowFlops:
        asked.append(text)
        return RowFlops(1.0, 3.0)

    def rate(*given: Any) -> float:
        asked.append(given)
        return 1e12

    monkeypatch.setattr("vpo_engine.trainer.count_row_flops", count)
    monkeypatch.setattr("vpo_engine.trainer.matrix_rate", rate)
    device = torch.device("cpu")
    trainer: Any = SimpleNamespace(
        _progress=SimpleNamespace(stage=lambda name: None),
        _algorithm=SimpleNamespace(
            model=SimpleNamespace(embed=list), optimizer=SimpleNamespace(whole=nullcontext)
        ),
        _held_out=SimpleNamespace(prompts=[str(number) for number in range(20)]),
        _processes=SimpleNamespace(device=device),
        _config=SimpleNamespace(model=SimpleNamespace(dtype="bfloat16")),
        _taken_at=0.0,
    )
    assert Trainer._measure_device(trainer).ceiling == 1e12
    assert asked == [[str(number) for number in range(16)], (device, torch.bfloat16)]
