"""Test the command for a machine with a GPU that is lent for a short time, with fakes in place of its checks."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_checks import CHECKS, ROWS, STAND_IN, Check
from on_gpu import MARK, ROOT, Result, Runner, locked, main

ENVIRONMENT = {
    "hardware": "a GPU",
    "threads": 1,
    "torch": "2",
    "triton": "3",
    "python": "3.12",
    "commit": "abc",
    "date": "2026-11-29T00:00:00+00:00",
    "command": "python bench/on_gpu.py",
}
ROW = {"topic": "loss", "case": {"shape": "1"}, "numbers": {"seconds": 1.5}, "environment": ENVIRONMENT}
WRITES = f"import json, sys; open(sys.argv[1] + '/loss.jsonl', 'w').write(json.dumps({ROW!r}) + chr(10))"
HANGS = "import time; time.sleep(3600)"
LEAVES = """import subprocess, sys
sleep = [sys.executable, "-I", "-c", "import time; time.sleep(3600)"]
open({note!r}, "w").write(str(subprocess.Popen(sleep, start_new_session=True).pid))
"""
"""Starts a process in a session of its own, and writes its number to a file."""


RENAMED = "import os; os.rename('{0}/new', '{0}/child')\n"


def fake(name: str, code: str = "", needs: Sequence[str] = (), seconds: float = 30.0) -> Check:
    return Check(name, f"why {name}", ("-I", "-c", code, ROWS), tuple(needs), seconds)


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())["results"]


def states(folder: Path) -> dict[str, str]:
    return {name: result["state"] for name, result in stored(folder).items()}


def call(folder: Path, checks: Sequence[Check], *arguments: str, minutes: float = 5.0) -> int:
    return main(["--out", str(folder), "--minutes", str(minutes), *arguments], checks)


def alive(number: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds, seconds: float = 300.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def test_each_check_is_kept_with_its_rows_and_its_output(tmp_path: Path, capsys) -> None:
    checks = [
        fake("wrong", "print('it is off by 3'); raise SystemExit(4)"),
        fake("dies", "import os; os.kill(os.getpid(), 11)"),
        fake("writes", WRITES),
        fake("lacks", needs=["json", "no_such_package:thing"]),
        fake("lacks a part", needs=["json:no_such_part"]),
    ]
    assert call(tmp_path, checks) == 1
    found = stored(tmp_path)
    assert states(tmp_path) == {
        "wrong": "failed",
        "dies": "failed",
        "writes": "passed",
        "lacks": "skipped",
        "lacks a part": "skipped",
    }
    assert (found["wrong"]["code"], found["wrong"]["output"]) == (4, "it is off by 3\n")
    assert found["dies"]["reason"] == "signal SIGSEGV"
    assert found["writes"]["rows"] == [ROW]
    assert "no_such_package:thing (ModuleNotFoundError" in found["lacks"]["reason"]
    assert found["lacks a part"]["reason"] == "needs json:no_such_part (json has no no_such_part)"
    shown = capsys.readouterr().out.splitlines()[-len(checks) :]
    assert [line.split("  ")[0] for line in shown] == [check.name for check in checks]
    assert f"{tmp_path}/results.json, 1 rows" in shown[2]
    assert shown[3].endswith(found["lacks"]["reason"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json"]


def test_an_import_that_ends_the_process_is_missing_and_the_others_are_tried(
    tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "ends_everything.py").write_text("import os; os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    checks = [fake("a", needs=["ends_everything", "json"]), fake("b", needs=["json"])]
    assert call(tmp_path / "out", checks) == 0
    assert states(tmp_path / "out") == {"a": "skipped", "b": "passed"}
    assert (
        stored(tmp_path / "out")["a"]["reason"] == "needs ends_everything (importing it ends in exit code 3)"
    )


def test_a_check_that_hangs_is_ended_with_its_children_and_the_next_goes_on(tmp_path: Path) -> None:
    """The check gets more time where the machine is too busy for it to start its child."""
    note, code = tmp_path / "child", LEAVES.format(note=str(tmp_path / "new")) + RENAMED + HANGS
    for seconds in (0.5, 2.0, 8.0, 32.0, 128.0):
        out = tmp_path / f"out {seconds:g}"
        assert call(out, [fake("hangs", code.format(tmp_path), seconds=seconds), fake("next")]) == 1
        if note.exists():
            break
    found = stored(out)
    assert (found["hangs"]["state"], found["hangs"]["code"]) == ("failed", None)
    assert found["hangs"]["reason"] == f"ended at its limit of {2 * seconds:.0f} s"
    assert found["next"]["state"] == "passed"
    assert not alive(int(note.read_text()))


def test_what_a_check_leaves_running_is_ended_too(tmp_path: Path) -> None:
    note = tmp_path / "child"
    assert call(tmp_path / "out", [fake("leaves", LEAVES.format(note=str(note)))]) == 0
    assert not alive(int(note.read_text()))


def test_the_time_is_never_passed_and_a_second_call_goes_on(tmp_path: Path, monkeypatch) -> None:
    """The clock is the test's: two seconds are left for a check that would take an hour, and none for the last."""
    checks = [
        fake("first", seconds=20.0),
        fake("huge", seconds=100.0),
        fake("cut off", HANGS, seconds=1.5),
        fake("last", seconds=0.1),
    ]
    begins = {"first": 0.0, "huge": 0.0, "cut off": 55.0, "last": 57.5}
    clock, run = SimpleNamespace(now=0.0), Runner.run

    def run_later(runner: Runner, check: Check, missing: dict[str, str]) -> Result:
        clock.now = begins[check.name]
        return run(runner, check, missing)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", run_later)
        patch.setattr("on_gpu.time", SimpleNamespace(monotonic=lambda: clock.now, sleep=time.sleep))
        assert call(tmp_path, checks, minutes=1.0) == 0
    found = stored(tmp_path)
    assert list(states(tmp_path).values()) == ["passed", "skipped", "skipped", "not reached"]
    assert found["huge"]["reason"].startswith("needs about 100 s, but ")
    assert "because the time was up" in found["cut off"]["reason"]
    again = [fake("first", "raise SystemExit(1)"), fake("huge"), fake("cut off"), fake("last")]
    assert call(tmp_path, again) == 0, "what has passed is not repeated"
    assert set(states(tmp_path).values()) == {"passed"}
    assert call(tmp_path, again, "--only", "first") == 1
    assert states(tmp_path)["first"] == "failed"


