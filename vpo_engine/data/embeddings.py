"""A cache of text embeddings. Prompts are encoded once, so the text encoder takes no memory while training.

A cache folder has a subfolder for each encoder. That contains shards, each a safetensors file of n prompts:

    keys     uint8 [n, 32]  sha256 of (encoder id, prompt)
    lengths  int64 [n]      number of tokens without padding
    widths   int64 [n]      L, the length to which the encoder had padded
    crcs     int64 [n]      CRC-32 of the prompt's rows of ``tokens``
    tokens   float [sum(lengths), D]  in the encoder's dtype, without padding

A shard is written under another name and then renamed, and it is never changed. So several processes may fill one
folder. Shape letters are those of ``protocols.py``.
"""

from __future__ import annotations

import hashlib
import os
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vpo_engine.full_disk import writing
from vpo_engine.protocols import TextEmbedding

SHARD_BYTES = 64 * 2**20
"""A shard is written when it has this many bytes of embeddings; a killed ``fill`` loses no more than this."""

Encode = Callable[[list[str]], TextEmbedding]


@dataclass(frozen=True)
class _Shard:
    """The tokens of a shard: a tensor in memory, or one that is mapped from the shard's file.

    (A slice of safetensors, ``get_slice``, loses a little memory at every access once its file object is gone.)
    """

    name: str
    tokens: Tensor  # [rows, D]


class _Entry(NamedTuple):
    shard: _Shard
    start: int
    length: int
    width: int
    crc: int


class _Encoded(NamedTuple):
    key: bytes
    tokens: Tensor  # [length, D], on the CPU
    width: int


def _crc(tokens: Tensor) -> int:
    return zlib.crc32(tokens.contiguous().view(torch.uint8).numpy().tobytes())


def _broken(path: Path, what: object) -> ValueError:
    return ValueError(
        f"embedding shard {path} is damaged ({what}); delete the file, and its prompts are encoded again"
    )


