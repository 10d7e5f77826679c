"""Test the reading of prompt files, and the order in which a run gets the prompts."""

import csv
import itertools
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from vpo_engine.data.prompts import PromptFile, PromptItem, PromptStream

WEBVID = ["videoid", "contentUrl", "duration", "page_dir", "name"]
PROMPTS = [
    "Aerial shot of a lighthouse",
    'A sign that says "open", swinging',
    "Two lines:\nthe second one",
    'Three lines,\r\n\n"quoted"\rand a lone return',
    "Ein Fuchs läuft über das Feld, 狐, 🦊",
    "line separator \u2028 and next line \x85 stay inside",
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_webvid(path: Path, prompts: list[str], ending: str = "\r\n") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator=ending)
        rows.writerow(WEBVID)
        rows.writerows([i, f"https://host/{i}.mp4", "PT00H00M10S", "a_b", p] for i, p in enumerate(prompts))
    return path


# --- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_txt_skips_blank_lines_and_strips(tmp_path: Path, ending: str) -> None:
    path = write(
        tmp_path / "p.txt", ending.join(["", "  first one ", "", "\t", "zweite Zeile: ü", "", "third"])
    )
    prompts = PromptFile(path)
    assert list(prompts) == ["first one", "zweite Zeile: ü", "third"]
    assert len(prompts) == 3
    assert prompts[-1] == "third"


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_webvid_csv_with_line_breaks_inside_quotes(tmp_path: Path, ending: str) -> None:
    prompts = PromptFile(write_webvid(tmp_path / "webvid.csv", PROMPTS * 3, ending))
    assert list(prompts) == PROMPTS * 3
    assert [prompts[i] for i in (13, 2, 17, 3)] == [(PROMPTS * 3)[i] for i in (13, 2, 17, 3)]


def test_csv_skips_blank_lines_between_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", 'id,name\n\n1,"a\n\nb"\n\n\r\n2,c\n\n')
    assert list(PromptFile(path)) == ["a\n\nb", "c"]


def test_jsonl(tmp_path: Path) -> None:
    rows = [json.dumps({"id": i, "caption": p}, ensure_ascii=i % 2 == 0) for i, p in enumerate(PROMPTS)]
    path = write(tmp_path / "p.jsonl", "\n\n".join(rows))
    assert list(PromptFile(path)) == PROMPTS


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path, kind: str) -> None:
    content = {
        "txt": "fox\ncat\n",
        "csv": "prompt,id\nfox,1\ncat,2\n",
        "jsonl": '{"text":"fox"}\n{"text":"cat"}\n',
    }
    path = write(tmp_path / f"p.{kind}", b"\xef\xbb\xbf" + content[kind].encode())
    assert list(PromptFile(path)) == ["fox", "cat"]


def test_suffix_in_capitals(tmp_path: Path) -> None:
    assert PromptFile(write(tmp_path / "p.TXT", "fox"))[0] == "fox"


@pytest.mark.parametrize("name", ["name", "caption", "prompt", "text", "Caption", " prompt "])
def test_known_column_names(tmp_path: Path, name: str) -> None:
    assert PromptFile(write(tmp_path / "p.csv", f"id,{name}\n1,fox\n"))[0] == "fox"
    assert PromptFile(write(tmp_path / "p.jsonl", json.dumps({"id": 1, name: "fox"})))[0] == "fox"


def test_named_column(tmp_path: Path) -> None:
    table = write(tmp_path / "p.csv", "name,long text\nshort,fox jumps\n")
    assert PromptFile(table, "long text")[0] == "fox jumps"
    lines = write(tmp_path / "p.jsonl", '{"name": "short", "en": "fox jumps"}')
    assert PromptFile(lines, "en")[0] == "fox jumps"


def test_index_out_of_range(tmp_path: Path) -> None:
    prompts = PromptFile(write(tmp_path / "p.txt", "a\nb"))
    for index in (2, -3):
        with pytest.raises(IndexError, match=rf"prompt {index} of 2 in .*p\.txt"):
            prompts[index]


