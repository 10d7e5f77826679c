"""STDiT3 and its text: packed without padding, laid out once, read on the host without waiting for a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vpo_kernels.attention import TextPlan, attention, plan_text

from vpo_engine.build import build_model
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.opensora import blocks, stdit3
from vpo_engine.models.opensora.blocks import Backed, Backends
from vpo_engine.models.opensora.rectified_flow import RectifiedFlow, guided_velocity
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.protocols import TextEmbedding

DATA = Path(__file__).parents[1] / "data" / "opensora"
CONFIG = json.loads((DATA / "stdit3_tiny.json").read_text())["config"]
LENGTH = 12
GEOMETRY = {"fps": 24.0, "height": 32, "width": 32}


def network(device: str = "cpu") -> STDiT3:
    torch.manual_seed(0)
    with torch.device(device):
        return STDiT3.from_config(CONFIG).requires_grad_(False)


def arguments(rows: int, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {
        "x": torch.randn(rows, 4, 2, 4, 4, generator=generator),
        "timestep": torch.rand(rows, generator=generator) * 1000,
        "y": torch.randn(rows, 1, LENGTH, CONFIG["caption_channels"], generator=generator),
    }
    return {name: value.to(device) for name, value in values.items()}


def mask_of(*lengths: int) -> Tensor:
    return torch.arange(LENGTH) < torch.tensor(lengths)[:, None]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[TextPlan]:
    """The plans that networks make from here on."""
    made: list[TextPlan] = []

    def recording(*given: Any, **named: Any) -> TextPlan:
        made.append(plan_text(*given, **named))
        return made[-1]

    monkeypatch.setattr(stdit3, "plan_text", recording)
    return made


@pytest.mark.parametrize(
    ("lengths", "way"),
    [((5, 5, 5), "dense"), ((8, 7, 8), "masked"), ((4, 12, 12), "masked"), ((1, 2, 9), "runs")],
)
def test_rows_equal_their_captions_alone_however_text_is_attended_to(
    plans: list[TextPlan], lengths: tuple[int, ...], way: str
) -> None:
    tiny, given = network(), arguments(3)
    together = tiny(**given, mask=mask_of(*lengths), **GEOMETRY)
    assert plans[0].way == way
    assert plans[0].tokens == sum(lengths)
    for row, length in enumerate(lengths):
        alone = {name: value[row : row + 1] for name, value in given.items()}
        alone["y"] = alone["y"][:, :, :length]
        assert torch.allclose(tiny(**alone, **GEOMETRY), together[row : row + 1], rtol=0, atol=1e-5)


def test_only_tokens_that_count_are_projected() -> None:
    tiny = network()
    rows: list[int] = []
    embedder = tiny.y_embedder
    keys = tiny.spatial_blocks[0].cross_attn.kv_linear
    for module in (embedder, keys):
        module.register_forward_hook(lambda _module, given, _out: rows.append(given[0].shape[0]))
    tiny(**arguments(4), mask=mask_of(3, 8), **GEOMETRY)
    assert rows == [22, 22]  # the mask is tiled over four rows


def sample(tiny: STDiT3, text: TextEmbedding, steps: int, device: str) -> Tensor:
    noise = torch.zeros(len(text), 4, 2, 4, 4, device=device)

    def predict(z: Tensor, t: Tensor) -> Tensor:
        null = tiny.y_embedder.y_embedding
        return guided_velocity(tiny, z, t, text.embeddings, text.mask, null, 7.0, **GEOMETRY)

    times, lengths = RectifiedFlow(use_timestep_transform=False).sampling_timesteps(steps, 32, 32, 17)
    z = noise
    for time, length in zip(times.tolist(), lengths.tolist(), strict=True):
        z = z + predict(z, torch.full((len(z),), time, device=device)) * length
    return z


@pytest.mark.parametrize("lengths", [(5, 5), (7, 8), (1, 9)])
def test_a_sampling_loop_never_reads_from_the_device(plans: list[TextPlan], lengths: tuple[int, ...]) -> None:
    """Tensors on the meta device hold no values: whatever waited for one would raise."""
    text = TextEmbedding(torch.zeros(2, LENGTH, CONFIG["caption_channels"]), mask_of(*lengths)).to("meta")
    assert text.embeddings.device.type == "meta"
    assert text.mask.device.type == "cpu"
    out = sample(network("meta"), text, steps=3, device="meta")
    assert out.device.type == "meta"
    assert len(plans) == 1  # laid out once for all steps
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        network("meta")(**arguments(2, "meta"), mask=text.mask.to("meta"), **GEOMETRY)


def test_the_layout_goes_by_the_masks_values(plans: list[TextPlan]) -> None:
    tiny, given = network(), arguments(2)
    first = tiny(**given, mask=mask_of(3, 8), **GEOMETRY)
    assert torch.equal(tiny(**given, mask=mask_of(3, 8).clone(), **GEOMETRY), first)
    assert len(plans) == 1
    mask = mask_of(3, 8)
    mask[0] = mask[0].roll(1)  # as long as before, other tokens
    assert not torch.equal(tiny(**given, mask=mask, **GEOMETRY), first)
    for length in range(1, LENGTH):
        tiny(**given, mask=mask_of(length, LENGTH), **GEOMETRY)
    assert len(tiny._texts) <= 4
    assert torch.equal(tiny(**given, mask=mask_of(3, 8), **GEOMETRY), first)


def test_a_layout_from_inference_mode_still_trains() -> None:
    tiny, given = network().requires_grad_(True), arguments(2)
    with torch.inference_mode():
        tiny(**given, mask=mask_of(3, 8), **GEOMETRY)
    tiny(**given, mask=mask_of(3, 8), **GEOMETRY).square().mean().backward()
    assert tiny.y_embedder.y_proj.fc1.weight.grad is not None


def test_blocks_compile_into_one_graph_each() -> None:
    tiny, given = network(), arguments(2)
    expected = tiny(**given, mask=mask_of(7, 8), **GEOMETRY)
    for block in (*tiny.spatial_blocks, *tiny.temporal_blocks):
        block.compile(fullgraph=True, backend="eager")
    assert torch.equal(tiny(**given, mask=mask_of(7, 8), **GEOMETRY), expected)


def test_text_embeddings_keep_their_mask_on_the_host() -> None:
    text = TextEmbedding(torch.arange(6.0).view(3, 2, 1), torch.tensor([[1, 0], [1, 1], [1, 0]]).bool())
    for index in (slice(1, 3), torch.tensor([2, 0]), torch.tensor([True, False, True])):
        part = text[index]
        assert torch.equal(part.embeddings, text.embeddings[index])
        assert torch.equal(part.mask, text.mask[index])
    assert text.repeat_interleave(2).mask.shape == (6, 2)
    assert TextEmbedding.cat([text, text]).mask.shape == (6, 2)


# --- Backends ---


def test_a_choice_reaches_every_module_and_copies_keep_it() -> None:
    tiny = network()
    choice = tiny.choose_backends("sdpa", "reference", dtype=torch.float32)
    assert str(choice) == "attention: sdpa (as configured)"
    backed = [module for module in tiny.modules() if isinstance(module, Backed)]
    assert len(backed) == 1 + 4 * 4  # final layer; of each block: itself, its attention and two norms
    assert {module.backends for module in backed} == {Backends("sdpa", "reference")}
    assert STDiT3.from_config(CONFIG).final_layer.backends == Backends()


@pytest.mark.parametrize(
    ("attention", "fused_ops", "message"),
    [
        ("flash2", "auto", "attention='flash2' cannot run here: it needs a CUDA"),
        ("auto", "triton", "on a CUDA device"),
    ],
)
def test_what_cannot_run_here_is_refused_before_the_first_step(
    attention: Any, fused_ops: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        network().choose_backends(attention, fused_ops, dtype=torch.bfloat16)


def test_a_run_says_its_attention_and_follows_its_settings() -> None:
    said: list[str] = []
    config = load_config(None, ["model.fused_ops=reference"])
    model = build_model(config, Processes.start("cpu"), said.append)
    assert said == ["attention: sdpa (cpu; flash2, flash3, flash4, xformers need a CUDA device)"]
    assert model.network.final_layer.backends == Backends("sdpa", "reference")
    with pytest.raises(ValueError, match=r"model\.attention=flash must be one of auto, sdpa, flash2, flash3"):
        load_config(None, ["model.attention=flash"])
    with pytest.raises(ValueError, match="attention='flash2' cannot run here"):
        build_model(load_config(None, ["model.attention=flash2"]), Processes.start("cpu"), said.append)


def test_the_names_and_the_signature_are_the_public_ones() -> None:
    """As in the public code sizes may be given by position, and force_drop_ids puts null captions into their places."""
    from vpo_engine.models.opensora import OpenSoraVAE, STDiT3

    assert (STDiT3.__name__, OpenSoraVAE.__name__) == ("STDiT3", "OpenSoraVAE")
    network = STDiT3.from_config(CONFIG).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    x, t = torch.randn(2, 4, 2, 4, 4), torch.tensor([100.0, 700.0])
    length, channels = network.y_embedder.y_embedding.shape
    y = torch.randn(2, 1, length, channels)
    sizes = (24.0, 32.0, 32.0)
    whole = network(x, t, y, None, None, *sizes)
    assert torch.equal(whole, network(x, t, y, fps=24.0, height=32.0, width=32.0))
    dropped = network(x, t, y, fps=24.0, height=32.0, width=32.0, force_drop_ids=torch.tensor([0, 1]))
    null = torch.stack([y[0], network.y_embedder.y_embedding[None]])
    assert torch.equal(dropped, network(x, t, null, None, None, *sizes))
    assert not torch.equal(dropped, whole)
    with pytest.raises(
        ValueError, match=r"fps=None, height=32\.0, width=32\.0: STDiT3 is conditioned on all three"
    ):
        network(x, t, y, height=32.0, width=32.0)
    with pytest.raises(
        ValueError, match=r"force_drop_ids is \[3\], expected a number for each caption: \[2\]"
    ):
        network(x, t, y, fps=24.0, height=32.0, width=32.0, force_drop_ids=torch.zeros(3))


def test_the_kernel_for_short_sequences_serves_blocks_over_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latents have 2 frames with 4 patches each."""
    lengths: list[int] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, _: str) -> Tensor:
        lengths.append(q.shape[1])
        return attention(q, k, v)

    monkeypatch.setattr(blocks, "uses_triton", lambda *_: True)
    monkeypatch.setattr(blocks, "temporal_attention", kernel)
    network()(**arguments(2), **GEOMETRY)
    assert lengths == [2, 2]
