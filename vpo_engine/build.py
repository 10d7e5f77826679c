"""Build the parts of a run from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vpo_engine.config import Config
from vpo_engine.data.embeddings import EmbeddingCache
from vpo_engine.data.prompts import PromptFile, Prompts
from vpo_engine.data.sprites.assets import GEOMETRY
from vpo_engine.data.sprites.measure import measure
from vpo_engine.data.sprites.world import all_captions, withheld_captions
from vpo_engine.data.text_source import TextSource
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.idle_offload import IdleOffload, module_tensors
from vpo_engine.memory.rounding import hold_in_bfloat16
from vpo_engine.metrics.held_out import HeldOut, HeldOutScorers
from vpo_engine.metrics.pixels import pixel_measures
from vpo_engine.models.lora import inject_adapter
from vpo_engine.models.registry import check_loaded, check_model, model_family
from vpo_engine.protocols import Reward
from vpo_engine.rewards import registry
from vpo_engine.rewards.combine import check_dimensions
from vpo_engine.rewards.process import start_reward
from vpo_engine.rewards.sprites import SpritesJudge
from vpo_engine.video_model import Encoder, LoadContext, VideoModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_prompts(config: Config) -> tuple[Prompts, list[str]]:
    """Return training prompts and held-out prompts; a ValueError names the file and row of a bad one."""
    settings = config.prompts
    withheld = withheld_captions()
    train: Prompts = [caption for caption in all_captions() if caption not in withheld]
    held_out: Sequence[str] = withheld
    if settings.train is not None:
        train = PromptFile(settings.train, settings.column)
    if settings.held_out is not None:
        file = PromptFile(settings.held_out, settings.column if settings.held_out.suffix != ".txt" else None)
        held_out = [file[index] for index in range(len(file))]
    return train, list(held_out[: config.evaluation.prompts])


def build_model(config: Config, processes: Processes, say: Callable[[str], None] = print) -> VideoModel:
    """Load the model with its policy, and give it a fresh adapter under model.lora.

    The first process ``say``s which attention was chosen, and why, and how much of the policy an adapter trains.
    Raise ValueError if the model cannot run so, or if the adapter's targets do not fit.
    """
    check_model(config)
    settings, memory = config.model, config.memory
    dtype = DTYPES[settings.dtype]
    model = model_family(settings.kind).load(settings, _load_context(config, processes, dtype))
    network = check_loaded(settings.kind, model).network
    model.use_memory(memory)
    said = [model.choose_backends(settings)]
    if settings.lora is not None:
        targets = model.card.lora_targets
        layers = inject_adapter(network, settings.lora, targets, config.seed, settings.policy)
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        said.append(
            f"LoRA of rank {settings.lora.rank} and scale {settings.lora.scale:g} (alpha / rank) in {len(layers)} "
            f"layers: {trained:,} parameters are trained"
        )
    if processes.first:
        for line in filter(None, said):
            say(line)
    hold_in_bfloat16(network, memory.weights, dtype)
    model.stay_by(IdleOffload.from_config(config, processes.device))
    return model


def _load_context(config: Config, processes: Processes, dtype: torch.dtype) -> LoadContext:
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

    return LoadContext(processes.device, dtype, text_source)


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
    check_dimensions(settings.dimensions, tuple(card.dimensions))
    held_out = config.guards.reward
    if held_out is not None:
        registry.check_reward(held_out.kind, held_out.path)
        check_dimensions(held_out.dimensions, tuple(registry.reward_card(held_out.kind).dimensions))


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
    scorers = HeldOutScorers(
        reward=reward,
        pixels=measure if sprites else pixel_measures,
        judge=judge,
        judged=None if settings is None else settings.dimensions,
    )
    return HeldOut(config, model, prompts, scorers, processes, model.idle_offload)
