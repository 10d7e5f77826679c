"""Evaluating folders of videos: VBench's layout as it is published, what is refused, and what is kept."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
from evaluation_case import PROMPTS, clip, results_of, run, videos

from vpo_engine.evaluation.chosen_metrics import OF_THE_ENGINE, metric_key
from vpo_engine.evaluation.engine_metrics import MetricOfMeasures, adapted
from vpo_engine.evaluation.folders import read_folder, video_name
from vpo_engine.evaluation.suites import read_suite, vbench_suite
from vpo_engine.metrics.pixels import pixel_measures
from vpo_engine.metrics.registry import build_metric, metric_card
from vpo_engine.runs.video import write_mp4

QUICK = "pixels,proxy_flicker"


def test_two_folders_are_compared_and_the_numbers_are_those_of_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sharpness of the pixels, recomputed by hand from the same files, gives every value and the difference."""
    from vpo_engine.metrics.pixels import pixel_measures
    from vpo_engine.runs.video import read_video

    bright, dim = videos(tmp_path / "bright", 160), videos(tmp_path / "dim", 120)
    assert run(bright, "--baseline", dim, "--metrics", QUICK, "--out", tmp_path / "out") == 0
    results = results_of(tmp_path / "out")
    by_hand = {
        folder: [
            pixel_measures(read_video(folder / f"{prompt}-{index}.mp4")[0].unsqueeze(0), [prompt])[
                "sharpness"
            ].item()
            for prompt in sorted(PROMPTS)
            for index in range(2)
        ]
        for folder in (bright, dim)
    }
    rows = results["videos"]
    assert [row["policy"]["values"]["pixels/sharpness"] for row in rows] == by_hand[bright]
    assert [row["baseline"]["values"]["pixels/sharpness"] for row in rows] == by_hand[dim]
    entry = results["measures"]["pixels/sharpness"]
    mean = {folder: sum(values) / 8 for folder, values in by_hand.items()}
    assert entry["policy"]["value"] == pytest.approx(mean[bright])
    assert entry["comparison"]["difference"] == pytest.approx(mean[bright] - mean[dim])
    assert entry["comparison"]["better"] == 4
    assert entry["comparison"]["prompts"] == 4
    assert results["partial"] is False
    assert results["settings"]["same_noise"] is False
    provenance = entry["policy"]["provenance"]
    assert (provenance["count"], provenance["fps"], provenance["resolution"]) == (8, [8.0], ["32x32"])
    assert list(results["proxies"]) == ["proxy_flicker"]
    assert not any(name.startswith("proxy") for name in results["measures"])
    said = capsys.readouterr().out
    assert "Stand-ins, which are not VBench" in said
    assert "Holm" in said


