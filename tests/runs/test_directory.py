import pytest

from vpo_engine.runs.directory import RunDirectory


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