SCRIPT = """
import sys
sys.path[:0] = {paths}
from test_on_gpu import WAITS, WRITES, fake
from on_gpu import main
first = WRITES + "; open({count!r}, 'a').write('x')"
sys.exit(main(sys.argv[1:], [fake("first", first), fake("middle", WAITS.format(note={note!r})), fake("last")]))
"""
WAITS = """import os, time
if not os.path.exists({note!r}):
    open({note!r} + ".new", "w").write(str(os.getpid()))
    os.rename({note!r} + ".new", {note!r})
    time.sleep(3600)
"""
"""Waits in its first call, after it has written its number to a file."""


class Command:
    """The command in a process of its own, whose second check waits, in the first call only."""

    def __init__(self, folder: Path) -> None:
        self.out, self.note, self.count = folder / "out", folder / "note", folder / "count"
        self.script = folder / "script.py"
        paths = [str(ROOT / "bench"), str(Path(__file__).parent)]
        self.script.write_text(SCRIPT.format(paths=paths, note=str(self.note), count=str(self.count)))

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(self.script), "--out", str(self.out), "--minutes", "5"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def stopped(self, by: signal.Signals) -> tuple[subprocess.Popen[str], str]:
        """Start it, and send it a signal while the second check runs; return it when it and the check are gone."""
        process = self.start()
        wait_until(self.note.exists)
        process.send_signal(by)
        printed, _ = process.communicate(timeout=300)
        wait_until(lambda: not alive(int(self.note.read_text())))
        return process, printed


