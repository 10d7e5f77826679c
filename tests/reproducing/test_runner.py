"""The runner: cells are made once, verified when they are found again, and put apart when they fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_cells import FakeCells

from vpo_engine.reproducing import cells as cells_module
from vpo_engine.reproducing.cells import LOG, RECORD, Cell, Record
from vpo_engine.reproducing.runner import CELLS, FAILED, REPLACED, Runner, look_up
from vpo_engine.runs.lock import RunLock

ONE, TWO = Cell("run", ("steps=2",), 0), Cell("run", ("steps=3",), 0)


def runner(out: Path, fake: FakeCells, jobs: int = 2, said: list[str] | None = None) -> Runner:
    said = [] if said is None else said
    return Runner(out, jobs, commands=fake, say=said.append)


def test_a_finished_cell_is_kept_and_equal_cells_are_made_once(tmp_path: Path) -> None:
    fake = FakeCells()
    found = runner(tmp_path, fake).run([ONE, TWO, ONE, Cell("run", ("steps=9", "steps=2"), 0)])
    assert fake.made == [ONE, TWO]
    assert set(found.finished) >= {ONE, TWO}
    assert not found.missing
    record = Record.read(tmp_path / CELLS / ONE.name)
    assert record is not None
    assert (record.finished, record.attempts, list(record.seconds)) == (True, 1, ["train", "measure"])
    assert all(clock > 0 for _, clock in record.seconds.values())
    runner(tmp_path, fake).run([ONE, TWO])
    assert fake.made == [ONE, TWO]
    other = Cell("run", ("steps=2",), 1)
    runner(tmp_path, fake).run([ONE, other])
    assert fake.made == [ONE, TWO, other]


def test_cells_of_other_code_are_refused_kept_or_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCells()
    runner(tmp_path, fake).run([ONE])
    monkeypatch.setattr(cells_module, "code_version", lambda: "another")
    with pytest.raises(
        ValueError, match=r"1 of 1 finished .* made by other code, .*; this is another.* --old keep"
    ):
        runner(tmp_path, fake).run([ONE])
    assert look_up([ONE], tmp_path, "keep").old.keys() == {ONE}
    runner(tmp_path, fake).run([ONE], "keep")
    assert fake.made == [ONE]
    found = runner(tmp_path, fake).run([ONE], "redo")
    assert fake.made == [ONE, ONE]
    assert found.finished == {ONE: tmp_path / CELLS / ONE.name}
    assert (tmp_path / REPLACED / f"{ONE.name}-1" / RECORD).is_file()
    assert not look_up([ONE], tmp_path).old


def test_a_cell_that_was_made_with_other_settings_is_noticed(tmp_path: Path) -> None:
    runner(tmp_path, FakeCells()).run([ONE])
    path = tmp_path / CELLS / ONE.name / RECORD
    record = json.loads(path.read_text())
    path.write_text(
        json.dumps(record | {"resolved": record["resolved"].replace("beta: 250.0", "beta: 500.0")})
    )
    with pytest.raises(ValueError, match=r"objective.beta: 500 -> 250"):
        look_up([ONE], tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"cell.json is damaged .* remove .*steps=2"):
        look_up([ONE], tmp_path)


def test_an_unfinished_cell_goes_on_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / CELLS / ONE.name
    record = Record.of(ONE)
    record.add("train", 5.0, 6.0)
    record.write(folder)
    (folder / "here").touch()
    runner(tmp_path, FakeCells()).run([ONE])
    found = Record.read(folder)
    assert found is not None
    assert (folder / "here").exists()
    assert found.attempts == 1
    assert found.took("train")[0] > 5.0
    assert found.took("train")[1] > 6.0


def test_a_failing_cell_is_named_and_put_apart_and_the_others_go_on(tmp_path: Path) -> None:
    fake, said = FakeCells(), []
    fake.scripts["steps=2"] = "import sys; print('before'); sys.exit('error: out of luck')"
    found = runner(tmp_path, fake, 1, said).run([ONE, TWO])
    assert list(found.finished) == [TWO]
    assert "train failed with exit code 1 (error: out of luck)" in found.failed[ONE]
    apart = tmp_path / FAILED / f"{ONE.name}-1"
    assert str(apart) in found.failed[ONE]
    assert "before" in (apart / LOG).read_text()
    assert any("FAILED" in text and ONE.name in text for text in said)
    assert not (tmp_path / CELLS / ONE.name).exists()
    del fake.scripts["steps=2"]
    assert ONE in runner(tmp_path, fake).run([ONE, TWO]).finished


def test_a_killed_cell_stays_where_it_is(tmp_path: Path) -> None:
    fake = FakeCells()
    fake.scripts["steps=2"] = "import os; os.kill(os.getpid(), 9)"
    found = runner(tmp_path, fake).run([ONE])
    assert "was ended by SIGKILL" in found.failed[ONE]
    assert "the same command goes on with it" in found.failed[ONE]
    assert (tmp_path / CELLS / ONE.name / RECORD).is_file()


def test_several_cells_run_at_once_and_never_more_than_asked_for(tmp_path: Path) -> None:
    """Each writes when it began and ended; two at a time overlap, and three never do."""
    fake = FakeCells()
    times = tmp_path / "times"
    times.mkdir()
    script = (
        f"import pathlib, sys, time; a = time.monotonic(); time.sleep(0.4); b = time.monotonic();"
        f"pathlib.Path({str(times)!r}, pathlib.Path(sys.argv[1]).name).write_text(f'{{a}} {{b}}'); sys.exit(1)"
    )
    cells = [Cell("run", (f"steps={count}",), 0) for count in range(1, 5)]
    fake.scripts = {f"steps={count}": script for count in range(1, 5)}
    runner(tmp_path, fake, 2).run(cells)
    spans = [tuple(map(float, path.read_text().split())) for path in times.iterdir()]
    assert len(spans) == 4
    most = max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans)
    assert most == 2


def test_two_runners_do_not_share_a_folder(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(ValueError, match="is in use by process"):
        runner(tmp_path, FakeCells()).run([ONE])


def test_a_run_that_an_earlier_runner_left_behind_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / CELLS / ONE.name / "run"
    folder.mkdir(parents=True)
    with RunLock(folder), pytest.raises(ValueError, match="is in use by process"):
        runner(tmp_path, FakeCells()).run([ONE])


_PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts the tests may ignore Ctrl-C
from pathlib import Path
from fake_cells import FakeCells
from vpo_engine.reproducing.cells import Cell
from vpo_engine.reproducing.runner import Runner
fake = FakeCells()
fake.scripts["steps=2"] = '''
import pathlib, signal, sys, time
def stop(number, frame):
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)
'''
try:
    Runner(Path(sys.argv[1]), 1, commands=fake).run([Cell("run", ("steps=2",), 0)])
except KeyboardInterrupt:
    sys.exit(7)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_lets_running_cells_save_and_ends_the_runner(tmp_path: Path, number: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    program = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(tmp_path)], env=environment)
    folder = tmp_path / CELLS / ONE.name
    end = time.monotonic() + 60
    while not (folder / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    program.send_signal(number)
    assert program.wait(60) == 7
    assert (folder / "saved").exists()
    record = Record.read(folder)
    assert record is not None
    assert not record.finished
    assert record.took("train")[1] > 0


def test_ctrl_c_while_a_cell_ends_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process cannot be waited for a second time."""
    write = Record.write

    def interrupted(record: Record, folder: Path) -> None:
        write(record, folder)
        if record.finished:
            raise KeyboardInterrupt

    monkeypatch.setattr(Record, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path, FakeCells()).run([Cell("base", (), 0)])


def test_a_trained_cell_that_could_not_be_measured_keeps_its_training(tmp_path: Path) -> None:
    def commands(*_: object) -> dict[str, list[str]]:
        return {"train": ["-c", "pass"], "measure": ["-c", "import sys; sys.exit('error: no memory')"]}

    found = Runner(tmp_path, 1, commands=commands, say=lambda _: None).run([ONE])
    said = "measure failed with exit code 1 (error: no memory); the same command goes on with it"
    assert found.failed[ONE] == said
    assert (tmp_path / CELLS / ONE.name / RECORD).is_file()


def test_an_unfinished_cell_of_other_code_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / CELLS / ONE.name
    Record.of(ONE).write(folder)
    (folder / "here").touch()
    monkeypatch.setattr(cells_module, "code_version", lambda: "another")
    runner(tmp_path, FakeCells()).run([ONE])
    record = Record.read(folder)
    assert record is not None
    assert (record.code, (folder / "here").exists()) == ("another", False)
    assert (tmp_path / REPLACED / f"{ONE.name}-1" / "here").exists()