def test_one_folder_alone_and_its_prompts_of_a_file(tmp_path: Path) -> None:
    """Names that sample writes, and a prompts.jsonl beside them, give the prompts."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for copy in range(2):
        write_mp4(folder / f"0000-words-{copy}.mp4", clip(150), 8, min_side=32)
    rows = [{"video": f"0000-words-{copy}.mp4", "prompt": "a cat/dog, 3-0"} for copy in range(2)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(folder, "--metrics", QUICK, "--out", tmp_path / "out") == 0
    results = results_of(tmp_path / "out")
    assert [(row["prompt"], row["index"]) for row in results["videos"]] == [
        ("a cat/dog, 3-0", 0),
        ("a cat/dog, 3-0", 1),
    ]
    assert "comparison" not in results["measures"]["pixels/motion"]


def test_vbench_prompts_and_layout_go_in_as_they_are_published(tmp_path: Path) -> None:
    """Every published prompt keeps its own name, dashes, quotes and all, and is read back from it."""
    suite = vbench_suite()
    assert len(suite.prompts) == 326
    folder = tmp_path / "videos"
    folder.mkdir()
    for number, prompt in enumerate(suite.prompts):
        assert video_name(number, prompt, 4) == f"{prompt}-4.mp4"
        (folder / f"{prompt}-4.mp4").touch()
    assert {video.key for video in read_folder(folder)} == {(prompt, 4) for prompt in suite.prompts}
    assert {video.key for video in read_folder(folder, suite)} == {(prompt, 4) for prompt in suite.prompts}


def test_each_dimension_has_its_published_prompts_and_number_of_videos() -> None:
    suite = vbench_suite()
    counts = {
        "subject_consistency": 72 * 5,
        "background_consistency": 86 * 5,
        "temporal_flickering": 75 * 25,
        "motion_smoothness": 72 * 5,
        "dynamic_degree": 72 * 5,
        "aesthetic_quality": 93 * 5,
        "imaging_quality": 93 * 5,
    }
    cards = {name: metric_card(name) for name in counts}
    cards["temporal_flickering"] = metric_card("temporal_flickering_filtered")
    for name, count in counts.items():
        planned = suite.videos([cards[name]])
        assert len(planned) == count
        assert all(suite.covers(cards[name], prompt, index) for _, prompt, index in planned)
    assert len(suite.videos(list(cards.values()))) == 3130
    assert len(suite.videos([cards["subject_consistency"], OF_THE_ENGINE["pixels"]])) == 326 * 5
    assert len(suite.videos([metric_card("temporal_flickering")])) == 75 * 5, (
        "without the filter, as VBench reads them"
    )
    assert len(vbench_suite(samples=2).videos([cards["temporal_flickering"]])) == 150


def test_vbenchs_own_file_of_dimensions_is_read(tmp_path: Path) -> None:
    """VBench_full_info.json names the dimensions of each prompt; the same prompt may stand there more than once."""
    file = tmp_path / "VBench_full_info.json"
    rows = [
        {"prompt_en": "a cat, still", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a dog", "dimension": ["subject_consistency", "dynamic_degree"]},
        {"prompt_en": "a dog", "dimension": ["motion_smoothness"]},
    ]
    file.write_text(json.dumps(rows))
    suite = read_suite(str(file))
    assert suite.prompts == ("a cat, still", "a dog")
    assert len(suite.videos([metric_card("temporal_flickering_filtered")])) == 25
    assert [row[1:] for row in suite.videos([metric_card("motion_smoothness")])] == [
        ("a dog", index) for index in range(5)
    ]


def test_prompts_that_no_file_name_can_have_get_the_names_of_sample() -> None:
    long, slash = "word " * 80 + "end", "a cat/dog"
    for number, prompt in enumerate((long, slash, "line\nbreak", ".hidden", "back\\slash")):
        name = video_name(number, prompt, 3)
        assert name.startswith(f"{number:04d}-")
        assert name.endswith("-3.mp4")
        assert "/" not in name
        assert len(name.encode()) < 255
    assert video_name(0, long, 0) != video_name(0, long + "s", 0)


def test_videos_that_cannot_be_measured_are_named_and_the_others_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged, a larger, a one-frame and a missing video: each is named with what to do, and the exit code is 1."""
    folder = videos(tmp_path / "clips", 150)
    damaged, larger, single = (folder / f"{prompt}-0.mp4" for prompt in PROMPTS[:3])
    damaged.write_bytes(damaged.read_bytes()[:700])
    write_mp4(larger, clip(150, side=64), 8, min_side=32)
    write_mp4(single, clip(150, frames=1), 8, min_side=32)
    (folder / f"{PROMPTS[3]}-0.mp4").unlink()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    out = tmp_path / "out"
    words = (folder, "--prompts", prompts, "--samples", "2", "--metrics", QUICK, "--out", out)
    assert run(*words) == 1
    results = results_of(out)
    problems = results["problems"]["policy"]
    assert results["partial"] is True
    assert set(problems) == {damaged.name, larger.name, single.name, f"{PROMPTS[3]}-0.mp4"}
    assert "give a video file that a player can play" in problems[damaged.name]
    assert (
        "has 17 frames of 64 x 64 at 8 fps, but most videos here have 17 frames of 32 x 32"
        in problems[larger.name]
    )
    assert "has 1 frames of 32 x 32" in problems[single.name]
    assert results["measures"]["pixels/motion"]["policy"]["provenance"]["count"] == 4
    said = capsys.readouterr().out
    assert "PARTIAL" in said
    assert all(name in " ".join(said.split()) for name in problems)
    page = (out / "evaluation.html").read_text()
    assert "These results are partial" in page


