"""Runs that train an adapter over a base in 8 or 4 bits: what they hold, plan, save, resume and refuse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from lora_case import LORA, PROMPT, Make, same
from power_cut import copy_cut
from real_trace import assert_traced_as_real
from safetensors.torch import load_file
from small_policy import small_network
from torch import Tensor

from vpo_engine import sample, training
from vpo_engine import train as entry
from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.quantised_base import block_linears, frozen_layers
from vpo_engine.metrics.throughput import count_row_flops
from vpo_engine.models.lora import adapter_parameters
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.planning.parts import Assumed, blueprint_of
from vpo_engine.planning.trace import trace_step
from vpo_engine.runs.log import read_metrics

FOUR = (*LORA, "memory.base_bits=4")


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    root = run / "checkpoints" / f"step_{step:08d}"
    files = (root / "policy" / "adapter_model.safetensors", *sorted(root.glob("*.safetensors")))
    return {f"{file.stem}.{name}": value for file in files for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def finished(smallest: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OpenSora]:
    """A run of four steps over a base in 4 bits, by the command line, and the model it has left in memory."""
    run, models = tmp_path_factory.mktemp("finished") / "run", []

    def build_and_keep(config: Config, processes: Processes) -> OpenSora:
        models.append(build_model(config, processes))
        return models[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_model", build_and_keep)
        patch.setattr(training, "check_fits", lambda config, *_: (config, ""))
        assert entry.main([*smallest, *FOUR, f"run_dir={run}"]) == 0
    return run, models[0]


def test_a_run_trains_the_adapter_saves_it_alone_and_leaves_the_base(finished: tuple[Path, OpenSora]) -> None:
    run, model = finished
    fresh = small_network()
    count = len(block_linears(fresh))
    assert len(frozen_layers(model.network)) == count > 0
    saved = tensors(run, 4)
    adapter = {name: weight.detach() for name, weight in adapter_parameters(model.network).items()}
    assert same(load_file(run / "checkpoints/step_00000004/policy/adapter_model.safetensors"), adapter)
    assert all(value.any() for value in adapter.values())
    assert not any(
        value.dtype == torch.uint8 for name, value in saved.items() if not name.startswith("baseline.")
    )
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["margin"] == 0.0 for row in rows] == [True, False, False, True]


def test_the_count_of_trained_parameters_is_that_of_any_base(small: Make) -> None:
    said: dict[str, list[str]] = {}
    for bits in ("null", "8", "4"):
        build_model(
            small(*LORA, f"memory.base_bits={bits}"), Processes.start("cpu"), said.setdefault(bits, []).append
        )
    plain = said["null"][1]
    assert re.fullmatch(r"LoRA of rank 4 .* with [\d,]+ of [\d,]+ parameters \(\d\.\d\d%\)", plain)
    assert re.fullmatch(
        re.escape(plain) + r"; 28 layers of the base are held in 8 bits \(\d\.\d MiB\)", said["8"][1]
    )
    assert re.fullmatch(
        re.escape(plain) + r"; 28 layers of the base are held in 4 bits \(0\.\d MiB\)", said["4"][1]
    )


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    finished: tuple[Path, OpenSora], small: Make, tmp_path: Path
) -> None:
    copy_cut(finished[0], tmp_path / "run", 2)
    assert entry.train(small(*FOUR, "checkpoint.resume=true")) == 0
    assert same(tensors(finished[0], 4), tensors(tmp_path / "run", 4))


def test_sample_shows_the_trained_policy_over_its_base(
    finished: tuple[Path, OpenSora], tmp_path: Path
) -> None:
    run, _ = finished
    for name, folder in (("one", run), ("other", run / "checkpoints/step_00000004")):
        assert sample.main([str(folder), "--prompt", PROMPT, "--out", str(tmp_path / name)]) == 0
    (one,), (other,) = ((tmp_path / name).glob("*.mp4") for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            ("memory.base_bits=4",),
            r"memory\.base_bits=4 .*without model\.lora .*set model\.lora\.rank=64 reference",
        ),
        ((*LORA, "memory.base_bits=6"), r"memory\.base_bits"),
        (
            (*FOUR, "rollout.weights=int8"),
            r"rollout\.weights=int8 .*memory\.base_bits=4 has rounded already; set rollout\.weights=policy",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main(list(settings)) == 1
    message = capsys.readouterr().err
    assert re.search(text, message)
    assert message.count("\n") == 1


def test_an_update_costs_the_same_operations_over_any_base(small: Make) -> None:
    costs = []
    for bits in ("null", "4"):
        model = build_model(small(*LORA, f"memory.base_bits={bits}"), Processes.start("cpu"), lambda _: None)
        model.prepare([PROMPT])
        costs.append(count_row_flops(model, model.embed([PROMPT])))
    assert costs[0] == costs[1]


# the plan

TWO = ("pairs_per_step=2", "objective.timesteps_per_pair=1", "memory.activation_checkpointing=block")


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.long), 4])
def test_the_plan_counts_the_codes_and_nothing_of_the_full_weights(bits: int) -> None:
    network = blueprint_of(load_config(None), Assumed(), 1).model.network
    layers = [layer.weight.numel() for layer in block_linears(network).values()]
    plain, found = (
        trace_step(load_config(None, [*LORA, *TWO, *more]), on_gpu=False, depth=1, network_only=True)
        for more in ([], [f"memory.base_bits={bits}"])
    )

    def rounded(size: int) -> int:
        return -(-size // 512) * 512

    blocks = [-(-count // 64) for count in layers]
    held = sum(rounded(64 * count * bits // 8) + rounded(4 * count) for count in blocks)
    held += 1024 * len(layers) if bits == 8 else 0
    less = sum(rounded(4 * count) for count in layers) - held
    for name in ("rollout", "update", "optimizer", "refresh"):
        assert plain.peak(name)["weights"] - found.peak(name)["weights"] == less
        assert plain.peak(name)["reference"] == found.peak(name)["reference"]
    assert plain.flops("update") == found.flops("update")


@pytest.mark.long
def test_the_trace_of_real_tensors_takes_the_bytes_of_the_trace_of_fakes() -> None:
    """The step over a base in 4 bits: each dequantised weight comes, goes, and counts."""
    assert_traced_as_real(load_config(None, [*FOUR, *TWO]))
