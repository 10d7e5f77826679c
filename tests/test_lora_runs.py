"""Runs that train a low-rank adapter: what they train, save, resume and sample."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from lora_case import LORA, PROMPT, TARGETS, Make, same
from power_cut import copy_cut
from process_group import run_in_group
from safetensors.torch import load_file
from small_policy import small_network
from torch import Tensor

from vpo_engine import evaluate, sample, training
from vpo_engine import train as entry
from vpo_engine.build import build_model
from vpo_engine.config import Config, LoraConfig
from vpo_engine.data.sprites.assets import WEIGHTS
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.lora import adapter_parameters, inject_adapter, save_adapter
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.models.policy import prepare_policy
from vpo_engine.runs.log import read_metrics
from vpo_engine.runs.video import write_mp4
from vpo_engine.seeding import normal


def weights(run: Path, step: int) -> dict[str, Tensor]:
    root = run / "checkpoints" / f"step_{step:08d}"
    files = (root / "policy" / "adapter_model.safetensors", *sorted(root.glob("*.safetensors")))
    return {f"{file.stem}.{name}": value for file in files for name, value in load_file(file).items()}


def numbers(run: Path, kind: str | None = None) -> list[dict[str, object]]:
    """Metric rows without what a clock wrote."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if kind in (None, row["kind"])]
    return [
        {key: value for key, value in row.items() if not key.startswith(("seconds/", "speed/"))}
        for row in rows
    ]


@pytest.fixture(scope="module")
def finished(smallest: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OpenSora]:
    """A run of four steps to its end, by the command line, and the model it has left in memory."""
    run, models = tmp_path_factory.mktemp("finished") / "run", []

    def build_and_keep(config: Config, processes: Processes) -> OpenSora:
        models.append(build_model(config, processes))
        return models[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_model", build_and_keep)
        patch.setattr(training, "check_fits", lambda config, *_: (config, ""))
        assert entry.main([*smallest, *LORA, f"run_dir={run}"]) == 0
    return run, models[0]


def test_a_run_trains_the_adapter_and_leaves_the_base(finished: tuple[Path, OpenSora]) -> None:
    run, model = finished
    base = small_network().state_dict()
    now = {name: value for name, value in model.network.state_dict().items() if ".lora_" not in name}
    assert same({name.replace(".base_layer.", "."): value for name, value in now.items()}, dict(base))
    saved = load_file(run / "checkpoints/step_00000004/policy/adapter_model.safetensors")
    assert same(saved, {name: weight.detach() for name, weight in adapter_parameters(model.network).items()})
    assert all(value.any() for value in saved.values())
    fresh = small_network()
    inject_adapter(fresh, LoraConfig(rank=4, alpha=8.0), TARGETS, seed=0)
    moved = [not torch.equal(weight, saved[name]) for name, weight in adapter_parameters(fresh).items()]
    assert all(moved)


def test_the_reference_holds_the_adapter_and_shares_the_base(finished: tuple[Path, OpenSora]) -> None:
    run, model = finished
    stored = load_file(run / "checkpoints/step_00000004/reference.safetensors")
    adapter = adapter_parameters(model.network)
    parameters = dict(model.network.named_parameters())
    assert {id(parameters[name]) for name in stored if name in parameters} == {
        id(one) for one in adapter.values()
    }
    assert set(stored) - set(parameters) <= set(dict(model.network.named_buffers()))


def test_the_margin_is_zero_right_after_a_refresh_and_not_before(finished: tuple[Path, OpenSora]) -> None:
    rows = numbers(finished[0], "train")
    assert [row["reference_age"] for row in rows] == [1, 2, 0, 1]
    assert [row["margin"] == 0.0 for row in rows] == [True, False, False, True]
    assert rows[3]["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_the_count_of_trained_parameters_is_said_once(small: Make) -> None:
    said: list[str] = []
    model = build_model(small(*LORA), Processes.start("cpu"), said.append)
    trained = sum(weight.numel() for weight in adapter_parameters(model.network).values())
    total = trained + sum(weight.numel() for weight in small_network().parameters())
    assert said[1:] == [
        f"LoRA of rank 4 and scale 2 (alpha / rank) in 20 layers, with {trained:,} of {total:,} parameters "
        f"({trained / total:.2%})"
    ]


@pytest.mark.long
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    finished: tuple[Path, OpenSora], unplanned: None, small: Make, tmp_path: Path
) -> None:
    copy_cut(finished[0], tmp_path / "run", 2)
    assert entry.train(small(*LORA, "checkpoint.resume=true")) == 0
    assert numbers(finished[0]) == numbers(tmp_path / "run")
    assert same(weights(finished[0], 4), weights(tmp_path / "run", 4))


@pytest.mark.parametrize("place", ["", "checkpoints/step_00000004"])
def test_sample_shows_the_trained_policy(finished: tuple[Path, OpenSora], tmp_path: Path, place: str) -> None:
    run, model = finished
    assert sample.main([str(run / place), "--prompt", PROMPT, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.mp4")
    noise = normal(model.latent_shape, 0, "sample", 0, 0)[None]
    model.prepare([PROMPT])
    latents = model.sample(model.network, noise, model.embed([PROMPT]), steps=2, guidance=1.0)
    write_mp4(tmp_path / "expected.mp4", model.decode(latents)[0], model.fps)
    assert file.read_bytes() == (tmp_path / "expected.mp4").read_bytes()


def test_evaluate_reads_such_runs(
    finished: tuple[Path, OpenSora], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(finished[0])]) == 0
    assert "Combined score" in capsys.readouterr().out


def test_the_adapter_names_the_policy_it_was_trained_on(small: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(WEIGHTS / "policy", tmp_path / "published")
    model = build_model(small(*LORA, f"model.policy={folder}"), Processes.start("cpu"))
    model.save_policy(tmp_path / "policy")
    assert peft.PeftConfig.from_pretrained(tmp_path / "policy").base_model_name_or_path == str(folder)


def train_and_keep_the_adapter(folder: Path, arguments: list[str]) -> int:
    """Train, then save the adapter of this process, of which the run itself saves only that of the first."""
    build, models = training.build_model, []

    def build_and_keep(config: Config, processes: Processes) -> OpenSora:
        models.append(build(config, processes))
        return models[0]

    training.build_model = build_and_keep
    code = entry.main(arguments)
    save_adapter(models[0].network, folder / os.environ["RANK"])
    return code


@pytest.mark.long
def test_two_processes_hold_the_same_adapter(smallest: list[str], small_policy: str, tmp_path: Path) -> None:
    settings = [*smallest, small_policy, *LORA, f"run_dir={tmp_path / 'run'}"]
    output = run_in_group(tmp_path, 2, train_and_keep_the_adapter, tmp_path, settings)
    assert output.count("LoRA of rank 4") == 1
    first, second = (load_file(tmp_path / rank / "adapter_model.safetensors") for rank in "01")
    assert same(first, second)
    assert same(first, load_file(tmp_path / "run/checkpoints/step_00000004/policy/adapter_model.safetensors"))


def test_runs_of_other_seeds_start_from_other_adapters(small: Make) -> None:
    starts = []
    for seed in (3, 3, 4):
        policy = small_network()
        prepare_policy(policy, small(*LORA, f"seed={seed}"), OpenSora.card, torch.float32)
        starts.append({name: weight.detach() for name, weight in adapter_parameters(policy).items()})
    assert same(starts[0], starts[1])
    assert not any(torch.equal(starts[0][name], starts[2][name]) for name in starts[0] if ".lora_A." in name)
