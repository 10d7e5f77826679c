"""Weight files from strangers: safetensors whose headers lie, damaged pickles, indices that lead out of the folder."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import torch
from fuzz_driver import clear_errors, flip, fuzz
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from vpo_engine.weights import read_files, shard_files

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}
DTYPES = (
    "F32",
    "F64",
    "BF16",
    "I64",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "C64",
    "U64",
    "Q8",
    "",
    None,
    3,
)
SIZES = st.one_of(st.integers(-2, 8), st.sampled_from([2**31, 2**62, 2**63, 2**64, 2**65, 1.5, "3", None]))
PLACES = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6)
ENTRY = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(DTYPES),
            "shape": st.lists(SIZES, max_size=4),
            "data_offsets": st.lists(SIZES, max_size=3),
        }
    ),
    st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
)
HEADERS = st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "", "\ud800", "a\0"]), ENTRY, max_size=4)


def packed(header: bytes, body: bytes, claimed: int | None) -> bytes:
    length = len(header) if claimed is None else claimed
    return (length % 2**64).to_bytes(8, "little") + header + body


def read(path: Path) -> None:
    """Read a file, or see a clear error; what is read takes no more than the file."""
    size = path.stat().st_size
    with clear_errors(naming=path.name):
        found = read_files([path])
        assert sum(each.untyped_storage().nbytes() for each in found.values()) <= 2 * size
        assert all(isinstance(key, str) for key in found)


@fuzz(
    header=HEADERS,
    body=st.binary(max_size=64),
    claimed=st.none() | st.sampled_from([0, 1, 7, 2**20, 2**31, 2**63, 2**64 - 1]),
)
def test_a_header_that_lies(folder: Path, header: object, body: bytes, claimed: int | None) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(packed(json.dumps(header).encode(), body, claimed))
    read(path)


@fuzz(
    places=PLACES,
    kept=st.integers(0, 400),
    tail=st.binary(max_size=9),
    pickled=st.sampled_from(["no", "zip", "old"]),
)
def test_a_damaged_file(
    folder: Path, places: list[tuple[int, int]], kept: int, tail: bytes, pickled: str
) -> None:
    whole = {"no": save_safetensors(TENSORS), "zip": saved(True), "old": saved(False)}[pickled]
    path = folder / ("model.safetensors" if pickled == "no" else "model.bin")
    cut = whole if kept > 300 else whole[: kept * len(whole) // 300]
    path.write_bytes(flip(cut, places) + tail)
    read(path)


def saved(packed_as_zip: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer, _use_new_zipfile_serialization=packed_as_zip)
    return buffer.getvalue()


NAMES = st.one_of(
    st.sampled_from(
        [
            "one.safetensors",
            "../out.safetensors",
            "/etc/passwd",
            "sub/../../out.safetensors",
            "link.safetensors",
            ".",
        ]
    ),
    st.text(max_size=12),
    st.sampled_from(["x" * 300, "a/" * 3000 + "b", "one.safetensors\0", "..\\out", "sub", "\ud800"]),
    st.none() | st.integers() | st.lists(st.integers(), max_size=1),
)
VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=4), lambda each: st.lists(each, max_size=3), max_leaves=5
)


@fuzz(index=st.fixed_dictionaries({"weight_map": st.dictionaries(st.sampled_from("abcd"), NAMES)}) | VALUES)
def test_an_index_never_leads_out_of_its_folder(folder: Path, index: object) -> None:
    inside = folder / "model"
    (inside / "sub").mkdir(parents=True)
    for path in (inside / "one.safetensors", folder / "out.safetensors"):
        path.write_bytes(save_safetensors({"a": torch.zeros(1)}))
    (inside / "link.safetensors").symlink_to(folder / "out.safetensors")
    file = inside / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with clear_errors(FileNotFoundError, naming=inside.name):
        for shard in shard_files(file):
            assert Path(os.path.realpath(shard)).parent == inside