def test_a_metric_that_fails_on_one_video_is_named_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vpo_engine.evaluation import engine_metrics
    from vpo_engine.metrics.pixels import pixel_measures

    folder = videos(tmp_path / "clips", 150)
    failing = PROMPTS[1]

    def fail_once(frames: object, prompts: list[str]) -> object:
        if prompts[0] == failing:
            raise KeyError("a broken table")
        return pixel_measures(frames, prompts)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_metrics, "pixel_measures", fail_once)
    out = tmp_path / "out"
    assert run(folder, "--metrics", QUICK, "--out", out) == 1
    failed = results_of(out)["measures"]["pixels/motion"]["failed"]["policy"]
    assert set(failed) == {f"{failing}-0.mp4", f"{failing}-1.mp4"}
    assert "KeyError" in failed[f"{failing}-0.mp4"]
    assert results_of(out)["proxies"]["proxy_flicker"]["failed"]["policy"] == {}
    monkeypatch.undo()
    assert run(folder, "--metrics", QUICK, "--out", out) == 0, "what failed is tried again"
    assert results_of(out)["partial"] is False


def test_only_what_is_missing_is_computed_and_a_changed_video_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped evaluation goes on: a row that was cut off is dropped, and known bytes are not measured again."""
    from vpo_engine.evaluation import engine_metrics
    from vpo_engine.metrics.pixels import pixel_measures

    measured: list[str] = []

    def count(frames: object, prompts: list[str]) -> object:
        measured.extend(prompts)
        return pixel_measures(frames, prompts)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_metrics, "pixel_measures", count)
    folder, out = videos(tmp_path / "clips", 150), tmp_path / "out"
    words = (folder, "--metrics", "pixels", "--out", out)
    assert run(*words) == 0
    first = results_of(out)
    assert len(measured) == 8
    rows = (out / "records" / "process_0.jsonl").read_bytes().splitlines(keepends=True)
    (out / "records" / "process_0.jsonl").write_bytes(b"".join(rows[:-2]) + rows[-2][:40])
    measured.clear()
    assert run(*words) == 0
    assert len(measured) == 2, "the last row, and the one that was cut off"
    assert results_of(out) == first
    write_mp4(folder / f"{PROMPTS[0]}-0.mp4", clip(90), 8, min_side=32)
    (folder / f"{PROMPTS[1]}-0.mp4").rename(folder / f"{PROMPTS[1]}-7.mp4")
    measured.clear()
    assert run(*words) == 0
    assert measured == [PROMPTS[0]]
    measured.clear()
    assert run(folder, "--metrics", "pixels,proxy_flicker", "--out", out) == 0
    assert measured == []
    assert "proxy_flicker" in results_of(out)["proxies"]


def test_a_start_with_a_damaged_record_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = videos(tmp_path / "clips", 150, count=1), tmp_path / "out"
    assert run(folder, "--metrics", "pixels", "--out", out) == 0
    (out / "records" / "process_0.jsonl").write_text('{"kind": "elephant"}\n')
    assert run(folder, "--metrics", "pixels", "--out", out) == 1
    assert "process_0.jsonl, line 1 is damaged" in capsys.readouterr().err


def test_numbers_of_different_settings_never_stand_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = videos(tmp_path / "one", 150, count=1), videos(tmp_path / "other", 120, count=1, fps=12)
    out = tmp_path / "out"
    assert run(one, "--baseline", other, "--metrics", QUICK, "--out", out) == 1
    said = capsys.readouterr().err
    assert "frames per second: 8 and 12" in said
    assert "without --baseline" in said
    assert not (out / "results.json").exists()
    assert run(one, "--metrics", QUICK, "--out", tmp_path / "a") == 0
    assert run(other, "--metrics", QUICK, "--out", tmp_path / "a") == 1
    assert f"policy.videos: {one} -> {other}" in capsys.readouterr().err
    half = videos(tmp_path / "half", 150, PROMPTS[:1], count=1)
    write_mp4(half / "a cat on a mat-0.mp4", clip(150, side=64), 8, min_side=32)
    assert run(half, "--metrics", QUICK, "--out", tmp_path / "b") == 1
    assert "half of the videos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--metrics", "pixls"], "there is no metric 'pixls'; did you mean 'pixels'"),
        (["--metrics", "reward:videoscore"], "reward:videoscore needs a local path to its weights"),
        (
            ["--metrics", "reward:videoscore", "--weights", "reward:videoscore=/nowhere"],
            "there is nothing at /nowhere",
        ),
        (["--metrics", "pixels", "--weights", "other=/x"], "'other' is none of the metrics"),
        (["--metrics", "pixels", "--reference", "/x"], "none of the metrics is a distance"),
        (["--samples", "0"], "--samples 0 must be from 1 to 10000 videos for each prompt"),
        (["--prompts", "gone.txt"], "there is no such prompt file"),
        (["--prompts", "vbench", "--metrics", "pixels"], "is of a prompt of vbench"),
        (["--baseline"], "is no run; give the baseline as a run"),
        (["rollout.steps=3", "--metrics", "pixels"], "is a setting for sampling"),
    ],
)
def test_what_the_words_alone_tell_is_refused_at_the_start(
    words: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = videos(tmp_path / "clips", 150, PROMPTS[:1], count=1), tmp_path / "out"
    assert run(folder, *words, "--out", out) == 1
    said = capsys.readouterr().err
    assert part in said
    assert said.startswith("error: ")
    assert not out.exists()


def test_a_folder_that_is_taken_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = videos(tmp_path / "clips", 150, PROMPTS[:1], count=1), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert run(folder, "--out", out) == 1
    assert "is not empty and holds no evaluation" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


def test_a_video_whose_name_leaves_no_prompt_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = videos(tmp_path / "clips", 150, PROMPTS[:1], count=1), tmp_path / "out"
    next(folder.glob("*.mp4")).rename(folder / "_-0.mp4")
    assert run(folder, "--metrics", "pixels", "--out", out) == 1
    assert "the name of _-0.mp4 leaves no prompt; rename it" in capsys.readouterr().err
    assert not out.exists()


def test_repeated_prompts_are_refused_with_both_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, prompts = videos(tmp_path / "clips", 150, count=1), tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*PROMPTS, PROMPTS[1]]))
    assert run(folder, "--prompts", prompts) == 1
    assert f"prompts 2 and 5 are both {PROMPTS[1]!r}" in capsys.readouterr().err


def test_vbenchs_leaderboard_script_reads_the_result(tmp_path: Path) -> None:
    """The score of a dimension is the first entry, as scripts/cal_final_score.py takes it; stand-ins are not there."""
    folder, out = videos(tmp_path / "clips", 150), tmp_path / "out"
    prompts = tmp_path / "VBench_full_info.json"
    rows = [{"prompt_en": prompt, "dimension": ["temporal_flickering"]} for prompt in PROMPTS[:2]]
    rows += [{"prompt_en": prompt, "dimension": ["scene"]} for prompt in PROMPTS[2:]]
    prompts.write_text(json.dumps(rows))
    words = ("--metrics", "temporal_flickering,proxy_flicker,pixels", "--samples", "2", "--out", out)
    assert run(folder, "--prompts", prompts, *words) == 0
    with zipfile.ZipFile(out / "vbench" / "policy.zip") as archive:
        archive.extractall(tmp_path / "mine")
    content = json.loads((tmp_path / "mine" / "policy_eval_results.json").read_text())
    upload = {key.replace("_", " "): value[0] for key, value in content.items()}
    results = results_of(out)
    assert upload == {"temporal flickering": results["measures"]["temporal_flickering"]["policy"]["value"]}
    listed = content["temporal_flickering"][1]
    assert len(listed) == 4, "the two prompts of this dimension alone"
    assert sum(each["video_results"] for each in listed) / 4 == pytest.approx(
        content["temporal_flickering"][0]
    )
    assert all(Path(each["video_path"]).is_file() for each in listed)
    assert results["measures"]["pixels/motion"]["policy"]["provenance"]["count"] == 8


def test_the_list_of_metrics_says_what_must_be_downloaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list") == 0
    said = capsys.readouterr().out
    assert "pixels:sprites" in said
    assert "reward:videoscore" in said
    assert "download" in said


def test_the_help_is_there_without_torch() -> None:
    """Errors of the words alone need no torch: the entry imports it only where videos are looked at."""
    import subprocess

    script = (
        "import sys; from vpo_engine import evaluate; code = evaluate.main(['nowhere', '--samples', '0']); "
        "assert code == 1; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_records_of_other_weights_or_settings_are_not_taken() -> None:
    card = OF_THE_ENGINE["pixels"]
    one, same, other = (
        MetricOfMeasures(card, pixel_measures, ("motion",), sprites=False, weights={"a.pth": digit * 64})
        for digit in "112"
    )
    assert metric_key(one) == metric_key(same)
    assert metric_key(one) != metric_key(other)
    flicker = build_metric("proxy_flicker")
    assert metric_key(adapted(flicker, sprites=True)) != metric_key(adapted(flicker, sprites=False))
