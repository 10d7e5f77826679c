"""The prompts of a run: what is said of them at its start, and what happens if they change before it is resumed."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from vpo_engine import sample
from vpo_engine import train as entry
from vpo_engine.build import build_prompts
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.data.prompts import PromptStream
from vpo_engine.data.sprites.world import all_captions, withheld_captions
from vpo_engine.metrics.held_out import HeldOut
from vpo_engine.runs.log import read_metrics
from vpo_engine.train import train

Make = Callable[..., Config]
HELD_OUT = withheld_captions()[:2]
MANY = [caption for caption in all_captions() if caption not in withheld_captions()]
TRAIN = MANY[:6]
STRANGE = "a purple hexagon moving sideways"


class Picky:
    """A reward of one's own that scores brightness, and refuses prompts with a question mark."""

    dimensions = ("brightness",)

    def refuse_prompt(self, prompt: str) -> str | None:
        return "it asks something" if "?" in prompt else None

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        assert not any("?" in prompt for prompt in prompts)
        return {"brightness": videos.float().mean(dim=(1, 2, 3, 4))}


def write(path: Path, prompts: Sequence[str]) -> Path:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    """Write prompt files, and return the settings that name them."""

    def make(train: Sequence[str] = TRAIN, held_out: Sequence[str] = HELD_OUT) -> list[str]:
        write(tmp_path / "train.txt", train)
        write(tmp_path / "held_out.txt", held_out)
        return [
            f"prompts.train={tmp_path / 'train.txt'}",
            f"prompts.held_out={tmp_path / 'held_out.txt'}",
            "evaluation.prompts=null",
        ]

    return make


@pytest.fixture
def nothing_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled(*_: object) -> None:
        raise AssertionError("a video was sampled")

    monkeypatch.setattr(HeldOut, "evaluate", sampled)


def starts(config: Config) -> None:
    """Run until the first video would be sampled."""
    with pytest.raises(AssertionError, match="a video was sampled"):
        train(config)


