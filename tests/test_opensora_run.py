"""The paper's configuration from local checkpoints in the published layouts, at tiny size: a whole run."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from vpo_engine import check_model, sample
from vpo_engine import train as entry
from vpo_engine.build import build_model
from vpo_engine.config_file import dump_config, load_config, require_files
from vpo_engine.distributed.processes import Processes
from vpo_engine.metrics.held_out import HeldOut
from vpo_engine.models.opensora.checkpoint import save_pretrained_layout
from vpo_engine.models.opensora.rectified_flow import null_captions
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.models.opensora.text import ByteTokenizer, T5Encoder, prepare_prompt
from vpo_engine.models.opensora.vae import OpenSoraVAE
from vpo_engine.planning.parts import configurations_are_here
from vpo_engine.protocols import TextEmbedding
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


@pytest.mark.long
def test_check_model_agrees_with_the_description(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Latents of 240 x 426 pixels have 53 columns, so that videos have 424: the run must know the size it will get."""
    parts = [f"model.{name}={checkpoints / name}" for name in ("vae", "text_encoder")]
    assert check_model.main([str(checkpoints / "policy"), "--kind", "opensora", *parts]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "the description fits: 5 entries were checked"


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vpo_engine.training.build_model", loaded)
    monkeypatch.setattr("vpo_engine.training.check_fits", lambda config, *_: (config, ""))


def write_prompts(checkpoints: Path, folder: Path, train: list[str], held_out: list[str]) -> list[str]:
    """Write prompt files, and return the settings of a run on them."""
    for name, prompts in (("train", train), ("held_out", held_out)):
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    named = [f"prompts.{name}={folder / name}.txt" for name in ("train", "held_out")]
    return [*settings(checkpoints, folder / "run"), *named]


CLEANED_AWAY = {
    "Chinese": "一只红色的狐狸在雪地上奔跑。",
    "a link": "https://www.example.com/clips/0001.mp4",
    "a size and a file name": "1920x1080 IMG_2041.jpg",
    "an article code": "#123456 (abc12345)",
    "with a score": "一只狐狸 aesthetic score: 6.5. motion score: 4.",
    "words that swallow the score": "click for",
}


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("caption", CLEANED_AWAY.values(), ids=CLEANED_AWAY)
def test_captions_of_which_the_cleaning_leaves_nothing_stop_the_run(
    checkpoints: Path, tmp_path: Path, caption: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = [PROMPTS[2], caption, PROMPTS[3], *[caption] * 7]
    assert entry.main(write_prompts(checkpoints, tmp_path, mixed, PROMPTS[:2])) == 1
    message = capsys.readouterr().err
    assert (
        f"train.txt, line 2: '{caption}' has no letter or digit that Open-Sora 1.2 reads; likewise "
        in message
    )
    assert "train.txt, line 4, " in message
    assert (
        "and 2 more. 8 of 10 prompts cannot be used: delete these rows or write them in another way"
        in message
    )
    assert entry.main(write_prompts(checkpoints, tmp_path, PROMPTS[2:], [PROMPTS[0], caption])) == 1
    assert "held_out.txt, line 2: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("nothing_loaded")
def test_captions_that_the_cleaning_shortens_are_noted(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [PROMPTS[2], "狐狸が雪原を走り抜けて湖畔に向かう", "2 foxes, 1990s, 4k, see www.example.com"]
    with pytest.raises(AssertionError, match="the model was loaded"):
        entry.main(write_prompts(checkpoints, tmp_path, prompts, PROMPTS[:2]))
    shown = capsys.readouterr().out
    assert (
        "note: Open-Sora 1.2 does not read more than half of the letters of 1 of 3 prompts, such as " in shown
    )
    assert f"train.txt, line 2: '{prompts[1]}' -> 'がを" in shown


def test_sample_refuses_a_caption_of_which_the_cleaning_leaves_nothing(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text(f"{PROMPTS[0]}\n{CLEANED_AWAY['Chinese']}\n", encoding="utf-8")
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(load_config(SHIPPED, settings(checkpoints, tmp_path / "run")[1:])))
    assert sample.main([str(config), "--prompts", str(prompts), "--out", str(tmp_path / "clips")]) == 1
    assert f"error: {prompts}, line 2: " in capsys.readouterr().err
    assert sample.main([str(config), "--prompt", CLEANED_AWAY["Chinese"]]) == 1
    assert "error: prompt 1: '一只红色" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("shipped", ["opensora_v1_2_240p.yaml", "opensora_v1_2_720p.yaml"])
@pytest.mark.parametrize("column", [[], ["prompts.column=name"]])
def test_the_papers_configuration_takes_a_txt_and_webvid(
    checkpoints: Path, tmp_path: Path, shipped: str, column: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """WebVid's column is known, and one from a configuration does not stand in the way of a .txt."""
    given = write_prompts(checkpoints, tmp_path, PROMPTS[2:], PROMPTS[:2])[1:]
    for train in ([], [f"prompts.train={checkpoints / 'webvid.csv'}"]):
        with pytest.raises(AssertionError, match="the model was loaded"):
            entry.main([shipped, *given, *column, *train])
    noted = "prompts.column=name is not used: .txt files have no columns" in capsys.readouterr().out
    assert noted == bool(column)


@pytest.mark.long
def test_a_caption_that_videoscore_refuses_stops_the_run_before_a_video_is_sampled(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sampled(*_: object) -> None:
        raise AssertionError("a video was sampled")

    monkeypatch.setattr(HeldOut, "evaluate", sampled)
    prompts = [*PROMPTS[2:], "a fox <s> runs", "a hare <image>"]
    assert entry.main(write_prompts(checkpoints, tmp_path, prompts, PROMPTS[:2])) == 1
    message = capsys.readouterr().err
    row = len(PROMPTS) - 1
    assert f"train.txt, line {row}: reward.kind=videoscore does not score this prompt: " in message
    assert "'a fox <s> runs' contains '<s>', which VideoScore's tokenizer reads as a special token" in message
    assert f"train.txt, line {row + 1}. 2 of {row + 1} prompts cannot be used" in message


@pytest.mark.parametrize("kind", ["reward", "guards.reward"])
@pytest.mark.long
def test_videos_that_the_reward_does_not_score_stop_the_run_before_one_is_sampled(
    checkpoints: Path,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The built-in scorer compares three neighbouring frames."""
    monkeypatch.setattr(HeldOut, "evaluate", lambda *_: pytest.fail("a video was sampled"))
    given = [*settings(checkpoints, tmp_path / "run"), "model.num_frames=1", "reward.path=null"]
    given += ["reward.kind=brisque", "reward.dimensions=global", f"{kind}.kind=builtin"]
    assert entry.main(given) == 1
    message = capsys.readouterr().err
    assert f"{kind}.kind=builtin does not score videos of 1 frame of " in message
    assert "videos have 1 frame, but temporal_consistency compares 3 neighbouring ones" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ("policy/config.json", "config.json is missing"),
        ("vae/model.safetensors", "vae"),
        ("text_encoder/spiece.model", "spiece.model"),
        ("reward/tokenizer.json", "tokenizer.json"),
    ],
)
@pytest.mark.long
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


def test_times_are_shifted_by_the_size_of_the_videos(checkpoints: Path) -> None:
    """In sampling and in training, as published: 144 x 256 pixels, 17 frames that are 5 latent ones."""
    config = load_config(SHIPPED, settings(checkpoints, checkpoints / "run")[1:])
    model = build_model(config, Processes.start("cpu"))
    ratio = (144 * 256) ** 0.5 / 512 * 5**0.5
    expected = [1000 * ratio * u / (1 + (ratio - 1) * u) for u in (1.0, 0.75, 0.5, 0.25)]
    assert list(model.solver(4).times) == pytest.approx(expected, rel=1e-5)
    assert float(model.draw_timesteps(torch.tensor([0.5]))) == pytest.approx(expected[2], rel=1e-5)


def test_prompts_are_encoded_with_the_score_of_the_settings(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, seen = T5Encoder.encode, list[str]()

    def noted(encoder: T5Encoder, prompts: Sequence[str]) -> TextEmbedding:
        seen.extend(prompts)
        return encode(encoder, prompts)

    monkeypatch.setattr(T5Encoder, "encode", noted)
    given = [*settings(checkpoints, tmp_path / "run")[1:], "model.aesthetic_score=5.5"]
    build_model(load_config(SHIPPED, given), Processes.start("cpu")).prepare(PROMPTS[:1])
    assert seen == [prepare_prompt(PROMPTS[0], aes=5.5)]
    assert "5.5" in seen[0]


def test_embeddings_are_found_again_by_their_encoder_and_its_type(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[str] = []
    monkeypatch.setattr("vpo_engine.build.EmbeddingCache", lambda folder, name: ids.append(name))
    other = shutil.copytree(checkpoints / "text_encoder", tmp_path / "other")
    for more in ([], ["model.dtype=bfloat16"], [f"model.text_encoder={other}"]):
        config = load_config(SHIPPED, [*settings(checkpoints, tmp_path / "run")[1:], *more])
        build_model(config, Processes.start("cpu"))
    assert len(ids) == len(set(ids)) == 3


def test_prompts_are_encoded_in_the_type_and_to_the_length_of_the_model(
    checkpoints: Path, tmp_path: Path
) -> None:
    """A policy that reads 7 tokens gets no more of a longer prompt."""
    shorter = Path(shutil.copytree(checkpoints / "policy", tmp_path / "policy"))
    config = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps({**config, "model_max_length": 7}))
    weights = load_file(shorter / "model.safetensors")
    weights["y_embedder.y_embedding"] = weights["y_embedder.y_embedding"][:7].contiguous()
    save_file(weights, shorter / "model.safetensors")
    given = [*settings(checkpoints, tmp_path / "run")[1:], "model.dtype=bfloat16"]
    for policy, length in ((checkpoints / "policy", None), (shorter, 7)):
        model = build_model(load_config(SHIPPED, [*given, f"model.policy={policy}"]), Processes.start("cpu"))
        model.prepare(PROMPTS[:1])
        text = model.embed(PROMPTS[:1])
        assert text.embeddings.dtype == torch.bfloat16
        assert length is None or text.embeddings.shape[1] == length
        null_captions(text.embeddings, model.network.y_embedder.y_embedding)
