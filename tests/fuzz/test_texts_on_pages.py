"""Prompts, names and paths of strangers on pages: a parser finds them as they are, and finds nothing else."""

from __future__ import annotations

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_driver import fuzz
from hypothesis import strategies as st

from vpo_engine.evaluation.page import write_page
from vpo_engine.evaluation.study import _page as study_page
from vpo_engine.evaluation.votes import format_votes
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.gallery import HeldOutGallery, write_held_out
from vpo_engine.runs.report import write_report
from vpo_engine.runs.video import write_mp4
from vpo_engine.texts import code_span, markdown, printable

HOSTILE = st.sampled_from(
    ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><b>', "' onload='x", "&lt;b&gt;", "&amp;",
     "<!--", "-->", "]]>", "</title>", "</style>", "</p>", "<p", "&#60;", "$data", "${study}", "{0}", "%s", "\\u003c",
     "a\u2028b", "\u202eevil", "\x1b]0;title\x07", "javascript:x", "`", "| a |", "**b**", "a_b_", "\\", "# h", "- i",
     "[a](b)", "![a](b)", "~~a~~", "<a@b.c>", "https://a.b"]
)  # fmt: skip
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")
TEXTS = (
    st.lists(HOSTILE | st.text(CHARACTERS, max_size=10), min_size=1, max_size=3).map(" ".join).map(str.strip)
)
PROMPTS = TEXTS.filter(bool)


class Page(HTMLParser):
    """The elements, attributes and texts of a page."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self._begun = False
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        self._begun = False

    def handle_endtag(self, tag: str) -> None:
        self.elements[f"/{tag}"] += 1
        self._begun = False

    def handle_comment(self, data: str) -> None:
        self.elements["!--"] += 1

    def handle_data(self, data: str) -> None:
        if self._begun:
            self.texts[-1] += data
        else:
            self.texts.append(data)
        self._begun = True

    @property
    def names(self) -> Counter[tuple[str, str]]:
        return Counter((tag, name) for tag, name, _ in self.attributes)

    def values(self, name: str) -> list[str | None]:
        return [value for _, key, value in self.attributes if key == name]


def check_same_page(hostile: str, harmless: str) -> Page:
    """Compare a page with the one that harmless texts give: elements and attributes are the same."""
    found, expected = Page(hostile), Page(harmless)
    assert found.elements == expected.elements
    assert found.names == expected.names
    return found


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    write_mp4(path, torch.full((3, 16, 16, 3), 90, dtype=torch.uint8), 8, min_side=16)
    return path


def results(prompt: str, label: str, why: str, video: Path) -> dict[str, Any]:
    """Return results of one policy and one video, with the texts in every place that holds one."""
    provenance = {
        "version": "1", "backbone": "none", "frames": 3, "fps": 8.0, "resolution": [16, 16], "count": 1,
        "aggregation": "mean", "settings": {}, "weights": {"w.pt": "0"}, "prompts": "0",
    }  # fmt: skip
    entry = {
        "metric": "m", "output": "", "group": "pixels", "dimension": "", "label": "Motion", "unit": "", "meaning": "x",
        "better": 1, "failed": {"policy": {label: why}},
        "policy": {"value": 1.0, "notes": [why], "partial": False, "others": {}, "provenance": provenance},
    }  # fmt: skip
    row = {"prompt": prompt, "index": 0, "policy": {"file": str(video), "sha256": "0", "values": {"m": 1.0}}}
    settings = {"frames": 3, "height": 16, "width": 16, "fps": 8.0, "prompts": {"count": 1, "source": label}}
    return {
        "partial": True, "settings": settings, "arms": {"policy": {"label": label, "videos": 1}},
        "measures": {"m": entry}, "proxies": {}, "problems": {"policy": {f"{label} 2": why}},
        "unloaded": {"n": why}, "statistics": "", "videos": [row],
    }  # fmt: skip


@fuzz(prompt=PROMPTS, label=PROMPTS, why=PROMPTS)
def test_the_page_of_an_evaluation(folder: Path, video: Path, prompt: str, label: str, why: str) -> None:
    pages = []
    for texts in ((prompt, label, why), ("a", "b", "c")):
        write_page(folder / "e.html", results(*texts, video))
        pages.append((folder / "e.html").read_bytes().decode())
    page = check_same_page(*pages)
    assert prompt in page.texts
    assert prompt in page.values("title")
    assert f"Evaluation of {label}" in page.texts, "the title"
    assert any(why in text for text in page.texts)
    assert json.loads(page.values("data-values")[0] or "") == {"m": [1.0]}


@fuzz(prompt=PROMPTS, name=st.text(st.sampled_from("0123456789abcdef"), min_size=16, max_size=16))
def test_the_page_of_a_study(prompt: str, name: str) -> None:
    pairs = [{"id": "pair-000", "prompt": prompt, "left": f"videos/{name}.mp4", "right": "videos/b.mp4"}]
    size = {"height": 16, "width": 16}
    harmless = study_page("s", [{**pairs[0], "prompt": "a"}], size)
    page = check_same_page(study_page("s", pairs, size), harmless)
    assert json.loads(page.values("data-study")[0] or "") == {"study": "s", "pairs": pairs}


@fuzz(prompt=PROMPTS, name=PROMPTS, text=PROMPTS)
def test_the_report_of_a_run(folder: Path, prompt: str, name: str, text: str) -> None:
    pages = []
    for number, texts in enumerate(((prompt, name, text), ("a", "b", "c"))):
        pages.append(report(folder / str(number), *texts))
    page = check_same_page(*pages)
    assert prompt in page.texts
    assert prompt in page.values("title")
    assert any(text in found for found in page.texts), "the alarm"


def report(root: Path, prompt: str, name: str, text: str) -> str:
    """Return the report of a run whose files hold the texts."""
    run = RunDirectory.create_at(root / "run", "steps: 3\n" + json.dumps({"name": name})[1:-1] + "\n")
    clips = torch.full((1, 2, 8, 8, 3), 60, dtype=torch.uint8)
    scores = [{"visual_quality": 1.0}]
    write_held_out(
        run.held_out_gallery, HeldOutGallery(clips, clips.clone(), [prompt], scores, scores, 8, text)
    )
    run.alarms.write_text(json.dumps({"step": 1, "kind": "prompt", "text": text}) + "\n")
    run.metrics.write_text(json.dumps({"step": 1, "kind": "train", "loss": 1.0}) + "\n")
    return write_report(run).read_bytes().decode()


@fuzz(text=TEXTS)
def test_markdown(text: str) -> None:
    shown = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    for content in (f"a {markdown(text)} b", f"| h |\n|---|\n| {markdown(f'a {text} b')} |"):
        assert f"a {shown} b" == rendered(content).strip().removeprefix("h").strip()
    assert shown.strip() == rendered(f"a {code_span(text)}").removeprefix("a").strip() or not shown.strip()


def rendered(content: str) -> str:
    """Return the text that readers of a Markdown page see, as CommonMark and GitHub's tables say."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    return "".join(Page(parser.render(content)).texts)


@fuzz(rater=TEXTS, label=TEXTS)
def test_the_table_of_votes(rater: str, label: str) -> None:
    share = {"wins": 1, "ties": 0, "losses": 0, "win_rate": 1.0, "low": 0.2, "high": 1.0}
    found = {
        "arms": {"policy": label, "baseline": "b"}, "pairs": 1, "votes": share, "by_pair": share,
        "by_rater": {rater: share}, "left_chosen": {"share": None},
        "agreement": {"krippendorff_alpha": None, "raters": 1},
    }  # fmt: skip
    assert len(format_votes(found).split("\n")) == 9
