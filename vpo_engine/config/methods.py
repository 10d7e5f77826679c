"""The training methods: what each one needs and does not use, and the settings of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from vpo_engine.config.presets import MEMORY_PRESETS
from vpo_engine.config.reward import RewardKind
from vpo_engine.config.section import Section

MethodName = Literal["online_vpo", "offline_dpo", "refl", "vader", "instructvideo", "t2v_turbo"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
GIVEN_PAIRS = ("dataset", "file")
GIVEN = (*GIVEN_PAIRS, "videos")
"""The settings of offline_dpo that name pairs which are there before the run."""


@dataclass(frozen=True, kw_only=True)
class MethodCard:
    """The facts about a method that the rest of the engine asks for, known before any file is read.

    title: the name that people read. paper: the address of its paper. reference: it keeps a frozen reference. prompts:
    it takes its prompts from prompts.train. candidates: it samples several candidates of each prompt and scores them.
    pairs: it learns from winners and losers. reward_gradient: it needs the gradient of the reward, through the decoder.
    seen: the sentence of a model card that says what was trained on, of the numbers {steps}, {prompts}, {videos} and
    {pairs}. unused: settings, or whole sections, that have no meaning for it.
    """

    title: str
    paper: str
    reference: bool = True
    prompts: bool = True
    candidates: bool = True
    pairs: bool = True
    reward_gradient: bool = False
    seen: str = (
        "{prompts:,} prompts were drawn in {steps:,} steps, and {videos:,} videos sampled for them by the policy "
        "itself; {pairs:,} pairs of best and worst were learned from; ties were left out."
    )
    unused: tuple[str, ...] = ()


def _keys(section: str, names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names.split())


_OF_CANDIDATES = (
    *_keys("rollout", "preset candidates source batch_size overlap compile guidance_interval"),
    *_keys("rollout", "prune cache weights explore"),
    *_keys("pairs", "rule resample dataset"),
    "guards.motion_floor",
    "reward.normalise",
)
_OF_PAIRS = (
    "pairs",
    *_keys(
        "objective",
        "beta timesteps_per_pair updates_per_rollout weighting noise winner_anchor loser_scaling branch",
    ),
    *_keys("memory", "sequential step_in_backward"),
    "processes.per_prompt",
)
_DIFFUSION_DPO = "https://arxiv.org/abs/2311.12908"
STORED_PAIRS = MethodCard(
    title="offline Diffusion-DPO",
    paper=_DIFFUSION_DPO,
    prompts=False,
    candidates=False,
    seen="{prompts:,} pairs of a stored preference dataset, of which {pairs:,} were no ties.",
    unused=(*_OF_CANDIDATES, "reference.refresh_every", "prompts.train", "objective.noise"),
)
"""The card of offline Diffusion-DPO on the preference dataset of a run."""
FILE_PAIRS = replace(
    STORED_PAIRS,
    seen="{prompts:,} pairs of a preference file.",
    unused=(*STORED_PAIRS.unused, "pairs.min_gap", "pairs.gap_power"),
)
"""The card of offline Diffusion-DPO on a preference file, whose pairs have no scores."""


def _by_reward_gradient(title: str, paper: str) -> MethodCard:
    return MethodCard(
        title=title,
        paper=paper,
        reference=False,
        candidates=False,
        pairs=False,
        reward_gradient=True,
        seen="{prompts:,} prompts were drawn in {steps:,} steps, with a video each; the gradient of its reward was "
        "followed.",
        unused=(*_OF_CANDIDATES, *_OF_PAIRS, "reference"),
    )


CARDS: dict[MethodName, MethodCard] = {
    "online_vpo": MethodCard(title="OnlineVPO", paper="https://arxiv.org/abs/2412.15159"),
    "offline_dpo": MethodCard(
        title="offline Diffusion-DPO",
        paper=_DIFFUSION_DPO,
        seen="{prompts:,} pairs of videos that the base policy had sampled, of which {pairs:,} were no ties.",
        unused=("rollout.source", "reference.refresh_every", "pairs.dataset", "objective.noise"),
    ),
    "refl": _by_reward_gradient("ReFL", "https://arxiv.org/abs/2304.05977"),
    "vader": _by_reward_gradient("VADER", "https://arxiv.org/abs/2407.08737"),
    "instructvideo": _by_reward_gradient("InstructVideo", "https://arxiv.org/abs/2312.12490"),
    "t2v_turbo": MethodCard(
        title="T2V-Turbo",
        paper="https://arxiv.org/abs/2405.18750",
        candidates=False,
        pairs=False,
        reward_gradient=True,
        seen="{prompts:,} given videos were learned from in {steps:,} steps, with the policy of the start as the "
        "teacher; the gradient of a reward was followed.",
        unused=(*_OF_CANDIDATES, *_OF_PAIRS, "reference.refresh_every"),
    ),
}


class ReflConfig(Section):
    """ReFL (method=refl): the policy follows the gradient of the reward of clean latents that it predicts in one late
    step. Source of all defaults: the public code of ImageReward."""

    steps: int | None = Field(40, ge=1)
    """Sampling steps of the videos that are trained on; null: rollout.steps. Source: ImageReward."""
    guidance: float | None = Field(1.0, ge=0)
    """Guidance of these videos; 1 turns it off, null: rollout.guidance. Source: ImageReward, which has none."""
    last_steps: int = Field(10, ge=1)
    """The step with a gradient is drawn among so many last steps; those before it are made without, and those after it
    are not made. Source: ImageReward."""
    margin: float | None = 2.0
    """The loss is scale * relu(margin - reward), so nothing pushes a reward beyond the margin; it belongs to the
    reward's own scale. null: -scale * reward. Source: ImageReward, for its own normalised score."""
    scale: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Factor of the loss. Source: ImageReward."""


class SecondRewardConfig(Section):
    """A second reward model, whose gradient the policy follows together with that of reward.kind. It stays on the
    policy's device, and does not count in evaluations and alarms."""

    kind: RewardKind
    """Name of the reward model, as for reward.kind; it must pass gradients."""
    path: Path | None = None
    """Folder of its checkpoint; null for reward models whose weights are in the package."""
    dimensions: tuple[str, ...] = ("global",)
    """Dimensions whose average counts; "global" alone means all of them."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Factor of its loss."""


