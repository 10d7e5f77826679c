"""Print the script that completes the words of vpo in a shell: commands, configurations and settings.

source <(vpo completion bash)         in ~/.bashrc
source <(vpo completion zsh)          in ~/.zshrc, after compinit
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vpo_engine.cli import COMMANDS
from vpo_engine.config_file import shipped_configurations
from vpo_engine.help_text import HelpFormatter
from vpo_engine.reproducing.tables import TABLES
from vpo_engine.settings import groups

_CONFIGURED = ("train", "plan")
"""The commands that take a configuration and settings."""

_OPTIONS = {
    "sample": "--prompt --prompts --column --out --count --seed --base --steps --guidance --negative-prompt --frames "
    "--size",
    "export": "--out --step --merge --format --ema --dtype --base",
    "check-model": "--kind --frames --size",
}
"""The options of commands that work on folders."""

_REPRODUCE = ("all", "--list", "--quick", "--seeds", "--jobs", "--out", "--steps", "--old", "--write")
"""What ``reproduce`` takes beside the names of tables."""

_BASH = """# Completion of vpo for bash; use it by: source <(vpo completion bash)
_vpo() {{
  local word=${{COMP_WORDS[COMP_CWORD]}}
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands} --help --version" -- "$word"))
    return
  fi
  case ${{COMP_WORDS[1]}} in
    {configured})
      COMPREPLY=($(compgen -W "{configurations}" -- "$word") $(compgen -S = -W "{settings}" -- "$word"))
      case ${{COMPREPLY[*]}} in *=) compopt -o nospace 2>/dev/null ;; esac ;;
    settings) COMPREPLY=($(compgen -W "{sections}" -- "$word")) ;;
    completion) COMPREPLY=($(compgen -W "bash zsh" -- "$word")) ;;
    reproduce) COMPREPLY=($(compgen -W "{tables}" -- "$word")) ;;
{bash_options}
  esac
}}
complete -o bashdefault -o default -F _vpo vpo
"""

_ZSH = """#compdef vpo
# Completion of vpo for zsh; use it by: source <(vpo completion zsh)
_vpo() {{
  local -a commands
  commands=({described})
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  case $words[2] in
    {configured}) compadd -- {configurations}; compadd -S = -- {settings}; _files ;;
    settings) compadd -- {sections} ;;
    completion) compadd -- bash zsh ;;
    reproduce) compadd -- {tables} ;;
{zsh_options}
    *) _files ;;
  esac
}}
(( $+functions[compdef] )) && compdef _vpo vpo
"""


def script(shell: str) -> str:
    """Return the completion script of ``shell``, "bash" or "zsh"."""
    found = list(groups())
    described = " ".join(f"'{name}:{command.meaning}'" for name, command in COMMANDS.items())
    keys = [f"{group.key}.{one.name}" if group.key else one.name for group in found for one in group.settings]
    return (_BASH if shell == "bash" else _ZSH).format(
        commands=" ".join(COMMANDS),
        described=described,
        configured="|".join(_CONFIGURED),
        configurations=" ".join(shipped_configurations()),
        settings=" ".join(keys),
        sections=" ".join(group.key for group in found if group.key),
        tables=" ".join([*TABLES, *_REPRODUCE]),
        bash_options="\n".join(
            f'    {name}) case $word in -*) COMPREPLY=($(compgen -W "{words}" -- "$word")) ;; esac ;;'
            for name, words in _OPTIONS.items()
        ),
        zsh_options="\n".join(
            f"    {name}) compadd -- {words}; _files ;;" for name, words in _OPTIONS.items()
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vpo completion", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    print(script(parser.parse_args(arguments).shell), end="")
    return 0
