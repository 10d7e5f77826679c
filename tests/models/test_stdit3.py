"""STDiT3 against recordings of the public code at a tiny size (tests/data/opensora/stdit3_tiny*)."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vpo_engine.config import ActivationCheckpointing
from vpo_engine.memory.checkpointing import Activations
from vpo_engine.models.opensora.stdit3 import STDiT3

DATA = Path(__file__).parents[1] / "data" / "opensora"
MANIFEST = json.loads((DATA / "stdit3_tiny.json").read_text())
CASES = sorted(MANIFEST["cases"])
ARGUMENTS = ("x", "timestep", "y", "mask", "x_mask", "fps", "height", "width")

FORWARD_TOLERANCE = 1e-5  # max abs; two independent float32 implementations differ by 3e-6 at most
GRADIENT_TOLERANCE = 1e-5  # relative l2
BF16_TOLERANCE = 2e-2  # relative l2 against float32 at the time that bfloat16 rounds to


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return load_file(DATA / "stdit3_tiny_inputs.safetensors")


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    return load_file(DATA / "stdit3_tiny_outputs.safetensors")


@pytest.fixture
def tiny() -> STDiT3:
    network = STDiT3.from_config(MANIFEST["config"])
    network.load_state_dict(load_file(DATA / "stdit3_tiny_weights.safetensors"))
    return network


def arguments(inputs: dict[str, Tensor], case: str) -> dict[str, Any]:
    return {name: inputs.get(f"{case}.{name}") for name in ARGUMENTS}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def keep_last(found: dict[str, Tensor], name: str, _module: object, _inputs: object, out: Tensor) -> None:
    found[name] = out


def worst(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


# --- Recordings ---


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_forward_equals_the_public_code(tiny, inputs, outputs, case):
    out = tiny(**arguments(inputs, case))
    assert out.dtype == torch.float32
    assert worst(out, outputs[f"{case}.out"]) <= FORWARD_TOLERANCE


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_float64_forward_agrees_and_stays_float64(tiny, inputs, outputs, case):
    kwargs = arguments(inputs, case)
    for name in ("x", "timestep", "y", "fps"):
        kwargs[name] = kwargs[name].double()
    out = tiny.double()(**kwargs)
    assert out.dtype == torch.float64
    assert worst(out.float(), outputs[f"{case}.out"]) <= FORWARD_TOLERANCE


@pytest.mark.parametrize("case", ["plain", "textmask"])
@torch.no_grad()
def test_bfloat16_forward_rounds_the_time_as_the_public_code_does(tiny, inputs, outputs, case):
    out = tiny.to(torch.bfloat16)(**arguments(inputs, case))
    assert out.dtype == torch.float32
    assert relative(out, outputs[f"{case}.out_fp32_t_rounded_to_bf16"]) <= BF16_TOLERANCE
    assert relative(out, outputs[f"{case}.out_bf16"]) <= BF16_TOLERANCE
    # The rounded time, not the arithmetic, is what moves the output away from float32.
    assert relative(out, outputs[f"{case}.out"]) > 2 * BF16_TOLERANCE


@pytest.mark.parametrize("case", ["plain", "textmask"])
def test_autocast_keeps_the_time_exact_and_float32_gradients(tiny, inputs, outputs, case):
    with torch.autocast("cpu", torch.bfloat16):
        out = tiny(**arguments(inputs, case))
    assert out.dtype == torch.float32
    assert relative(out.detach(), outputs[f"{case}.out"]) <= BF16_TOLERANCE
    out[:, :4].square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in tiny.parameters() if p.requires_grad)


@torch.no_grad()
@pytest.mark.parametrize("case", ["plain", "xmask"])
def test_every_module_output_equals_the_recording(tiny, inputs, case):
    """Float64 has no rounding to speak of, so this is the recording's own, in float32, on every machine.

    Inside the network values reach 7, and float32 rounds relative to them: where that is more than the tolerance of
    outputs, the bound is 2e-6 of a module's largest value, 17 of float32's steps. The recording is within 12.
    """
    recorded = load_file(DATA / "stdit3_tiny_intermediates.safetensors")
    expected = {
        key.removeprefix(case + "."): value for key, value in recorded.items() if key.startswith(case)
    }
    found: dict[str, Tensor] = {}
    modules = dict(tiny.named_modules())
    for name in expected.keys() - {"pos_embed"}:
        modules[name].register_forward_hook(partial(keep_last, found, name))
    kwargs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments(inputs, case).items()
    }
    tiny.double()(**kwargs)
    rows, columns = (-(-size // 2) for size in kwargs["x"].shape[-2:])
    height, width = float(kwargs["height"][0]), float(kwargs["width"][0])
    found["pos_embed"] = tiny._position((rows, columns), height, width, kwargs["x"])
    assert found.keys() == expected.keys()
    if kwargs["mask"] is not None:  # the public code embeds padding too
        expected["y_embedder"] = expected["y_embedder"][:, 0][kwargs["mask"] == 1]
    for name, value in expected.items():
        bound = max(FORWARD_TOLERANCE, 2e-6 * float(value.abs().max()))
        assert worst(found[name].reshape(value.shape), value.double()) <= bound, name


@pytest.mark.parametrize("checkpointing", get_args(ActivationCheckpointing))
def test_gradients_equal_the_public_code(tiny, inputs, outputs, checkpointing):
    tiny.activations = Activations(checkpointing)
    out = tiny(**arguments(inputs, "textmask"))
    loss = (out[:, :4] - inputs["textmask.grad_target"]).square().mean()
    assert loss.item() == pytest.approx(MANIFEST["grad"]["loss"], rel=1e-6)
    loss.backward()
    gradients = {name: p.grad for name, p in tiny.named_parameters() if p.grad is not None}
    norms = MANIFEST["grad"]["grad_norm_l2"]
    assert gradients.keys() == norms.keys()
    for name, gradient in gradients.items():
        assert gradient.norm().item() == pytest.approx(norms[name], rel=GRADIENT_TOLERANCE), name
    prefix = "textmask.grad."
    recorded = {key.removeprefix(prefix): value for key, value in outputs.items() if key.startswith(prefix)}
    assert recorded
    for name, value in recorded.items():
        assert relative(gradients[name], value) <= GRADIENT_TOLERANCE, name
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert total == pytest.approx(MANIFEST["grad"]["total_norm"], rel=GRADIENT_TOLERANCE)


def test_channels_beyond_the_velocity_get_exactly_zero_gradient(tiny, inputs):
    tiny(**arguments(inputs, "textmask"))[:, :4].square().mean().backward()
    for parameter in (tiny.final_layer.linear.weight, tiny.final_layer.linear.bias):
        by_channel = parameter.grad.unflatten(0, (4, 8))  # patch position, output channel
        assert by_channel[:, 4:].count_nonzero() == 0
        assert by_channel[:, :4].count_nonzero() == by_channel[:, :4].numel()


def test_null_caption_replaces_marked_rows(tiny, inputs, outputs):
    rows = inputs["plain.force_drop_ids"] == 1
    with torch.no_grad():
        found = tiny.y_embedder(tiny.y_embedder.replace(inputs["plain.y"], rows))
    assert worst(found, outputs["plain.y_embedder_force_drop"]) <= FORWARD_TOLERANCE


# --- Invariants ---


@torch.no_grad()
def test_training_mode_changes_nothing_and_draws_no_random_numbers(tiny, inputs):
    assert tiny.config["class_dropout_prob"] == 0.1
    state = torch.get_rng_state()
    train = tiny.train()(**arguments(inputs, "textmask"))
    evaluation = tiny.eval()(**arguments(inputs, "textmask"))
    assert torch.equal(train, evaluation)
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpointing_leaves_gradients_bit_identical(tiny, inputs):
    def gradients(network: STDiT3) -> list[Tensor]:
        network.zero_grad()
        network(**arguments(inputs, "xmask")).square().mean().backward()
        return [p.grad.clone() for p in network.parameters() if p.requires_grad]

    calls: list[str] = []
    for block in (*tiny.spatial_blocks, *tiny.temporal_blocks):
        block.mlp.register_forward_hook(lambda *_: calls.append("block"))
    plain = gradients(tiny)
    assert len(calls) == 4
    tiny.activations = Activations("block")
    for with_checkpoints, without in zip(gradients(tiny), plain, strict=True):
        assert torch.equal(with_checkpoints, without)
    assert len(calls) == 4 + 2 * 4  # every block was computed again
    with torch.no_grad():
        tiny(**arguments(inputs, "xmask"))
    assert len(calls) == 4 + 2 * 4 + 4


@torch.no_grad()
def test_padding_tokens_never_matter(tiny, inputs):
    kwargs = arguments(inputs, "textmask")
    expected = tiny(**kwargs)
    padding = kwargs["mask"][:, None, :, None] == 0
    assert torch.equal(tiny(**{**kwargs, "y": kwargs["y"].masked_fill(padding, 1e4)}), expected)


@torch.no_grad()
def test_a_mask_with_holes_equals_the_packed_caption(tiny, inputs):
    kwargs = arguments(inputs, "plain")
    mask = torch.zeros(2, 12, dtype=torch.int64)
    mask[0, [1, 4, 5]] = 1
    mask[1, [0, 4]] = 1
    packed = torch.zeros_like(kwargs["y"])
    for row in range(2):
        packed[row, 0, : int(mask[row].sum())] = kwargs["y"][row, 0, mask[row] == 1]
    packed_mask = (torch.arange(12) < mask.sum(1, keepdim=True)).long()
    holes = tiny(**{**kwargs, "mask": mask})
    assert worst(holes, tiny(**{**kwargs, "y": packed, "mask": packed_mask})) <= FORWARD_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 12])
def test_equally_long_captions_equal_unmasked_short_ones(tiny, inputs, length):
    kwargs = arguments(inputs, "plain")
    mask = (torch.arange(12) < length).expand(2, 12)
    short = tiny(**{**kwargs, "y": kwargs["y"][:, :, :length]})
    assert worst(tiny(**{**kwargs, "mask": mask}), short) <= FORWARD_TOLERANCE


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(tiny, inputs):
    kwargs = arguments(inputs, "textmask")
    together = tiny(**kwargs)
    for row in range(3):
        alone = tiny(**{name: None if v is None else v[row : row + 1] for name, v in kwargs.items()})
        assert worst(alone, together[row : row + 1]) <= FORWARD_TOLERANCE


@torch.no_grad()
def test_numbers_serve_as_geometry(tiny, inputs):
    kwargs = arguments(inputs, "textmask")
    numbers = {name: float(kwargs[name][0]) for name in ("fps", "height", "width")}
    assert torch.equal(tiny(**{**kwargs, **numbers}), tiny(**kwargs))


@torch.no_grad()
def test_an_all_true_frame_mask_is_no_mask(tiny, inputs):
    kwargs = arguments(inputs, "plain")
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert worst(tiny(**{**kwargs, "x_mask": everything}), tiny(**kwargs)) <= FORWARD_TOLERANCE


@torch.no_grad()
def test_positions_are_cached_per_size_and_survive_inference_mode(tiny, inputs):
    kwargs = arguments(inputs, "plain")
    expected = tiny(**kwargs)
    for size in range(40, 48):
        assert not torch.equal(tiny(**{**kwargs, "height": float(size)}), expected)
    assert len(tiny._positions) <= 4
    with torch.inference_mode():
        tiny(**{**kwargs, "height": 64.0})
    assert torch.equal(tiny(**kwargs), expected)


def test_forward_after_inference_mode_still_trains(tiny, inputs):
    with torch.inference_mode():
        tiny(**arguments(inputs, "plain"))
    tiny(**arguments(inputs, "plain")).square().mean().backward()
    assert tiny.x_embedder.proj.weight.grad.norm() > 0


def test_a_copy_is_independent_and_equal(tiny, inputs):
    with torch.no_grad():
        expected = tiny(**arguments(inputs, "plain"))
        twin = copy.deepcopy(tiny)
        tiny.final_layer.linear.bias.add_(1)
        assert torch.equal(twin(**arguments(inputs, "plain")), expected)


def test_caption_dropout_is_drawn_from_its_generator_and_all_or_nothing(tiny):
    y = torch.randn(400, 1, 5, 32)
    null = tiny.y_embedder.y_embedding[:5]
    dropped = [
        (tiny.y_embedder.drop(y, 0.3, torch.Generator().manual_seed(3)) == null).flatten(1).all(1)
        for _ in range(2)
    ]
    assert torch.equal(*dropped)
    assert 80 < int(dropped[0].sum()) < 160  # 120 expected, standard deviation 9
    assert torch.equal(tiny.y_embedder.drop(y, 0.0), y)
    assert torch.equal(tiny.y_embedder.drop(y, 1.0), null.expand_as(y))
    kept = tiny.y_embedder.drop(y, 0.3, torch.Generator().manual_seed(3))[~dropped[0]]
    assert torch.equal(kept, y[~dropped[0]])


def test_a_fresh_model_starts_with_silent_time_mixing_and_frame_rate(inputs):
    torch.manual_seed(0)
    network = STDiT3.from_config(MANIFEST["config"])
    kwargs = arguments(inputs, "plain")
    with torch.no_grad():
        expected = network(**kwargs)
        assert torch.equal(network(**{**kwargs, "fps": 120.0}), expected)
        other_frames = kwargs["x"].clone()
        other_frames[:, :, 1:] = 0
        assert torch.equal(network(**{**kwargs, "x": other_frames})[:, :, 0], expected[:, :, 0])
    weight = network.spatial_blocks[0].mlp.fc1.weight
    assert weight.abs().max().item() == pytest.approx((6 / sum(weight.shape)) ** 0.5, rel=1e-2)


# --- Configuration and errors ---


def test_config_round_trips_and_keeps_the_dropout_record(tiny):
    again = STDiT3.from_config(tiny.config)
    assert again.config == tiny.config
    assert {key: tiny.config[key] for key in MANIFEST["config"]} == MANIFEST["config"]
    assert json.loads(json.dumps(tiny.config)) == tiny.config


def test_freezing_the_caption_embedder_follows_the_config(tiny):
    frozen = STDiT3.from_config({**MANIFEST["config"], "freeze_y_embedder": True})
    text = sum(p.numel() for p in frozen.y_embedder.parameters())
    assert tiny.num_trainable - frozen.num_trainable == text
    assert not tiny.rope["freqs"].requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 64}, "unknown key 'hiden_size'; known keys are .*hidden_size"),
        ({"model_type": "PixArt"}, "model_type='PixArt', expected 'STDiT3'"),
        ({"drop_path": 0.1}, "drop_path=0.1 is not supported"),
        ({"qk_norm": False}, "qk_norm=False is not supported"),
        ({"patch_size": [2, 2, 2]}, r"patch_size=\(2, 2, 2\) must be \(1, rows, columns\)"),
        ({"num_heads": 5}, "hidden_size=64 must be divisible .* num_heads=5"),
    ],
)
def test_config_errors_name_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        STDiT3.from_config({**MANIFEST["config"], **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5, 2, 6, 4)}, r"x is \[3, 5, 2, 6, 4\], expected latents \[B, 4, T, H, W\]"),
        ({"timestep": torch.zeros(1)}, r"timestep is \[1\], expected one per sample: \[3\]"),
        ({"y": torch.zeros(3, 12, 32)}, r"y is \[3, 12, 32\], expected text states \[captions, 1, L, 32\]"),
        ({"mask": torch.ones(2, 12)}, r"mask is \[2, 12\], expected \[rows, 12\] with rows dividing 3"),
        ({"mask": torch.ones(3, 11)}, r"mask is \[3, 11\], expected \[rows, 12\]"),
        (
            {"mask": torch.eye(3, 12)[[0, 1, 1]] * torch.tensor([[1], [1], [0]])},
            "mask row 2 has no valid text",
        ),
        ({"x_mask": torch.ones(3, 5, dtype=torch.bool)}, r"x_mask is .*\[3, 5\], expected bool \[3, 2\]"),
        ({"x_mask": torch.ones(3, 2)}, r"x_mask is torch.float32 \[3, 2\], expected bool"),
    ],
)
def test_input_errors_name_value_and_constraint(tiny, inputs, change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**{**arguments(inputs, "textmask"), **change})
