"""A JSON file of DeepSpeed's: "auto" values, contradictions, unknown settings, and what DeepSpeed excludes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.distributed.deepspeed_settings import check_deepspeed, resolve
from vpo_engine.models.registry import check_model
from vpo_engine.train import main

SHIPPED = Path(__file__).parents[2] / "configs" / "deepspeed_zero2.json"
DEEPSPEED = "distributed.engine=deepspeed"

Write = Callable[[Any], Config]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Config]:
    """Return a configuration with these values in its JSON file, and with these settings."""

    def make(values: object, *settings: str) -> Config:
        file = tmp_path / "own.json"
        file.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
        return load_config(None, [DEEPSPEED, f"distributed.deepspeed_config={file}", *settings])

    return make


def test_the_defaults_of_deepspeed_that_would_train_something_else_are_written_out() -> None:
    found = resolve(load_config(None, [DEEPSPEED, "pairs_per_step=8", "optimizer.clip=null"]), 4)
    assert found["gradient_clipping"] == 0.0
    assert found["managed_gradient_accumulation"] is False
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == (8, 2)
    assert (found["zero_optimization"]["stage"], found["zero_optimization"]["overlap_comm"]) == (2, False)
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "none"}
    assert found["bf16"] == found["fp16"] == {"enabled": False}


def test_the_shipped_example_takes_every_value_from_the_run() -> None:
    settings = [
        DEEPSPEED,
        f"distributed.deepspeed_config={SHIPPED}",
        "optimizer.clip=0.7",
        "pairs_per_step=6",
    ]
    found = resolve(load_config(None, settings), 3)
    assert (found["gradient_clipping"], found["train_batch_size"]) == (0.7, 6)
    assert found["zero_optimization"]["stage"] == 2
    assert "auto" not in json.dumps(found)


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ({"zero_optimization": {"stage": 3}}, [], 3),
        ({"zero_optimization": {"stage": "auto"}}, ["distributed.zero_stage=1"], 1),
        ({"zero_optimization": {"stage": 1}}, ["distributed.zero_stage=1"], 1),
        ({}, ["distributed.zero_stage=0"], 0),
    ],
)
def test_the_stage_comes_from_the_file_or_from_the_settings(
    write: Callable[..., Config], values: object, settings: list[str], expected: int
) -> None:
    assert resolve(write(values, *settings), 2)["zero_optimization"]["stage"] == expected


def test_what_is_passed_on_reaches_deepspeed(write: Callable[..., Config]) -> None:
    values = {
        "wall_clock_breakdown": True,
        "zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True, "sub_group_size": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
    }
    found = resolve(write(values), 2)
    assert found["wall_clock_breakdown"] is True
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000
    assert found["zero_optimization"]["overlap_comm"] is True
    assert "sub_group_size" not in found["zero_optimization"]
    assert "optimizer" not in found


@pytest.mark.parametrize(
    ("values", "settings", "text"),
    [
        (
            {"gradient_clipping": 0.5},
            ["optimizer.clip=2"],
            r"gradient_clipping=0.5, but this run has 2.0, which is said by optimizer.clip",
        ),
        ({"gradient_clipping": 1.0}, ["optimizer.clip=null"], r"gradient_clipping=1.0, but this run has 0.0"),
        (
            {"zero_optimization": {"stage": 3}},
            ["distributed.zero_stage=2"],
            r"zero_optimization.stage=3, but this run has 2, which is said by distributed.zero_stage",
        ),
        (
            {"train_batch_size": 16},
            ["pairs_per_step=8"],
            r"train_batch_size=16, but this run has 8, which is said by pairs_per_step",
        ),
        ({"gradient_accumulation_steps": 4}, [], r"=4, but this run has 1, .*set objective.micro_batch_size"),
        (
            {"managed_gradient_accumulation": True},
            [],
            r"managed_gradient_accumulation=true, but this run has false",
        ),
        ({"bf16": {"enabled": True}}, [], r"bf16.enabled=true, but this run has false, .*memory.weights"),
        ({"fp16": {"enabled": True}}, [], r"fp16.enabled=true, but this run has false"),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            [],
            r'grad_accum_dtype="bf16", but this run has "fp32"',
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}},
            ["optimizer.lr=1e-5"],
            r"optimizer.params.lr=0.0001, but this run has 1e-05, which is said by optimizer.lr",
        ),
        ({"optimizer": {"type": "OneBitAdam"}}, [], r'optimizer.type="OneBitAdam", but this run has "AdamW"'),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ["distributed.offload_optimizer=false"],
            r'device="cpu", but this run has "none", which is said by distributed.offload_optimizer',
        ),
        (
            {"zero_optimization": {"memory_efficient_linear": True}},
            ["distributed.zero_stage=3"],
            r"memory_efficient_linear=true, but this run has false",
        ),
    ],
)
def test_a_value_that_contradicts_the_run_is_refused_with_both(
    write: Callable[..., Config], values: object, settings: list[str], text: str
) -> None:
    with pytest.raises(ValueError, match=text) as error:
        resolve(write(values, *settings), 2)
    assert "own.json: " in str(error.value)
    assert '"auto"' in str(error.value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"gradient_cliping": 1}, r"gradient_cliping is no setting .*did you mean gradient_clipping\?"),
        (
            {"zero_optimization": {"overlap_com": True}},
            r"zero_optimization.overlap_com is no setting .*did you mean zero_optimization.overlap_comm\?",
        ),
        ({"optimizer": {"params": {"weight_decy": 0}}}, r"did you mean optimizer.params.weight_decay\?"),
        (
            {"scheduler": {"type": "WarmupLR"}},
            r"scheduler has no place here: the learning rate follows optimizer.lr",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            r"offload_param has no place here: .*distributed.offload_optimizer=true",
        ),
        (
            {"zero_optimization": {"zero_quantized_gradients": True}},
            r"zero_quantized_gradients has no place here",
        ),
        (
            {"zero_optimization": {"stage": 1, "overlap_comm": True}},
            r"overlap_comm=true goes with stage 2 only, .*but the stage is 1",
        ),
        ({"zero_optimization": {"stage": 4}}, r"zero_optimization.stage=4 must be 0, 1, 2, 3"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            r"device='nvme' must be \"cpu\", \"none\"",
        ),
        ({"zero_optimization": []}, r"zero_optimization=\[\] must be an object"),
        ([], r"holds a list, expected an object"),
        ("{", r"own.json is not JSON"),
        ('{"steps_per_print": 1, "steps_per_print": 2}', r"the key 'steps_per_print' is there twice"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(
    write: Callable[..., Config], values: object, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        resolve(write(values), 2)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["distributed.zero_stage=0", "distributed.offload_optimizer=true"], r"set distributed.zero_stage=1"),
        (
            ["distributed.zero_stage=0", "memory.weights=fp32_master", "model.dtype=bfloat16"],
            r"stage 0 adds up the gradients of bfloat16 weights in bfloat16",
        ),
        (
            ["memory.weights=fp32_master", "model.dtype=float32"],
            r"set model.dtype=bfloat16, or memory.weights=float32",
        ),
        (
            [
                "distributed.zero_stage=3",
                "reference.storage=exact8",
                "memory.weights=fp32_master",
                "model.dtype=bfloat16",
            ],
            r"exact8 decodes the reference .*set distributed.zero_stage=2, or reference.storage=bf16",
        ),
        (
            ["distributed.zero_stage=3", "rollout.compile=blocks"],
            r"rollout.compile=blocks compiles .*zero_stage=2",
        ),
        (
            ["distributed.zero_stage=3", "rollout.weights=int8"],
            r"a copy of the policy in int8 .*zero_stage=2",
        ),
    ],
)
def test_what_a_stage_excludes_is_refused_with_the_remedy(settings: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_deepspeed(load_config(None, [DEEPSPEED, *settings]), 2)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            ["memory.weights=stochastic_rounding"],
            r"excludes memory.weights=stochastic_rounding: .*set fp32_master",
        ),
        (
            ["memory.offload_idle=true"],
            r"excludes memory.offload_idle=true: .*distributed.offload_optimizer=true",
        ),
        (["memory.step_in_backward=true", "optimizer.clip=null"], r"excludes memory.step_in_backward=true"),
    ],
)
def test_what_deepspeed_excludes_is_refused_with_the_configuration(settings: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_config(None, [DEEPSPEED, *settings])


@pytest.mark.parametrize("setting", ["zero_stage=2", "offload_optimizer=true", "deepspeed_config=own.json"])
def test_settings_of_deepspeed_need_its_engine(setting: str) -> None:
    with pytest.raises(ValueError, match=r"set distributed.engine=deepspeed, or leave distributed\."):
        load_config(None, [f"distributed.{setting}"])


def test_a_missing_deepspeed_is_one_line_with_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "deepspeed" else found(name, *rest)
    )
    assert main([DEEPSPEED, f"run_dir={tmp_path / 'run'}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert 'which is not installed; pip install "vpo-engine[deepspeed]"' in line


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([DEEPSPEED, f"distributed.deepspeed_config={tmp_path / 'none.json'}"]) == 1
    assert "none.json: there is no such file; check the path" in capsys.readouterr().err


def test_weights_of_two_types_are_refused_before_a_model_is_loaded() -> None:
    """A family some of whose modules stay float32; an adapter is float32 throughout."""
    settings = ["memory.weights=fp32_master", "reference.storage=bf16", "memory.offload_idle=false"]
    config = load_config("wan2_1_1_3b.yaml", settings)
    check_model(config)
    divided = load_config("wan2_1_1_3b.yaml", [*settings, DEEPSPEED])
    with pytest.raises(
        ValueError, match=r"leaves some weights of model.kind=wan .* set memory.weights=float32, or"
    ):
        check_model(divided)
    check_model(load_config("wan2_1_14b_lora.yaml", [DEEPSPEED, "memory.offload_idle=false"]))


def test_the_file_alone_can_send_the_state_to_the_host(write: Callable[..., Config]) -> None:
    def offload(values: dict[str, Any], *settings: str) -> Any:
        config = write({"zero_optimization": {"offload_optimizer": values}}, *settings)
        return resolve(config, 2)["zero_optimization"]["offload_optimizer"]

    asked = {"device": "cpu", "pin_memory": True}
    assert offload(asked) == asked
    assert offload({"device": "none"}) == {"device": "none"}
    automatic = {"device": "auto", "pin_memory": "auto"}
    assert offload(automatic, "distributed.offload_optimizer=true") == {"device": "cpu"}


@pytest.mark.parametrize("value", ["true", 1])
def test_overlap_is_true_or_false_and_nothing_like_it(write: Callable[..., Config], value: object) -> None:
    with pytest.raises(ValueError, match=r"zero_optimization.overlap_comm=.* must be true, false or"):
        resolve(write({"zero_optimization": {"overlap_comm": value}}), 2)
