"""The console command ``vpo``: what it dispatches to, what it loads, and what it completes."""

from __future__ import annotations

import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import vpo_engine
from vpo_engine import cli, completion


def bash(line: str) -> list[str]:
    """Return what bash completes at the end of a line."""
    words = shlex.split(line) + ([""] if line.endswith(" ") else [])
    program = (
        f"{completion.script('bash')}\nCOMP_WORDS=({' '.join(map(shlex.quote, words))})\n"
        f"COMP_CWORD={len(words) - 1}\n_vpo\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_help_and_version_name_the_commands_and_load_no_torch():
    program = (
        "import sys; from vpo_engine import cli; cli.main(['--help']); cli.main(['--version']); cli.main(['trian']);"
        "sys.exit(sorted({'torch', 'pydantic', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "error: vpo has no command trian; did you mean vpo train?\n")
    for name, command in cli.COMMANDS.items():
        assert f"\n  {name} " in done.stdout
        assert command.meaning in done.stdout
    assert done.stdout.endswith(f"vpo-engine {vpo_engine.__version__}\n")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["trian"], "no command trian; did you mean vpo train?"),
        (["steps=4"], "steps=4 is no command; did you mean vpo train steps=4?"),
        (["sprites_fast.yaml"], "did you mean vpo train sprites_fast.yaml?"),
        (["--verson"], "no option --verson; the commands are train, sample"),
    ],
)
def test_what_is_no_command_is_refused_with_what_was_meant(capsys, words, hint):
    assert cli.main(words) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_a_help_fits_a_terminal_of_80_columns(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    with suppress(SystemExit):
        cli.main([name, "--help"] if name else ["--help"])
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if len(line) > 80] == []
    assert "usage: " in printed
    assert "``" not in printed, "a help is no page"
    commands = [line for line in printed.splitlines() if line.startswith("    python -m vpo_engine")]
    assert all(line.count("[") == line.count("]") for line in commands), "a command stays on its line"


def test_a_command_gets_its_arguments_and_its_exit_code_comes_back(capsys, tmp_path):
    assert cli.main(["evaluate", str(tmp_path / "nowhere")]) == 1
    assert "there is no run directory at" in capsys.readouterr().err
    assert cli.main(["settings", "log"]) == 0
    assert "log.wandb=null" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "vpo_engine", "train", "stps=4"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "did you mean steps" in done.stderr


def test_every_command_exists():
    for name, command in cli.COMMANDS.items():
        file = Path(vpo_engine.__file__).parents[1] / (command.module.replace(".", "/") + ".py")
        assert "\ndef main(" in file.read_text(encoding="utf-8"), name


def test_bash_completes_commands_configurations_and_settings():
    assert bash("vpo tr") == ["train"]
    assert bash("vpo train optimizer.l") == ["optimizer.lr="]
    assert bash("vpo train sprites_f") == ["sprites_fast"]
    assert bash("vpo plan checkpoint.fr") == ["checkpoint.from="]
    assert "model.lora.rank=" in bash("vpo train model.")
    assert bash("vpo settings rollout.p") == ["rollout.prune"]
    assert bash("vpo completion ") == ["bash", "zsh"]
    assert bash("vpo sample optimizer.l") == []


def test_zsh_gets_a_script_of_its_own():
    text = completion.script("zsh")
    assert text.startswith("#compdef vpo\n")
    assert "optimizer.lr" in text
    assert "'train:train a policy by online preference optimization'" in text