def test_a_command_that_is_killed_leaves_what_has_finished_and_goes_on(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command.stopped(signal.SIGKILL)
    assert states(command.out) == {"first": "passed", "middle": "running", "last": "not reached"}
    assert stored(command.out)["first"]["rows"] == [ROW]
    again = command.start()
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    assert set(states(command.out).values()) == {"passed"}
    assert command.count.read_text() == "x", "the first check ran once"


def test_a_command_that_is_asked_to_stop_says_what_is_left(tmp_path: Path) -> None:
    command = Command(tmp_path)
    process, printed = command.stopped(signal.SIGTERM)
    assert process.returncode == 1
    assert states(command.out) == {"first": "passed", "middle": "not reached", "last": "not reached"}
    assert "it ran when the command was stopped" in printed
    assert "Traceback" not in printed


def test_a_process_that_an_earlier_call_left_is_ended(tmp_path: Path) -> None:
    left = subprocess.Popen(
        [sys.executable, "-I", "-c", HANGS], env={**os.environ, MARK: str(tmp_path.resolve())}
    )
    try:
        assert call(tmp_path, [fake("a")]) == 0
        assert left.wait(60) == -signal.SIGKILL
    finally:
        left.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "1", "--only", "fast"], "there is no check 'fast'; --only takes of a, b"),
        (["--minutes", "0"], "0 minutes is no time"),
        (["--minutes", "nan"], "nan minutes is no time"),
        ([], "--minutes is missing"),
        (["--record"], "holds no measured rows; run checks with this --out first"),
    ],
)
def test_a_wrong_call_is_one_message(tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path), *arguments], [fake("a"), fake("b")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_folders_are_not_shared_and_kinds_of_results_do_not_mix(tmp_path: Path, capsys) -> None:
    assert call(tmp_path, [fake("a")], "--dry-run") == 0
    assert stored(tmp_path)["a"]["output"] == "stands in for a\n"
    with pytest.raises(SystemExit):
        call(tmp_path, [fake("a")])
    assert "holds the results of a dry run" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"results": [')
    with pytest.raises(SystemExit):
        call(tmp_path, [fake("a")])
    assert "does not hold results" in capsys.readouterr().err
    with locked(tmp_path), pytest.raises(SystemExit):
        call(tmp_path, [fake("a")])
    assert "another call works in" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_checked_and_that_is_said(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "torch.py").write_text(
        "__version__ = '0'\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"
    )
    monkeypatch.setattr("on_gpu.ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "gpu_checks.py").write_text((ROOT / "bench" / "gpu_checks.py").read_text())
    assert call(tmp_path / "out", [fake("a", needs=["cuda"])]) == 1
    said = capsys.readouterr()
    assert "needs cuda (torch 0 finds no CUDA device)" in said.out
    assert "--dry-run tries the command on a machine without a GPU" in said.err


def test_rows_that_were_measured_can_be_recorded(tmp_path: Path, monkeypatch) -> None:
    import rows  # not above: torch, which it imports, would slow the start of ``Command``

    call(tmp_path / "out", [fake("writes", WRITES), fake("silent")])
    monkeypatch.setattr(rows, "record", functools.partial(rows.record, folder=tmp_path / "recorded"))
    assert main(["--out", str(tmp_path / "out"), "--record"], [fake("writes")]) == 0
    [row] = rows.read(tmp_path / "recorded")["loss"]
    assert (row.case, row.numbers, row.environment.hardware) == ({"shape": "1"}, {"seconds": 1.5}, "a GPU")


def test_rows_that_are_no_rows_fail_the_check_and_the_next_goes_on(tmp_path: Path) -> None:
    broken = fake("broken", "import sys; open(sys.argv[1] + '/loss.jsonl', 'w').write('{')")
    assert call(tmp_path, [broken, fake("next")]) == 1
    assert states(tmp_path) == {"broken": "failed", "next": "passed"}


def test_the_list_names_what_exists() -> None:
    from gpu_measure import MEASURES

    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert names[0] == "kernels", "nothing else counts if a kernel is wrong"
    for check in CHECKS:
        assert "cuda" in check.needs
        assert (ROWS in check.command) == bool(check.topic), check.name
        for part in check.command:
            assert not part.startswith(("bench/", "tests/")) or (ROOT / part).exists(), part
        if check.command[0] == "bench/gpu_measure.py":
            assert check.command[1] in {*MEASURES, "memory"}


@pytest.mark.long
def test_a_dry_run_of_all_checks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("gpu_checks.STAND_IN", STAND_IN.replace("sleep(1)", "sleep(0)"))
    assert main(["--out", str(tmp_path), "--minutes", "3", "--dry-run"]) == 0
    found = stored(tmp_path)
    assert list(found) == [check.name for check in CHECKS]
    assert all(one["state"] in ("passed", "skipped") for one in found.values())
    assert found["kernels"]["state"] == "passed"
    for check in CHECKS:
        assert len(found[check.name]["rows"]) == (
            bool(check.topic) and found[check.name]["state"] == "passed"
        )


COLLECT = """
import json, sys, pytest
codes = [int(pytest.main(["--collect-only", "-q", *words])) for words in json.loads(sys.argv[1])]
print(json.dumps(codes))
"""


@pytest.mark.long
def test_what_checks_select_is_there() -> None:
    """On a machine without a GPU some cases have other names, so only those that are there are looked for: not the
    sizes of fused operations. One process looks for all."""
    checks = [check for check in CHECKS if "-k" in check.command and not check.name.startswith("fused")]
    places = [check.command.index("-k") for check in checks]
    words = [check.command[place - 1 : place + 2] for check, place in zip(checks, places, strict=True)]
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, json.dumps(words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(checks) > 3
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0] * len(checks), [check.name for check, code in zip(checks, codes, strict=True) if code]


@pytest.mark.long
def test_a_benchmark_writes_its_rows_where_it_is_told(tmp_path: Path) -> None:
    command = ["-m", "pytest", "-q", "bench/test_delta.py", "-k", "encode and reference and 4608", "--rows"]
    # In several processes of pytest-xdist, benchmarks would be off.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)],
        cwd=ROOT,
        env=ours,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    [line] = (tmp_path / "delta.jsonl").read_text().splitlines()
    assert json.loads(line)["case"]["shape"] == "4608x1152"
