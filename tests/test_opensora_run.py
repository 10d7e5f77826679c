"""The paper's configuration from local checkpoints in the published layouts, at tiny size: a whole run."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from vpo_engine import sample
from vpo_engine import train as entry
from vpo_engine.build import build_model
from vpo_engine.config_file import load_config, require_files
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.opensora.checkpoint import save_pretrained_layout
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.models.opensora.text import ByteTokenizer, T5Encoder
from vpo_engine.models.opensora.vae import OpenSoraVAE
from vpo_engine.planning.parts import configurations_are_here
from vpo_engine.reference.store import build_reference
from vpo_engine.runs.log import read_metrics
from vpo_engine.runs.video import read_video

DATA = Path(__file__).parent / "data"
SHIPPED = "opensora_v1_2_240p.yaml"
PROMPTS = [
    f"a {colour} {animal} runs over {ground}"
    for colour in ("red", "blue", "grey")
    for animal in ("fox", "hare")
    for ground in ("snow", "sand", "wet grass")
]


def write_text_encoder(folder: Path) -> None:
    config = json.loads((DATA / "opensora" / "t5_tiny.json").read_text())["config"]
    encoder = T5Encoder.from_config(config, ByteTokenizer(8))
    folder.mkdir()
    weights = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS * 4),
        model_prefix=str(folder / "spiece"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
    )


def write_video_score(folder: Path) -> None:
    source = DATA / "rewards" / "videoscore"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / "tokenizer" / name, folder / name)
    shutil.copy(source / "tiny_model" / "config.json", folder / "config.json")
    fields = {"do_image_splitting": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    fields |= {"size": {"shortest_edge": 28, "longest_edge": 56}}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    save_file(load_file(source / "tiny_model" / "weights.safetensors"), folder / "model.safetensors")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """policy, vae, text_encoder, reward and prompt files, laid out as their publishers do."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    tiny = json.loads((DATA / "opensora" / "stdit3_tiny.json").read_text())["config"]
    network = STDiT3.from_config({**tiny, "model_max_length": 300, "freeze_y_embedder": True})
    save_pretrained_layout(network.state_dict(), network.config, root / "policy")
    sizes = json.loads((DATA / "opensora" / "vae_tiny.json").read_text())
    vae = OpenSoraVAE.from_config(
        {
            **{f"{part}_config": sizes[f"{part}_config"] for part in ("spatial", "temporal")},
            "scale": sizes["constants"]["scale"],
            "shift": sizes["constants"]["shift"],
        }
    )
    save_pretrained_layout(vae.state_dict(), vae.config, root / "vae")
    write_text_encoder(root / "text_encoder")
    write_video_score(root / "reward")
    with (root / "webvid.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
        rows.writerows(
            [number, "url", "PT00H00M05S", "dir", prompt] for number, prompt in enumerate(PROMPTS[2:])
        )
    (root / "held_out.txt").write_text("\n".join(PROMPTS[:2]) + "\n")
    return root


def settings(checkpoints: Path, run: Path) -> list[str]:
    return [
        SHIPPED,
        f"model.policy={checkpoints / 'policy'}",
        f"model.vae={checkpoints / 'vae'}",
        f"model.text_encoder={checkpoints / 'text_encoder'}",
        f"reward.path={checkpoints / 'reward'}",
        f"prompts.train={checkpoints / 'webvid.csv'}",
        f"prompts.held_out={checkpoints / 'held_out.txt'}",
        "model.dtype=float32",
        "model.resolution=144p",
        "model.num_frames=17",
        "steps=2",
        "pairs_per_step=2",
        "rollout.candidates=2",
        "rollout.steps=2",
        "reference.refresh_every=1",
        "evaluation.every=null",
        f"run_dir={run}",
    ]


@pytest.mark.long
def test_the_papers_configuration_runs_from_local_checkpoints(checkpoints: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert entry.main(settings(checkpoints, run)) == 0
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["optimizer_steps"] for row in rows] == [1, 2]
    assert [row["margin"] for row in rows] == [0.0, 0.0]
    before = load_file(checkpoints / "policy" / "model.safetensors")
    after = load_file(run / "checkpoints" / "step_00000002" / "policy" / "model.safetensors")
    assert before.keys() == after.keys()
    assert (run / "checkpoints/step_00000002/policy/model/model.safetensors.index.json").is_file()
    moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert "spatial_blocks.0.attn.qkv.weight" in moved
    assert not any(name.startswith(("y_embedder.", "rope.")) for name in moved)
    assert list((tmp_path / "embeddings").rglob("*.safetensors"))
    out = tmp_path / "clips"
    assert sample.main([str(run), "--prompt", PROMPTS[0], "--out", str(out)]) == 0
    (file,) = out.glob("*.mp4")
    frames, _ = read_video(file)
    assert frames.shape[0] == 17


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ("policy/config.json", "config.json is missing"),
        ("vae/model.safetensors", "vae"),
        ("text_encoder/spiece.model", "spiece.model"),
        ("reward/tokenizer.json", "tokenizer.json"),
    ],
)
def test_a_missing_part_of_a_checkpoint_is_named(
    checkpoints: Path, tmp_path: Path, broken: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(checkpoints, tmp_path / "copy"))
    (copy / broken).unlink()
    assert entry.main(settings(copy, tmp_path / "run")) == 1
    message = capsys.readouterr().err
    assert "error: " in message
    assert text in message


def test_bfloat16_rounds_the_time_alike_for_policy_and_reference(checkpoints: Path) -> None:
    config = load_config(SHIPPED, settings(checkpoints, checkpoints / "run")[1:])
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    model = build_model(config, Processes.start("cpu"))
    model.prepare(PROMPTS[:1])
    text = model.embed(PROMPTS[:1])
    latents = torch.randn(1, 4, 2, 6, 8)
    reference = build_reference("copy", model.network)
    times = [torch.tensor([value]) for value in (701.0, 700.0, 702.1)]
    outputs = [model.predict(model.network, latents, t, text) for t in times]
    assert torch.equal(outputs[0], outputs[1])  # bfloat16 has steps of 4 here
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(model.predict(reference, latents, times[2], text), outputs[2])


def test_the_folder_of_a_training_run_and_its_averages_are_policies(
    checkpoints: Path, tmp_path: Path
) -> None:
    top = tmp_path / "epoch0-global_step9"
    shutil.copytree(checkpoints / "policy", top / "model")
    weights = load_file(top / "model" / "model.safetensors")
    torch.save({name: weight + 1 for name, weight in weights.items()}, top / "ema.pt")
    name = "spatial_blocks.0.attn.qkv.weight"
    for policy, expected in ((top, weights[name]), (top / "ema.pt", weights[name] + 1)):
        given = [*settings(checkpoints, tmp_path / "run")[1:], f"model.policy={policy}"]
        config = load_config(SHIPPED, given)
        require_files(config)
        assert configurations_are_here(config)
        model = build_model(config, Processes.start("cpu"))
        assert torch.equal(model.network.state_dict()[name], expected.float())
