"""The record of a run's prompts in its directory: a resumed run goes on with the same ones, in the same order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from vpo_engine.data.fingerprint import Fingerprint, Prompts, fingerprint
from vpo_engine.full_disk import write_whole
from vpo_engine.texts import read_json

NAME = "prompts.json"
"""The file of the run directory: {setting: {"count": int, "digest": SHA-256}}."""

Texts = Mapping[str, Prompts]
"""The prompts of a run by the setting that they come from; of a preference dataset, a text for each pair."""


def write_record(root: Path, texts: Texts) -> None:
    """Keep number and SHA-256 of the prompts in the run directory ``root``."""
    content = {name: asdict(fingerprint(each)) for name, each in texts.items()}
    write_whole(root / NAME, json.dumps(content, indent=1) + "\n")


def check_record(root: Path, texts: Texts) -> str:
    """Raise ValueError, saying what changed, unless the prompts are those that the run at ``root`` started with.

    Return a line for the user, "" if there is nothing to say. A run of a version that kept no record gets one.
    """
    path = root / NAME
    if not path.is_file():
        write_record(root, texts)
        return f"note: {root} has no {NAME} yet, so whether its prompts are still the same is not known; it has one now"
    try:
        saved = {name: Fingerprint(**each) for name, each in read_json(path).items()}
        if any(type(each.count) is not int or not isinstance(each.digest, str) for each in saved.values()):
            raise TypeError("a count or a digest is none")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); delete it to resume without this check"
        ) from error
    changed = [
        _what_changed(name, saved[name], each)
        for name, each in texts.items()
        if name in saved and saved[name] != fingerprint(each)
    ]
    if changed:
        raise ValueError(
            f"cannot resume {root}: {'; '.join(changed)}. The order of the prompts, and the clips that evaluations "
            "compare, depend on all of them. Put them back as they were, or start a new run with them: leave out "
            "checkpoint.resume and name another run_dir (model.policy=.../checkpoints/step_.../policy begins with what "
            "this run has learned, unless it trained an adapter)"
        )
    return ""


def _what_changed(name: str, before: Fingerprint, texts: Prompts) -> str:
    """Describe a change; entries that were added at the end are told apart from others."""
    now = fingerprint(texts)
    if now.count > before.count and fingerprint(texts, before.count) == before:
        how = f"the first {before.count} are the same, and {now.count - before.count} were added behind them"
    elif now.count == before.count:
        how = "some have other texts or other places"
    else:
        how = "and they are others, or in other places"
    return f"{name} had {before.count} entries when the run started, and has {now.count} now ({how})"
