"""The VAE against the public code's outputs, its published layout, and its use in training."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vpo_engine.models.opensora.checkpoint import save_pretrained_layout
from vpo_engine.models.opensora.vae import OpenSoraVAE, to_uint8
from vpo_engine.models.opensora.vae_temporal import Posterior

DATA = Path(__file__).parent.parent / "data" / "opensora"
TINY = json.loads((DATA / "vae_tiny.json").read_text())
CASES = list(TINY["cases"])
CONFIG = {
    "spatial_config": TINY["spatial_config"],
    "temporal_config": TINY["temporal_config"],
    "micro_frame_size": 17,
    "micro_batch_size": 4,
    "scale": TINY["constants"]["scale"],
    "shift": TINY["constants"]["shift"],
}
OTHER = {
    "spatial_config": {
        "block_out_channels": [8, 8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "latent_channels": 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "temporal_config": {
        "in_out_channels": 3,
        "latent_embed_dim": 5,
        "embed_dim": 6,
        "filters": 8,
        "num_res_blocks": 1,
        "channel_multipliers": [1, 2],
        "temporal_downsample": [True],
        "num_groups": 4,
    },
    "micro_frame_size": 5,
    "micro_batch_size": None,
    "scale": [2.0] * 6,
    "shift": [0.5] * 6,
}
FP32 = 1e-5  # max abs, as stated with the recorded outputs


@pytest.fixture(scope="module")
def tiny():
    vae = OpenSoraVAE.from_config(CONFIG).eval()
    vae.load_state_dict(load_file(DATA / "vae_tiny_weights.safetensors"))
    return vae


@pytest.fixture(scope="module")
def recorded():
    inputs, outputs = (load_file(DATA / f"vae_tiny_{name}.safetensors") for name in ("inputs", "outputs"))
    return {**inputs, **outputs}


def noise_of(recorded, case):
    return iter([recorded[name] for name in sorted(recorded) if name.startswith(f"{case}.noise.")])


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=FP32)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_encode_with_the_recorded_noise(tiny, recorded, case):
    noise = noise_of(recorded, case)
    assert_equal(tiny.encode(recorded[f"{case}.x"], noise=noise), recorded[f"{case}.z_sample"])
    assert next(noise, None) is None, "every recorded draw is used"


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_encode_without_sampling(tiny, recorded, case):
    assert_equal(tiny.encode(recorded[f"{case}.x"], sample=False), recorded[f"{case}.z_mode"])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_posteriors_of_both_parts(tiny, recorded, case):
    x = recorded[f"{case}.x"]
    spatial = tiny.spatial_posterior(x)
    for name, value in (("mean", spatial.mean), ("logvar", spatial.logvar)):
        assert value.shape[:3] == (x.shape[0], 4, x.shape[2])
        assert_equal(value.transpose(1, 2).flatten(0, 1), recorded[f"{case}.spatial_{name}"])
    temporal = tiny.temporal_posterior(recorded[f"{case}.x_z"])
    assert_equal(temporal.mean, recorded[f"{case}.temporal_mean"])
    assert_equal(temporal.logvar, recorded[f"{case}.temporal_logvar"])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_decode_part_by_part(tiny, recorded, case):
    z, frames = recorded[f"{case}.z_mode"], TINY["cases"][case]["x"][2]
    assert_equal(tiny.decode_temporal(z * tiny.scale + tiny.shift, frames), recorded[f"{case}.x_z_dec"])
    assert_equal(tiny.decode_spatial(recorded[f"{case}.x_z_dec"]), recorded[f"{case}.decoded"])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_decode_end_to_end(tiny, recorded, case):
    """In float64 within the stated tolerance: the recorded float32 video is itself up to 9.0e-6 off.

    A float32 run of both parts adds as much rounding of its own (f34: 1.1e-5 at values up to 4.2), so
    end to end it is held in the norm.
    """
    z, facts = recorded[f"{case}.z_mode"], TINY["cases"][case]
    expected = recorded[f"{case}.decoded"].double()
    exact = copy.deepcopy(tiny).double().decode(z, facts["x"][2])
    assert list(exact.shape) == facts["decoded"]
    assert_equal(exact, expected)
    assert float((tiny.decode(z, facts["x"][2]) - exact).norm() / exact.norm()) < 5e-6


@pytest.mark.parametrize("case", CASES)
def test_latent_size(tiny, case):
    facts = TINY["cases"][case]
    assert list(tiny.latent_size(*facts["x"][2:])) == facts["get_latent_size"] == facts["z"][2:]


@torch.no_grad()
def test_chunks_know_nothing_of_each_other(tiny, recorded):
    x = recorded["f34.x"]
    other = torch.cat([x[:, :, :17], -x[:, :, 17:]], dim=2)
    a, b = (tiny.encode(video, sample=False) for video in (x, other))
    torch.testing.assert_close(a[:, :, :5], b[:, :, :5], rtol=0, atol=1e-6)
    assert float((a[:, :, 5:] - b[:, :, 5:]).abs().max()) > 1e-2
    first = tiny.decode(a[:, :, :5], 17)
    torch.testing.assert_close(tiny.decode(a, 34)[:, :, :17], first, rtol=0, atol=FP32)


@torch.no_grad()
def test_time_is_causal_within_a_chunk(tiny):
    """A later latent changes no earlier frame: GroupNorm aside, which sees the whole chunk."""
    conv = tiny.temporal_vae.decoder.conv1
    z = torch.randn(1, 4, 5, 2, 3)
    changed = z.clone()
    changed[:, :, 3:] += 1
    a, b = conv(z), conv(changed)
    assert torch.equal(a[:, :, :3], b[:, :, :3])
    assert not torch.equal(a[:, :, 3], b[:, :, 3])


@torch.no_grad()
def test_spatial_micro_batches_do_not_change_the_result(recorded):
    vae = OpenSoraVAE.from_config({**CONFIG, "micro_batch_size": None}).eval()
    vae.load_state_dict(load_file(DATA / "vae_tiny_weights.safetensors"))
    assert_equal(vae.encode(recorded["f20.x"], sample=False), recorded["f20.z_mode"])
    assert_equal(vae.decode(recorded["f20.z_mode"], 20), recorded["f20.decoded"])


@torch.no_grad()
def test_the_generator_decides_the_draws(tiny, recorded):
    x = recorded["f20.x"]
    once, again, other = (tiny.encode(x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    shapes = TINY["cases"]["f20"]["noise_calls"]
    generator = torch.Generator().manual_seed(1)
    noise = iter([torch.randn(shape, generator=generator) for shape in shapes])
    assert torch.equal(tiny.encode(x, noise=noise), once), "one draw per published call, in its order"


def test_full_size_has_the_published_keys_shapes_counts_and_file_size():
    with torch.device("meta"):
        vae = OpenSoraVAE.from_config(json.loads((DATA / "vae_v1_2_config.json").read_text()))
    state = {name: [list(value.shape), str(value.dtype)[6:]] for name, value in vae.state_dict().items()}
    assert state == json.loads((DATA / "vae_v1_2_keys.json").read_text())
    counts = json.loads((DATA / "param_counts.json").read_text())["vae_v1_2"]
    size = {name: sum(p.numel() for p in module.parameters()) for name, module in vae.named_children()}
    assert size == {"spatial_vae": counts["spatial"], "temporal_vae": counts["temporal"]}
    assert sum(p.numel() for p in vae.temporal_vae.encoder.parameters()) == counts["temporal_encoder"]
    assert sum(p.numel() for p in vae.temporal_vae.decoder.parameters()) == counts["temporal_decoder"]
    assert len(state) == counts["state_dict_tensors"]
    assert sum(value.numel() for value in vae.state_dict().values()) == counts["elements"]
    assert safetensors_bytes(state) == counts["published"]["size_bytes"]
    assert (vae.spatial_factor, vae.temporal_factor) == (8, 4)
    assert vae.scale.is_meta
    assert vae.spatial_scaling == 0.18215


def safetensors_bytes(state):
    """Size of a float32 safetensors file: 8 bytes, the header padded to a multiple of 8, the data."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(state):
        start, end = end, end + 4 * math.prod(state[name][0])
        header[name] = {"dtype": "F32", "shape": state[name][0], "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end


@torch.no_grad()
def test_factors_and_channels_follow_from_the_config():
    vae = OpenSoraVAE.from_config(OTHER).eval()
    assert (vae.spatial_factor, vae.temporal_factor, vae.latent_channels) == (4, 2, 6)
    x = torch.randn(2, 3, 12, 8, 12).clamp(-1, 1)
    z = vae.encode(x)
    assert z.shape == (2, 6, *vae.latent_size(12, 8, 12)) == (2, 6, 3 + 3 + 1, 2, 3)
    assert vae.decode(z, 12).shape == x.shape


def test_a_config_that_is_given_back_builds_the_same_model(tmp_path):
    vae = OpenSoraVAE.from_config(OTHER)
    assert vae.config == OTHER
    save_pretrained_layout(vae.state_dict(), vae.config, tmp_path)
    loaded = OpenSoraVAE.from_pretrained(tmp_path)
    assert loaded.config == OTHER
    for name, value in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_gradients_reach_every_weight_and_the_input():
    torch.manual_seed(0)
    vae = OpenSoraVAE.from_config(OTHER)
    x = torch.randn(1, 3, 7, 8, 8, requires_grad=True)
    vae.decode(vae.encode(x), 7).square().mean().backward()
    still = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert not still
    assert x.grad.abs().any()


def test_posteriors_carry_gradients():
    vae = OpenSoraVAE.from_config(OTHER)
    x = torch.randn(1, 3, 5, 8, 8)
    spatial = vae.spatial_posterior(x)
    temporal = vae.temporal_posterior(spatial.mean * vae.spatial_scaling)
    kl = sum((p.mean.square() + p.logvar.exp() - p.logvar).mean() for p in (spatial, temporal))
    kl.backward()
    encoders = (vae.spatial_vae.module.encoder, vae.temporal_vae.encoder)
    assert all(p.grad is not None for encoder in encoders for p in encoder.parameters())


def test_a_step_of_training_lowers_the_loss():
    torch.manual_seed(0)
    vae = OpenSoraVAE.from_config(OTHER)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    x = torch.rand(2, 3, 5, 8, 8) * 2 - 1
    losses = []
    for _ in range(12):
        loss = (vae.decode(vae.encode(x, sample=False), 5) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
def test_bfloat16_and_autocast_stay_near_float32(tiny, recorded):
    x, z, expected = recorded["f17.x"], recorded["f17.z_mode"], recorded["f17.decoded"]
    half = OpenSoraVAE.from_config(CONFIG).eval()
    half.load_state_dict(tiny.state_dict())
    half.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tiny.encode(x, sample=False), tiny.decode(z, 17)
    plain = half.encode(x, sample=False), half.decode(z, 17)
    assert {value.dtype for value in plain} == {torch.bfloat16}
    for latents, video in (mixed, plain):
        # bfloat16 rounds to 2^-9 relative, through some forty layers
        assert float((video.float() - expected).norm() / expected.norm()) < 5e-2
        assert float((latents.float() - z).norm() / z.norm()) < 5e-2


def test_posterior_clamps_the_log_variance():
    moments = torch.tensor([1.0, -100.0]).view(1, 2, 1, 1, 1)
    posterior = Posterior.from_moments(moments)
    assert posterior.logvar.item() == -30.0
    assert posterior.sample(torch.full((1, 1, 1, 1, 1), 2.0)).item() == pytest.approx(1 + 2 * math.exp(-15))


def test_uint8_clamps_rounds_and_puts_channels_last():
    values = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0, 3 / 127.5 - 1, 3.49 / 127.5 - 1, 3.51 / 127.5 - 1])
    video = values.view(1, 1, 8, 1, 1).repeat(1, 3, 1, 1, 1)
    video[:, 1] = -1
    pixels = to_uint8(video)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (1, 8, 1, 1, 3)
    assert pixels.is_contiguous()
    assert pixels[0, :, 0, 0, 0].tolist() == [0, 0, 128, 255, 255, 3, 3, 4]
    assert pixels[..., 1].max() == 0