@pytest.mark.long
def test_memory_is_a_few_bytes_per_prompt(tmp_path: Path) -> None:
    """50,000 rows, 5 MB: the index is 0.4 MB, and building it never holds more than a few times that."""
    path = write_webvid(
        tmp_path / "big.csv", [f"prompt number {i} of a long file " * 2 for i in range(50_000)]
    )
    assert path.stat().st_size > 5e6
    tracemalloc.start()
    prompts = PromptFile(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 6e5
    assert peak < 1.5e6
    assert prompts[49_999].startswith("prompt number 49999 of")


# --- faults ----------------------------------------------------------------------------------------------

BAD_ROWS = {
    "undecodable txt": (
        "p.txt",
        b"fine\n\ncaf\xe9\n",
        r"p\.txt, line 3: byte 4 of the line, 0xe9, is not UTF-8; save",
    ),
    "undecodable csv": (
        "p.csv",
        b'name\n"a\nb"\n\xff\n',
        r"p\.csv, line 4: byte 1 .* 0xff, is not UTF-8; save",
    ),
    "too few fields": (
        "p.csv",
        'id,name\n1,"a\nb"\n2\n',
        r"p\.csv, line 4: the row has 1 fields, .* has 2; put",
    ),
    "too many fields": (
        "p.csv",
        "id,name\n1,a\n2,b, c\n",
        r"p\.csv, line 3: the row has 3 fields, .* has 2; put",
    ),
    "empty prompt csv": (
        "p.csv",
        "id,name\n1,a\n2, \n",
        r"p\.csv, line 3: the prompt \('name'\) is empty; delete",
    ),
    "open quote": (
        "p.csv",
        'id,name\n1,a\n2,"b\n3,c\n',
        r"p\.csv, line 3: the row that begins here is not CSV",
    ),
    "stray quote": (
        "p.csv",
        'id,name\n1,"a"b\n',
        r"p\.csv, line 2: the row that begins here is not CSV .*put quotes",
    ),
    "bad JSON": (
        "p.jsonl",
        '{"text": "a"}\n{"text": \n',
        r"p\.jsonl, line 2: not JSON \(.*\); write one JSON object",
    ),
    "not an object": ("p.jsonl", '"a fox"\n', r"p\.jsonl, line 1: JSON str, but must be an object; write"),
    "missing key": (
        "p.jsonl",
        '{"text":"a"}\n\n{"txt":"b"}',
        r"line 3: the prompt \('text'\) is missing, .*delete",
    ),
    "empty prompt jsonl": (
        "p.jsonl",
        '{"text":"a"}\n{"text":""}',
        r"line 2: the prompt \('text'\) is empty, ",
    ),
    "not a string": (
        "p.jsonl",
        '{"text":"a"}\n{"text":7}',
        r"line 2: the prompt \('text'\) is 7, but must be a str",
    ),
    "half a pair": (
        "p.jsonl",
        '{"text":"\\ud83e"}',
        r"line 1: the prompt \('text'\) has half of a .*surrogate",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_stop_at_opening(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as raised:
        PromptFile(path)
    assert str(raised.value).startswith(str(path))


def test_field_longer_than_csv_allows_is_named(tmp_path: Path) -> None:
    rows = "".join(f"{i},x\n" for i in range(60_000))
    path = write(tmp_path / "p.csv", 'id,name\n1,a\n2,"never closed\n' + rows)
    with pytest.raises(
        ValueError, match=r"p\.csv, line 3: the row that begins here is not CSV \(field larger"
    ):
        PromptFile(path)


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("p.txt", "", None, r"p\.txt: the file has no prompts; give a file with at least one"),
        ("p.txt", "\n \n", None, r"p\.txt: the file has no prompts"),
        ("p.csv", "id,name\n", None, r"p\.csv: the file has no prompts"),
        ("p.csv", "", None, r"p\.csv: 0 columns are named name, caption, .*it has none"),
        ("p.jsonl", "\n", None, r"p\.jsonl: the file has no prompts"),
        ("p.json", "[]", None, r"p\.json: the file has no prompts"),
        (
            "p.yaml",
            "- a",
            None,
            r"p\.yaml: unknown kind of prompt file '\.yaml'; .*\.txt, \.csv, \.tsv, \.jsonl, \.json",
        ),
        (
            "p.csv",
            "id,title\n1,a\n",
            None,
            r"0 columns are named name, .*columns: 'id', 'title'",
        ),
        ("p.csv", "name,text\na,b\n", None, r"2 columns are named name, .*: 'name', 'text'"),
        (
            "p.csv",
            "id,name\n1,a\n",
            "en",
            r"column 'en' occurs 0 times, but must occur once; .*: 'id', 'name'",
        ),
        ("p.csv", "en,en\n1,a\n", "en", r"column 'en' occurs 2 times"),
        ("p.jsonl", '{"id": 1}', None, r"p\.jsonl: 0 keys are named name, .*: 'id'"),
        ("p.jsonl", '{"id": "x"}', "en", r"key 'en' occurs 0 times"),
        (
            "p.txt",
            "fox",
            "name",
            r"p\.txt: column='name' cannot be used, a \.txt file has no columns; leave it out",
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, column: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptFile(write(tmp_path / name, content), column)


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ValueError, match=r"there is no such prompt file; check the path|unknown kind"):
            PromptFile(path)


@pytest.mark.parametrize("content", ["fox\ncat\ndog\n", "fox\ndog\n"])
def test_file_changed_after_indexing(tmp_path: Path, content: str) -> None:
    """It may be as long as before."""
    path = write(tmp_path / "p.txt", "fox\ncat\n")
    prompts = PromptFile(path)
    assert prompts[1] == "cat"
    later = path.stat().st_mtime_ns + 1000
    os.utime(write(path, content), ns=(later, later))
    with pytest.raises(
        ValueError, match=r"p\.txt: the file was changed after the run had opened it; restart"
    ):
        prompts[1]


def test_replaced_file_keeps_its_old_content(tmp_path: Path) -> None:
    """Saving by rename, as editors do, leaves the open file alone."""
    prompts = PromptFile(write(tmp_path / "p.txt", "fox\ncat\n"))
    os.replace(write(tmp_path / "new", "a much longer line\n"), tmp_path / "p.txt")
    assert list(prompts) == ["fox", "cat"]


# --- the stream ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 64, 65, 256, 1025])
def test_every_prompt_once_per_epoch(count: int) -> None:
    prompts = [f"p{i}" for i in range(count)]
    stream = PromptStream(prompts, seed=3)
    for epoch in range(3):
        items = stream.take(epoch * count, count)
        assert sorted(item.index for item in items) == list(range(count))
        assert all(item == PromptItem(item.index, prompts[item.index]) for item in items)


def test_pure_function_of_seed_and_cursor() -> None:
    prompts = [str(i) for i in range(100)]
    whole = PromptStream(prompts, seed=5).take(0, 350)
    stream = PromptStream(prompts, seed=5)
    assert stream.take(90, 25) == whole[90:115]  # across the end of an epoch
    assert [stream.take(cursor, 1)[0] for cursor in reversed(range(350))] == whole[::-1]
    assert stream.take(12, 0) == []


def test_epochs_and_seeds_differ() -> None:
    prompts = [str(i) for i in range(1000)]
    first, second = PromptStream(prompts, seed=0), PromptStream(prompts, seed=1)
    orders = [
        tuple(i.index for i in stream.take(e * 1000, 1000)) for stream in (first, second) for e in range(3)
    ]
    assert len(set(orders)) == 6
    for order in orders:  # a random permutation has about one fixed point, and one neighbour kept, on average
        assert sum(place == index for place, index in enumerate(order)) < 8
        assert sum(b - a == 1 for a, b in itertools.pairwise(order)) < 8


@pytest.mark.parametrize("count", [2, 5, 10, 48])
def test_places_are_uniform_over_epochs(count: int) -> None:
    """Test where a prompt lands and what follows it, by chi-square within five standard deviations."""
    epochs = 600
    stream = PromptStream([""] * count, seed=11)
    places, followers = Counter(), Counter()
    for epoch in range(epochs):
        order = [item.index for item in stream.take(epoch * count, count)]
        places[order.index(0)] += 1
        followers[(order[0] - order[-1]) % count] += 1
    for observed, cells in ((places, range(count)), (followers, range(1, count))):
        expected = epochs / len(cells)
        statistic = sum((observed[cell] - expected) ** 2 / expected for cell in cells)
        freedom = len(cells) - 1
        assert abs(statistic - freedom) <= 5 * (2 * freedom) ** 0.5 + 1e-9


def test_order_is_fixed_for_all_time() -> None:
    """A checkpoint's cursor must mean the same prompts in a later version."""
    assert [item.index for item in PromptStream([""] * 10, seed=0).take(0, 12)] == [
        0,
        7,
        6,
        2,
        8,
        9,
        3,
        1,
        5,
        4,
        8,
        6,
    ]


def test_huge_lists_cost_nothing() -> None:
    class Endless:
        def __len__(self) -> int:
            return 10**12

        def __getitem__(self, index: int, /) -> str:
            return str(index)

    items = PromptStream(Endless(), seed=0).take(3 * 10**12 + 7, 500)
    assert len({item.index for item in items}) == 500
    assert max(item.index for item in items) > 9 * 10**11


def test_stream_over_a_file(tmp_path: Path) -> None:
    stream = PromptStream(PromptFile(write_webvid(tmp_path / "w.csv", PROMPTS)), seed=2)
    assert sorted(item.text for item in stream.take(0, len(PROMPTS))) == sorted(PROMPTS)


def test_stream_errors() -> None:
    with pytest.raises(ValueError, match="prompts is empty; a stream needs at least one"):
        PromptStream([], seed=0)
    stream = PromptStream(["a"], seed=0)
    for cursor, count in ((-1, 1), (0, -1)):
        with pytest.raises(ValueError, match=rf"cursor={cursor} and count={count} must not be negative"):
            stream.take(cursor, count)


def test_places_are_told_in_any_order(tmp_path: Path) -> None:
    """Lines are counted on from the last place that was asked for, or from the start if that lies behind."""
    lines = [f"prompt {number}" if number % 3 else "" for number in range(1, 30)]
    prompts = PromptFile(write(tmp_path / "p.txt", "\n".join(lines)))
    expected = [number for number in range(1, 30) if number % 3]
    for order in (range(len(prompts)), reversed(range(len(prompts))), (7, 7, 0, 19, 3)):
        for index in order:
            assert prompts.place(index) == f"{tmp_path / 'p.txt'}, line {expected[index]}"
