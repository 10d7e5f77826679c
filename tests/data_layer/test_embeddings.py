"""Test that the cache of text embeddings is exact, can be shared by processes, and reports damage."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vpo_engine.data import embeddings
from vpo_engine.data.embeddings import EmbeddingCache
from vpo_engine.data.text_source import TextSource
from vpo_engine.distributed.processes import Processes
from vpo_engine.protocols import TextEmbedding

CHANNELS = 6
PROMPTS = ["a red square", "two blue circles that drift", "", "ünïcödé 狐", "a red square, again and again"]


class ByteEncoder:
    """One token per byte and one for the end; padding holds garbage, as an encoder's does."""

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = 40, channels: int = CHANNELS) -> None:
        self.dtype, self.width, self.channels = dtype, width, channels
        self.seen: list[list[str]] = []

    def one(self, prompt: str) -> torch.Tensor:
        tokens = torch.tensor([*prompt.encode(), 256])[: self.width, None]
        return torch.sin(tokens * torch.arange(1, self.channels + 1) * 0.37).to(self.dtype)

    def __call__(self, prompts: list[str]) -> TextEmbedding:
        self.seen.append(prompts)
        rows = torch.full((len(prompts), self.width, self.channels), 1e3, dtype=self.dtype)
        mask = torch.zeros(len(prompts), self.width, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            tokens = self.one(prompt)
            rows[i, : len(tokens)] = tokens
            mask[i, : len(tokens)] = True
        return TextEmbedding(rows, mask)


def fail(prompts: list[str]) -> TextEmbedding:
    raise AssertionError(f"encoded again: {prompts}")


def assert_exact(text: TextEmbedding, prompts: list[str], encoder: ByteEncoder) -> None:
    expected = encoder(prompts)
    assert torch.equal(text.mask, expected.mask)
    assert text.embeddings.dtype == encoder.dtype
    assert torch.equal(text.embeddings, expected.embeddings.masked_fill(~expected.mask[..., None], 0))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on_disk", [True, False])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, on_disk: bool) -> None:
    encoder = ByteEncoder(dtype)
    cache = EmbeddingCache(tmp_path if on_disk else None, "bytes")
    assert cache.fill(PROMPTS, encoder, batch_size=2) == len(PROMPTS)
    assert [len(batch) for batch in encoder.seen] == [2, 2, 1]
    order = [PROMPTS[i] for i in (3, 0, 0, 4, 2, 1)]
    assert_exact(cache.get(order), order, encoder)
    assert bool(shards(tmp_path)) == on_disk


def test_encoded_once_then_read_from_disk(tmp_path: Path) -> None:
    encoder = ByteEncoder()
    EmbeddingCache(tmp_path, "bytes").fill(PROMPTS, encoder, batch_size=8)
    later = EmbeddingCache(tmp_path, "bytes")
    assert later.fill(PROMPTS, fail, batch_size=8) == 0
    assert len(later) == len(PROMPTS)
    assert all(prompt in later for prompt in PROMPTS)
    assert "another" not in later
    assert_exact(later.get(PROMPTS), PROMPTS, encoder)


def test_only_missing_prompts_are_encoded_and_each_once(tmp_path: Path) -> None:
    encoder = ByteEncoder()
    cache = EmbeddingCache(tmp_path, "bytes")
    cache.fill(["a", "b", "a"], encoder, batch_size=1)
    assert cache.fill(iter(["b", "c", "a", "c", "d", "e"]), encoder, batch_size=2) == 3
    assert encoder.seen == [["a"], ["b"], ["c", "d"], ["e"]]


def test_processes_divide_the_same_list_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own set of them, whose order differs between interpreters."""
    monkeypatch.setattr(Processes, "encoder_share", lambda self: slice(self.rank, None, self.count))
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    prompts = [f"Prompt {number:02d}" for number in range(24)]
    for rank in range(2):
        seen: list[str] = []

        class Encoder:
            def encode(self, texts: list[str]) -> TextEmbedding:
                seen.extend(texts)  # noqa: B023
                return ByteEncoder()(texts)

        cache = EmbeddingCache(tmp_path / str(rank), "bytes")
        member = Processes(rank, 2, torch.device("cpu"))
        TextSource(cache, Encoder, member, str.lower).prepare([*reversed(prompts), *prompts])
        assert seen == [prompt.lower() for prompt in prompts[rank::2]]


def test_encoders_do_not_share(tmp_path: Path) -> None:
    one, two = EmbeddingCache(tmp_path, "t5, 120 tokens"), EmbeddingCache(tmp_path, "t5, 300 tokens")
    one.fill(["fox"], ByteEncoder(), batch_size=1)
    assert "fox" not in two
    with pytest.raises(ValueError, match=r"no embedding of 'fox' by 't5, 300 tokens' in .*; call fill"):
        two.get(["fox"])


def test_padding_is_not_stored(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, "bytes")
    cache.fill(["ab", "c"], ByteEncoder(torch.bfloat16, width=300), batch_size=2)
    (path,) = shards(tmp_path)
    parts = load_file(path)
    assert parts["tokens"].shape == (3 + 2, CHANNELS)
    assert parts["tokens"].dtype == torch.bfloat16
    assert cache.get(["c"]).embeddings.shape == (1, 300, CHANNELS)


def test_width_is_the_largest_asked_for() -> None:
    cache = EmbeddingCache(None, "bytes")
    cache.fill(["a"], ByteEncoder(width=4), batch_size=1)
    cache.fill(["b"], ByteEncoder(width=9), batch_size=1)
    assert cache.get(["a"]).mask.shape == (1, 4)
    assert cache.get(["a", "b"]).mask.shape == (2, 9)


def test_shards_of_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "SHARD_BYTES", 4000)
    prompts = [f"prompt {i:03d}" for i in range(100)]  # 11 tokens of 24 bytes: 264 bytes each
    cache = EmbeddingCache(tmp_path, "bytes")
    cache.fill(prompts, ByteEncoder(), batch_size=1)
    paths = shards(tmp_path)
    assert len(paths) == -(-100 // 16)  # a shard closes with its 16th prompt
    assert all(path.stat().st_size < 4000 + 264 + 3000 for path in paths)  # the rest is header and index
    assert_exact(cache.get(prompts), prompts, ByteEncoder())


def test_failing_encoder_keeps_earlier_shards_and_leaves_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "SHARD_BYTES", 1)
    encoder = ByteEncoder()

    def flaky(prompts: list[str]) -> TextEmbedding:
        if "c" in prompts:
            raise RuntimeError("out of memory")
        return encoder(prompts)

    with pytest.raises(RuntimeError, match="out of memory"):
        EmbeddingCache(tmp_path, "bytes").fill(["a", "b", "c"], flaky, batch_size=1)
    again = EmbeddingCache(tmp_path, "bytes")
    assert "b" in again
    assert "c" not in again
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == shards(tmp_path)


def test_failed_write_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(parts: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(embeddings, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        EmbeddingCache(tmp_path, "bytes").fill(["a"], ByteEncoder(), batch_size=1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- several processes -----------------------------------------------------------------------------------


def fill_part(folder: Path, prompts: list[str]) -> None:
    EmbeddingCache(folder, "bytes").fill(prompts, ByteEncoder(), batch_size=3)


def test_processes_fill_one_folder(tmp_path: Path) -> None:
    prompts = [f"clip {i}" for i in range(40)]
    context = multiprocessing.get_context("fork")
    parts = [prompts[:25], prompts[15:], prompts[:25]]  # overlapping, two of them equal
    workers = [context.Process(target=fill_part, args=(tmp_path, part)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    cache = EmbeddingCache(tmp_path, "bytes")
    assert len(cache) == 40
    assert_exact(cache.get(prompts), prompts, ByteEncoder())


def test_sees_what_another_wrote_later(tmp_path: Path) -> None:
    early = EmbeddingCache(tmp_path, "bytes")
    EmbeddingCache(tmp_path, "bytes").fill(["fox", "cat"], ByteEncoder(), batch_size=2)
    assert_exact(early.get(["cat"]), ["cat"], ByteEncoder())
    assert early.fill(["fox"], fail, batch_size=1) == 0


# --- faults ----------------------------------------------------------------------------------------------


def test_truncated_shard(tmp_path: Path) -> None:
    EmbeddingCache(tmp_path, "bytes").fill(PROMPTS, ByteEncoder(), batch_size=8)
    (path,) = shards(tmp_path)
    for size in (path.stat().st_size - 10, 30, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(
            ValueError, match=rf"embedding shard {path} is damaged \(.*\); delete the file, and its prompts"
        ):
            EmbeddingCache(tmp_path, "bytes")
    path.unlink()
    again = EmbeddingCache(tmp_path, "bytes")
    assert again.fill(PROMPTS, ByteEncoder(), batch_size=8) == len(PROMPTS)


def test_flipped_bit_is_found_on_reading(tmp_path: Path) -> None:
    EmbeddingCache(tmp_path, "bytes").fill(["fox", "cat"], ByteEncoder(), batch_size=2)
    (path,) = shards(tmp_path)
    content = bytearray(path.read_bytes())
    value = ByteEncoder().one("cat").numpy().tobytes()[:24]
    content[content.index(value) + 5] ^= 1
    path.write_bytes(content)
    cache = EmbeddingCache(tmp_path, "bytes")
    assert_exact(cache.get(["fox"]), ["fox"], ByteEncoder())
    with pytest.raises(
        ValueError, match=rf"shard {path} is damaged \(a checksum does not match\); delete the file"
    ):
        cache.get(["cat"])


def damage_counts(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**parts, "lengths": parts["lengths"] + 1}


def drop_tokens(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: part for name, part in parts.items() if name != "tokens"}


@pytest.mark.parametrize(
    ("change", "encoder_id", "message"),
    [
        (damage_counts, "bytes", r"2 prompts do not fit its 8 tokens"),
        (drop_tokens, "bytes", r"tokens"),
        (dict, "other", r"it is not of encoder_id='bytes'"),
    ],
)
def test_foreign_or_inconsistent_shard(
    tmp_path: Path, change: Callable[[dict], dict], encoder_id: str, message: str
) -> None:
    EmbeddingCache(tmp_path, "bytes").fill(["fox", "cat"], ByteEncoder(), batch_size=2)
    (path,) = shards(tmp_path)
    save_file(change(load_file(path)), path, metadata={"encoder_id": encoder_id})
    with pytest.raises(
        ValueError, match=rf"embedding shard {path} is damaged \(.*{message}.*\); delete the file"
    ):
        EmbeddingCache(tmp_path, "bytes")


@pytest.mark.parametrize("other", [ByteEncoder(torch.bfloat16), ByteEncoder(channels=8)])
def test_two_encoders_under_one_id(tmp_path: Path, other: ByteEncoder) -> None:
    cache = EmbeddingCache(tmp_path, "bytes")
    cache.fill(["fox"], ByteEncoder(), batch_size=1)
    cache.fill(["cat"], other, batch_size=1)
    with pytest.raises(
        ValueError, match=r"encoder_id='bytes' has embeddings of several dtypes or widths D: .*delete"
    ):
        cache.get(["fox", "cat"])


def with_gap(prompts: list[str]) -> TextEmbedding:
    return TextEmbedding(torch.zeros(1, 3, 2), torch.tensor([[True, False, True]]))


def with_nan(prompts: list[str]) -> TextEmbedding:
    return TextEmbedding(torch.full((1, 3, 2), torch.nan), torch.tensor([[True, False, False]]))


def with_one_row_too_many(prompts: list[str]) -> TextEmbedding:
    return TextEmbedding(torch.zeros(2, 3, 2), torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (with_gap, r"the mask of 'fox' has gaps, but tokens must come first; pad on the right"),
        (with_nan, r"the embedding of 'fox' is not finite; run the encoder in bfloat16 or float32"),
        (
            with_one_row_too_many,
            r"gave embeddings \[2, 3, 2\] and mask \[2, 3\] for 1 prompts, .*\[1, L, D\]",
        ),
    ],
)
def test_encoder_faults_are_not_stored(tmp_path: Path, encode: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingCache(tmp_path, "bytes").fill(["fox"], encode, batch_size=1)
    assert shards(tmp_path) == []


def test_padding_may_be_nan() -> None:
    text = TextEmbedding(torch.tensor([[[1.0], [torch.nan]]]), torch.tensor([[True, False]]))
    cache = EmbeddingCache(None, "bytes")
    cache.fill(["fox"], lambda _: text, batch_size=1)
    assert cache.get(["fox"]).embeddings.tolist() == [[[1.0], [0.0]]]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="encoder_id is empty; name the encoder's weights"):
        EmbeddingCache(None, "")
    cache = EmbeddingCache(None, "bytes")
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        cache.fill(["a"], ByteEncoder(), batch_size=0)
    with pytest.raises(ValueError, match="prompts is empty; ask for at least one"):
        cache.get([])
    with pytest.raises(ValueError, match="no embedding of 'a' by 'bytes' in memory; call fill"):
        cache.get(["a"])
