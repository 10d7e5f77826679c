"""The console command ``vpo``, under which all commands of the engine stand. Each is imported when it is called."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import vpo_engine
from vpo_engine.texts import say


class Command(NamedTuple):
    """A command: the module whose ``main`` it calls, and what it does in a few words."""

    module: str
    meaning: str


COMMANDS = {
    "train": Command("vpo_engine.train", "train a policy by online preference optimization"),
    "sample": Command("vpo_engine.sample", "write videos of a policy, trained or not"),
    "export": Command("vpo_engine.export", "write a run's policy as files that other programs load"),
    "check-model": Command("vpo_engine.check_model", "prove by numbers that a model's folder is understood"),
    "rank": Command("vpo_engine.rank", "score video files with a reward model"),
    "evaluate": Command("vpo_engine.evaluate", "measure and compare policies, videos or finished runs"),
    "reproduce": Command("vpo_engine.reproduce", "make the paper's tables and figures in miniature"),
    "plan": Command("vpo_engine.plan", "say what memory and time a run will take"),
    "report": Command("vpo_engine.runs.report", "write the report of a run again, finished or not"),
    "push": Command("vpo_engine.push", "publish the policy of a finished run on the Hugging Face Hub"),
    "doctor": Command("vpo_engine.doctor", "print what works here and why not, for a bug report"),
    "settings": Command("vpo_engine.settings", "print what every setting does"),
    "completion": Command("vpo_engine.completion", "print the completion script of a shell: bash or zsh"),
}
_WRONG_USAGE = 2
"""The exit code for words that are no command, as argparse has it."""


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"vpo-engine {vpo_engine.__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        say(f"error: {_unknown(name)}", sys.stderr)
        return _WRONG_USAGE
    return importlib.import_module(COMMANDS[name].module).main(rest) or 0


def usage() -> str:
    """Return the help: a line for each command."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.meaning}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vpo COMMAND [ARGUMENTS]       vpo COMMAND --help       vpo --version",
            "",
            "Train text-to-video models by online video preference optimization.",
            "",
            *lines,
            "",
            "With several GPUs, start a run by:",
            "  torchrun --nproc_per_node N -m vpo_engine train [CONFIG.yaml] ...",
            "Completion of commands and settings: source <(vpo completion bash)",
        ]
    )


def _unknown(name: str) -> str:
    """Return the error for a word that is no command, with the command that was probably meant."""
    if "=" in name or name.endswith((".yaml", ".yml")):
        return f"{name} is no command; did you mean vpo train {name}?"
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean vpo {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
    kind = "option" if name.startswith("-") else "command"
    return f"vpo has no {kind} {name}; {hint}"
