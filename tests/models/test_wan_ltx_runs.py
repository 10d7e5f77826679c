"""Wan and LTX-Video in the engine: margins right after a refresh, whole runs, resume, what a rollout computes once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_case import noise_for
from flow_folders import PROMPTS, ltx_folder, wan_folder
from power_cut import copy_cut
from safetensors.torch import load_file
from torch import Tensor, nn
from vpo_kernels import paired_dpo_loss

from vpo_engine import train as entry
from vpo_engine.build import build_model
from vpo_engine.config import Config, MemoryConfig
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.model_values import SamplerSettings
from vpo_engine.reference.store import build_reference
from vpo_engine.runs.log import read_metrics

WRITE: dict[str, Callable[..., Path]] = {"wan": wan_folder, "ltx": ltx_folder}
KINDS = list(WRITE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    (root / "train.txt").write_text(
        "".join(f"{prompt} {number}\n" for number in "abcd" for prompt in PROMPTS)
    )
    (root / "held_out.txt").write_text("a white horse\na grey horse\n")
    return {kind: write(root / kind) for kind, write in WRITE.items()} | {"root": root}


def overrides(folders: dict[str, Path], kind: str, run: Path, *more: str) -> list[str]:
    root = folders["root"]
    return [
        f"model.kind={kind}",
        f"model.policy={folders[kind]}",
        "model.height=32",
        "model.width=64",
        "model.num_frames=9",
        f"prompts.train={root / 'train.txt'}",
        f"prompts.held_out={root / 'held_out.txt'}",
        "reward.kind=tiny_reward:Brightness",
        "steps=3",
        "pairs_per_step=1",
        "rollout.candidates=2",
        "rollout.steps=3",
        "rollout.guidance=3",
        "optimizer.warmup_steps=0",
        "optimizer.lr=1e-3",
        "reference.refresh_every=2",
        "evaluation.every=null",
        "evaluation.prompts=1",
        "evaluation.samples_per_prompt=1",
        "checkpoint.every=2",
        "checkpoint.keep=5",
        f"run_dir={run}",
        *more,
    ]


LORA = ("model.lora.rank=4", "optimizer.lr=1e-2")
BF16 = ("model.dtype=bfloat16",)
CASES = {
    "copy": (),
    "copy, autocast": BF16,
    "bf16, autocast": (*BF16, "reference.storage=bf16"),
    "copy, masters": (*BF16, "memory.weights=fp32_master"),
    "bf16, masters": (*BF16, "memory.weights=fp32_master", "reference.storage=bf16"),
    "exact8, masters": (*BF16, "memory.weights=fp32_master", "reference.storage=exact8"),
    "exact8, stochastic": ("memory.weights=stochastic_rounding", "reference.storage=exact8"),
    "lora": (*LORA, "reference.storage=adapter"),
    "lora, autocast": (*LORA, *BF16, "reference.storage=adapter"),
    "lora, masters": (*LORA, *BF16, "reference.storage=adapter", "memory.weights=fp32_master"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_right_after_a_refresh_the_margin_is_exactly_zero(
    folders: dict[str, Path], tmp_path: Path, kind: str, case: str
) -> None:
    config = load_config(None, overrides(folders, kind, tmp_path / "run", *CASES[case]))
    model = build_model(config, Processes.start("cpu"), lambda text: None)
    reference = build_reference(config.reference.storage, model.network)
    move(model.network)
    model.prepare(PROMPTS)
    text, latents = model.embed(PROMPTS), noise_for(model, 4)
    t = torch.tensor([999.0, 640.5, 321.25, 7.0])
    ask = lambda network: model.predict(network, latents, t, text).detach()  # noqa: E731
    assert not torch.equal(ask(model.network), ask(reference))
    reference.refresh(model.network)
    policy, frozen = ask(model.network), ask(reference)
    out = paired_dpo_loss(*policy.chunk(2), *frozen.chunk(2), *noise_for(model, 4, 1).chunk(2), beta=5000.0)
    assert out.margin.tolist() == [0.0, 0.0]


@torch.no_grad()
def move(network: nn.Module) -> None:
    """Move the trained weights, each to a value that its type on the disk of a run can hold."""
    from vpo_engine.memory.rounding import is_kept_in_float32

    random = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        if parameter.requires_grad:
            moved = parameter + 0.05 * torch.randn(parameter.shape, generator=random).to(parameter)
            parameter.copy_(moved if is_kept_in_float32(parameter) else moved.bfloat16())


def state(run: Path, step: int) -> dict[str, Tensor]:
    root = run / "checkpoints" / f"step_{step:08d}"
    files = (*root.glob("*.safetensors"), *root.glob("policy/*.safetensors"))
    return {f"{file.stem}.{name}": value for file in files for name, value in load_file(file).items()}


def numbers(run: Path) -> list[dict[str, Any]]:
    """Rows of training steps without what a clock wrote."""
    rows = read_metrics(run / "metrics.jsonl")
    return [
        {key: value for key, value in row.items() if not key.startswith(("seconds/", "speed/"))}
        for row in rows
        if row["kind"] == "train"
    ]


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("wan", (*BF16, "memory.weights=fp32_master", "reference.storage=exact8")),
        ("wan", (*LORA, "reference.storage=adapter", "memory.activation_checkpointing=block")),
        ("ltx", ()),
    ],
    ids=["wan", "wan-lora", "ltx"],
)
def test_a_run_resumes_bit_for_bit_and_leaves_a_diffusers_policy(
    folders: dict[str, Path],
    tmp_path: Path,
    kind: str,
    more: tuple[str, ...],
    smallest: object,
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert entry.main(overrides(folders, kind, whole, *more)) == 0
    copy_cut(whole, cut, 2)
    assert entry.main(overrides(folders, kind, cut, *more, "checkpoint.resume=true")) == 0
    one, other = state(whole, 3), state(cut, 3)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    rows = numbers(whole)
    assert rows == numbers(cut)
    assert [row["margin"] == 0.0 for row in rows] == [True, False, True]  # a refresh after step 2
    if "lora" not in str(more):
        assert_diffusers_policy(folders[kind] / "transformer", whole / "checkpoints/step_00000003/policy")


def assert_diffusers_policy(before: Path, after: Path) -> None:
    """The policy is a folder like the one that it came from, with other weights."""
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    configs = [json.loads((folder / names[0]).read_text()) for folder in (before, after)]
    for config in configs:
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]
    old, new = (load_file(folder / names[1]) for folder in (before, after))
    assert old.keys() == new.keys()
    assert any(not torch.equal(value, new[name]) for name, value in old.items())


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_of_the_text_are_computed_once_for_each_prompt(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Two prompts and their negative ones, in one of three steps, however many candidates there are."""
    config: Config = load_config(None, overrides(folders, kind, tmp_path / "run"))
    model = build_model(config, Processes.start("cpu"), lambda text: None)
    model.prepare(PROMPTS)
    seen: list[int] = []
    block = next(module for name, module in model.network.named_modules() if name.endswith(".0.attn2"))
    block.to_k.register_forward_hook(lambda layer, given, made: seen.append(len(given[0])))
    model.sample(model.network, noise_for(model, 6), model.embed(PROMPTS), steps=3, guidance=3.0)
    assert seen == [2 * len(PROMPTS)]


