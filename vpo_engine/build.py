"""From configuration to parts: the one place that knows every kind of model and reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vpo_engine.config import Config, ModelConfig
from vpo_engine.data.embeddings import EmbeddingCache
from vpo_engine.data.prompts import PromptFile, Prompts
from vpo_engine.data.sprites.assets import GEOMETRY, load_sprites
from vpo_engine.data.sprites.measure import measure
from vpo_engine.data.sprites.world import all_captions, withheld_captions
from vpo_engine.data.text_source import TextSource
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.checkpointing import Activations
from vpo_engine.memory.residency import Residency, module_tensors
from vpo_engine.memory.rounding import hold_in_bfloat16
from vpo_engine.metrics.held_out import HeldOut, Instruments
from vpo_engine.metrics.pixels import pixel_measures
from vpo_engine.models.lora import inject_adapter
from vpo_engine.models.opensora.load import load_opensora
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.models.opensora.text import MAX_LENGTH, T5Encoder, prepare_prompt
from vpo_engine.protocols import Reward
from vpo_engine.rewards import registry
from vpo_engine.rewards.combine import check_dimensions
from vpo_engine.rewards.process import start_reward
from vpo_engine.rewards.sprites import SpritesJudge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_prompts(config: Config) -> tuple[Prompts, list[str]]:
    """Training prompts and held-out prompts; ValueError names the file and row of a bad one."""
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


def build_model(config: Config, processes: Processes, say: Callable[[str], None] = print) -> OpenSora:
    """The model with its policy, and a fresh adapter under model.lora; text embeddings of the Open-Sora kind are kept
    on disk.

    The first process ``say``s which attention was chosen, and why, and how much of the policy an adapter trains;
    ValueError if the attention asked for cannot run, or if the adapter's targets do not fit.
    """
    settings = config.model
    dtype = DTYPES[settings.dtype]
    if settings.kind == "sprites":
        model = load_sprites(processes, dtype, settings.policy)
    else:
        beside = config.run_dir.parent if config.run_dir else Path("runs")
        cache = config.prompts.cache or beside / "embeddings"
        model = _build_opensora(settings, processes, dtype, cache)
    memory = config.memory
    model.network.activations = Activations(memory.recompute, memory.offload, memory.mlp_chunks)
    choice = model.network.choose_backends(settings.attention, settings.companions, dtype=dtype)
    if processes.first:
        say(str(choice))
    if settings.lora is not None:
        layers = inject_adapter(model.network, settings.lora, config.seed, settings.policy)
        if processes.first:
            trained = f"{model.network.num_trainable:,} parameters are trained"
            say(f"LoRA of rank {settings.lora.rank} in {len(layers)} layers: {trained}")
    hold_in_bfloat16(model.network, memory.weights, dtype)
    model.decode_frames, model.decode_rows = memory.decode_frames, memory.decode_rows
    model.stay_by(Residency.from_config(config, processes.device))
    return model


def _build_opensora(settings: ModelConfig, processes: Processes, dtype: torch.dtype, cache: Path) -> OpenSora:
    folder = settings.text_encoder
    # The configuration has checked these.
    assert settings.policy is not None
    assert settings.vae is not None
    assert folder is not None

    def load_encoder() -> T5Encoder:
        return T5Encoder.from_pretrained(folder, dtype=dtype).to(processes.device)

    text = TextSource(
        EmbeddingCache(cache, f"{folder}, {MAX_LENGTH} tokens, {settings.dtype}"),
        load_encoder,
        processes,
        lambda prompt: prepare_prompt(prompt, aes=settings.aesthetic_score),
    )
    return load_opensora(
        settings.policy,
        settings.vae,
        text,
        resolution=settings.resolution,
        aspect=settings.aspect,
        num_frames=settings.num_frames,
        fps=settings.fps,
        device=processes.device,
        dtype=dtype,
    )


def check_reward(config: Config) -> None:
    """Refuse, before any weight is read, what ``build_reward`` or the first step would.

    ValueError for a reward that is not for training, for settings it does not have and for dimensions it does not
    have; FileNotFoundError for a missing folder.
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


def build_reward(config: Config, device: torch.device, residency: Residency | None = None) -> Reward:
    """The reward model, on reward.device or else ``device``, in a process of its own under reward.process.

    ``residency`` is told of its weights if they are on ``device``, in this process. Errors as of ``check_reward``, and
    of its files.
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
    if moves and residency is not None and network is not None:
        residency.register("reward", lambda: module_tensors(network))
    return reward


def _scorer_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _present(name: str) -> torch.device:
    """ValueError for a CUDA device that is not there."""
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"reward.device={name}, but torch sees {count} CUDA devices; set reward.device=auto, cpu"
            + (f" or cuda:0 to cuda:{count - 1}" if count else "")
        )
    return device


def build_held_out(
    config: Config, model: OpenSora, prompts: Sequence[str], reward: Reward, processes: Processes
) -> HeldOut:
    """With guards.reward as the judge, on the policy's device; else the sprites world's own, or none."""
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
            model.residency.register("judge", lambda: module_tensors(network))
    instruments = Instruments(
        reward=reward,
        pixels=measure if sprites else pixel_measures,
        judge=judge,
        judged=None if settings is None else settings.dimensions,
    )
    return HeldOut(config, model, prompts, instruments, processes, model.residency)
