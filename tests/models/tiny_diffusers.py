"""Tiny pipelines of diffusers with random weights, and the engine's models of their folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.data.embeddings import EmbeddingCache
from vpo_engine.data.text_source import TextSource
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.registry import model_family
from vpo_engine.video_model import LoadContext

PROMPTS = ("a red ball rolls over the grass", "two dogs")
TOKENS = 12


@torch.no_grad()
def randomise(module: nn.Module, seed: int, scale: float = 0.25) -> Any:
    """Draw all parameters, so that gates, norms and last layers matter."""
    random = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=random))
    return module.eval()


def tiny_t5(seed: int, channels: int = 32) -> Any:
    import transformers

    config = transformers.T5Config(
        d_model=channels,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=384,
        feed_forward_proj="gated-gelu",
    )
    return randomise(transformers.T5EncoderModel(config), seed, 0.5)


def cogvideox_pipeline(seed: int = 0, **changes: Any) -> Any:
    """Make a CogVideoXPipeline whose native size is 64 x 96 pixels and 9 frames. changes: of the transformer."""
    import diffusers
    import transformers

    transformer = diffusers.CogVideoXTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 32,
            "num_layers": 3,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": TOKENS,
            **changes,
        }
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    pipeline = diffusers.CogVideoXPipeline(
        transformers.ByT5Tokenizer(),
        tiny_t5(seed + 1),
        randomise(vae, seed + 2, 0.3),
        randomise(transformer, seed),
        scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings(folder: Path, *overrides: str, kind: str = "cogvideox", frames: int = 9) -> Config:
    """Return the configuration of a run on a tiny folder, with two prompts beside it."""
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    given = [
        f"model.kind={kind}",
        f"model.policy={folder}",
        f"model.num_frames={frames}",
        "reward.kind=builtin",
    ]
    files = [f"prompts.{name}={prompts}" for name in ("train", "held_out")]
    return load_config(None, [*given, *files, *overrides])


def run_words(
    folder: Path, run: Path, *overrides: str, kind: str = "cogvideox", frames: int = 9
) -> list[str]:
    """Return the command line of a run of three steps on a tiny folder, with a refresh of the reference after two."""
    prompts = folder.parent / "train.txt"
    prompts.write_text("a red ball\na blue ball\na cat on a sofa\n")
    return [
        f"model.kind={kind}",
        f"model.policy={folder}",
        f"model.num_frames={frames}",
        "model.height=32",
        "model.width=64",
        f"prompts.train={prompts}",
        f"prompts.held_out={prompts}",
        "reward.kind=tiny_reward:Brightness",
        f"run_dir={run}",
        "steps=3",
        "pairs_per_step=1",
        "rollout.candidates=2",
        "rollout.steps=2",
        "rollout.guidance=6",
        "optimizer.lr=1e-3",
        "optimizer.warmup_steps=0",
        "reference.refresh_every=2",
        "evaluation.every=null",
        "evaluation.prompts=1",
        "evaluation.samples_per_prompt=2",
        "checkpoint.every=2",
        *overrides,
    ]


def text_source(load: Any, encoder_id: str, rewrite: Any = str, *, on_disk: bool = True) -> TextSource:
    """Make text sources that keep embeddings in memory."""
    return TextSource(EmbeddingCache(None, encoder_id), load, Processes.start("cpu"), rewrite)


def load(config: Config, prompts: Sequence[str] = PROMPTS, dtype: torch.dtype = torch.float32) -> Any:
    """Load the model of a configuration, check its settings first, and prepare prompts."""
    family = model_family(config.model.kind)
    family.check(config.model)
    model = family.load(config.model, LoadContext(torch.device("cpu"), dtype, text_source))
    model.use_memory(config.memory)
    model.prepare(prompts)
    return model
