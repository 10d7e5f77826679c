"""Folders of published models from strangers, sampled by the command: configurations and weights that lie."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from fuzz_driver import flip, fuzz
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

from tiny_pipelines import FOLDERS, SMALL

from vpo_engine import sample
from vpo_engine.models.rehearsal import check_tokens

CONFIGS = (
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)
WEIGHTS = (
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
)
VALUES = st.one_of(
    st.sampled_from(
        [0, -1, 1, 3, 2**20, 2**31, 2**62, 1e300, 0.5, None, True, "", "x", "a/b", "../../x", [], {}]
    ),
    st.lists(st.sampled_from([0, 1, 2, -1, 2**40, "x", None]), max_size=4),
    st.dictionaries(
        st.sampled_from(["a", "AutoTokenizer"]), st.sampled_from(["hostile.Class", 1]), max_size=1
    ),
)
ADDED = [
    *("auto_map", "attn_implementation", "quantization_config", "_class_name", "tokenizer_class", "dtype"),
    *("transformer_2", "boundary_ratio", "hidden_size", "num_hidden_layers", "num_attention_heads", "self"),
]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny published model of each kind. One is sampled, so that what all need has been imported."""
    parent = tmp_path_factory.mktemp("models")
    folders = {kind: make(parent / kind) for kind, make in FOLDERS.items()}
    assert sampled(folders["wan"], parent / "first", "wan") == 0
    return folders


def sampled(folder: Path, out: Path, kind: str) -> int:
    """Sample a smallest video from a folder. Errors that the command does not print are raised."""
    frames, height, width = SMALL[kind]
    small = ["--steps=2", f"--frames={frames}", f"--size={height}x{width}", "model.device=cpu"]
    return sample.main(
        [str(folder), "--prompt", "a cat", "--out", str(out), *small, f"prompts.cache={out / 'cache'}"]
    )


KINDS = st.sampled_from(sorted(FOLDERS))


@fuzz(
    kind=KINDS,
    file=st.sampled_from(CONFIGS),
    changes=st.lists(st.tuples(st.integers(0, 60), VALUES), min_size=1, max_size=2),
    added=st.dictionaries(st.sampled_from(ADDED), VALUES, max_size=1),
)
def test_configurations(
    folder: Path,
    published: dict[str, Path],
    kind: str,
    file: str,
    changes: list[tuple[int, Any]],
    added: dict[str, Any],
) -> None:
    model = Path(shutil.copytree(published[kind], folder / "model"))
    (model / "hostile.py").write_text("raise SystemExit('code of a stranger was run')")
    config = json.loads((model / file).read_text())
    for place, value in changes:
        config[sorted(config)[place % len(config)]] = value
    (model / file).write_text(json.dumps(config | added))
    assert sampled(model, folder / "out", kind) in (0, 1)


TRANSFORMER, VAE, TEXT = "transformer/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
WRONG_SETTINGS = [
    (VAE, {"latents_std": [1.0]}, "latents_std is [1.0], expected a number for each of its 4"),
    (
        VAE,
        {"scale_factor_temporal": None},
        "config.json sets scale_factor_temporal to null, expected a whole",
    ),
    (VAE, {"out_channels": 4}, "vae/config.json does not describe a AutoencoderKLWan that can run"),
    (TRANSFORMER, {"out_channels": 3}, "does not describe a WanTransformer3DModel that can run"),
    (
        TRANSFORMER,
        {"in_channels": "4"},
        'transformer/config.json sets in_channels to "4", expected a whole number',
    ),
    (TEXT, {"dense_act_fn": "x"}, "config.json does not describe a UMT5EncoderModel that can be built"),
    (
        TEXT,
        {"num_heads": 0},
        "text_encoder/config.json sets num_heads to 0, expected a whole number of at least 1",
    ),
    (TEXT, {"relative_attention_num_buckets": 1}, "does not describe a UMT5EncoderModel that can run"),
    (SCHEDULER, {"_class_name": []}, "_class_name is []"),
    (SCHEDULER, {"beta_schedule": "x"}, "does not describe a UniPCMultistepScheduler that can be built"),
    (
        SCHEDULER,
        {"beta_start": 1e300},
        "sets beta_start to 1e+300, expected a number between 0 and 1; put the",
    ),
    (SCHEDULER, {"flow_shift": 1e30}, "scheduler_config.json does not describe a scheduler that can run"),
]


@pytest.mark.parametrize(("file", "changes", "message"), WRONG_SETTINGS)
def test_settings_that_cannot_run_are_refused_before_weights_are_read(
    tmp_path: Path,
    published: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    file: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    model = Path(shutil.copytree(published["wan"], tmp_path / "model"))
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | changes))
    for weights in model.rglob("*.safetensors"):
        weights.write_bytes(b"nothing reads this")
    assert sampled(model, tmp_path / "out", "wan") == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [-1, 0, 0.5, None, [], 2**31])
def test_numbers_of_tokens_that_no_model_has(tokens: Any) -> None:
    with pytest.raises(ValueError, match=r"a/config.json gives a prompt .* tokens, expected from 1 to 32768"):
        check_tokens(tokens, "a/config.json")


@fuzz(
    kind=KINDS,
    file=st.sampled_from(WEIGHTS + CONFIGS),
    places=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=3),
    kept=st.integers(0, 2000),
)
def test_damaged_files(
    folder: Path,
    published: dict[str, Path],
    kind: str,
    file: str,
    places: list[tuple[int, int]],
    kept: int,
) -> None:
    model = Path(shutil.copytree(published[kind], folder / "model"))
    content = (model / file).read_bytes()
    (model / file).write_bytes(flip(content[: kept if kept < 1000 else None], places))
    assert sampled(model, folder / "out", kind) in (0, 1)
