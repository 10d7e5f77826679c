"""Build the parts of a run from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from vpo_engine.config import Config
from vpo_engine.data.embeddings import EmbeddingCache
from vpo_engine.data.prompt_checks import (
    check_readable,
    describe_overlap,
    describe_repeats,
    refuse_rows,
    rows_looked_at,
)
from vpo_engine.data.prompt_settings import open_prompt_files
from vpo_engine.data.prompts import PlacedPrompts, PromptList, Prompts, Stream
from vpo_engine.data.sprites.assets import GEOMETRY
from vpo_engine.data.sprites.measure import measure
from vpo_engine.data.sprites.world import all_captions, withheld_captions
from vpo_engine.data.text_source import TextSource
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.sequence import SequenceGroup
from vpo_engine.memory.idle_offload import IdleOffload, module_tensors
from vpo_engine.memory.quantised_base import HeldBase
from vpo_engine.metrics.held_out import HeldOut, HeldOutScorers
from vpo_engine.metrics.pixels import pixel_measures
from vpo_engine.models.policy import held_base, prepare_policy
from vpo_engine.models.registry import check_loaded, check_model, model_family
from vpo_engine.protocols import Reward
from vpo_engine.rewards import registry
from vpo_engine.rewards.combine import check_dimensions
from vpo_engine.rewards.frames import counted_frames
from vpo_engine.rewards.process import start_reward
from vpo_engine.rewards.refusals import refusals, size_refusal
from vpo_engine.rewards.sprites import SpritesJudge
from vpo_engine.rollout.preference_dataset import StoredPairs
from vpo_engine.rollout.preferred_files import FilePairs
from vpo_engine.runs.checkpoint import verify_if_of_checkpoint
from vpo_engine.video_model import Encoder, LoadContext, VideoModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_prompts(config: Config, say: Callable[[str], None] | None = None) -> tuple[Prompts, list[str]]:
    """Return training prompts and held-out prompts; ``say`` what is odd about them.

    Raise ValueError, naming file and line, for a bad row and for a prompt of which the model would read nothing.
    """
    files, notes = open_prompt_files(config.prompts)
    withheld, count = withheld_captions(), config.evaluation.prompts
    train: Prompts = [caption for caption in all_captions() if caption not in withheld]
    held_out = withheld[:count]
    if "train" in files:
        train = files["train"]
    if "held_out" in files:
        held_out = PromptList((), files["held_out"], count)
    notes += check_prompts(config, held_out)
    if files and config.card.prompts:
        rows = _rows_of(config, train)
        notes += check_prompts(config, train, rows)
        notes += describe_repeats("prompts.train", train, rows)
        notes += describe_overlap(held_out, train, rows)
    notes += describe_repeats("prompts.held_out", held_out, range(len(held_out)))
    if len(held_out) * config.evaluation.samples_per_prompt == 1:
        notes.append(
            "note: there is one held-out clip, so its changes will have no bounds; give a second held-out prompt, or "
            "set evaluation.samples_per_prompt=2"
        )
    if say is not None:
        for note in notes:
            say(note)
    return train, held_out


def _rows_of(config: Config, train: Prompts) -> Sequence[int]:
    return rows_looked_at(train, config.seed, config.steps * config.pairs_per_step)


def check_prompts(config: Config, prompts: Prompts, rows: Sequence[int] | None = None) -> list[str]:
    """Raise ValueError, naming their places, for prompts of which the model would read nothing.

    ``rows``: the numbers of those that are looked at; None for all. Return notes for the user.
    """
    family = model_family(config.model.kind)
    rows = range(len(prompts)) if rows is None else rows
    return check_readable(prompts, rows, partial(family.readable_part, config.model), family.card.name)


def check_given(
    config: Config, stream: Stream, say: Callable[[str], None] | None = None
) -> PlacedPrompts | None:
    """Return the prompts of given videos or pairs; None where prompts.train is trained on. ``say`` what is odd.

    Raise ValueError, naming their places, for prompts of which the model would read nothing.
    """
    if not isinstance(stream, FilePairs | StoredPairs):
        return None
    for note in check_prompts(config, stream.prompts):
        if say is not None:
            say(note)
    return stream.prompts


def check_scored(
    config: Config,
    model: VideoModel,
    reward: Reward,
    train: Prompts,
    held_out: Sequence[str],
    given: PlacedPrompts | None = None,
) -> None:
    """Raise ValueError for what the reward refuses, before a video is made: the size of the model's videos, or prompts,
    whose places are named. given: see ``check_given``; a reward scores them whose gradient is followed."""
    who, change = f"reward.kind={config.reward.kind}", "set another reward.kind"
    _ask_size(reward, model, who, change)
    _ask_preview_size(config, model, reward, who)
    _ask(reward, held_out, range(len(held_out)), who, change)
    if config.card.prompts:
        _ask(reward, train, _rows_of(config, train), who, change)
    if given is not None and config.card.reward_gradient:
        _ask(reward, given, range(len(given)), who, change)


def _ask_size(reward: Reward, model: VideoModel, who: str, change: str) -> None:
    if model.video_size is None:
        return
    frames, height, width = model.video_size
    reason = size_refusal(reward, frames, height, width)
    if reason is not None:
        raise ValueError(
            f"{who} does not score videos of {counted_frames(frames)} of {height} x {width} pixels, which the model "
            f"makes: {reason}. Change model.num_frames, model.resolution, or model.height and model.width, "
            f"as far as the model has them, or {change}"
        )


def _ask_preview_size(config: Config, model: VideoModel, reward: Reward, who: str) -> None:
    asked = config.rollout.preview_frames
    if asked is None:
        return
    _, frames = model.prefix(asked)
    reason = None
    if config.guards.motion_floor is not None and frames < 2:
        who, reason = "guards.motion_floor", "one frame does not move"
    elif model.video_size is not None:
        reason = size_refusal(reward, frames, *model.video_size[1:])
    if reason is not None:
        raise ValueError(
            f"{who} does not score previews of {counted_frames(frames)}, which rollout.prune.frames={asked} asks for: "
            f"{reason}. Raise rollout.prune.frames, or set rollout.prune.frames=null"
        )


def _ask(reward: Reward, prompts: Prompts, rows: Sequence[int], who: str, change: str) -> None:
    found = refusals(reward, [prompts[row] for row in rows])
    reasons = {
        rows[number]: f"{who} does not score this prompt: {reason}" for number, reason in found.items()
    }
    refuse_rows(prompts, reasons, len(rows), f"delete or change these rows, or {change}")


def build_model(config: Config, processes: Processes, say: Callable[[str], None] = print) -> VideoModel:
    """Load the model with its policy, and give it a fresh adapter under model.lora.

    The first process ``say``s which attention was chosen, and why, and how much of the policy an adapter trains.
    Raise ValueError if the model cannot run so, if the adapter's targets do not fit, or for weights of a checkpoint
    that are not as they were saved.
    """
    check_model(config)
    settings = config.model
    for path in filter(None, (settings.policy, settings.vae, settings.text_encoder)):
        verify_if_of_checkpoint(path)
    dtype = DTYPES[settings.dtype]
    family = model_family(settings.kind)
    context = _load_context(config, processes, dtype, held_base(config, family.card, processes.device))
    model = family.load(settings, context)
    network = check_loaded(settings.kind, model).network
    model.use_memory(config.memory)
    said = [model.choose_backends(settings)]
    said.append(prepare_policy(network, config, model.card, dtype, processes.device))
    if processes.sequence.count > 1:
        model.share_sequence(SequenceGroup(processes.sequence))
    if processes.first:
        for line in filter(None, said):
            say(line)
    model.stay_by(IdleOffload.from_config(config, processes.device))
    return model


def _load_context(config: Config, processes: Processes, dtype: torch.dtype, base: HeldBase) -> LoadContext:
    """Return where the model is loaded to; embeddings on disk lie in prompts.cache, or beside the run."""
    beside = config.run_dir.parent if config.run_dir else Path("runs")
    folder = config.prompts.cache or beside / "embeddings"

    def text_source(
        load_encoder: Callable[[], Encoder],
        encoder_id: str,
        rewrite: Callable[[str], str] = str,
        *,
        on_disk: bool = True,
    ) -> TextSource:
        cache = EmbeddingCache(folder if on_disk else None, encoder_id)
        return TextSource(cache, load_encoder, processes, rewrite)

    return LoadContext(processes.device, dtype, text_source, base)


def check_reward(config: Config) -> None:
    """Refuse, before any weight is read, what ``build_reward`` or the first step would.

    Raise ValueError for a reward that is not for training, for settings it does not have and for dimensions it does
    not have; FileNotFoundError for a missing folder.
    """
    settings = config.reward
    registry.check_reward(settings.kind, settings.path, settings.scorer_settings)
    card = registry.reward_card(settings.kind)
    if not card.for_training:
        raise ValueError(
            f"reward.kind={settings.kind} writes its scores in words, too slow and too coarse to train on: it is for "
            "python -m vpo_engine.rank; set another reward.kind"
        )
    if config.card.reward_gradient and not card.differentiable:
        raise ValueError(
            f"method={config.method} follows the gradient of the reward, but reward.kind={settings.kind} has none; set "
            "another reward.kind (the column gradient of python -m vpo_engine.rank --list), or method=online_vpo"
        )
    check_dimensions(settings.dimensions, tuple(card.dimensions))
    held_out = config.guards.reward
    if held_out is not None:
        registry.check_reward(held_out.kind, held_out.path)
        check_dimensions(held_out.dimensions, tuple(registry.reward_card(held_out.kind).dimensions))


def blind_reward_note(config: Config) -> str | None:
    """Return what the user should know where nothing in the run reads the prompt, by the cards of its rewards."""
    held_out = config.guards.reward
    kinds = [config.reward.kind, *([] if held_out is None else [held_out.kind])]
    if any(registry.reward_card(kind).reads_prompt for kind in kinds):
        return None
    return (
        f"reward.kind={config.reward.kind} does not read the prompt, so a policy can raise it by ignoring prompts, and "
        "runs have collapsed to noise that way within 20 rollouts. Name a held-out reward that reads the prompt "
        "(guards.reward.kind; python -m vpo_engine.rank --list NAME says whether one does), take another reward.kind, "
        "or watch the alarms (docs/guards.md)"
    )


def build_reward(config: Config, device: torch.device, idle_offload: IdleOffload | None = None) -> Reward:
    """Make the reward model, on reward.device or else ``device``, in a separate process if reward.process is set.

    ``idle_offload`` is told of its weights if they are on ``device``, in this process. Errors: those of
    ``check_reward``, and of its files.
    """
    check_reward(config)
    settings = config.reward
    moves = settings.device == "auto" and not settings.process
    device = device if settings.device == "auto" else _present(settings.device)
    spec = registry.RewardSpec(
        settings.kind,
        settings.path,
        device=device,
        dtype=_scorer_dtype(device),
        fps=GEOMETRY.fps if config.model.kind == "sprites" else config.model.fps,
        settings=settings.scorer_settings,
    )
    if settings.process:
        return start_reward(spec, time_limit=settings.time_limit)
    reward = spec.build()
    network = getattr(reward, "network", None)
    if moves and idle_offload is not None and network is not None:
        idle_offload.register("reward", lambda: module_tensors(network))
    return reward


def _scorer_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _present(name: str) -> torch.device:
    """Raise ValueError for a CUDA device that is not there."""
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"reward.device={name}, but torch sees {count} CUDA devices; set reward.device=auto, cpu"
            + (f" or cuda:0 to cuda:{count - 1}" if count else "")
        )
    return device


def judged_dimensions(config: Config, judge: Reward | None) -> Sequence[str] | None:
    """Return the dimensions of the judge that are averaged: those of guards.reward; or None, for those that are trained
    on, if the judge has them; or else all."""
    if config.guards.reward is not None:
        return config.guards.reward.dimensions
    if judge is None or set(config.reward.dimensions) <= {"global", *judge.dimensions}:
        return None
    return ("global",)


def build_held_out(
    config: Config, model: VideoModel, prompts: Sequence[str], reward: Reward, processes: Processes
) -> HeldOut:
    """Build the held-out evaluation, judged by guards.reward on the policy's device, else by the sprites world's judge
    if it is the model."""
    sprites, settings = config.model.kind == "sprites", config.guards.reward
    judge: Reward | None = SpritesJudge() if sprites and settings is None else None
    if settings is not None:
        judge = registry.build_reward(
            settings.kind,
            settings.path,
            device=processes.device,
            dtype=_scorer_dtype(processes.device),
            fps=model.fps,
        )
        network = getattr(judge, "network", None)
        if network is not None:
            model.idle_offload.register("judge", lambda: module_tensors(network))
    if judge is not None:
        who = "the judge of the sprites world" if settings is None else f"guards.reward.kind={settings.kind}"
        change = "set guards.reward to another judge"
        _ask_size(judge, model, who, change)
        _ask(judge, prompts, range(len(prompts)), who, change)
    scorers = HeldOutScorers(
        reward=reward,
        pixels=measure if sprites else pixel_measures,
        judge=judge,
        judged=judged_dimensions(config, judge),
    )
    return HeldOut(config, model, prompts, scorers, processes, model.idle_offload)
