"""The layouts in which people keep prompts: what is read, and what is refused with the keys found and a remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vpo_engine.data.prompts import PromptFile, PromptList, place_of

A, B = "a lantern on a pier", "two cups, one full"
SEPARATORS = "a \u2028 b \x85 c \x0c d \u2029 e \x1c f"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


READ = {
    "tsv": ("p.tsv", f"Prompt\tCategory\tNote\n{A}\tObjects\t\n{B}\tQuantity\tmine\n"),
    "tsv with quoted fields": ("p.tsv", f'Prompt\tNote\n"{A}"\t"a\tb ""c""\nd"\n{B}\t\n'),
    "tsv with CR LF": ("p.tsv", f"id\tprompt\r\n1\t{A}\r\n2\t{B}\r\n"),
    "csv with tabs": ("p.csv", f"id\tprompt\n1\t{A}\n2\t{B}\n"),
    "csv with semicolons": ("p.csv", f"id;prompt\n1;{A}\n2;{B}\n"),
    "list of texts": ("p.json", json.dumps([A, B])),
    "list of objects": (
        "p.json",
        json.dumps([{"prompt_en": A, "dimension": ["x"]}, {"prompt_en": B}], indent=4),
    ),
    "names with texts": ("p.json", json.dumps({"0.mp4": A, "1.mp4": B})),
    "names with objects": (
        "p.json",
        json.dumps({"0": {"prompt": A, "fps": 8}, "1": {"fps": 9, "prompt": B}}),
    ),
    "list of names with texts": ("p.json", json.dumps({"prompts": [{"0.mp4": A}, {"1.mp4": B}]})),
    "list under a name": ("p.json", json.dumps({"version": 2, "prompts": [A, B]}, indent=1)),
    "columns": ("p.json", json.dumps({"id": [1, 2], "caption": [A, B]})),
    "array under .jsonl": (
        "p.jsonl",
        "\n" + json.dumps([{"path": "x", "caption": A}, {"path": "y", "caption": B}]),
    ),
    "objects a line under .json": ("p.json", f'{{"text": "{A}"}}\n\n{{"text": "{B}"}}\n'),
    "video_prompt": ("p.jsonl", f'{{"video_prompt": "{A}"}}\n{{"video_prompt": "{B}"}}\n'),
    "byte order mark": ("p.json", b"\xef\xbb\xbf" + json.dumps([A, B]).encode()),
    "one object a line, one line": ("p.json", json.dumps({"0.mp4": A, "1.mp4": B}) + "\n"),
    "blanks that cannot be seen": ("p.txt", f"{A}\n\u200b\n\ufeff \u2028\n{B}\n"),
}


@pytest.mark.parametrize(("name", "content"), READ.values(), ids=READ)
def test_common_layouts_are_read(tmp_path: Path, name: str, content: str | bytes) -> None:
    prompts = PromptFile(write(tmp_path / name, content))
    assert list(prompts) == [A, B]
    assert prompts[-1] == B


def test_quotation_marks_of_a_plain_tsv_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "p.tsv", f'Prompt\tNote\n"Stop" on a sign\t\n{A}\t5" wide\n')
    assert list(PromptFile(path)) == ['"Stop" on a sign', A]
    mixed = write(tmp_path / "m.tsv", f'Prompt\tNote\n"Stop" on a sign\t\n"{A}"\t\n')
    with pytest.raises(
        ValueError, match=r"m\.tsv, line 2: the row that begins here is not TSV .*; put quotes"
    ):
        PromptFile(mixed)


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "json"])
def test_only_a_newline_ends_a_line(tmp_path: Path, kind: str) -> None:
    content = {
        "txt": f"{A}\r\n{SEPARATORS}\r\n",
        "csv": f"prompt\r\n{A.replace(',', '')}\r\n{SEPARATORS}\r\n",
        "tsv": f"prompt\n{A}\n{SEPARATORS}\n",
        "jsonl": "".join(json.dumps({"text": each}, ensure_ascii=False) + "\n" for each in (A, SEPARATORS)),
        "json": json.dumps([A, SEPARATORS], ensure_ascii=False),
    }
    assert list(PromptFile(write(tmp_path / f"p.{kind}", content[kind]))) == [A, SEPARATORS]


REFUSED = {
    "missing key beside a single other one": (
        "p.json",
        '[{"prompt": "a", "id": "1"},\n{"id": "2"}]',
        r"line 2: the prompt \('prompt'\) of entry 2 is missing",
    ),
    "utf-16": (
        "p.txt",
        A.encode("utf-16"),
        r"line 1: the file is UTF-16 or UTF-32, not UTF-8; save it as UTF-8",
    ),
    "utf-16 json": ("p.json", '["a"]'.encode("utf-16"), r"p\.json, line 1: the file is UTF-16"),
    "utf-16 without a mark": (
        "p.csv",
        "prompt\na".encode("utf-16-le"),
        r"line 1: byte 2 of the line is 0 \(NUL\)",
    ),
    "nul": (
        "p.jsonl",
        b'{"text": "a"}\n{"text": "\0"}',
        r"p\.jsonl, line 2: byte 11 of the line is 0 \(NUL\)",
    ),
    "escaped nul": (
        "p.jsonl",
        '{"text": "a\\u0000"}',
        r"line 1: the prompt \('text'\) has the character .u0000",
    ),
    "old Macs": (
        "p.txt",
        "a\rb\rc",
        r"p\.txt, line 1: a carriage return stands inside .*; convert the line endings",
    ),
    "json as txt": (
        "p.txt",
        '\n{"prompt": "a"}\n',
        r"p\.txt, line 2: the file begins with JSON.*end in \.jsonl",
    ),
    "array as txt": ("p.txt", '[\n"a",\n"b"\n]', r"p\.txt, line 1: the file begins with JSON"),
    "a prompt that cannot be seen": (
        "p.csv",
        "id,prompt\n1,\u200b\n",
        r"line 2: the prompt \('prompt'\) is empty",
    ),
    "key twice": (
        "p.jsonl",
        '{"text": "a", "text": "b"}',
        r"line 1: not JSON \(the key 'text' is there twice\)",
    ),
    "key twice in json": (
        "p.json",
        '[{"text":"a"},\n{"text":"b","text":"c"}]',
        r"line 2: the key 'text' is there tw",
    ),
    "broken json": ("p.json", '[\n"a",\n"b"', r"p\.json, line 3: not JSON \(.*\); repair the file"),
    "empty text": ("p.json", '["a",\n"",\n"b"]', r"p\.json, line 2: entry 2 is empty"),
    "mixed": (
        "p.json",
        '["a",\n{"prompt": "b"}]',
        r"line 2: entry 2 is a JSON dict, but must be text; write every",
    ),
    "numbers": ("p.json", "[1, 2]", r"line 1: entry 1 is a JSON int, but must be text or an object"),
    "missing key": (
        "p.json",
        '[{"prompt":"a"},\n{"x":"b","y":"c"}]',
        r"line 2: the prompt \('prompt'\) of entry 2 is m",
    ),
    "unknown keys": ("p.json", '[{"en": "a", "zh": "b"}]', r"0 keys are named name, .*keys: 'en', 'zh'"),
    "two keys": (
        "p.json",
        '[{"prompt": "a", "text": "b"}]',
        r"2 keys are named .*set prompts.column to one of its keys",
    ),
    "one row": (
        "p.json",
        '{"prompt": "a fox", "negative_prompt": "blurry"}',
        r"the file is one object with the keys 'prompt', 'negative_prompt', not a list .*; write \[ before it",
    ),
    "another layout": (
        "p.json",
        '{"steps": 3, "set": {"x": 1}}',
        r"object with the keys 'steps', 'set' is no known",
    ),
    "a single value": (
        "p.json",
        '"a fox"',
        r"p\.json, line 1: the file is a single JSON value, but must hold a list",
    ),
    "prompts as keys": (
        "p.json",
        '{"a fox": "0.mp4", "a cat": "1.mp4"}',
        r"line 1: the object gives file names, such",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_list_of_prompts_is_refused(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as raised:
        PromptFile(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_a_column_chooses_in_json_too(tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", json.dumps([{"prompt": "no", "long": A}, {"prompt": "no", "long": B}]))
    assert list(PromptFile(path, "long")) == [A, B]
    path = write(tmp_path / "q.json", json.dumps({"train": [A, B], "test": ["no"]}))
    assert list(PromptFile(path, "train")) == [A, B]
    with pytest.raises(ValueError, match="keys 'train', 'test' is no known layout"):
        PromptFile(path)


def test_the_remedy_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="; give --column to one of its columns: 'id'"):
        PromptFile(write(tmp_path / "p.csv", "id\n1\n"), choose="give --column")


@pytest.mark.parametrize(
    ("name", "content", "second"),
    [
        ("p.txt", "a\n\n\nb\n", "line 4"),
        ("p.csv", 'name\n"a\nb"\nc\n', "line 4"),
        ("p.jsonl", '\n{"text":"a"}\n\n{"text":"b"}\n', "line 4"),
        ("p.json", '[\n "a",\n\n "b"]', "line 4, entry 2"),
        ("p.json", '{"prompts":\n[\n{"text": "a"},\n{"text": "b"}]}', "line 4, entry 2"),
    ],
)
def test_every_prompt_knows_its_line(tmp_path: Path, name: str, content: str, second: str) -> None:
    path = write(tmp_path / name, content)
    prompts = PromptFile(path)
    assert place_of(prompts, 1) == f"{path}, {second}"
    both = PromptList(["given"], prompts)
    assert [place_of(both, index) for index in (0, 2)] == ["prompt 1", f"{path}, {second}"]
    assert place_of(["a", "b"], 1) == "prompt 2"


def test_a_fingerprint_is_of_the_texts_and_their_order(tmp_path: Path) -> None:
    first = PromptFile(write(tmp_path / "p.txt", f"{A}\n{B}\n")).fingerprint
    assert first.count == 2
    assert PromptFile(write(tmp_path / "p.json", json.dumps([A, B]))).fingerprint == first
    for other in ([B, A], [A, B, B], [A + B], [A]):
        assert PromptFile(write(tmp_path / "o.json", json.dumps(other))).fingerprint != first


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", A)
    path.chmod(0)
    with pytest.raises(ValueError, match=r"p\.txt: the file cannot be opened \(Permission denied\)"):
        PromptFile(path)


@pytest.mark.parametrize("beside", [{}, {"version": 2}])
def test_a_column_chooses_among_the_objects_of_a_list_under_a_name(
    tmp_path: Path, beside: dict[str, int]
) -> None:
    rows = [{"prompt": "no", "long": A}, {"prompt": "no", "long": B}]
    path = write(tmp_path / "p.json", json.dumps({**beside, "prompts": rows}))
    assert list(PromptFile(path, "long")) == [A, B]
