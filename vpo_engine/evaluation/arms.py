"""The two sides of a comparison, called arms: a policy or a folder of videos, and the baseline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.evaluation.folders import holds_videos
from vpo_engine.policy_source import PolicySource, find_source, holds_adapter
from vpo_engine.runs.directory import CONFIG_NAME
from vpo_engine.sample import SampleOptions, with_options

Role = Literal["policy", "baseline"]
_NO_SAMPLING = ("policy", "vae", "text_encoder", "device", "lora", "attention", "fused_ops")
"""Settings of the model that do not say how videos are sampled."""
_SAMPLING = ("steps", "guidance")
"""Settings of the rollout that do. Evaluations use neither rollout.cache nor rollout.guidance_interval."""


@dataclass(frozen=True)
class Arm:
    """A policy to sample from, or a folder of videos; one of ``source`` and ``folder`` is None.

    label: what it is, for people.
    """

    role: Role
    label: str
    source: PolicySource | None = None
    folder: Path | None = None

    def identity(self) -> dict[str, Any]:
        """Return what identifies the arm, so that results of another one are not mixed with its own."""
        if self.source is None:
            assert self.folder is not None
            return {"videos": str(self.folder.resolve())}
        return {"policy": _digest(self.source), "sampling": sampling_settings(self.source.config)}


def find_arm(role: Role, path: Path, base: Path | None, overrides: Sequence[str]) -> Arm:
    """Find what ``path`` is: a folder of videos, or whatever ``policy_source.find_source`` takes.

    overrides: settings as key.path=value, which a policy is sampled with. Raise ValueError where nothing is found.
    """
    if holds_videos(path):
        return Arm(role, str(path), folder=path)
    source = find_source(path, base if holds_adapter(path) else None, overrides)
    label = str(path) if source.step is None else f"{path}, step {source.step}"
    return Arm(role, label, source=_as_evaluated(source, overrides))


def starting_policy(arm: Arm, overrides: Sequence[str]) -> Arm:
    """Return the policy that the run of an arm started from, as a baseline. Raise ValueError if it is of no run."""
    checkpoint = None if arm.source is None else arm.source.checkpoint
    if checkpoint is None:
        raise ValueError(
            "--baseline alone is the policy that a run started from, "
            f"but {arm.label} is no run; give the baseline "
            "as a run, a checkpoint, a model, a YAML configuration or a folder of videos: --baseline OTHER"
        )
    root = checkpoint.resolve().parent.parent
    config = load_config(root / CONFIG_NAME, [f"run_dir={root}", *overrides])
    return Arm(
        "baseline",
        f"the policy that {root.name} started from",
        _as_evaluated(PolicySource(config), overrides),
    )


def check_alike(policy: Arm, baseline: Arm) -> None:
    """Raise ValueError, naming what differs, if two policies would be sampled in different ways."""
    if policy.source is None or baseline.source is None:
        return
    one, other = (sampling_settings(arm.source.config) for arm in (policy, baseline) if arm.source)
    different = [
        f"{name} is {_shown(one.get(name))} and {_shown(other.get(name))}"
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]
    if different:
        names = [text.partition(" ")[0] for text in different]
        raise ValueError(
            f"{policy.label} and {baseline.label} are not sampled alike, so their numbers cannot stand side by side: "
            f"{'; '.join(different)}. Add {' '.join(f'{name}=VALUE' for name in names)}, which sets it for both, or "
            "give another baseline"
        )


def sampling_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide how videos are sampled, by their names in the configuration."""
    model = config.model.model_dump(mode="json", exclude=set(_NO_SAMPLING))
    rollout = config.rollout.model_dump(mode="json", include=set(_SAMPLING))
    return {f"model.{name}": value for name, value in model.items()} | {
        f"rollout.{name}": value for name, value in rollout.items()
    }


def on_device(arm: Arm, device: str) -> Arm:
    """Return an arm whose policy is sampled on ``device``, whatever its configuration says."""
    if arm.source is None:
        return arm
    model = arm.source.config.model.model_copy(update={"device": device})
    return replace(
        arm, source=replace(arm.source, config=arm.source.config.model_copy(update={"model": model}))
    )


def held_out_prompts(arm: Arm) -> list[str] | None:
    """Return the held-out prompts of an arm's run; None where it has none of its own."""
    if arm.source is None:
        return None
    config = arm.source.config
    if config.prompts.held_out is None and config.model.kind != "sprites":
        return None
    from vpo_engine.build import build_prompts

    return list(build_prompts(config)[1])


def _as_evaluated(source: PolicySource, overrides: Sequence[str]) -> PolicySource:
    """Return a source that samples with as many steps as the run's own evaluations, unless others are asked for."""
    asked = {word.partition("=")[0] for word in overrides}
    own = "rollout.steps" in asked and "evaluation.steps" not in asked
    steps = source.config.rollout.steps if own else source.config.held_out_steps
    return with_options(source, SampleOptions(steps=steps))


def _digest(source: PolicySource) -> str:
    """Return a digest of the files that videos come from: of a checkpoint its list of hashes, else names, sizes and
    times."""
    model, inside = source.config.model, source.checkpoint
    content: list[Any] = [model.kind]
    if inside is not None:
        content.append((inside / "manifest.json").read_text(encoding="utf-8"))
    for path in (model.policy, source.adapter):
        if path is not None and (inside is None or not path.is_relative_to(inside)):
            content += _listing(path)
    beside = {"vae": model.vae, "text_encoder": model.text_encoder}
    content += [[name, _listing(path)] for name, path in beside.items() if path is not None]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _listing(path: Path) -> list[Any]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    known = [(file, file.stat()) for file in files if file.is_file()]
    return [(file.name, status.st_size, status.st_mtime_ns) for file, status in known]


def _shown(value: Any) -> str:
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def settings_of(arm: Arm) -> Mapping[str, Any] | None:
    """Return how an arm's videos are sampled; None for videos that were sampled elsewhere."""
    return None if arm.source is None else sampling_settings(arm.source.config)
