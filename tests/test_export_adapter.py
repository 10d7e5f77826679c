"""Adapter files in every dialect: read as diffusers reads them, or refused with one clear error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from safetensors.torch import save_file
from torch import Tensor

from vpo_engine.exporting.adapter import Adapter, find_adapter, read_adapter
from vpo_engine.exporting.check import attached, sides
from vpo_engine.models.lora import inject_adapter
from vpo_engine.models.wan.names import original_name
from vpo_engine.policy_source import holds_adapter

RANK, ALPHA = 3, 7.0
LAYERS = [
    *(f"blocks.{block}.{part}" for block in (0, 1) for part in (
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
        "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2",
    )),
]  # fmt: skip
Write = Callable[[Path, dict[str, tuple[Tensor, Tensor]]], Path]


def network() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=40,
        num_layers=2,
        rope_max_seq_len=64,
    )


@pytest.fixture(scope="module")
def layers() -> dict[str, tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    made, found = network(), {}
    for name in LAYERS:
        linear: Any = made.get_submodule(name)
        found[name] = (
            torch.randn(RANK, linear.in_features, generator=random),
            torch.randn(linear.out_features, RANK, generator=random),
        )
    return found


def write_diffusers(folder: Path, layers: dict[str, tuple[Tensor, Tensor]]) -> Path:
    """As diffusers' training scripts write it, with alpha in the metadata."""
    fields = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.target_modules": LAYERS}
    tensors = {
        f"transformer.{n}.lora_{s}.weight": w
        for n, both in layers.items()
        for s, w in zip("AB", both, strict=True)
    }
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(fields)})
    return file


def write_original(folder: Path, layers: dict[str, tuple[Tensor, Tensor]]) -> Path:
    """As trainers for ComfyUI write it, with alpha beside each layer."""
    tensors = {}
    for name, (down, up) in layers.items():
        stem = f"diffusion_model.{original_name(name)}"
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(ALPHA),
        }
    save_file(tensors, folder / "comfy_lora.safetensors")
    return folder / "comfy_lora.safetensors"


def write_flat(folder: Path, layers: dict[str, tuple[Tensor, Tensor]]) -> Path:
    """As musubi-tuner writes it."""
    tensors = {}
    for name, (down, up) in layers.items():
        stem = f"lora_unet_{str(original_name(name)).replace('.', '_')}"
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(ALPHA),
        }
    save_file(tensors, folder / "musubi_lora.safetensors")
    return folder / "musubi_lora.safetensors"


def write_peft(folder: Path, layers: dict[str, tuple[Tensor, Tensor]], **fields: Any) -> Path:
    tensors = {
        f"base_model.model.{n}.lora_{s}.weight": w
        for n, both in layers.items()
        for s, w in zip("AB", both, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA} | fields))
    return folder / "adapter_model.safetensors"


def read(path: Path) -> Adapter:
    file = find_adapter(path)
    assert file is not None
    with torch.device("meta"):
        bare = network()
    return read_adapter(file, bare, original_name, "Wan 2.1")


@pytest.mark.parametrize("write", [write_diffusers, write_original, write_flat])
def test_every_dialect_is_read_as_diffusers_reads_it(
    tmp_path: Path, layers: dict[str, tuple[Tensor, Tensor]], write: Write
) -> None:
    """The product B @ A of every layer, scaled by alpha / rank, is that of the adapter that diffusers attaches."""
    file = write(tmp_path, layers)
    own = read(tmp_path)
    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(file), return_lora_metadata=True)
    other = network()
    WanLoraLoaderMixin.load_lora_into_transformer(state, other, metadata=metadata)
    theirs = attached(other)
    assert own.layers.keys() == theirs.layers.keys() == set(LAYERS)
    for name, (down, up) in own.layers.items():
        expected = theirs.layers[name]
        torch.testing.assert_close(up @ down, expected[1] @ expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            up @ down, ALPHA / RANK * layers[name][1] @ layers[name][0], rtol=1e-5, atol=1e-5
        )


def test_pefts_scale_stands_in_its_configuration(
    tmp_path: Path, layers: dict[str, tuple[Tensor, Tensor]]
) -> None:
    write_peft(tmp_path, layers, alpha_pattern={r"blocks\.1\.attn1\.to_q": 12.0})
    scales = {name: float((up / layers[name][1]).mean()) for name, (_, up) in read(tmp_path).layers.items()}
    assert scales.pop("blocks.1.attn1.to_q") == pytest.approx(4.0)
    assert all(scale == pytest.approx(ALPHA / RANK) for scale in scales.values())
    write_peft(tmp_path, layers, use_rslora=True)
    scale = float((read(tmp_path).layers["blocks.0.ffn.net.2"][1] / layers["blocks.0.ffn.net.2"][1]).mean())
    assert scale == pytest.approx(ALPHA / RANK**0.5)


