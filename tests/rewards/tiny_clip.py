"""A tokenizer of words w0, w1, ... between CLIP's start and end tokens, for tiny CLIPs and their recorded ids."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from vpo_engine.rewards.clip import END, START


def write_words(path: Path, size: int = 96) -> None:
    """tokenizer.json of ``size`` tokens, of which the last two are start and end."""
    words = [f"w{place}" for place in range(size - 2)] + [START, END]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([START, END])
    tokenizer.save(str(path))


def spelled(ids: Tensor, size: int = 96) -> list[str]:
    """The prompts that have these ids, [B, L], from start to end token."""
    return [" ".join(f"w{place}" for place in row[1 : row.index(size - 1)]) for row in ids.tolist()]