class VaderConfig(Section):
    """VADER (method=vader): the policy follows the gradient of the reward back through the last sampling steps. Source
    of all defaults: the public code of VADER for Open-Sora."""

    steps: int | None = Field(30, ge=1)
    """Sampling steps of the videos that are trained on; null: rollout.steps. Source: VADER."""
    guidance: float | None = Field(7.0, ge=0)
    """Guidance of these videos; 1 turns it off, null: rollout.guidance. Source: VADER."""
    last_steps: int = Field(1, ge=1)
    """K: number of last steps that the gradient goes back through. Source: VADER (mode last)."""
    random_steps: bool = False
    """Draw K anew in every optimizer step, between 1 and all steps, in place of last_steps (VADER's mode rand)."""
    goal: float | Literal["auto"] | None = "auto"
    """The loss is scale * mean|reward - goal|; null: -scale * mean(reward). auto: 10 for laion_aesthetic, 1 for hpsv2
    and hpsv2_1, 100 for pickscore, and null for other rewards. Source: VADER."""
    scale: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Factor of the loss; null: 1, but with goal=auto 0.1 for laion_aesthetic and 0.01 for pickscore. Source: VADER."""
    frames: int | None = Field(None, ge=1)
    """Number of random frames that are decoded and scored, the same for all videos of a step; null: 1 for rewards that
    score single frames, all for others, which take no other value. Source: VADER."""
    second: SecondRewardConfig | None = None
    """A second reward of the same sort (of single frames, or of videos), with a goal and a scale as goal=auto gives
    them. The loss is (weight * loss of reward.kind + second.weight * loss of the second) / 2. null: none."""
    weight: float = Field(1.5, gt=0, allow_inf_nan=False)
    """Factor of the loss of reward.kind where there is a second reward. Source: VADER, with laion_aesthetic first and
    hpsv2_1 second."""


class InstructVideoConfig(Section):
    """InstructVideo (method=instructvideo): the policy edits noised videos in a part of the sampling steps, and follows
    the gradient of a reward of a few of their frames. Source of all defaults: the public code in VGen."""

    steps: int | None = Field(20, ge=1)
    """Sampling steps of the whole chain, of which a part is run; null: rollout.steps. Source: VGen."""
    guidance: float | None = Field(3.0, ge=0)
    """Guidance; 1 turns it off, null: rollout.guidance. Source: VGen."""
    videos: Path | None = None
    """The videos that are edited, with their prompts, which take the place of prompts.train: a folder of videos (as
    vpo_engine.rank reads it), a file of pairs (as for offline_dpo.file) or a run with pairs.dataset=latents, of which
    the winners are taken. Videos have the size that the model makes; they are encoded once, into the folder
    encoded_videos beside the run directory. null: the clips that the sprites world draws for its captions; other models
    have none."""
    strength: float = Field(0.6, gt=0, le=1)
    """How much of a video is made anew; see strength_of. Source: VGen."""
    strength_of: Literal["steps", "noise"] = "steps"
    """The rule by which strength names the step where the chain begins. steps: the last share of the steps is run, as
    in VGen, whatever their noise is; samplers differ in that. noise: the first step whose noise is at most strength,
    from 0 (clean) to 1 (pure noise): t of rectified flow, sqrt(1 - abar) of v-prediction. VGen's start has a signal
    that is 0.52 times the noise: 0.66 for rectified flow, 0.89 for v-prediction. Source: VGen."""
    segments: int | None = Field(None, ge=1)
    """Number of equal parts of a video, of each of which one random frame is decoded and scored; null: 4 for rewards
    that score single frames. Other rewards score whole videos, and take no other value. Source: VGen."""
    attenuation: float | None = Field(None, ge=0, allow_inf_nan=False)
    """A frame weighs exp(-attenuation * its distance from the middle frame) where there are segments; null: 1. Source:
    VGen."""


class T2VTurboConfig(Section):
    """T2V-Turbo (method=t2v_turbo): the policy learns to reach clean latents in one step from its own guided steps, and
    follows the gradient of rewards of what it reaches. Source of all defaults: the public code of T2V-Turbo."""

    videos: Path | None = None
    """The videos that are learned from, with their prompts; see instructvideo.videos. Source: T2V-Turbo, which takes
    videos from the web."""
    steps: int = Field(50, ge=2)
    """Steps of the teacher's sampling, each of which is learned to be skipped. Source: T2V-Turbo."""
    guidance: float = Field(7.5, ge=0, allow_inf_nan=False)
    """w of the teacher, whose guidance scale is w + 1. T2V-Turbo draws w between 5 and 15 and tells its student, as an
    input that the models here do not have; so w is one number. Source: T2V-Turbo, for its samples."""
    huber: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """c of the pseudo-Huber distance. Source: T2V-Turbo."""
    reward_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Factor of the reward beside the distillation loss. Source: T2V-Turbo: 1 for its image reward, 2 for its video
    reward."""
    frames: int | None = Field(None, ge=1)
    """Number of random frames that are decoded and scored; null: 5 for rewards that score single frames, all for
    others, which take no other value. Source: T2V-Turbo."""
    second: SecondRewardConfig | None = None
    """A second reward, of the same sort or of the other one; second.weight is its factor. null: none. Source:
    T2V-Turbo has an image reward with factor 1 and a video reward with factor 2."""


class OfflineDPOConfig(Section):
    """Offline Diffusion-DPO (method=offline_dpo): the policy learns from pairs that are there before its first step,
    against the frozen policy that the run starts from. Pairs are taken in their order, again and again."""

    dataset: Path | None = None
    """Run directory, or its folder preference_dataset, whose pairs are trained on, in the order in which they were
    made. That run must have had pairs.dataset=latents."""
    file: Path | None = None
    """File of pairs: .csv, .tsv or .jsonl with winner, loser and prompt, where winner and loser are files of videos or
    of latents (see docs/methods.md)."""
    pairs: int | None = Field(None, ge=1)
    """Number of prompts for which the policy of the start samples candidates, before the first step, if neither dataset
    nor file is given. The run directory keeps the pairs, as its preference dataset. null: as many as the steps take,
    so that none is taken twice."""
    cache: Path | None = None
    """Folder of the encoded videos of file, which runs may share; null: the folder encoded_videos beside the run
    directory."""
    refresh_every: int | None = Field(None, ge=1)
    """The reference becomes the policy after every so many optimizer steps; null: never. Source: Diffusion-DPO
    (arXiv 2311.12908)."""

    @property
    def given(self) -> str | None:
        """Return the setting that names pairs which are there before the run; None: they are sampled."""
        return next((name for name in GIVEN_PAIRS if getattr(self, name) is not None), None)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = {
            name: getattr(self, name) for name in (*GIVEN_PAIRS, "pairs") if getattr(self, name) is not None
        }
        if len(given) > 1:
            shown = " and ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"{shown} name different pairs; give one of them")
        if self.cache is not None and self.file is None:
            raise ValueError(
                f"cache={self.cache} is for the videos of file, which is not given; leave it out"
            )
        return self


SECTIONS: dict[str, type[Section]] = {
    "offline_dpo": OfflineDPOConfig,
    "refl": ReflConfig,
    "vader": VaderConfig,
    "instructvideo": InstructVideoConfig,
    "t2v_turbo": T2VTurboConfig,
}
"""The methods that have settings of their own, which stand in a section of the method's name."""