class EmbeddingCache:
    """A cache of embeddings by prompt. ``fill`` encodes missing prompts, ``get`` reads embeddings.

    folder: the folder of the shards; None keeps everything in memory. encoder_id: names everything that an embedding
    depends on (weights, maximal length, caption cleaning, dtype). Embeddings of other ids are never used.
    """

    def __init__(self, folder: str | Path | None, encoder_id: str) -> None:
        if not encoder_id:
            raise ValueError("encoder_id is empty; name the encoder's weights, maximal length and dtype")
        self.encoder_id = encoder_id
        self.folder: Path | None = None
        self._index: dict[bytes, _Entry] = {}
        self._loaded: set[Path] = set()
        if folder is not None:
            self.folder = Path(folder) / hashlib.sha256(encoder_id.encode()).hexdigest()[:16]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._load_new_shards()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, prompt: str) -> bool:
        return self._key(prompt) in self._index

    def fill(self, prompts: Iterable[str], encode: Encode, batch_size: int) -> int:
        """Encode the missing prompts, ``batch_size`` at a time, and return how many there were.

        encode: maps [B] prompts to a TextEmbedding; masks are True from the first token on, then False. For runs
        that repeat bit for bit, the embedding of a prompt must not depend on the other prompts of its batch.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self._load_new_shards()
        missing = self._missing(prompts)
        waiting: list[_Encoded] = []
        waiting_bytes = count = 0
        while batch := list(islice(missing, batch_size)):
            for encoded in self._encode(batch, encode):
                waiting.append(encoded)
                waiting_bytes += encoded.tokens.nbytes
            count += len(batch)
            if waiting_bytes >= SHARD_BYTES:
                self._add_shard(waiting)
                waiting, waiting_bytes = [], 0
        if waiting:
            self._add_shard(waiting)
        return count

    def get(self, prompts: Sequence[str]) -> TextEmbedding:
        """Return embeddings [P, L, D] on the CPU, in the encoder's dtype; they are zero where the mask is False.

        L is the largest length to which the encoder had padded one of these prompts. Raise ValueError for a prompt
        that was never encoded, and for a damaged shard.
        """
        if not prompts:
            raise ValueError("prompts is empty; ask for at least one embedding")
        keys = [self._key(prompt) for prompt in prompts]
        if any(key not in self._index for key in keys):
            self._load_new_shards()
        for key, prompt in zip(keys, prompts, strict=True):
            if key not in self._index:
                raise ValueError(
                    f"no embedding of {prompt!r} by {self.encoder_id!r} in {self.folder or 'memory'}; "
                    "call fill with it first"
                )
        entries = [self._index[key] for key in keys]
        rows = [self._read(entry) for entry in entries]
        kinds = {(str(row.dtype), row.shape[1]) for row in rows}
        if len(kinds) > 1:
            raise ValueError(
                f"encoder_id={self.encoder_id!r} has embeddings of several dtypes or widths D: {sorted(kinds)}; "
                f"several encoders have used this id: delete {self.folder or 'the cache'}, and give each its own id"
            )
        width = max(entry.width for entry in entries)
        embeddings = rows[0].new_zeros(len(rows), width, rows[0].shape[1])
        for i, row in enumerate(rows):
            embeddings[i, : len(row)] = row
        lengths = torch.tensor([entry.length for entry in entries])
        return TextEmbedding(embeddings, torch.arange(width) < lengths[:, None])

    def _key(self, prompt: str) -> bytes:
        return hashlib.sha256(f"{self.encoder_id}\0{prompt}".encode()).digest()

    def _missing(self, prompts: Iterable[str]) -> Iterator[str]:
        """Yield each prompt that has no embedding, once."""
        seen: set[bytes] = set()
        for prompt in prompts:
            key = self._key(prompt)
            if key not in self._index and key not in seen:
                seen.add(key)
                yield prompt

    def _encode(self, prompts: list[str], encode: Encode) -> list[_Encoded]:
        text = encode(prompts)
        mask, embeddings = text.mask.cpu(), text.embeddings.detach().cpu()
        if embeddings.ndim != 3 or len(embeddings) != len(prompts) or mask.shape != embeddings.shape[:2]:
            raise ValueError(
                f"the encoder gave embeddings {list(embeddings.shape)} and mask {list(mask.shape)} for "
                f"{len(prompts)} prompts, but must give [{len(prompts)}, L, D] and [{len(prompts)}, L]"
            )
        encoded = []
        for prompt, row, valid in zip(prompts, embeddings, mask.bool(), strict=True):
            length = int(valid.sum())
            tokens = row[:length].clone()
            if not valid[:length].all():
                raise ValueError(
                    f"the mask of {prompt!r} has gaps, but tokens must come first; pad on the right"
                )
            if not tokens.isfinite().all():
                raise ValueError(
                    f"the embedding of {prompt!r} is not finite; run the encoder in bfloat16 or float32"
                )
            encoded.append(_Encoded(self._key(prompt), tokens, len(valid)))
        return encoded

    def _add_shard(self, encoded: list[_Encoded]) -> None:
        parts = {
            "keys": torch.frombuffer(
                bytearray(b"".join(item.key for item in encoded)), dtype=torch.uint8
            ).view(-1, 32),
            "lengths": torch.tensor([len(item.tokens) for item in encoded]),
            "widths": torch.tensor([item.width for item in encoded]),
            "crcs": torch.tensor([_crc(item.tokens) for item in encoded]),
            "tokens": torch.cat([item.tokens for item in encoded]),
        }
        if self.folder is None:
            self._index_shard(_Shard("memory", parts["tokens"]), parts)
            return
        path = self.folder / f"{hashlib.sha256(parts['keys'].numpy().tobytes()).hexdigest()[:32]}.safetensors"
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            with writing(path):
                save_file(parts, temporary, metadata={"encoder_id": self.encoder_id})
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._load_new_shards()

    def _load_new_shards(self) -> None:
        if self.folder is None:
            return
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._loaded):
            self._load_shard(path)
            self._loaded.add(path)

    def _load_shard(self, path: Path) -> None:
        try:
            file = safe_open(path, "pt")
            parts = {name: file.get_tensor(name) for name in ("keys", "lengths", "widths", "crcs")}
            tokens = file.get_tensor("tokens")  # mapped from the file, and read where it is looked at
        except (SafetensorError, OSError) as error:
            raise _broken(path, error) from error
        if (file.metadata() or {}).get("encoder_id") != self.encoder_id:
            raise _broken(path, f"it is not of encoder_id={self.encoder_id!r}")
        count, rows = len(parts["lengths"]), len(tokens)
        if list(parts["keys"].shape) != [count, 32] or int(parts["lengths"].sum()) != rows:
            raise _broken(path, f"{count} prompts do not fit its {rows} tokens")
        self._index_shard(_Shard(str(path), tokens), parts)

    def _index_shard(self, shard: _Shard, parts: dict[str, Tensor]) -> None:
        start = 0
        columns = (parts[name].tolist() for name in ("lengths", "widths", "crcs"))
        for key, length, width, crc in zip(parts["keys"].numpy(), *columns, strict=True):
            self._index.setdefault(key.tobytes(), _Entry(shard, start, length, width, crc))
            start += length

    def _read(self, entry: _Entry) -> Tensor:
        tokens = entry.shard.tokens[entry.start : entry.start + entry.length]
        if _crc(tokens) != entry.crc:
            raise _broken(Path(entry.shard.name), "a checksum does not match")
        return tokens
