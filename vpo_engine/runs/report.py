"""Write ``report.html``, a self-contained page about a run, finished or not.

python -m vpo_engine.runs.report RUN_DIRECTORY
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from vpo_engine.config import Config
from vpo_engine.config.methods import GIVEN, METHODS, card_of
from vpo_engine.config.yaml_values import MOST_BYTES, read_settings
from vpo_engine.full_disk import write_whole
from vpo_engine.metrics.summary import headline, verdict
from vpo_engine.runs.alarms import alarm_section, read_alarms
from vpo_engine.runs.checkpoint import newest_complete
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.log import iterate_metrics
from vpo_engine.runs.readable import readable
from vpo_engine.runs.report_clips import held_out_section, pairs_section
from vpo_engine.runs.report_curves import chart_section
from vpo_engine.runs.report_html import command, page
from vpo_engine.runs.report_numbers import Summary, summary_section, tiles
from vpo_engine.runs.report_rows import MetricRows
from vpo_engine.runs.report_time import time_section
from vpo_engine.runs.summary_file import read_summary
from vpo_engine.texts import counted, printable, read_text, say, shortened

USAGE = "usage: python -m vpo_engine.runs.report RUN_DIRECTORY"
NO_BREAK = "\N{NO-BREAK SPACE}"


def write_report(run: RunDirectory) -> Path:
    """Write ``report.html`` from what the run directory has so far, and return its path.

    The page loads nothing: it contains its styles, script and clips. Sections without data say what is missing.
    """
    config = _read_config(run)
    summary = _read_summary(run)
    rows = MetricRows(iterate_metrics(run.metrics))
    weights = _trained_weights(config)
    sections = [
        _header(run, config, summary, rows),
        alarm_section(read_alarms(run), rows.first("eval", "guards/prompt/"), rows),
        held_out_section(run, weights),
        chart_section(rows),
        pairs_section(run, weights),
        time_section(summary["timings"] if summary else None, rows),
        summary_section(summary),
        _commands_section(run),
        _config_section(run),
    ]
    script = Path(__file__).with_name("report.js").read_text(encoding="utf-8")
    write_whole(run.report, page(run.name, "\n".join(sections), "", script))
    return run.report


def main(arguments: Sequence[str]) -> None:
    if list(arguments) in (["-h"], ["--help"]):
        print(f"{USAGE}\n\nWrite report.html, a self-contained page about a run, finished or not.")
        return
    if len(arguments) != 1:
        raise SystemExit(USAGE)
    try:
        path = write_report(RunDirectory.open(Path(arguments[0])))
    except (ValueError, OSError) as error:
        raise SystemExit(printable(f"error: {' '.join(str(error).split())}")) from error
    say(str(path))


def _header(run: RunDirectory, config: dict[str, Any], summary: Summary | None, rows: MetricRows) -> str:
    planned = config.get("steps")
    if summary is not None:
        title, text = headline(summary), verdict(summary)
    elif rows.steps:
        of = f" of {planned}" if planned else ""
        title, text = (
            "Not finished yet",
            f"{rows.steps}{of} steps so far. The result is shown here at the end.",
        )
    else:
        title, text = "Not started yet", "No step has been logged."
    facts, unused = [counted(rows.steps, "step")], _unused(config)
    for keys, label in (
        (("pairs_per_step",), "pairs per step"),
        (("rollout", "candidates"), "candidates per prompt"),
        (("objective", "beta"), "beta"),
        (("reference", "refresh_every"), "K"),
        (("offline_dpo", "refresh_every"), "K"),
        (("optimizer", "lr"), "learning rate"),
        (("seed",), "seed"),
    ):
        value = None if {".".join(keys), keys[0]} & unused else _lookup(config, keys)
        if value is not None:
            shown = shortened(str(value), 40)
            facts.append(f"{shown} {label}" if "per" in label else f"{label} {shown}")
    alarms = read_alarms(run)
    if alarms:
        text += f" The run raised {len(alarms)} alarm{'s' if len(alarms) > 1 else ''}, see below."
    return (
        f'<header><p class="eyebrow">Online video preference optimization, run <b>{escape(run.name)}</b></p>'
        f'<h1>{escape(title)}</h1><p class="verdict">{escape(text.replace(" %", NO_BREAK + "%"))}</p>'
        f'<p class="facts">{escape(", ".join(facts))}</p>{tiles(summary, rows)}</header>'
    )


def _commands_section(run: RunDirectory) -> str:
    """Show what can be done with the run: its curves in TensorBoard, and clips from its newest policy."""
    folder = run.root.parent if run.root.parent.name == "runs" else run.root
    body = "<p>All numbers of the log, in TensorBoard (open the address that it prints):</p>"
    body += command(f"tensorboard --logdir {shlex.quote(str(folder))}")
    if newest_complete(run.checkpoints) is not None:
        body += "<p>Clips sampled from the newest checkpoint's policy:</p>"
        body += command(f"python -m vpo_engine.sample {shlex.quote(str(run.root))}")
    return f"<section><h2>Go on from here</h2>{body}</section>"


def _config_section(run: RunDirectory) -> str:
    text = escape(read_text(run.config, "configuration", MOST_BYTES))
    return (
        f"<section><h2>Configuration</h2><details><summary>{escape(run.config.name)}, with all defaults</summary>"
        f"<pre>{text}</pre></details></section>"
    )


def _read_summary(run: RunDirectory) -> Summary | None:
    """Return the content of ``summary.json``; None if the run has not written it yet."""
    if not run.summary.is_file():
        return None
    return read_summary(run.summary)


def _read_config(run: RunDirectory) -> dict[str, Any]:
    with readable(run.config, "repair it, or give another run"):
        text = read_text(run.config, "configuration", MOST_BYTES)
        return read_settings(text, str(run.config), Config).values


def _lookup(config: dict[str, Any], keys: Sequence[str]) -> Any:
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _unused(config: dict[str, Any]) -> set[str]:
    """Return the settings, and sections, that the run's method does not use."""
    method = config.get("method", "online_vpo")
    if method not in METHODS:
        return set()
    given = next((name for name in GIVEN if _lookup(config, (method, name)) is not None), None)
    return set(card_of(method, given).unused)


def _trained_weights(config: dict[str, Any]) -> dict[str, float]:
    """Return the weights of the dimensions that were trained on; none where all weigh alike."""
    chosen = _lookup(config, ("reward", "dimensions"))
    if isinstance(chosen, dict):
        return {str(name): weight for name, weight in chosen.items() if isinstance(weight, int | float)}
    if not isinstance(chosen, list) or "global" in chosen:
        return {}
    return {str(name): 1.0 for name in chosen}


if __name__ == "__main__":
    main(sys.argv[1:])
