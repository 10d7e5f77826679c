"""The sprites rollout on a GPU."""

from __future__ import annotations

import functools

import torch
from rollout_case import PROMPTS
from step_case import sample_candidates
from torch import Tensor

from vpo_engine.build import build_model
from vpo_engine.config import RolloutConfig
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.metrics.throughput import CountedRows
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.protocols import TextEmbedding


@functools.cache
def gpu_sprites() -> tuple[OpenSora, TextEmbedding]:
    model = build_model(load_config(None, ["model.device=cuda"]), Processes.start("cuda"), lambda _: None)
    model.prepare(PROMPTS)
    return model, model.embed(PROMPTS)


def on_gpu(config: RolloutConfig) -> tuple[Tensor, int]:
    """Candidates of the two prompts, and the rows that went through the network for them."""
    model, text = gpu_sprites()
    network = CountedRows(model.network)
    latents = sample_candidates(model, network, text, [7, 8], config, 0, torch.device("cuda"))
    return latents, network.rows
