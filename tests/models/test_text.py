"""Text path: cleaning and encoder against the public code's outputs; tokenizers; local folders."""

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from vpo_engine.models.opensora.text import (
    ByteTokenizer,
    PieceTokenizer,
    T5Encoder,
    append_scores,
    clean_caption,
    prepare_prompt,
)

DATA = Path(__file__).parent.parent / "data" / "opensora"
ROWS = json.loads((DATA / "text_clean.json").read_text())["rows"]
CONFIG = json.loads((DATA / "t5_tiny.json").read_text())["config"]
TIED = "encoder.embed_tokens.weight"


class Recorded:
    """A tokenizer that returns recorded ids."""

    def __init__(self, ids, mask):
        self.ids, self.mask = ids, mask

    def __call__(self, texts):
        return self.ids, self.mask.bool()


@pytest.fixture(scope="module")
def tensors():
    return load_file(DATA / "t5_tiny.safetensors")


@pytest.fixture(scope="module")
def weights(tensors):
    return {name[2:]: value for name, value in tensors.items() if name.startswith("w.")}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A trained spiece.model numbered as T5's: 0 pads, 1 ends, 2 is unknown."""
    prefix = tmp_path_factory.mktemp("pieces") / "spiece"
    shapes = ("circle", "square", "triangle", "star")
    sentences = [
        f"a {colour} {shape} moves {way} over the {ground}"
        for colour in ("red", "blue", "green", "yellow")
        for shape in shapes
        for way in ("left", "right", "up", "down")
        for ground in ("grass", "sand", "night sky")
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(prefix),
        vocab_size=36,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
    )
    return prefix.with_suffix(".model")


@pytest.fixture
def folder(tmp_path, pieces, weights):
    """A tiny copy of the published T5 folder, its token table stored twice."""
    (tmp_path / "config.json").write_text(
        json.dumps({**CONFIG, "model_type": "t5", "architectures": ["T5EncoderModel"]})
    )
    (tmp_path / "spiece.model").write_bytes(pieces.read_bytes())
    save_file({**weights, TIED: weights["shared.weight"].clone()}, tmp_path / "model.safetensors")
    return tmp_path


def relative_l2(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_scores_and_cleaning_equal_the_public_code(row):
    assert append_scores(row["prompt"], **row["args"]) == row["with_scores"]
    assert clean_caption(row["with_scores"]) == row["cleaned_once"]
    assert prepare_prompt(row["prompt"], **row["args"]) == row["cleaned"]


def test_scores_have_one_decimal_and_zero_is_a_score():
    assert append_scores("x", aes=6, flow=0) == "x aesthetic score: 6.0. motion score: 0.0."


def test_a_score_already_there_is_not_repeated():
    prompt = append_scores("x", aes=6.5, flow=5.0, camera_motion="pan left")
    assert append_scores(prompt, aes=1.0, flow=1.0, camera_motion="zoom in") == prompt


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("WORLDWIDE free shipping now", "now"),
        ("click for more cats", "cats"),
        ("12x34 12х34 12×34 grid", "grid"),  # noqa: RUF001
        ("a b2c3d4 thing", "a thing"),
        ("one_two-three_four", "one_two-three_four"),
        ("one_two-three_four-five", "one two three four five"),
        ("end:", "end"),
        ("a+b", "a b"),
        ("&#65;pple", "Apple"),
        ("wind 龍 turbines ㌍", "wind turbines"),
    ],
)
def test_single_cleaning_rules(raw, cleaned):
    assert clean_caption(raw) == cleaned


def test_encoder_equals_the_public_code(tensors, weights):
    encoder = T5Encoder.from_config(CONFIG, Recorded(tensors["input_ids"], tensors["attention_mask"]))
    encoder.model.load_state_dict({**weights, TIED: weights["shared.weight"]})
    text = encoder.encode(["recorded"] * 3)
    assert text.mask.dtype == torch.bool
    assert torch.equal(text.mask, tensors["attention_mask"].bool())
    assert relative_l2(text.embeddings, tensors["out_masked"]) < 1e-5
    assert not text.embeddings.requires_grad


def test_the_mask_matters_and_no_mask_equals_the_public_code(tensors, weights):
    everything = Recorded(tensors["input_ids"], torch.ones_like(tensors["attention_mask"]))
    encoder = T5Encoder.from_config(CONFIG, everything)
    encoder.model.load_state_dict({**weights, TIED: weights["shared.weight"]})
    out = encoder.encode(["recorded"] * 3).embeddings
    assert relative_l2(out, tensors["out_nomask"]) < 1e-5
    assert relative_l2(out, tensors["out_masked"]) > 1e-2


