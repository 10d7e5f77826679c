import shlex
from pathlib import Path

import pytest

from vpo_engine.command import split_words
from vpo_engine.config_file import dump_config, load_config
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.next_steps import closing_lines
from vpo_engine.runs.start import check_same_run
from vpo_engine.training import _stopped_text


def test_created_runs_have_distinct_readable_names(tmp_path):
    runs = [RunDirectory.create("Sprites demo!", "seed: 1\n", parent=tmp_path / "runs") for _ in range(3)]
    assert len({run.root for run in runs}) == 3
    for run in runs:
        assert run.name.startswith("Sprites-demo-20")
        assert run.config.read_text() == "seed: 1\n"
        assert run.checkpoints.is_dir()
        assert run.pairs_gallery.is_dir()


def test_the_layout_is_the_documented_one(tmp_path):
    run = RunDirectory.create_at(tmp_path / "mine", "{}\n")
    expected = {
        run.config: "config.yaml",
        run.metrics: "metrics.jsonl",
        run.tensorboard: "tensorboard",
        run.checkpoints: "checkpoints",
        run.held_out_gallery: "gallery/held_out.safetensors",
        run.pairs_file(12): "gallery/pairs/step_00000012.safetensors",
        run.summary: "summary.json",
        run.report: "report.html",
    }
    for path, relative in expected.items():
        assert path == tmp_path / "mine" / relative
    assert RunDirectory.open(tmp_path / "mine") == run


def test_an_empty_directory_may_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    assert RunDirectory.create_at(tmp_path / "empty", "{}").config.is_file()


def test_a_foreign_directory_is_left_alone(tmp_path):
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and was not made by a run; choose another"):
        RunDirectory.create_at(tmp_path, "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_earlier_run_is_left_alone(tmp_path):
    RunDirectory.create_at(tmp_path / "run", "seed: 1\n")
    with pytest.raises(
        ValueError, match=r"already holds a run; go on with it by checkpoint\.resume=true, or choose"
    ):
        RunDirectory.create_at(tmp_path / "run", "seed: 2\n")
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\n"


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="there is a file with that name"):
        RunDirectory.create_at(tmp_path / "run", "{}")


def test_opening_what_is_not_a_run(tmp_path):
    with pytest.raises(ValueError, match="there is no run directory at"):
        RunDirectory.open(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"is not a run directory: it has no config\.yaml"):
        RunDirectory.open(tmp_path)


def test_a_label_without_letters(tmp_path):
    with pytest.raises(ValueError, match="must have a letter or a digit, got '///'"):
        RunDirectory.create("///", "{}", parent=tmp_path)


def test_latest_leads_to_the_newest_run_relatively(tmp_path):
    first = RunDirectory.create_at(tmp_path / "runs" / "one", "seed: 1\n")
    assert RunDirectory.open(tmp_path / "runs" / "latest").name == first.name
    second = RunDirectory.create("two", "seed: 2\n", parent=tmp_path / "runs")
    link = tmp_path / "runs" / "latest"
    assert link.readlink() == Path(second.name)
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert RunDirectory.open(tmp_path / "moved" / "latest").config.read_text() == "seed: 2\n"
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["latest", "one", second.name]


def test_latest_is_left_alone_where_it_is_no_link_and_outside_of_runs(tmp_path, monkeypatch):
    mine = RunDirectory.create_at(tmp_path / "runs" / "latest", "seed: 1\n")
    RunDirectory.create_at(tmp_path / "runs" / "two", "seed: 2\n")
    assert not mine.root.is_symlink()
    assert mine.config.read_text() == "seed: 1\n"
    RunDirectory.create_at(tmp_path / "elsewhere" / "one", "{}")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["one"]


def test_without_links_a_run_starts_all_the_same(tmp_path, monkeypatch):
    def refuse(*given, **named):
        raise OSError("links are not supported here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    RunDirectory.create_at(tmp_path / "runs" / "one", "{}")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]


def test_the_closing_lines_are_commands_that_work(tmp_path, monkeypatch):
    run = RunDirectory.create_at(tmp_path / "my runs" / "one", dump_config(load_config(None, ["steps=5"])))
    lines = dict(line.split(":", 1) for line in closing_lines(run).splitlines())
    commands = {meaning: shlex.split(command) for meaning, command in lines.items()}
    assert commands["open its report"] == [str(run.report)]
    assert commands["sample from it"][:4] == ["python", "-m", "vpo_engine.sample", str(run.root)]
    assert commands["compare it with other runs"][2:] == ["vpo_engine.evaluate", str(run.root), "OTHER_RUN"]
    resume = commands["go on to more steps"]
    assert resume[:3] == ["torchrun", "-m", "vpo_engine.train"]
    config = load_config(*split_words(resume[3:]))
    assert (config.run_dir, config.steps) == (run.root, 10)
    check_same_run(config, run.config)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert "torchrun --nproc_per_node 8 -m vpo_engine.train" in closing_lines(run)


def test_the_command_that_a_stopped_run_prints_works(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    run = RunDirectory.create_at(tmp_path / "my runs" / "one", dump_config(load_config(None, ["steps=5"])))
    words = shlex.split(_stopped_text("SIGTERM", 2, run).splitlines()[-1])
    assert words[:3] == ["torchrun", "-m", "vpo_engine.train"]
    config = load_config(*split_words(words[3:]))
    assert (config.run_dir, config.steps) == (run.root, 5)
    check_same_run(config, run.config)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert "torchrun --nproc_per_node 8 -m vpo_engine.train" in _stopped_text("SIGTERM", 2, run)


def test_the_words_that_a_run_directory_is_answered_with_work(tmp_path):
    run = RunDirectory.create_at(tmp_path / "my runs" / "one", dump_config(load_config(None, ["steps=5"])))
    with pytest.raises(ValueError, match="is a run directory, not a configuration file") as refused:
        load_config(run.root)
    config = load_config(*split_words(shlex.split(str(refused.value).splitlines()[-1])))
    assert (config.run_dir, config.steps, config.checkpoint.resume) == (run.root, 5, True)