def test_uint8_leaves_its_input_alone():
    video = torch.full((1, 3, 1, 2, 2), 5.0)
    to_uint8(video)
    assert torch.equal(video, torch.full((1, 3, 1, 2, 2), 5.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_uint8_refuses_values_that_are_not_finite(bad):
    video = torch.zeros(1, 3, 2, 2, 2)
    video[0, 0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="1 of 24 values that are not finite; check the latents and the VAE"):
        to_uint8(video)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": [1.0] * 3}, "scale has 3 values for embed_dim=4 latent channels; give one per channel"),
        ({"micro_frame_size": 0}, "sets micro_frame_size to 0, expected a whole number of at least 1"),
        (
            {"micro_batch_size": 0},
            "sets micro_batch_size to 0, expected a whole number of at least 1 or null",
        ),
        ({"scale": [1.0, 1.0, 0.0, 1.0]}, "sets scale to .*, expected a list, each a number above 0"),
        ({"vae_2d": []}, "sets vae_2d to .*, expected an object"),
        (
            {"spatial_config": {"in_channels": "3"}},
            'spatial_config sets in_channels to "3", expected a whole number',
        ),
        ({"temporal_config": {"filters": 24}}, "does not describe a VAE that can be built"),
        ({"temporal_config": {"temporal_downsample": [1, 1, 0]}}, "temporal_config sets temporal_downsample"),
        ({"temporal_config": {"in_out_channels": 8}}, r"makes 4 latent channels .* in_out_channels=8"),
        ({"temporal_config": {"filter": 8}}, r"unknown keys \['filter'\]; known: in_out_channels"),
        ({"temporal_config": {"temporal_downsample": [True]}}, r"1 entries for 4 channel_multipliers; .* 3"),
    ],
)
def test_configs_that_cannot_be_built(change, message):
    with pytest.raises(ValueError, match=message):
        OpenSoraVAE.from_config({**CONFIG, **change})


