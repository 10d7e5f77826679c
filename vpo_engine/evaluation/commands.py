"""The work behind the words of ``python -m vpo_engine.evaluate``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vpo_engine.command import is_first_process, same_in_all_processes
from vpo_engine.evaluation.folders import holds_videos
from vpo_engine.evaluation.session import Options, plan_evaluation, run_evaluation, start_processes
from vpo_engine.runs.directory import CONFIG_NAME
from vpo_engine.texts import say


def options_of(given: argparse.Namespace, target: Path, overrides: Sequence[str]) -> Options:
    """Return the options of an evaluation."""
    return Options(
        target=target,
        baseline=given.baseline,
        base=given.base,
        overrides=tuple(overrides),
        metrics=_names("--metrics", given.metrics),
        weights=tuple(given.weights),
        reference=given.reference,
        prompts=given.prompts,
        samples=given.samples,
        seed=given.seed,
        out=given.out,
        devices=_names("--device", given.device),
    )


def compares_finished_runs(paths: Sequence[Path], options: Options) -> bool:
    """Return whether runs were given and no option: then what they measured themselves is compared."""
    if options != Options(target=options.target, overrides=options.overrides):
        return False
    if len(paths) > 1:
        return not options.overrides
    path = paths[0]
    policy = (path / "policy").is_dir() or path.is_file() or holds_videos(path)
    run = (path / CONFIG_NAME).is_file() or not path.exists() or not any(path.glob("*.json"))
    return run and not policy and not options.overrides


def compare_finished_runs(paths: Sequence[Path]) -> int:
    """Print the table of finished runs."""
    from vpo_engine.evaluation.finished_runs import compare

    say(compare(paths))
    if len(paths) == 1:
        anew = f"vpo evaluate {shlex.quote(str(paths[0]))} --baseline"
        say(f"\nThese are the run's own numbers. To sample and measure anew: {anew}", sys.stderr)
    return 0


def evaluate(options: Options, words: Sequence[str]) -> int:
    """Evaluate, and print the table. Return 1 if the results are partial."""
    with same_in_all_processes():
        plan = plan_evaluation(options)
    code = start_processes(options.devices, words)
    if code is not None:
        return code
    if is_first_process():
        say(
            f"{_counted(len(plan.videos), 'video')} of {_counted(len(plan.suite.prompts), 'prompt')}, metrics "
            f"{', '.join(plan.choice.cards)}; "
            f"everything is written to {plan.out.root}",
            sys.stderr,
        )
    results = run_evaluation(plan)
    if results is None:
        return 0
    from vpo_engine.evaluation.table import format_results

    say(format_results(results))
    say(f"\n{plan.out.page} shows the videos side by side; the numbers are in {plan.out.results}")
    return int(results["partial"])


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def list_metrics() -> int:
    """Print a line for every metric."""
    from vpo_engine.evaluation.chosen_metrics import HEADINGS, OF_THE_ENGINE
    from vpo_engine.metrics.registry import metric_card, metric_names

    cards = [metric_card(name) for name in metric_names()] + list(OF_THE_ENGINE.values())
    width = max(len(card.name) for card in cards)
    for group, title in HEADINGS.items():
        own = [card for card in cards if card.group == group]
        lines = [
            f"  {card.name:<{width}}  {'download' if card.needs else 'included'}  {card.measures}"
            for card in own
        ]
        print("\n".join([f"{title}:", *lines]) if own else "", end="\n" if own else "")
    return 0


def study(folder: Path, votes: Sequence[Path], seed: int, pairs: int | None) -> int:
    """Write a study of a comparison, or read its votes."""
    if votes:
        from vpo_engine.evaluation.votes import report_votes

        say(report_votes(folder, votes))
        return 0
    from vpo_engine.evaluation.study import write_study

    page = write_study(folder, seed, pairs)
    say(
        f"{page} is the study: send its folder {page.parent} to the people who vote. Each saves a file of votes; read "
        f"them by: python -m vpo_engine.evaluate --study {shlex.quote(str(folder))} --votes FILE ..."
    )
    return 0


def _names(option: str, text: str | None) -> tuple[str, ...]:
    """Return the names of an option that takes several; none where it was not given."""
    if text is None:
        return ()
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ValueError(
            f"{option} {text!r} names nothing; give names with commas between them, or leave it out"
        )
    return names
