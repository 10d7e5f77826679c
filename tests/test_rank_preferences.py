"""Rankings of preferences by ``python -m vpo_engine.rank``, and preference files that are refused."""

import json
import re
from pathlib import Path

import pytest
import video_cases
from rank_case import CAPTIONS, fails, frozen, read_csv, sprites

from vpo_engine.data.clips import read_preferences
from vpo_engine.metrics.ranking import rank_preferences
from vpo_engine.metrics.ranking_report import format_ranking, write_ranking_csv
from vpo_engine.rank import GLOBAL, main
from vpo_engine.rewards.sprites import DIMENSIONS
from vpo_engine.runs.video import write_mp4


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per caption a folder of a clean clip, the other caption and a frozen one; the clean ones are preferred."""
    folder = tmp_path_factory.mktemp("videos")
    rows = []
    for number, caption in enumerate(CAPTIONS):
        (folder / str(number)).mkdir()
        clips = [frozen(sprites(caption, 1)), sprites(caption), sprites(CAPTIONS[1 - number], 2)]
        names = [f"{number}/{kind}.mp4" for kind in ("frozen", "clean", "other")]
        for name, clip in zip(names, clips, strict=True):
            write_mp4(folder / name, clip, 8)
        rows.append({"prompt": caption, "videos": names, "preferred": 1})
    (folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class TestPreferences:
    def test_ranking_with_sprites(
        self, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The clean clip is best overall; text alignment tells the other caption, dynamic degree the frozen clip."""
        arguments = [str(shared), "--reward", "sprites", "--preferences", str(shared / "preferences.jsonl")]
        assert main([*arguments, "--out", str(tmp_path)]) == 0
        table = capsys.readouterr().out.splitlines()
        assert re.split(r"\s{2,}", table[0].strip()) == ["MRR", "recall@1", "recall@2", "recall@4"]
        (line,) = [line for line in table if line.startswith(GLOBAL)]
        assert re.split(r"\s{2,}", line)[1:] == ["100.00 [100.0, 100.0]"] * 4
        assert "chance" in table[-3]
        assert "61.11" in table[-3]  # of 3 candidates: (1 + 1/2 + 1/3) / 3
        assert table[-1].startswith("2 prompts; per cent, in brackets 95%")

        rows = {(row["score"], row["measure"]): row for row in read_csv(tmp_path / "ranking.csv")}
        assert rows[GLOBAL, "mrr"]["value"] == "1.0"
        assert {score for score, _ in rows} == {*DIMENSIONS, GLOBAL}
        scores = {row["video"]: row for row in read_csv(tmp_path / "scores.csv")}
        for number in range(2):
            assert float(scores[f"{number}/other.mp4"]["text_alignment"]) < 3
            assert float(scores[f"{number}/frozen.mp4"]["dynamic_degree"]) < 2
        assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "ranking.png").stat().st_size > 10_000

    def test_a_second_run_writes_the_same(self, shared: Path, tmp_path: Path) -> None:
        arguments = [str(shared), "--reward", "sprites", "--preferences", str(shared / "preferences.jsonl")]
        for out in ("one", "two"):
            assert main([*arguments, "--out", str(tmp_path / out)]) == 0
        for name in ("scores.csv", "ranking.csv", "ranking.png"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    def test_one_prompt_has_no_interval(self, tmp_path: Path) -> None:
        rankings = {"only": rank_preferences([[1.0, 0.0, 2.0]], [0])}
        assert "50.00" in format_ranking(rankings)
        assert "50.00 [" not in format_ranking(rankings)
        write_ranking_csv(tmp_path / "r.csv", rankings)
        assert read_csv(tmp_path / "r.csv")[0] | {"chance": ""} == {
            "score": "only",
            "measure": "mrr",
            "value": "0.5",
            "low": "",
            "high": "",
            "chance": "",
            "prompts": "1",
        }

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 1: not JSON"),
            (
                '{"prompt": "p", "videos": ["0/clean.mp4"]}',
                'expected an object with "prompt", "videos" and "preferred"',
            ),
            ('{"prompt": " ", "videos": [], "preferred": 0}', "prompt is ' ', expected text"),
            ('{"prompt": "p", "videos": ["a"], "preferred": 0}', "expected at least two different files"),
            (
                '{"prompt": "p", "videos": ["a", "a"], "preferred": 0}',
                "expected at least two different files",
            ),
            (
                '{"prompt": "p", "videos": ["a", "b"], "preferred": 2}',
                "preferred is 2, expected a position from 0 to 1",
            ),
            (
                '{"prompt": "p", "videos": ["a", "b"], "preferred": true}',
                "preferred is True, expected a position",
            ),
            ('{"prompt": "p", "videos": ["0/clean.mp4", "b"], "preferred": 0}', "there is no video 'b' in"),
            ("", "holds no preferences; give one object per line"),
        ],
    )
    def test_bad_rows(self, shared: Path, tmp_path: Path, line: str, message: str) -> None:
        file = tmp_path / "preferences.jsonl"
        file.write_text(line + "\n")
        with pytest.raises(ValueError, match=re.escape(message)):
            read_preferences(file, shared)

    def test_lines_end_at_newlines_only(self, tmp_path: Path) -> None:
        """JSON strings may hold U+2028, U+2029 and U+0085; a byte order mark and Windows line ends are no text."""
        for name in ("a.mp4", "b.mp4"):
            (tmp_path / name).touch()
        (row,) = read_preferences(video_cases.CASES / "preferences.jsonl", tmp_path)
        assert "\u2028" in row.clips[0].prompt
        prompt = "one\u2029two\x85three\x0cfour"
        row = {"prompt": prompt, "videos": ["a.mp4", "b.mp4"], "preferred": 0}
        text = json.dumps(row, ensure_ascii=False)
        (tmp_path / "p.jsonl").write_bytes(f"\ufeff{text}\r\n\r\n{text}\r\n".encode())
        rows = read_preferences(tmp_path / "p.jsonl", tmp_path)
        assert [each.clips[0].prompt for each in rows] == [prompt] * 2

    def test_text_that_is_not_utf8(self, shared: Path, tmp_path: Path) -> None:
        (tmp_path / "p.jsonl").write_bytes(b'\n{"prompt": "caf\xe9"}\n')
        with pytest.raises(
            ValueError, match=r"p\.jsonl, line 2: byte .* is not UTF-8; save the file as UTF-8"
        ):
            read_preferences(tmp_path / "p.jsonl", shared)

    def test_missing_file(self, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
        absent = shared / "absent.jsonl"
        error = fails(capsys, shared, "--reward", "sprites", "--preferences", absent)
        assert f"there is no file of preferences at {absent}" in error