def test_configs_that_name_no_known_architecture():
    published = json.loads((DATA / "vae_v1_2_config.json").read_text())
    with pytest.raises(
        ValueError, match=r"from_pretrained is 'a/b', .*known: PixArt-alpha/.*'spatial_config'"
    ):
        OpenSoraVAE.from_config({**published, "vae_2d": {"from_pretrained": "a/b"}})
    with pytest.raises(ValueError, match=r"vae_temporal\.type is 'X', .*VAE_Temporal_SD.*'temporal_config'"):
        OpenSoraVAE.from_config({**published, "vae_temporal": {"type": "X"}})
    with pytest.raises(ValueError, match=r"lacks \['scale', 'shift'\]"):
        OpenSoraVAE.from_config({})


def test_inputs_of_a_wrong_shape_are_named(tiny):
    with pytest.raises(ValueError, match=r"shape \(1, 4, 2, 16, 16\); expected \[B, 3, F, H, W\]"):
        tiny.encode(torch.zeros(1, 4, 2, 16, 16))
    with pytest.raises(ValueError, match=r"shape \(1, 4, 9, 2, 2\); 34 frames need \[B, 4, 10, h, w\]"):
        tiny.decode(torch.zeros(1, 4, 9, 2, 2), 34)
    with pytest.raises(ValueError, match=r"4 x 16 pixels are less than one latent cell; .* at least 8"):
        tiny.latent_size(1, 4, 16)
    with pytest.raises(ValueError, match="num_frames is 0"):
        tiny.latent_size(0, 16, 16)
    with pytest.raises(ValueError, match=r"recorded noise has shape \(1,\); expected \(1, 4, 2, 2\)"):
        tiny.encode(torch.zeros(1, 3, 1, 16, 16), noise=iter([torch.zeros(1)]))