# --- before the first step -------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_sampled")
@pytest.mark.parametrize("where", ["train", "held_out"])
@pytest.mark.parametrize("process", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_caption_that_the_scorer_refuses_stops_the_run_at_its_start(
    small: Make, files: Callable[..., list[str]], tmp_path: Path, where: str, process: bool
) -> None:
    """It is the last one of its file, and no step would have taken it."""
    chosen = {"train": [*TRAIN, STRANGE], "held_out": [*HELD_OUT, STRANGE]}
    config = small(*files(**{where: chosen[where]}), "steps=1", f"reward.process={process}")
    row = len(chosen[where])
    message = (
        rf"{where}\.txt, line {row}: reward\.kind=sprites does not score this prompt: caption '{STRANGE}' is not one "
        rf"of the sprites world; .*1 of {row} prompts cannot be used: delete or change these rows, or set another "
        r"reward\.kind"
    )
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("nothing_sampled")
@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_the_judge_and_rewards_of_ones_own_are_asked_too(
    small: Make, files: Callable[..., list[str]]
) -> None:
    brisque = ("reward.kind=brisque", "reward.dimensions=global")
    free = files(["a fox", "a hare?", "a hare", "a cat?"], ["a dog"])
    judged = r"held_out\.txt, line 1: the judge of the sprites world does not score this prompt.*set guards\.reward to"
    with pytest.raises(ValueError, match=judged):
        train(small(*free, *brisque))
    own = "test_run_prompts:Picky"
    message = rf"train\.txt, line 2: reward\.kind={own} .*: it asks something; likewise .*train\.txt, line 4\. 2 of 4 "
    with pytest.raises(ValueError, match=message):
        train(small(*free, f"reward.kind={own}", "reward.dimensions=global", "guards.reward.kind=brisque"))
    free = files(TRAIN, [*HELD_OUT, "a dog?"])
    with pytest.raises(
        ValueError, match=rf"held_out\.txt, line 3: guards\.reward\.kind={own} does not score"
    ):
        train(small(*free, *brisque, f"guards.reward.kind={own}"))


@pytest.mark.usefixtures("nothing_sampled")
def test_what_is_odd_about_prompts_is_said_at_the_start(
    small: Make, files: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run takes them; repeats count as often as they stand there, and blank lines are no prompts."""
    prompts = files([TRAIN[0], TRAIN[1], TRAIN[0], HELD_OUT[1], TRAIN[0]], [*HELD_OUT, "", "  "])
    starts(small(*prompts, "prompts.column=name"))
    shown = capsys.readouterr().out
    assert f"prompts.train has 2 prompts that repeat an earlier one, such as '{TRAIN[0]}' (3 times)" in shown
    assert f"1 of 2 held-out prompts are training prompts, too, such as '{HELD_OUT[1]}'" in shown
    assert f"held_out.txt, line 2; {tmp_path / 'train.txt'}, line 4)" in shown
    assert "prompts.column=name is not used: .txt files have no columns" in shown


@pytest.mark.usefixtures("nothing_sampled")
@pytest.mark.long
def test_the_usual_names_are_tried_where_only_the_other_file_has_the_column(
    small: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.csv").write_text("id,words\n" + "".join(f"1,{each}\n" for each in TRAIN))
    (tmp_path / "held_out.csv").write_text("id,prompt\n" + "".join(f"1,{each}\n" for each in HELD_OUT))
    named = [f"prompts.train={tmp_path / 'train.csv'}", f"prompts.held_out={tmp_path / 'held_out.csv'}"]
    starts(small(*named, "prompts.column=words"))
    said = "held_out.csv has no column 'words' (prompts.column); the usual names were tried"
    assert said in capsys.readouterr().out
    missing = r"train\.csv: column 'wrods' occurs 0 times.*set prompts\.column to one of"
    with pytest.raises(ValueError, match=missing):
        train(small(*named, "prompts.column=wrods", f"run_dir={tmp_path / 'other'}"))


@pytest.mark.usefixtures("nothing_sampled")
@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_of_a_long_file_all_prompts_are_asked_that_the_run_takes(
    small: Make, files: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the number that is looked at anyway, a strange prompt matters only if a step takes it."""
    monkeypatch.setattr("vpo_engine.data.prompt_checks.LOOKED_AT", 1)
    settings = ("steps=1", "pairs_per_step=2")
    stream = PromptStream(MANY, small().seed)
    taken = {stream.index(position) for position in range(2)}
    beyond = next(number for number in range(1, len(MANY)) if number not in taken)
    number = max(taken)
    assert number > 3
    with pytest.raises(ValueError, match=f"line {number + 1}: reward.kind=sprites"):
        train(small(*files([*MANY[:number], STRANGE, *MANY[number + 1 :]]), *settings))
    starts(small(*files([*MANY[:beyond], STRANGE, *MANY[beyond + 1 :]]), *settings))


# --- one clip --------------------------------------------------------------------------------------------


@pytest.mark.long
def test_one_held_out_clip_has_values_and_no_bounds(
    small: Make,
    small_policy: str,
    files: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(small(small_policy, *files(held_out=HELD_OUT[:1]), "steps=2")) == 0
    shown = capsys.readouterr()
    said = "there is one held-out clip, so its changes will have no bounds"
    assert shown.out.index(said) < shown.out.index("plan: ")
    assert "1 held-out clip, the same prompt and noise before and after. It has no bounds" in shown.err
    assert "on one clip, which has no bounds." in shown.err

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text(), parse_constant=refuse)
    assert summary["clips"] == 1
    for numbers in summary["measures"].values():
        assert numbers["low"] is numbers["high"] is None
        assert numbers["difference"] == pytest.approx(numbers["after"] - numbers["before"], abs=1e-6)
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "eval"]
    assert rows[-1]["held_out/reward/selected"] == pytest.approx(
        summary["measures"]["reward/selected"]["after"]
    )
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    report = (run / "report.html").read_text()
    assert "no bounds" in report
    assert "One clip has no bounds" in report
    assert not re.search(r"\bnan\b", re.sub(r"[\w+/=]{200,}", "", report), re.IGNORECASE)


# --- resuming --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_step(smallest: list[str], small_policy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step, with its prompt files."""
    root = tmp_path_factory.mktemp("one_step")
    named = [f"prompts.train={write(root / 'train.txt', TRAIN)}"]
    named += [f"prompts.held_out={write(root / 'held_out.txt', HELD_OUT)}", f"run_dir={root / 'run'}"]
    assert (
        train(load_config(None, [*smallest, small_policy, *named, "evaluation.prompts=null", "steps=1"])) == 0
    )
    return root


@pytest.fixture
def stopped(small: Make, small_policy: str, one_step: Path, tmp_path: Path) -> Callable[..., Config]:
    """A copy of that run, and the configuration that resumes it for another step."""
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    saved = tmp_path / "run/config.yaml"
    saved.write_text(saved.read_text().replace(str(one_step), str(tmp_path)))
    named = [f"prompts.{name}={tmp_path / name}.txt" for name in ("train", "held_out")]
    settings = ("evaluation.prompts=null", "steps=2", "evaluation.every=null", "checkpoint.resume=true")
    return lambda *overrides: small(small_policy, *named, *settings, *overrides)


@pytest.mark.parametrize(
    ("name", "prompts", "message"),
    [
        (
            "train",
            [*TRAIN, all_captions()[0]],
            r"prompts\.train had 6 .*, and has 7 now \(the first 6 are the same, and 1 were added behind them\)",
        ),
        (
            "train",
            TRAIN[::-1],
            r"prompts\.train had 6 entries .* 6 now \(some have other texts or other places\)",
        ),
        (
            "train",
            TRAIN[1:],
            r"prompts\.train had 6 entries .* 5 now \(and they are others, or in other places\)",
        ),
        ("held_out", HELD_OUT[:1], r"prompts\.held_out had 2 entries when the run started, and has 1 now"),
    ],
)
@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_other_prompts_are_refused_when_a_run_is_resumed(
    stopped: Callable[..., Config], tmp_path: Path, name: str, prompts: list[str], message: str
) -> None:
    write(tmp_path / f"{name}.txt", prompts)
    with pytest.raises(
        ValueError, match=rf"cannot resume .*: {message}.*Put them back as they were, or start a new"
    ):
        train(stopped())


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_a_run_without_a_record_is_resumed_with_a_note(
    stopped: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same prompts in another form are the same."""
    (tmp_path / "train.txt").write_bytes("\n\n".join(TRAIN).replace("\n", "\r\n").encode())
    record = tmp_path / "run/prompts.json"
    kept = record.read_bytes()
    record.unlink()
    assert train(stopped()) == 0
    said = "has no prompts.json yet, so whether its prompts are still the same is not known"
    assert said in capsys.readouterr().out
    assert record.read_bytes() == kept
    assert train(stopped("steps=3")) == 0
    assert said not in capsys.readouterr().out


@pytest.mark.usefixtures("nothing_sampled")
def test_a_run_that_saved_nothing_begins_again_with_other_prompts(
    stopped: Callable[..., Config], tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/checkpoints").mkdir()
    write(tmp_path / "train.txt", MANY)
    starts(stopped("checkpoint.resume=auto"))
    assert json.loads((tmp_path / "run/prompts.json").read_text())["prompts.train"]["count"] == len(MANY)


def test_another_number_of_samples_cannot_be_compared(stopped: Callable[..., Config]) -> None:
    message = r"evaluation\.samples_per_prompt: 1 -> 2, and the base was evaluated"
    with pytest.raises(ValueError, match=message):
        train(stopped("evaluation.samples_per_prompt=2"))


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_a_preference_dataset_that_grew_is_noticed(small: Make, small_policy: str, tmp_path: Path) -> None:
    source, brief = tmp_path / "source", (small_policy, "evaluation.every=null")
    assert train(small(f"run_dir={source}", "pairs.dataset=latents", "steps=2", *brief)) == 0
    rows = source / "preference_dataset/pairs_0000.jsonl"
    whole = rows.read_bytes()
    rows.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    own = ("rollout.candidates=4", "reference.refresh_every=200", "prompts.train=null")  # as if not given
    offline = ["method=offline_dpo", f"offline_dpo.dataset={source}", *brief, *own]
    assert train(small(*offline, "steps=1")) == 0
    rows.write_bytes(whole)
    message = r"offline_dpo\.dataset had 3 entries .*, and has 4 now \(the first 3 are the same"
    with pytest.raises(ValueError, match=message):
        train(small(*offline, "steps=2", "checkpoint.resume=true"))


# --- sample ----------------------------------------------------------------------------------------------


def test_sample_says_what_the_model_does_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sprites world's tokenizer reads 31 bytes."""
    prompts = write(tmp_path / "p.txt", ["a red circle moving left", "---"])
    assert sample.main(["--prompts", str(prompts), "--out", str(tmp_path / "clips")]) == 1
    assert f"error: {prompts}, line 2: '---' has no letter or digit that the sprites world reads" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "clips").exists()
    long = "a red circle moving left seen from above on a plain grey tabletop"
    assert sample.main(["--prompt", long, "--out", str(tmp_path / "clips")]) == 0
    assert (
        "note: the sprites world does not read more than half of the letters of 1 of 1 prompts, such as prompt 1"
        in (capsys.readouterr().err)
    )


def test_the_command_ends_with_one_line(
    smallest: list[str], files: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main([*smallest, *files([*TRAIN, STRANGE])]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_so_many_held_out_prompts_of_a_file_are_used(small: Make, files: Callable[..., list[str]]) -> None:
    for count, expected in (("1", HELD_OUT[:1]), ("null", HELD_OUT)):
        _, held_out = build_prompts(small(*files(), f"evaluation.prompts={count}"))
        assert list(held_out) == expected


@pytest.mark.usefixtures("unplanned")
def test_the_prompts_of_given_videos_are_asked_about_too(small_policy: str, tmp_path: Path) -> None:
    """They are known before any video is read."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("0.mp4", "1.mp4"):
        (videos / name).write_bytes(b"no video")
    (videos / "prompts.csv").write_text(f"video,prompt\n0.mp4,{TRAIN[0]}\n1.mp4,{STRANGE}\n")
    own = ("method=instructvideo", f"instructvideo.videos={videos}", "steps=1", "pairs_per_step=2")
    config = load_config(None, [small_policy, *own, "evaluation.prompts=2", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match=f"does not score this prompt: .*'{STRANGE}'"):
        train(config)
    assert not (tmp_path / "run").exists()
