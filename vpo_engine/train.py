"""Train a text-to-video policy by online video preference optimization.

    torchrun -m vpo_engine.train [CONFIG.yaml] [key.path=value ...]
    python -m vpo_engine.train --help settings [SECTION]

Without a configuration it trains the embedded sprites world, which needs nothing but this package. Under torchrun
with several processes each (with processes.per_prompt each team of them) takes its own prompts; gradients are averaged.
With processes.reward the last process holds the reward model, and scores for the others.

A run that was stopped goes on when the same command is given again with its run_dir.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from vpo_engine import settings
from vpo_engine.command import (
    USER_ERRORS,
    Parser,
    is_first_process,
    processes_that_train,
    report_errors,
    same_in_all_processes,
    split_words,
)
from vpo_engine.config import Config
from vpo_engine.config.notes import notes
from vpo_engine.config_file import load_config, require_files
from vpo_engine.distributed.deepspeed_settings import check_deepspeed
from vpo_engine.distributed.shares import check_shares
from vpo_engine.help_text import HelpFormatter
from vpo_engine.runs.attempts import stopped_by_alarm
from vpo_engine.runs.lock import refuse_held
from vpo_engine.runs.progress import wrap_for
from vpo_engine.runs.start import find_start
from vpo_engine.runs.wandb_log import check_wandb
from vpo_engine.texts import say


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:2] in (["--help", "settings"], ["-h", "settings"]):
        return settings.main(words[2:])
    parser = Parser(
        prog="torchrun -m vpo_engine.train",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml | key.path=value",
        help="YAML file, or the name of a shipped one (default: sprites); and settings that replace the file's",
    )
    given, unknown = parser.parse_known_args(words)
    return report_errors(lambda: _train(given.words, unknown))


def _train(words: Sequence[str], unknown: Sequence[str]) -> int:
    with same_in_all_processes():
        source, overrides = split_words(words, unknown)
        config = load_config(source, overrides)
    return train(config)


def train(config: Config) -> int:
    """Run ``config`` in this process (one of a torchrun group, or alone); return the exit code.

    torch and the models are imported after everything has been checked that the configuration and the run directory
    tell.
    """
    with same_in_all_processes():
        require_files(config)
    if config.prompts.train is not None or config.prompts.held_out is not None:
        from vpo_engine.data.prompt_settings import check_prompt_files

        with same_in_all_processes():
            check_prompt_files(config.prompts)
    with same_in_all_processes():
        _check_given_videos(config)
        _check_peft(config)
        check_shares(config, processes_that_train(config))
        check_deepspeed(config, processes_that_train(config))
    if is_first_process():
        start = find_start(config)
        if start.root is not None:
            refuse_held(start.root)
        if start.finished:
            say(
                f"the run at {start.root} is finished: step {config.steps} is its last; raise steps to go on with it"
            )
            return 0
        if start.root is not None and stopped_by_alarm(start.root):
            say(
                f"an alarm has stopped the run at {start.root}; look at its report, and start it again yourself"
            )
            return 1
        if config.log.wandb is not None:
            check_wandb(config.log.wandb)
        for note in notes(config):
            say(wrap_for(sys.stderr, f"note: {note}"), sys.stderr)
    elif (code := _code_at_once(config)) is not None:
        return code
    from vpo_engine.training import run_training

    return run_training(config)


def _code_at_once(config: Config) -> int | None:
    """Return the exit code of a process of a run that does not go on; None if it does. The first one says why."""
    try:
        start = find_start(config)
    except USER_ERRORS:
        return None
    if start.finished:
        return 0
    return 1 if start.root is not None and stopped_by_alarm(start.root) else None


def _check_peft(config: Config) -> None:
    """Raise ValueError for an adapter without the package that makes it, before the policy is read."""
    if config.model.lora is not None and find_spec("peft") is None:
        raise ValueError('model.lora needs PEFT, which is not installed; pip install "vpo-engine[lora]"')


def _check_given_videos(config: Config) -> None:
    """Raise ValueError for a file of pairs that is not there, or has a row that cannot be used."""
    for setting in ("offline_dpo.file", "instructvideo.videos", "t2v_turbo.videos"):
        section, _, name = setting.partition(".")
        path = getattr(getattr(config, section), name, None)
        if path is None or path.is_dir():
            continue
        if not path.exists():
            raise ValueError(
                f"{setting}={path} is not there; give a folder of videos, a file of pairs, or a run"
            )
        from vpo_engine.data.preference_file import PreferenceFile

        PreferenceFile(path)


if __name__ == "__main__":
    sys.exit(main())
