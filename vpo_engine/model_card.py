"""The model card of a run: what was trained, on what, with which result, and how to use it."""

from __future__ import annotations

from typing import Any

from vpo_engine.config import Config
from vpo_engine.metrics.summary import change, number_texts, verdict
from vpo_engine.models.registry import model_family
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.log import iterate_metrics
from vpo_engine.runs.summary_file import read_summary
from vpo_engine.texts import markdown

_SETTINGS = {
    "candidates per prompt": "rollout.candidates",
    "sampling steps": "rollout.steps",
    "guidance": "rollout.guidance",
    "reward": "reward.kind",
    "beta": "objective.beta",
    "K (optimizer steps between refreshes of the reference)": "reference.refresh_every",
    "learning rate": "optimizer.lr",
    "pairs per step": "pairs_per_step",
    "seed": "seed",
}
"""{what the card calls a setting: its key}."""
_NAMED = {"resolution": "model.resolution", "aspect": "model.aspect", "frames": "model.num_frames"}
_SIZES = {"height": "model.height", "width": "model.width", "frames": "model.num_frames"}


def card(run: RunDirectory, config: Config, repo: str, step: int) -> str:
    """Return the card of the policy after ``step`` as Markdown; ``repo`` is the name it is published under."""
    summary = read_summary(run.summary)
    lora = config.model.lora is not None
    method = ["preference-optimization", "dpo"] if config.card.pairs else ["reward-gradient"]
    tags = ["text-to-video", *method, *(["lora"] if lora else [])]
    head = ["---", "license: other  # fill in: the licence of the base model binds this one too"]
    head += ["pipeline_tag: text-to-video", "tags:", *(f"- {tag}" for tag in tags), "---"]
    what = "A LoRA adapter for" if lora else "A fine-tuned"
    return "\n".join(
        [
            *head,
            f"\n# {repo.partition('/')[2]}\n",
            f"{what} text-to-video model, trained by [{config.card.title}]({config.card.paper}) with vpo-engine.\n",
            "## Base model\n",
            f"{_base(config)}\n",
            "## Data\n",
            f"{_data(run, config, step)}\n",
            "## Settings\n",
            *_table([("setting", "value"), *_settings(config)]),
            "\n## Result\n",
            f"{summary['clips']} held-out clips, the same prompts and noise before and after. {verdict(summary)}\n",
            *_table([("measure", "base", "final", "difference", "95 % bounds", ""), *_measures(summary)]),
            "\n## Use\n",
            _use(config, repo),
            "## Licence\n",
            "Fill in: the licence of the base model, and what it asks of models that are made from it.\n",
            "## Citation\n",
            f"{config.card.title}, {config.card.paper}\n",
        ]
    )


def _base(config: Config) -> str:
    """Return the name of the base model, never a local path."""
    if config.model.policy is not None:
        return f"{markdown(config.model.policy.name)} (family {config.model.kind})"
    return "the sprites policy that comes with vpo-engine, a miniature of Open-Sora 1.2 for tests"


def _data(run: RunDirectory, config: Config, step: int) -> str:
    """Return how much the policy has seen; prompts themselves are not told."""
    pairs = sum(int(row.get("pairs", 0)) for row in iterate_metrics(run.metrics) if row["kind"] == "train")
    drawn = step * config.pairs_per_step
    videos = drawn * config.rollout.candidates
    return config.card.seen.format(steps=step, prompts=drawn, videos=videos, pairs=pairs)


def _settings(config: Config) -> list[tuple[str, str]]:
    named = bool(model_family(config.model.kind).card.resolutions)
    chosen = _SETTINGS if config.model.kind == "sprites" else (_NAMED if named else _SIZES) | _SETTINGS
    unused = config.card.unused
    used = {label: key for label, key in chosen.items() if not {key, key.partition(".")[0]} & set(unused)}
    found = {"method": config.card.title, **{label: _value(config, key) for label, key in used.items()}}
    unset = dict.fromkeys(("height", "width"), "the model's own")
    shown = {key: unset.get(key, "none") if value is None else str(value) for key, value in found.items()}
    rows = [(label, markdown(text)) for label, text in shown.items()]
    if config.model.lora is not None:
        rows.append(("LoRA", f"rank {config.model.lora.rank}, scale {config.model.lora.scale:g}"))
    return rows


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _measures(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (markdown(name), *number_texts(numbers), change(name, numbers))
        for name, numbers in summary["measures"].items()
    ]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _use(config: Config, repo: str) -> str:
    """Return the commands that load the policy; each is complete but for local paths."""
    fetch = f"```sh\nhf download {repo} --local-dir policy\n"
    kind = config.model.kind
    if pipelines := model_family(kind).card.pipelines:
        load = f'pipeline = DiffusionPipeline.from_pretrained("policy")  # {pipelines[0]}'
        if config.model.lora is not None:
            load = 'pipeline.load_lora_weights("policy")  # of a pipeline of the base model'
        return f"{fetch}```\n\nIn diffusers:\n\n```python\n{load}\n```\n"
    if config.model.lora is not None:
        return (
            f"{fetch}```\n\nThe folder is an adapter in PEFT's format; `peft.LoraConfig.from_pretrained` and "
            "`peft.set_peft_model_state_dict` put it on the base model.\n"
        )
    if kind == "sprites":
        return f"{fetch}torchrun -m vpo_engine.train model.policy=policy\n```\n"
    card = model_family(kind).card
    own = (
        f"\nIn the public code of {card.name}:\n\n```sh\n{card.run_policy}\n```\n" if card.run_policy else ""
    )
    return f"{fetch}```\n\nIn a configuration of vpo-engine: `model.kind={kind} model.policy=policy`.\n{own}"
