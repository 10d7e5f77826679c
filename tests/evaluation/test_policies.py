"""Evaluating policies of the sprites world: the same noise for both, going on, several processes, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_case import results_of, run

from vpo_engine import train
from vpo_engine.config_file import load_config
from vpo_engine.evaluation import arms
from vpo_engine.evaluation.arms import Arm, find_arm, sampling_settings
from vpo_engine.evaluation.generate import _at_once, _batches
from vpo_engine.evaluation.output import OutputFolder
from vpo_engine.evaluation.session import Options, plan_evaluation, run_evaluation
from vpo_engine.policy_source import PolicySource

PIXELS = "pixels:sprites"


@pytest.fixture(scope="module")
def a_run(smallest: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, whose policy differs a little from the one that it started from."""
    root = tmp_path_factory.mktemp("runs") / "small"
    words = [*smallest, "steps=2", "evaluation.every=1", "optimizer.lr=1e-3", f"run_dir={root}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpo_engine.training.check_fits", lambda config, *_: (config, ""))
        assert train.main(words) == 0
    return root


def test_a_run_against_its_start_on_the_same_noise(
    a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The videos are those of sample with the same seed, and are not sampled again by a second start.

    No folder of the current one is taken for the start, whatever its name.
    """
    from vpo_engine import sample
    from vpo_engine.runs.video import read_video

    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    words = (
        a_run,
        "--baseline",
        "--metrics",
        f"{PIXELS},reward:sprites",
        "--samples",
        "1",
        "--seed",
        "4",
        "--out",
        out,
    )
    assert run(*words) == 0
    results = results_of(out)
    assert results["settings"]["same_noise"] is True
    assert results["arms"]["baseline"]["label"] == "the policy that small started from"
    assert [row["prompt"] for row in results["videos"]] == _held_out(a_run)
    said = capsys.readouterr()
    assert "baseline" in said.out
    assert (said.out + said.err).count("attention: ") == 1, "both policies have the same model"
    sampled = tmp_path / "sampled"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(_held_out(a_run)))
    common = ["--prompts", str(prompts), "--count", "1", "--seed", "4", "--out"]
    assert sample.main([str(a_run), *common, str(sampled / "policy")]) == 0
    assert sample.main([str(a_run / "config.yaml"), *common, str(sampled / "baseline")]) == 0
    for role in ("policy", "baseline"):
        files = sorted(file for file in (sampled / role).glob("*.mp4"))
        for row, file in zip(results["videos"], files, strict=True):
            own, other = (read_video(path)[0].float() for path in (out / row[role]["file"], file))
            assert (own - other).abs().mean() < 2, "the same noise gives the same video, but for rounding"
    values = [
        [row[role]["values"][f"{PIXELS}/sharpness"] for row in results["videos"]]
        for role in ("policy", "baseline")
    ]
    assert values[0] != values[1]
    times = {file: file.stat().st_mtime_ns for file in out.glob("videos/*/*.mp4")}
    monkeypatch.setattr("vpo_engine.evaluation.generate.load_source", _unexpected)
    assert run(*words) == 0
    assert {file: file.stat().st_mtime_ns for file in out.glob("videos/*/*.mp4")} == times
    assert results_of(out) == results


def test_a_missing_video_is_sampled_again_with_the_same_bits(a_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (a_run, "--metrics", PIXELS, "--samples", "3", "--out", out)  # more than are sampled at once
    assert run(*words) == 0
    files = sorted(out.glob("videos/policy/*.mp4"))
    before = {file: file.read_bytes() for file in files}
    assert len({*before.values()}) == 6, "every video has noise of its own"
    files[1].unlink()
    (files[3].parent / f".{files[3].name}").write_bytes(b"half")
    files[3].unlink()
    assert run(*words) == 0
    assert {file: file.read_bytes() for file in sorted(out.glob("videos/policy/*.mp4"))} == before
    assert sorted(file.name for file in (out / "videos" / "policy").iterdir()) == [
        file.name for file in files
    ]
    rows = [json.loads(line) for line in (out / "videos" / "prompts.jsonl").read_text().splitlines()]
    assert {row["video"] for row in rows} == {f"policy/{file.name}" for file in files}


@pytest.mark.long
def test_two_processes_share_the_videos_and_give_the_numbers_of_one(a_run: Path, tmp_path: Path) -> None:
    words = [str(a_run), "--baseline", "--metrics", f"{PIXELS},proxy_flicker", "--samples", "2", "--out"]
    assert run(*words, tmp_path / "one") == 0
    command = [
        sys.executable,
        "-m",
        "vpo_engine.evaluate",
        *words,
        str(tmp_path / "two"),
        "--device",
        "cpu,cpu",
    ]
    subprocess.run(command, check=True, timeout=300)
    assert len(list((tmp_path / "two" / "records").glob("process_*.jsonl"))) == 2
    one, two = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    for name, entry in {**one["measures"], **one["proxies"]}.items():
        other = {**two["measures"], **two["proxies"]}[name]
        assert other["policy"]["value"] == pytest.approx(entry["policy"]["value"], rel=1e-3, abs=1e-3)
        assert other["policy"]["provenance"]["count"] == 4


def test_policies_that_are_sampled_otherwise_are_refused(
    a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(
        (a_run / "config.yaml").read_text().replace("steps: 2\n  guidance", "steps: 5\n  guidance")
    )
    assert run(a_run, "--baseline", other, "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "rollout.steps is 2 and 5" in said
    assert "Add rollout.steps=VALUE" in said
    assert not (tmp_path / "out").exists()


def test_another_seed_or_policy_does_not_go_into_the_same_folder(
    a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(a_run, "--metrics", PIXELS, "--samples", "1", "--out", out) == 0
    assert run(a_run, "--metrics", PIXELS, "--samples", "1", "--seed", "1", "--out", out) == 1
    assert "seed: 0 -> 1" in capsys.readouterr().err
    assert run(a_run / "config.yaml", "--metrics", PIXELS, "--samples", "1", "--out", out) == 1
    assert "policy.policy" in capsys.readouterr().err


def test_a_finished_run_alone_still_gives_its_own_table(
    a_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(a_run) == 0
    said = capsys.readouterr()
    assert "held-out clips, the same prompts and noise before and after" in said.out
    assert "--baseline" in said.err


def test_the_light_evaluations_of_a_run_are_in_tensorboard_with_the_reward_and_with_videos(
    a_run: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(a_run / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("reward/selected")] == [1, 2]
    assert [point.step for point in events.Scalars("held_out/reward/selected")] == [0, 1, 2]
    samples = [name for name in events.Tags()["images"] if name.startswith("samples/")]
    assert [name.partition(" ")[2] for name in samples] == _held_out(a_run)
    for name in samples:
        assert [image.step for image in events.Images(name)] == [0, 1, 2]
    first, _, last = events.Images(samples[0])
    assert first.encoded_image_string != last.encoded_image_string
    assert (
        "Held out" in (a_run / "report.html").read_text() or "held out" in (a_run / "report.html").read_text()
    )


def _unexpected(*_: object) -> None:
    raise AssertionError("no policy is loaded where all videos are there")


def _held_out(root: Path) -> list[str]:
    from vpo_engine.build import build_prompts
    from vpo_engine.config_file import load_config

    return list(build_prompts(load_config(root / "config.yaml"))[1])


SPRITES = Path(__file__).parents[2] / "configs" / "sprites.yaml"


def test_videos_of_other_sampling_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    one, other = (find_arm("policy", SPRITES, None, [f"rollout.guidance={scale}"]) for scale in (1, 3))
    out = OutputFolder(tmp_path / "out")
    out.begin({"policy": one.identity()})
    out.check({"policy": one.identity()})
    with pytest.raises(ValueError, match=r"policy\.sampling\.rollout\.guidance: 1\.0 -> 3\.0"):
        out.check({"policy": other.identity()})


def test_an_adapter_that_was_written_anew_is_another_policy(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"one")
    arm = Arm("policy", "an adapter", PolicySource(load_config(None), tmp_path))
    before = arm.identity()
    assert arm.identity() == before
    file.write_bytes(b"another")
    assert arm.identity() != before


def test_a_policy_is_evaluated_with_as_many_steps_as_its_run_did() -> None:
    source = find_arm("policy", SPRITES, None, ["evaluation.steps=7"]).source
    assert source is not None
    assert sampling_settings(source.config)["rollout.steps"] == 7


def test_without_a_number_there_are_as_many_videos_as_the_run_evaluates(tmp_path: Path) -> None:
    settings = ("evaluation.prompts=2", "evaluation.samples_per_prompt=3")
    planned = plan_evaluation(Options(target=SPRITES, overrides=settings, out=tmp_path / "out"))
    assert [index for _, _, index in planned.videos] == [0, 1, 2] * 2


def test_each_process_of_an_evaluation_has_a_device_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a cat on a mat-0.mp4").touch()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    given = Options(
        tmp_path / "clips", metrics=("pixels",), devices=("cuda:0", "cuda:1"), out=tmp_path / "out"
    )
    for local, device in enumerate(given.devices):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert plan_evaluation(given).device == device


def test_a_policy_is_sampled_on_the_device_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def load(source: PolicySource, *_: object) -> None:
        seen.append(source.config.model.device)
        raise KeyboardInterrupt

    monkeypatch.setattr("vpo_engine.evaluation.generate.load_source", load)
    given = Options(SPRITES, metrics=("pixels",), samples=1, devices=("cpu",), out=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(plan_evaluation(given))
    assert seen == ["cpu"]


def test_policies_are_sampled_alike_whatever_their_rollouts_approximate() -> None:
    """An evaluation uses neither a cache of steps nor guidance in a part of them."""
    exact, fast = (
        find_arm("policy", SPRITES, None, [f"rollout.preset={name}"]) for name in ("exact", "fast")
    )
    assert exact.source is not None
    assert fast.source is not None
    assert fast.source.config.rollout != exact.source.config.rollout
    assert sampling_settings(fast.source.config) == sampling_settings(exact.source.config)


@pytest.mark.parametrize(("limit", "count"), [("auto", 4), ("3", 3), ("9", 4)])
def test_no_more_videos_are_sampled_at_once_than_candidates_fit(limit: str, count: int) -> None:
    assert _at_once(load_config(None, ["rollout.candidates=4", f"rollout.batch_size={limit}"])) == count
    plan = [*((0, "a", index) for index in range(5)), (1, "b", 0)]
    assert [len(batch) for batch in _batches(plan, 3)] == [3, 2, 1]


def test_steps_that_are_asked_for_win_over_those_of_the_runs_evaluations(tmp_path: Path) -> None:
    config = tmp_path / "turbo.yaml"
    config.write_text("evaluation: {steps: 7}\n")
    source = find_arm("policy", config, None, ["rollout.steps=5"]).source
    assert source is not None
    assert sampling_settings(source.config)["rollout.steps"] == 5


@pytest.mark.parametrize(
    ("devices", "message"),
    [(("cpu", "cuda:0"), "different kinds of devices"), (("cuda:1", "cuda:1"), "name each GPU once")],
)
def test_devices_whose_processes_could_not_meet_are_refused(
    devices: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes on a CPU talk by gloo and those on GPUs by NCCL, which takes a GPU once: they would wait for a week."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match=f"^--device {','.join(devices)}: .*{message}"):
        plan_evaluation(Options(SPRITES, devices=devices))


@pytest.mark.parametrize("part", ["policy", "vae", "text_encoder"])
def test_other_parts_beside_a_checkpoint_make_other_videos(tmp_path: Path, part: str) -> None:
    """The policy is the base of an adapter that a run has trained."""
    checkpoint, config, found = tmp_path / "step_00000002", load_config(None), []
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
        model = config.model.model_copy(update={part: tmp_path / name})
        own = config.model_copy(update={"model": model})
        found.append(Arm("policy", "a run", PolicySource(own, checkpoint / "policy", checkpoint)).identity())
    assert found[0] != found[1]


def test_other_weights_of_the_same_size_are_another_policy(tmp_path: Path) -> None:
    """As those of an adapter that was trained for longer, and of a run that was begun anew."""
    adapter, checkpoint, found = tmp_path / "adapter.safetensors", tmp_path / "step_00000002", []
    checkpoint.mkdir()
    sources = [
        PolicySource(load_config(None), adapter),
        PolicySource(load_config(None), checkpoint=checkpoint),
    ]
    for second, content in enumerate(("one", "two"), start=1):
        adapter.write_text(content)
        os.utime(adapter, (second, second))
        (checkpoint / "manifest.json").write_text(content)
        found.append([Arm("policy", "it", source).identity() for source in sources])
    assert all(before != after for before, after in zip(*found, strict=True))


def test_a_base_is_refused_for_a_run_that_has_trained_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration names the base, and another one would not be used."""
    source = PolicySource(load_config(None), tmp_path / "policy", tmp_path / "step_00000002")
    arm = Arm("policy", "runs/a, step 2", source)
    monkeypatch.setattr("vpo_engine.evaluation.session.find_arm", lambda *_: arm)
    with pytest.raises(
        ValueError, match=r"--base .* is for an adapter, but runs/a, step 2 is none; leave --base"
    ):
        plan_evaluation(Options(tmp_path / "run", base=tmp_path, out=tmp_path / "out"))


@pytest.mark.parametrize("start", [True, False], ids=["its start", "another one"])
def test_settings_that_are_asked_for_hold_for_both_policies(a_run: Path, tmp_path: Path, start: bool) -> None:
    """So those that are sampled otherwise can be compared, as the refusal says."""
    other = tmp_path / "other.yaml"
    text = (a_run / "config.yaml").read_text()
    assert "steps: 2\n  guidance" in text
    other.write_text(text.replace("steps: 2\n  guidance", "steps: 5\n  guidance"))
    words = ("rollout.steps=3", "rollout.guidance=3")
    baseline = True if start else str(other)
    given = Options(a_run, baseline, overrides=words, metrics=("pixels",), out=tmp_path / "out")
    asked = [sampling_settings(arm.source.config) for arm in plan_evaluation(given).arms if arm.source]
    assert [(each["rollout.steps"], each["rollout.guidance"]) for each in asked] == [(3, 3.0)] * 2


def test_a_prompt_of_which_the_model_reads_nothing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moving left\n---\n")
    assert run(SPRITES, "--prompts", prompts, "--metrics", "pixels", "--out", tmp_path / "out") == 1
    assert "'---' has no letter or digit that the sprites world reads" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_policy_of_one_folder_is_the_one_of_earlier_versions(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    config = load_config(None)
    config = config.model_copy(update={"model": config.model.model_copy(update={"policy": tmp_path})})
    before = json.dumps(["sprites", *arms._listing(tmp_path)])
    found = Arm("policy", "it", PolicySource(config)).identity()["policy"]
    assert found == hashlib.sha256(before.encode()).hexdigest()