def gradients(model: Any, text: Any, latents: Tensor, t: Tensor) -> list[Tensor]:
    trained = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    loss = model.predict(model.network, latents, t, text).square().mean()
    return list(torch.autograd.grad(loss, trained))


@pytest.mark.parametrize("kind", KINDS)
def test_activation_options_change_no_gradient(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Block checkpointing and offload to the bit; parts of an MLP but for the rounding of sums."""
    config = load_config(None, overrides(folders, kind, tmp_path / "run"))
    model = build_model(config, Processes.start("cpu"), lambda text: None)
    model.prepare(PROMPTS)
    text, latents, t = model.embed(PROMPTS), noise_for(model, 2), torch.tensor([900.0, 30.0])
    plain = gradients(model, text, latents, t)
    for options, tolerance in (
        ({"activation_checkpointing": "block", "offload_activations": True}, 0.0),
        ({"activation_checkpointing": "all_but_attention"}, 0.0),
        ({"activation_checkpointing": "block", "mlp_chunks": 3}, 1e-4),
    ):
        model.use_memory(MemoryConfig.model_validate(options))
        for found, expected in zip(gradients(model, text, latents, t), plain, strict=True):
            torch.testing.assert_close(
                found, expected, rtol=tolerance, atol=tolerance * float(expected.std())
            )


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_cache_reuses_what_later_blocks_added(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """A threshold that nothing meets changes no bit; one that all steps meet gives other latents."""
    config = load_config(None, overrides(folders, kind, tmp_path / "run"))
    model = build_model(config, Processes.start("cpu"), lambda text: None)
    model.prepare(PROMPTS)
    text, noise = model.embed(PROMPTS), noise_for(model, 4)
    exact = model.sample(model.network, noise, text, steps=4, guidance=3.0)

    def cached(threshold: float) -> Tensor:
        settings = SamplerSettings(4, 3.0, cache=threshold)
        return model.denoise(model.network, model.start(noise), text, settings).latents

    assert torch.equal(cached(1e-9), exact)
    assert not torch.equal(cached(1e9), exact)


@pytest.mark.parametrize("more", [(), (*LORA, "reference.storage=adapter")], ids=["all weights", "adapter"])
def test_a_run_holds_in_float32_what_its_family_needs_so(
    folders: dict[str, Path], tmp_path: Path, more: tuple[str, ...]
) -> None:
    """As diffusers keeps them (_keep_in_fp32_modules), beside bfloat16."""
    given = overrides(folders, "wan", tmp_path / "run", *BF16, "memory.weights=fp32_master", *more)
    network = build_model(load_config(None, given), Processes.start("cpu"), lambda text: None).network
    held = {name: weight.dtype for name, weight in network.named_parameters() if ".lora_" not in name}
    needed = {"time_embedder", "scale_shift_table", "norm2"}
    kept = {name for name in held if needed & {*name.split(".")}}
    assert needed == needed & {part for name in kept for part in name.split(".")}
    assert {held[name] for name in kept} == {torch.float32}
    assert {held[name] for name in held.keys() - kept} == {torch.bfloat16}
