import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from fake_run import CONFIG, make_run
from PIL import Image

from vpo_engine.metrics.summary import format_summary
from vpo_engine.runs.checkpoint import save_checkpoint
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.gallery import HeldOutGallery, PairGallery, write_held_out, write_pairs
from vpo_engine.runs.log import RunLog, read_metrics
from vpo_engine.runs.report import main, write_report

ATTACK = '<script>alert(1)</script> a "red" square & <img src=x onerror=alert(2)>'
VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """Checks that tags nest; keeps the text, the tags and every attribute that could load something."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.attributes: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.elements.append((tag, dict(attrs)))
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "poster", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "sprites-7")


@pytest.fixture(scope="module")
def page(finished):
    return Page(write_report(finished).read_text(encoding="utf-8"))


def test_the_page_has_every_part(page, finished):
    for text in (
        "sprites-7",
        "Held-out reward and judge are better",
        "Before and after",
        "All 16 clips of the held-out gallery",
        "Curves",
        "Error change of winner and loser",
        "Tie rate",
        "Gradient norm",
        "Damage",
        "Training pairs",
        "The run saved 16 training pairs",
        "Where the time went",
        "Colour change (share)",
        "refresh_every: 10",
    ):
        assert text in page.text, text
    assert page.tags.count("canvas") == 2 * 16 + 2 * 8
    assert page.tags.count("svg") >= 12
    assert "nan" not in re.sub(r"\w*nan\w+|\w+nan\w*", "", page.text)


def test_the_page_is_self_contained_and_small(page, finished):
    assert page.loads
    assert all(url.startswith("data:image/") for url in page.loads)
    source = finished.report.read_text(encoding="utf-8")
    assert "http:" not in source
    assert "https:" not in source
    assert "url(" not in source
    assert len(source) < 4_000_000


def test_a_prompt_is_text_and_never_markup(tmp_path):
    run = make_run(tmp_path / "run", prompts=[ATTACK], steps=12, gallery=2)
    source = write_report(run).read_text(encoding="utf-8")
    page = Page(source)
    assert ATTACK in page.text
    assert page.tags.count("script") == 1
    assert not [name for name in page.attributes if name.startswith("on")]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', source)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "script-src 'sha256-" in policy[1]


def test_hostile_names_and_configuration_are_escaped(tmp_path):
    run = RunDirectory.create_at(tmp_path / "run <b>&", f"name: '{ATTACK}'\n")
    with RunLog(run) as log:
        log.write(0, "eval", {"held_out/pixels/<script>": 1.0})
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "run <b>&" in page.text
    assert ATTACK in page.text
    assert page.tags.count("script") == 1


def test_an_empty_run_says_what_is_missing(tmp_path):
    run = RunDirectory.create_at(tmp_path / "run", CONFIG)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    for text in (
        "Not started yet",
        "No held-out gallery was saved yet",
        "No metrics were logged yet",
        "No training pairs were saved yet",
        "No stage timings were logged yet",
        "There is no summary yet",
    ):
        assert text in page.text, text


def test_a_run_in_its_middle(tmp_path):
    run = RunDirectory.create_at(tmp_path / "run", CONFIG)
    with RunLog(run) as log:
        log.write(1, "train", {"loss": 0.69, "tie_rate": 1.0, "seconds/rollout": 2.0, "seconds/step": 3.0})
        log.write(2, "train", {"tie_rate": 1.0, "seconds/rollout": 2.0, "seconds/step": 3.0})
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "2 of 48 steps so far" in page.text
    assert "Loss" in page.text
    assert "rollout" in page.text
    assert "33.3 %" in page.text, "what no stage accounts for"


def test_the_time_table_says_what_stages_do_and_how_near_the_peak_they_are(finished):
    text = Page(write_report(finished).read_text(encoding="utf-8")).text
    table = text[text.index("Where the time went") : text.index("Held-out measures")]
    for part in ("the policy samples candidates", "of peak", "43 %", "38 %", "72.1 GFLOP/s"):
        assert part in table, part
    assert "candidates per second" in table


def test_a_run_without_measured_speed_has_no_column_for_it(tmp_path):
    run = RunDirectory.create_at(tmp_path / "run", CONFIG)
    with RunLog(run) as log:
        log.write(1, "train", {"seconds/rollout": 2.0, "seconds/step": 3.0})
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "of peak" not in page.text
    assert "outside all stages" in page.text


def test_pairs_of_few_files_are_not_shown_twice(tmp_path):
    run = make_run(tmp_path / "run", steps=12, gallery=2)
    for path in sorted(run.pairs_gallery.iterdir())[1:]:
        path.unlink()
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "the 4 with the largest difference between the winner's and the loser's score." in page.text
    assert page.tags.count("canvas") == 2 * 2 + 2 * 4


def test_the_command(finished, capsys, tmp_path):
    main([str(finished.root)])
    assert capsys.readouterr().out.strip() == str(finished.report)
    with pytest.raises(SystemExit, match="error: there is no run directory at"):
        main([str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match="usage: "):
        main([])


def test_there_is_one_account_of_time(finished):
    """Terminal, report and summary.json give the same total; the tile names mean and median."""
    summary = json.loads(finished.summary.read_text())
    summary["timings"] = {"rollout": 90.0, "update": 30.0, "evaluate": 60.0, "step": 192.0}
    page = Page(report_with(finished, summary))
    assert "Time: 3 min 12 s in all: rollout 1 min 30 s, update 30.0 s" in format_summary(summary)
    assert "Median time per step3.4 smean 4.0 s\n48 steps, 3 min 12 s in all" in page.text
    table = page.text[page.text.index("Where the time went") :]
    assert "The run took 3 min 12 s, evaluations and checkpoints included." in table
    assert "a mean of 4.0 s for each of 48 steps. The median step took 3.4 s." in table
    assert "other outside all stages12.0 s0.25 s6.2 %" in table
    assert "all of it3 min 12 s4.0 s100 %" in table


def report_with(run, summary):
    """Return the page of a run with another summary, and put the run's own summary back."""
    own = run.summary.read_text()
    run.summary.write_text(json.dumps(summary))
    try:
        return write_report(run).read_text(encoding="utf-8")
    finally:
        run.summary.write_text(own)


