"""A tokenizer of characters with Qwen's special tokens, for tiny models."""

import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

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