def card_of(method: MethodName, given: str | None) -> MethodCard:
    """Return the card of a method. given: the setting of its section, among GIVEN, that names what it learns from in
    place of prompts.train; None if there is none."""
    if given == "videos":
        return replace(CARDS[method], prompts=False, unused=(*CARDS[method].unused, "prompts.train"))
    return {"dataset": STORED_PAIRS, "file": FILE_PAIRS}[given] if given else CARDS[method]


def unused_settings(config: Section, names: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, value, default) of every setting among ``names``, or in sections among them, that has not its default
    value. What memory.preset sets does not count."""
    for name in names:
        owner: Any = config
        *sections, leaf = name.split(".")
        for section in sections:
            owner = getattr(owner, section)
        value, default = getattr(owner, leaf), type(owner).model_fields[leaf].default
        if isinstance(default, Section):
            yield from unused_settings(config, [f"{name}.{key}" for key in type(default).model_fields])
        elif value != default and not (sections == ["memory"] and _of_preset(owner.preset, leaf, value)):
            yield name, value, default


def _of_preset(preset: str | None, name: str, value: Any) -> bool:
    """Return whether memory.preset gives a setting this value; balanced may give any of those it chooses."""
    if preset == "balanced":
        return name in MEMORY_PRESETS["lean"]
    values = MEMORY_PRESETS.get(preset or "", {})
    return name in values and values[name] == value


def refuse_beside_gradients(config: Any) -> None:
    """Raise ValueError for settings of a run that the gradient of the reward cannot pass, or that were not made for it.

    config: all settings of the run.
    """
    elsewhere = "the gradient of the reward does not come from another process; set false"
    wrong = {
        "processes.reward=true": (config.processes.reward, elsewhere),
        "reward.process=true": (config.reward.process, elsewhere),
        "distributed.engine=deepspeed": (
            config.distributed.engine == "deepspeed",
            "the decoder and the reward are in the graph, which ZeRO knows nothing of; set data_parallel",
        ),
        f"distributed.sequence_parallel={config.distributed.sequence_parallel}": (
            config.distributed.sequence_parallel > 1,
            "the gradient of a slice of the tokens does not go on through earlier steps; set 1",
        ),
    }
    for name, (given, reason) in wrong.items():
        if given:
            raise ValueError(f"method={config.method} excludes {name}: {reason}")


def drop_settings(values: dict[str, Any], names: Sequence[str], kept: Callable[[str], bool]) -> list[str]:
    """Take settings, or all of those in sections, out of nested ``values``; return the keys of those that were there.

    kept: says of a key whether it stays.
    """
    dropped = []
    for name in names:
        *sections, leaf = name.split(".")
        owner: Any = values
        for section in sections:
            owner = owner.get(section) if isinstance(owner, dict) else None
        if not isinstance(owner, dict) or leaf not in owner:
            continue
        if not sections and isinstance(owner[leaf], dict):
            dropped += drop_settings(values, [f"{name}.{key}" for key in owner[leaf]], kept)
        elif not kept(name):
            del owner[leaf]
            dropped.append(name)
    return dropped