def test_every_tile_of_a_measure_has_bounds_and_says_whether_it_is_clear(finished):
    summary = json.loads(finished.summary.read_text())
    summary["measures"]["pixels/jitter"] |= {"low": -1.2, "high": 0.1}
    summary["measures"]["judge/selected"] |= {"low": -0.5, "high": -0.1, "difference": -0.3}
    source = report_with(finished, summary)
    tiles = source[source.index('class="tiles"') : source.index("Median time per step")].split(
        'class="tile"'
    )[1:]
    for tile in tiles[:-1]:
        assert "95 %:" in tile
        assert re.search(r'class="result [a-z ]*">(better|worse|not clear|changed)<', tile)
    by_name = {re.search(r'label">([^<]*)', tile)[1]: tile for tile in tiles}
    assert "not clear" in by_name["Jitter"]
    assert "better" not in by_name["Jitter"]
    assert "worse" not in by_name["Jitter"]
    assert "95 %: -82 to +7" in by_name["Jitter"]
    assert 'value worse">-0.30' in by_name["Independent judge"]
    summary["measures"]["pixels/jitter"] |= {"low": None, "high": None}
    assert "one clip" in report_with(finished, summary), "a comparison without bounds"


def test_single_clips_are_never_coloured_as_better_or_worse(finished):
    source = write_report(finished).read_text(encoding="utf-8")
    clips = source[source.index("Before and after") : source.index("<h2>Curves")]
    for word in ("better", "worse", "up", "down"):
        assert not re.search(rf'class="[^"]*\b{word}\b', clips)
    css = source[source.index("<style>") : source.index("</style>")]
    coloured = {
        line.split("{")[0].strip() for line in css.split("}") if re.search(r"var\(--(good|bad)\)", line)
    }
    assert coloured == {".better", ".worse"}


def test_charts_speak_and_carry_the_points_for_the_readout(finished):
    source = write_report(finished).read_text(encoding="utf-8")
    page = Page(source)
    charts = [json.loads(values["data-chart"]) for tag, values in page.elements if "data-chart" in values]
    assert len(charts) == page.tags.count("h3")
    labels = [
        values["aria-label"] for tag, values in page.elements if tag == "svg" and "aria-label" in values
    ]
    assert len(labels) == len(charts)
    accuracy = next(i for i, label in enumerate(labels) if label.startswith("Implicit accuracy"))
    points = dict(charts[accuracy]["series"][0])
    assert charts[accuracy]["percent"] is True
    assert [step for step in range(1, 49) if step not in points] == [1, 11, 21, 31, 41], "n/a after a refresh"
    rows = {row["step"]: row for row in read_metrics(finished.metrics) if row["kind"] == "train"}
    assert points[48] == pytest.approx(rows[48]["implicit_accuracy"], rel=1e-3)
    assert re.fullmatch(
        r"Implicit accuracy: pairs with a margin above zero from [\d.]+\s% at step 2 to [\d.]+\s% at step 48",
        labels[accuracy],
    )


def test_clips_have_alternative_texts(finished):
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    texts = [values["aria-label"] for tag, values in page.elements if tag == "canvas"]
    assert re.fullmatch(r"Clip before training: a red square moves right; score \d\.\d\d", texts[0])
    assert texts[1].startswith("Clip after training: a red square moves right")
    assert sum(text.startswith("Clip that won its pair: ") for text in texts) == 8


def test_cells_carry_their_heads_for_narrow_screens(finished):
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    cells = [values for tag, values in page.elements if tag == "td" and "num" in (values.get("class") or "")]
    assert cells
    assert all(values.get("data-head") for values in cells)