def test_without_any_alpha_the_scale_is_one(tmp_path: Path, layers: dict[str, tuple[Tensor, Tensor]]) -> None:
    name = "blocks.0.attn2.to_k"
    down, up = layers[name]
    tensors = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    save_file(tensors, tmp_path / "a.safetensors")
    found = read(tmp_path / "a.safetensors")
    assert list(found.layers) == [name]
    assert torch.equal(found.layers[name][1], up)


def test_ranks_may_differ(tmp_path: Path, layers: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The network's adapter has the largest rank; it computes the same, and starts from nothing where there is less."""
    names = ["blocks.0.attn1.to_q", "blocks.1.ffn.net.2"]
    down, up = layers[names[1]]
    cut = {names[0]: layers[names[0]], names[1]: (down[:1].contiguous(), up[:, :1].contiguous())}
    write_original(tmp_path, cut)
    found = read(tmp_path)
    made = network()
    settings = found.settings()
    inject_adapter(made, settings, settings.targets, seed=0)  # type: ignore[arg-type]
    found.put_into(made)
    for name, (down, up) in attached(made).layers.items():
        torch.testing.assert_close(up @ down, found.layers[name][1] @ found.layers[name][0])
        assert down.shape[0] == RANK
    assert len(sides(found)) == 4


def _renamed(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: _renamed(t, "transformer.blocks", "transformer.transformer_blocks"),
            "does not fit Wan 2.1: none of its tensors belongs to a linear layer of it, for example transformer.tr",
        ),
        (
            lambda t: _renamed(t, "transformer.blocks.1.", "transformer.blocks.2."),
            "does not fit Wan 2.1: 20 of its 40 tensors belong to no linear layer of it",
        ),
        (lambda t: _renamed(t, "transformer.", "unet."), "the nearest name is transformer.blocks.0.attn1"),
        (lambda t: _renamed(t, ".lora_A.", ".lora_E."), "belong to no linear layer of it"),
        (lambda t: {"blocks.0.attn1.to_q.weight": torch.ones(2, 2)}, "is no low-rank adapter: it holds blocks.0.attn1"),
        (lambda t: {}, "holds no tensors"),
        (
            lambda t: {name: tensor for name, tensor in t.items() if "0.attn1.to_q.lora_B" not in name},
            "blocks.0.attn1.to_q has no lora_B (lora_up), so the file is incomplete",
        ),
        (
            lambda t: t | {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(RANK, 99)},
            "maps 99 to 24 values through [3, 99] and [24, 3], but the layer of this Wan 2.1 maps 24 to 24",
        ),
        (
            lambda t: t | {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.full((RANK, 24), torch.nan)},
            "blocks.0.attn1.to_q has values that are not finite",
        ),
    ],
)  # fmt: skip
def test_what_is_no_adapter_of_the_model_is_refused(
    tmp_path: Path,
    layers: dict[str, tuple[Tensor, Tensor]],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    words: str,
) -> None:
    tensors = {
        f"transformer.{n}.lora_{s}.weight": w
        for n, both in layers.items()
        for s, w in zip("AB", both, strict=True)
    }
    file = tmp_path / "lora.safetensors"
    save_file(change(tensors), file)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read(tmp_path)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_not_whole(
    tmp_path: Path, layers: dict[str, tuple[Tensor, Tensor]]
) -> None:
    file = write_peft(tmp_path, layers)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"whose scale stands in adapter_config\.json, and there is none beside it"
    ):
        read(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged, incomplete or no safetensors file"):
        read(file)
    file.unlink()
    for name in ("one_lora.safetensors", "two_lora.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ValueError, match="holds several adapters"):
        find_adapter(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(a+)+b", "repeats too much to be matched"),
        ("(.*.*.*.*)x", "repeats too much to be matched"),
        ("(", "is no regular expression"),
    ],
)
def test_patterns_that_would_be_matched_for_ever(
    tmp_path: Path, layers: dict[str, tuple[Tensor, Tensor]], pattern: str, words: str
) -> None:
    write_peft(tmp_path, layers)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"alpha_pattern": {pattern: 8}}))
    with pytest.raises(ValueError, match=words):
        read(tmp_path)


def test_a_pattern_may_be_the_end_of_a_name_and_the_first_that_fits_counts(
    tmp_path: Path, layers: dict[str, tuple[Tensor, Tensor]]
) -> None:
    """As PEFT reads alpha_pattern."""
    write_peft(tmp_path, layers, alpha_pattern={r"attn1\.to_q": 12.0, "to_q": 24.0})
    scales = {name: float((up / layers[name][1]).mean()) for name, (_, up) in read(tmp_path).layers.items()}
    expected = dict.fromkeys(LAYERS, ALPHA / RANK)
    for block in (0, 1):
        for part, alpha in (("attn1", 12.0), ("attn2", 24.0)):
            expected[f"blocks.{block}.{part}.to_q"] = alpha / RANK
    assert scales == pytest.approx(expected)


@pytest.mark.parametrize("name", ["Style_LoRA.safetensors", "My_Adapter.safetensors"])
def test_a_folder_holds_an_adapter_however_its_file_is_written(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / name)
    assert find_adapter(tmp_path) == tmp_path / name
    assert holds_adapter(tmp_path)
