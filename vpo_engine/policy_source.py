"""The source of a policy: a run, a checkpoint, a configuration, an export, a published folder or an adapter.

Nothing here imports torch, but for the class of the model's family where only that knows the answer.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vpo_engine.config import Config
from vpo_engine.config_file import load_config, parse_config, require_model_files
from vpo_engine.foreign_files import read_object
from vpo_engine.runs.checkpoint import (
    checkpoint_name,
    complete_checkpoints,
    evaluated_policy,
    newest_complete,
    verify_checkpoint,
    verify_if_of_checkpoint,
)
from vpo_engine.runs.directory import CONFIG_NAME, RunDirectory

RECORD = "vpo_export.json"
"""The file in an export that says what it was made of, and how the run sampled."""
INDEX = "model_index.json"
"""The file by which a folder is one of a diffusers pipeline."""
_POLICY, _AVERAGE = "policy", "ema"
"""The folders of the policy and of its moving average in a checkpoint."""
_ADAPTER_ENDING = ".safetensors"
_PEFT_CONFIG = "adapter_config.json"
_OF_THE_VIDEO = ("kind", "policy", "vae", "text_encoder", "device", "lora", "attention", "fused_ops")
"""Settings of the model that do not go into an export's record: its files, and the machine of the run."""
_RECORDED = ("model.", "rollout.")
"""How the settings in an export's record begin."""


@dataclass(frozen=True)
class PolicySource:
    """A policy and the configuration to load it with.

    config: model.policy names the trained weights, or the base of ``adapter``. adapter: the file or folder of an
    adapter that is not yet part of ``config.model.lora``, or that a run has written; None for a whole model.
    checkpoint: the checkpoint that the policy is of; None where it is of no run. base: the model that a run started
    from, as its configuration says.
    """

    config: Config
    adapter: Path | None = None
    checkpoint: Path | None = None
    base: Path | None = None

    @property
    def step(self) -> int | None:
        return None if self.checkpoint is None else int(self.checkpoint.name.rpartition("_")[2])


def find_source(path: Path | None, base: Path | None, overrides: Sequence[str]) -> PolicySource:
    """Find what ``path`` is, and how it is loaded. ``base``: the folder of the model that an adapter is for.

    overrides: settings as key.path=value, which replace those of the source. Raise ValueError for a path where nothing
    is, for a checkpoint that is not as it was saved, and for an adapter without a base.
    """
    if path is not None and not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"there is no run, checkpoint, model, adapter or YAML file at {path}; {nearest(path)}"
        )
    for given in filter(None, (path, base)):
        verify_if_of_checkpoint(given)
    average = None
    if path is not None and base is None and _is_of_checkpoint(path):
        path, average = path.parent, path.name == _AVERAGE
    adapter = path is not None and holds_adapter(path)
    if adapter and base is None:
        raise ValueError(
            f"{path} is an adapter; give the folder of the model that it was trained on: --base FOLDER"
        )
    if base is not None:
        if not adapter:
            what = "no RUN was given" if path is None else f"{path} is none"
            raise ValueError(f"--base {base} is for an adapter, but {what}; leave --base out")
        if holds_adapter(base):
            raise ValueError(f"--base {base} is an adapter itself; give the folder of a whole model")
        assert path is not None
        source = find_source(base, None, [*_recorded(path), *overrides])
        if source.adapter is not None:
            raise ValueError(f"--base {base} is a run of an adapter; give the folder of a whole model")
        return replace(source, adapter=path)
    if path is None or not path.is_dir():
        config = load_config(path, overrides)
        require_model_files(config)
        return PolicySource(config)
    if (path / RECORD).is_file() or is_published(path):
        return PolicySource(folder_config(path, overrides))
    return run_source(path, None, overrides, average)


def run_source(
    run: Path, step: int | None = None, overrides: Sequence[str] = (), average: bool | None = None
) -> PolicySource:
    """Return the policy of a run directory (its newest checkpoint, or that of ``step``), or of a checkpoint.

    average: whether its moving average is meant (ema.decay); None: if there is one, as the run's evaluations do. A run
    with model.lora has trained an adapter only. Then model.policy stays as it is, and the adapter's folder stands
    beside the configuration. Raise ValueError for what is no run, and for a checkpoint that is not as it was saved.
    """
    if (run / _POLICY).is_dir():
        if step is not None:
            raise ValueError(
                f"--step {step} chooses among the checkpoints of a run, but {run} is one; leave it out"
            )
        checkpoint = run
    else:
        checkpoint = _checkpoint_of(run, step)
    verify_checkpoint(checkpoint)
    root = checkpoint.resolve().parent.parent
    saved, trained = RunDirectory.open(root).config, checkpoint / _POLICY
    if average is None:
        trained = evaluated_policy(checkpoint)
    elif average:
        trained = checkpoint / _AVERAGE
    if not trained.is_dir():
        raise ValueError(
            f"{checkpoint} has no moving average of the policy; leave --ema out (a run with ema.decay has one)"
        )
    given = [f"run_dir={root}", *overrides]
    config = load_config(saved, given)
    if config.model.lora is not None:
        return PolicySource(config, trained, checkpoint, config.model.policy)
    beside = [f"model.policy={trained}"]
    base = config.model.policy
    if base is not None and (base / INDEX).is_file():  # the parts beside the policy stay those of its folder
        named = {"vae": config.model.vae, "text_encoder": config.model.text_encoder}
        beside += [f"model.{name}={base}" for name, path in named.items() if path is None]
    return PolicySource(load_config(saved, [*given, *beside]), None, checkpoint, base)