def test_commands_to_go_on(finished, tmp_path):
    text = Page(write_report(finished).read_text(encoding="utf-8")).text
    assert f"tensorboard --logdir {finished.root}" in text
    assert "vpo_engine.sample" not in text, "there is no checkpoint"
    root = tmp_path / "runs" / "my run; $(x)"
    run = make_run(root, steps=12, gallery=2)
    save_checkpoint(
        run.checkpoints,
        12,
        tensors={},
        state={},
        keep=1,
        write_policy=lambda folder: (folder / "model.safetensors").write_bytes(b""),
    )
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert f"tensorboard --logdir {tmp_path / 'runs'}" in text
    assert f"python -m vpo_engine.sample '{root}'" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", '{"measures": {"reward/selected": {}}, "clips": 2, "timings": {}}'),
        ("config.yaml", "a: [1\nb: 2"),
        ("alarms.jsonl", "{}\n"),
        ("alarms.jsonl", "no JSON\n"),
        ("metrics.jsonl", "no JSON\n"),
        ("gallery/held_out.safetensors", "no safetensors"),
        ("gallery/pairs/step_00000001.safetensors", ""),
    ],
)
def test_a_damaged_file_is_an_error_of_one_line_that_names_it(name, content, tmp_path):
    run = RunDirectory.create_at(tmp_path / "run", CONFIG)
    path = run.root / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main([str(run.root)])
    message = str(stopped.value)
    assert message.startswith(f"error: '{path}' ")
    assert re.search("remove|repair", message)
    assert "\n" not in message


def test_a_page_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    run = RunDirectory.create_at(tmp_path / "run", CONFIG)
    run.report.mkdir()
    with pytest.raises(SystemExit, match=r"^error: .*report\.html"):
        main([str(run.root)])


def test_the_score_of_a_clip_is_the_weighted_one_that_was_trained_on(tmp_path):
    given = CONFIG.replace(
        CONFIG[CONFIG.index("  dimensions:") : CONFIG.index("objective:")],
        "  dimensions: {visual_quality: 3.0, text_alignment: 1.0}\n",
    )
    run = RunDirectory.create_at(tmp_path / "run", given)
    clips = torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8)
    before = [{"visual_quality": 1.0, "text_alignment": 5.0, "dynamic_degree": 9.0}]
    after = [{"visual_quality": 2.0, "text_alignment": 5.0, "dynamic_degree": 0.0}]
    write_held_out(
        run.held_out_gallery, HeldOutGallery(clips, clips.clone(), ["a"], before, after, 8, "3 steps")
    )
    page = Page(write_report(run).read_text(encoding="utf-8"))
    shown = [values["aria-label"] for tag, values in page.elements if tag == "canvas"]
    assert shown == ["Clip before training: a; score 2.00", "Clip after training: a; score 2.75"]


def test_every_clip_stands_beside_its_own_score_and_the_widest_pair_comes_first(tmp_path):
    def clips(*levels):
        return torch.stack([torch.full((2, 16, 16, 3), level, dtype=torch.uint8) for level in levels])

    def scored(*values):
        return [{"visual_quality": value} for value in values]

    run = RunDirectory.create_at(tmp_path / "run", CONFIG)
    sides = (scored(1.0, 3.0), scored(2.0, 4.0))
    held_out = HeldOutGallery(clips(10, 20), clips(110, 120), ["a", "b"], *sides, 8, "3 steps")
    write_held_out(run.held_out_gallery, held_out)
    two = PairGallery(
        clips(130, 140), clips(30, 40), ["c", "d"], scored(5.1, 5.5), scored(5.0, 5.0), [0.1, 0.5], 8
    )
    write_pairs(run.pairs_file(1), two)
    write_pairs(
        run.pairs_file(2), PairGallery(clips(150), clips(50), ["e"], scored(5.3), scored(5.0), [0.3], 8)
    )
    page = Page(write_report(run).read_text(encoding="utf-8"))
    urls = [values["src"].partition(",")[2] for tag, values in page.elements if tag == "img"]
    levels = [Image.open(io.BytesIO(base64.b64decode(url))).convert("L").getpixel((0, 0)) for url in urls]
    spoken = [values["aria-label"] for tag, values in page.elements if tag == "canvas"]
    assert list(zip(spoken, levels, strict=True)) == [
        ("Clip before training: a; score 1.00", 10),
        ("Clip after training: a; score 2.00", 110),
        ("Clip before training: b; score 3.00", 20),
        ("Clip after training: b; score 4.00", 120),
        ("Clip that lost its pair: d; score 5.00", 40),
        ("Clip that won its pair: d; score 5.50", 140),
        ("Clip that lost its pair: e; score 5.00", 50),
        ("Clip that won its pair: e; score 5.30", 150),
        ("Clip that lost its pair: c; score 5.00", 30),
        ("Clip that won its pair: c; score 5.10", 130),
    ]
    assert "The score is higher after training in 2 of 2 clips" in page.text
    found = re.findall(r"step (\d), wide gap ([\d.]+)", page.text)
    assert found == [("1", "0.500"), ("2", "0.300"), ("1", "0.100")]


def test_the_head_has_no_settings_that_the_method_does_not_use(tmp_path):
    run = RunDirectory.create_at(tmp_path / "run", CONFIG + "method: refl\n")
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "learning rate 0.0001" in text
    for unused in ("candidates per prompt", "beta 250.0", "K 10"):
        assert unused not in text