def test_full_size_encoder_has_the_published_keys_and_parameters():
    published = json.loads((DATA / "t5_xxl_encoder_keys.json").read_text())
    sizes = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240}
    with torch.device("meta"):
        encoder = T5Encoder.from_config(
            {**sizes, "num_layers": 24, "feed_forward_proj": "gated-gelu"}, ByteTokenizer(1)
        )
    state = {name: [list(value.shape)] for name, value in encoder.model.state_dict().items()}
    assert state == published
    counts = json.loads((DATA / "param_counts.json").read_text())["t5_v1_1_xxl_encoder"]
    assert sum(value.numel() for value in encoder.parameters()) == counts["parameters"]


def test_bytes_are_shifted_ended_padded_and_truncated():
    ids, mask = ByteTokenizer(6)(["ab", "", "abcdefgh", "é"])
    assert ids.tolist() == [
        [100, 101, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [100, 101, 102, 103, 104, 1],
        [0xC3 + 3, 0xA9 + 3, 1, 0, 0, 0],
    ]
    assert ids.dtype == torch.int64
    assert mask.tolist() == (ids != 0).tolist()
    assert int(ByteTokenizer(9)(["\x00", "\U0010ffff"])[0].max()) < ByteTokenizer.vocab_size


def test_byte_tokenizer_refuses_no_room():
    with pytest.raises(ValueError, match="max_length is 0; the end token alone needs 1"):
        ByteTokenizer(0)


def test_pieces_equal_sentencepiece_with_end_and_padding(folder, pieces):
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    prompts = ["a red star moves left", "sand", "a blue circle moves right over the night sky " * 3]
    ids, mask = PieceTokenizer(folder, max_length=20)(prompts)
    for row, kept, prompt in zip(ids.tolist(), mask.tolist(), prompts, strict=True):
        expected = [*model.encode(prompt)[:19], 1]
        assert row == expected + [0] * (20 - len(expected))
        assert kept == [position < len(expected) for position in range(20)]


def test_published_length_is_300(folder):
    ids, mask = PieceTokenizer(folder)(["a red star"])
    assert ids.shape == mask.shape == (1, 300)


@pytest.mark.parametrize("layout", ["safetensors", "untied name only", "bin shards"])
def test_a_local_folder_gives_the_same_embeddings(folder, weights, layout):
    both = {**weights, TIED: weights["shared.weight"]}
    if layout == "untied name only":
        save_file({name: value for name, value in both.items() if name != TIED}, folder / "model.safetensors")
    if layout == "bin shards":
        (folder / "model.safetensors").unlink()
        names = sorted(both)
        shards = {
            "pytorch_model-00001-of-00002.bin": names[:9],
            "pytorch_model-00002-of-00002.bin": names[9:],
        }
        for file, held in shards.items():
            torch.save({name: both[name] for name in held}, folder / file)
        index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    encoder = T5Encoder.from_pretrained(folder, max_length=12)
    reference = T5EncoderModel(T5Config(**CONFIG)).eval()
    reference.load_state_dict(both)
    ids, mask = PieceTokenizer(folder, 12)(["a red star moves", "sand"])
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    text = encoder.encode(["a red star moves", "sand"])
    assert torch.equal(text.embeddings, expected)
    assert encoder.model.encoder.embed_tokens.weight is encoder.model.shared.weight


def test_bfloat16_casts_every_weight_and_the_output(folder):
    encoder = T5Encoder.from_pretrained(folder, dtype=torch.bfloat16, max_length=8)
    assert {value.dtype for value in encoder.parameters()} == {torch.bfloat16}
    assert encoder.encode(["sand"]).embeddings.dtype == torch.bfloat16


def test_missing_parts_of_a_folder_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        T5Encoder.from_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"holds no weights: expected model\.safetensors"):
        T5Encoder.from_pretrained(folder)
    (folder / "spiece.model").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"neither spiece\.model nor tokenizer\.json; copy spiece\.model"
    ):
        T5Encoder.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        T5Encoder.from_pretrained(folder)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen"])
def test_weights_that_do_not_fit_are_refused(folder, weights, fault):
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    state = dict(weights)
    if fault == "missing":
        del state[name]
    elif fault == "unexpected":
        state["decoder.block.0.weight"] = torch.zeros(1)
        name = "decoder.block.0.weight"
    else:
        state[name] = torch.zeros(32, 31)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"do not fit its config\.json as a T5 encoder(.|\n)*{name}"):
        T5Encoder.from_pretrained(folder)


def test_two_different_token_tables_are_refused(folder, weights):
    save_file({**weights, TIED: weights["shared.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="two different token tables"):
        T5Encoder.from_pretrained(folder)