def folder_config(folder: Path, overrides: Sequence[str] = (), kind: str | None = None) -> Config:
    """Return the configuration that samples from an export, or from a published folder.

    An export is sampled as its run did, a published folder as its family's card says. kind: the family, where the
    folder does not tell. Raise ValueError where no family is known that the folder belongs to.
    """
    from vpo_engine.models.registry import model_family

    record = _record(folder)
    asked = [word.partition("=")[2] for word in overrides if word.startswith("model.kind=")]
    kind = asked[-1] if asked else kind
    if record is None:
        kind = kind or _kind_of(folder)
        own = _as_overrides(dict(model_family(kind).card.native))
    else:
        kind, own = kind or _kind_of_record(folder, record), _recorded(folder)
    assert kind is not None
    neutral = [f"model.kind={kind}", f"model.policy={folder}", "reward.kind=builtin"]
    if kind != "sprites":  # a configuration names prompt files, which sampling does not read
        neutral += ["prompts.train=none", "prompts.held_out=none"]
    return parse_config("", str(folder), [*neutral, *own, *overrides])


def _kind_of_record(folder: Path, record: dict[str, Any]) -> str:
    """Return the family in an export's record. ValueError for a class, which only the user may name."""
    kind: str = record["kind"]
    if ":" in kind:
        raise ValueError(
            f"{folder / RECORD} names the class {kind}, and no code is run because a file names it; if you trust that "
            f"class, name it yourself: model.kind={kind}"
        )
    return kind


def _kind_of(folder: Path) -> str:
    from vpo_engine.models.registry import BUILT_IN, kind_of_folder

    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} has no {INDEX}, so it does not say which family of models it is of; add model.kind=KIND, one of "
            f"{', '.join(sorted(BUILT_IN))}"
        )
    return kind_of_folder(folder)


def record_text(source: PolicySource, form: str) -> str:
    """Return the content of an export's record; ``form`` says what the export holds."""
    values = source.config.model.model_dump(mode="json")
    model = {f"model.{name}": value for name, value in values.items() if name not in _OF_THE_VIDEO}
    rollout = source.config.rollout
    record = {
        "made_by": "python -m vpo_engine.export",
        "form": form,
        "kind": source.config.model.kind,
        "step": source.step,
        "settings": model | {"rollout.steps": rollout.steps, "rollout.guidance": rollout.guidance},
    }
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def is_published(folder: Path) -> bool:
    """Return whether a folder holds a model as its project publishes it, and neither a run nor a checkpoint."""
    if (folder / CONFIG_NAME).is_file() or (folder / _POLICY).is_dir():
        return False
    return (folder / INDEX).is_file() or (folder / "config.json").is_file()


def holds_adapter(path: Path) -> bool:
    """Return whether a path is an adapter by its names: a weights file, or a folder of one."""
    if path.is_file():
        return path.suffix == _ADAPTER_ENDING
    if is_published(path) or (path / CONFIG_NAME).is_file() or (path / _POLICY).is_dir():
        return False
    files = [file.name.lower() for file in path.glob(f"*{_ADAPTER_ENDING}")]
    return (path / _PEFT_CONFIG).is_file() or any("lora" in name or "adapter" in name for name in files)


def _is_of_checkpoint(path: Path) -> bool:
    """Return whether a path is the folder of the policy, or of its moving average, in a checkpoint."""
    return path.name in (_POLICY, _AVERAGE) and (path.parent / "manifest.json").is_file()


def nearest(path: Path) -> str:
    """Return what to do about a path where nothing is."""
    around = [found.name for found in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, around, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else f"check the path (relative to {Path.cwd()})"


def _checkpoint_of(run: Path, step: int | None) -> Path:
    """Return a complete checkpoint of a run directory: the newest, or that of ``step``."""
    runs = sorted(path.parent for path in run.glob(f"*/{CONFIG_NAME}") if not path.parent.is_symlink())
    if runs and not (run / CONFIG_NAME).is_file():
        raise ValueError(f"{run} holds {len(runs)} runs; give one of them, such as {runs[-1]}")
    folder = RunDirectory.open(run).checkpoints
    if step is not None:
        found = complete_checkpoints(folder)
        if step not in found:
            known = ", ".join(map(str, sorted(found))) or "none yet"
            raise ValueError(
                f"{run} has no complete checkpoint {checkpoint_name(step)}; give one of its steps ({known}) as --step"
            )
        return found[step]
    newest = newest_complete(folder)
    if newest is None:
        raise ValueError(
            f"{run} has no complete checkpoint yet; wait until the run has saved one, or give a YAML configuration"
        )
    return newest


def _record(path: Path) -> dict[str, Any] | None:
    """Return the record of an export; None where there is none."""
    file = (path if path.is_dir() else path.parent) / RECORD
    if not file.is_file():
        return None
    record = read_object(file, "export again")
    kind, settings = record.get("kind"), record.get("settings")
    if not isinstance(kind, str) or not isinstance(settings, dict):
        raise ValueError(
            f"{file} is not the record of an export: it must have 'kind' and 'settings'; export again"
        )
    own = [f"model.{name}" for name in _OF_THE_VIDEO]
    for name in settings:
        if not name.startswith(_RECORDED) or any(name == each or name.startswith(f"{each}.") for each in own):
            raise ValueError(
                f"{file} sets {name!r}, which the record of an export does not do; export again, or take it out"
            )
    return record


def _recorded(path: Path) -> list[str]:
    """Return the settings of an export's record as overrides."""
    record = _record(path)
    return [] if record is None else _as_overrides(record["settings"])


def _as_overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={_as_yaml(value)}" for key, value in settings.items()]


def _as_yaml(value: Any) -> str:
    return (
        json.dumps(value, ensure_ascii=False) if isinstance(value, str | list | dict) else json.dumps(value)
    )
