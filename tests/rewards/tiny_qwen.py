"""A tokenizer of characters with Qwen's special tokens, and tiny judges that answer what they are told to."""

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n\N{EN DASH}"
NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def write_tokenizer(path: Path, special: Mapping[str, int], pieces: Sequence[str] = ()) -> None:
    """One id a character, then the pieces (only decoded, never found in a text), then special tokens at their ids."""
    words = [NO_CHARACTER, *CHARACTERS, *pieces]
    words += [f"unused {index}" for index in range(min(special.values()) - len(words))]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=NO_CHARACTER)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in sorted(special, key=special.__getitem__)]
    )
    assert {token: tokenizer.token_to_id(token) for token in special} == dict(special)
    path.parent.mkdir(exist_ok=True)
    tokenizer.save(str(path))


JUDGE_TOKENS = {
    token: 180 + index
    for index, token in enumerate(
        (
            "<|vision_start|>",
            "<|vision_end|>",
            "<|image_pad|>",
            "<|video_pad|>",
            "<|im_start|>",
            "<|im_end|>",
        )
    )
}
JUDGE_CONFIG = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 190,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "image_token_id": JUDGE_TOKENS["<|image_pad|>"],
    "video_token_id": JUDGE_TOKENS["<|video_pad|>"],
    "vision_start_token_id": JUDGE_TOKENS["<|vision_start|>"],
    "vision_end_token_id": JUDGE_TOKENS["<|vision_end|>"],
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 16,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    },
}

Step = str | tuple[str, Sequence[float]]
"""A piece of an answer; with numbers, a digit and the logits of 1 to 5 where it is chosen."""


def write_judge(folder: Path, answer: Sequence[Step] = ()) -> Path:
    """A tiny Qwen2.5-VL with the published key names in two shards, random unless it has an answer to give."""
    folder.mkdir()
    pieces = [step if isinstance(step, str) else step[0] for step in answer]
    write_tokenizer(
        folder / "tokenizer.json", JUDGE_TOKENS, [piece for piece in pieces if piece not in CHARACTERS]
    )
    (folder / "config.json").write_text(json.dumps(JUDGE_CONFIG))
    torch.manual_seed(0)
    network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(JUDGE_CONFIG))
    if answer:
        _teach(network, Tokenizer.from_file(str(folder / "tokenizer.json")), answer)
    weights = {published(key): weight.detach().clone() for key, weight in network.state_dict().items()}
    write_judge_weights(folder, weights)
    return folder


def published(key: str) -> str:
    """The key as in published checkpoints."""
    return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def write_judge_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    owner = {key: f"model-0000{1 + key.startswith('visual.')}-of-00002.safetensors" for key in weights}
    for name in set(owner.values()):
        save_file({key: weights[key] for key in weights if owner[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owner}))


def _teach(network: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer, answer: Sequence[Step]) -> None:
    """Every token follows from the one before alone, the first from the line end after "assistant"."""
    state = network.state_dict()
    with torch.no_grad():
        for key, weight in state.items():
            if key.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")):
                weight.zero_()
        embeddings, head = state["model.language_model.embed_tokens.weight"], state["lm_head.weight"]
        steps: list[Step] = [*answer, "<|im_end|>"]
        before = tokenizer.token_to_id("\n")
        for place, step in enumerate(steps):
            embeddings[before, place] = 1e3  # the norm makes it sqrt(64)
            token, logits = (step, None) if isinstance(step, str) else step
            before = tokenizer.token_to_id(token)
            if logits is None:
                head[before, place] = 1.0
            else:
                for digit, logit in zip("12345", logits, strict=True):
                    head[tokenizer.token_to_id(digit), place] = logit / 8
