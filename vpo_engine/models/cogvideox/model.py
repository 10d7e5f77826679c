"""CogVideoX-2B as a ``VideoModel``: what differs from other families of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vpo_engine.models.cogvideox import published
from vpo_engine.models.cogvideox.attention import JointAttention
from vpo_engine.models.cogvideox.schedule import DDIM, Schedule
from vpo_engine.models.diffusers_facts import OPTIONS, Parts, Setup
from vpo_engine.models.diffusers_model import DiffusersModel
from vpo_engine.models.diffusers_network import TextLayers
from vpo_engine.models.diffusers_sequence import TokenInputs
from vpo_engine.models.rehearsal import REHEARSED, rehearse_solver, rehearsing
from vpo_engine.video_model import ModelCard, SizeRule, TextSource

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = ("ff.net.0.proj", "ff.net.2")


class CogVideoX(DiffusersModel):
    """The transformer attends to text and video jointly, and to the padding of the text.

    Latents are [B, C, T, H, W] in the engine and [B, T, C, H, W] in the transformer. The number of frames is 8k or
    8k + 1, because the VAE decodes latents in pairs.
    """

    card = ModelCard(
        name="CogVideoX-2B",
        files=("policy",),
        lora_targets=ATTENTION,
        lora_target_sets={"attention": ATTENTION, "mlp": MLP, "all": (*ATTENTION, *MLP)},
        sizes=SizeRule(frame_step=8, frame_offset=1, more_offsets=(8,), exact=True, side=16),
        pipelines=("CogVideoXPipeline",),
        supports=(OPTIONS - {"model.flow_shift"}) | {"rollout.prune.frames"},
        native={
            "model.num_frames": 49,
            "model.fps": 8,
            "rollout.steps": 50,
            "rollout.guidance": 6.0,
        },
    )
    facts = Parts(
        transformer="CogVideoXTransformer3DModel",
        vae="AutoencoderKLCogVideoX",
        text_encoder="T5EncoderModel",
        published={
            "transformer": published.TRANSFORMER,
            "vae": published.VAE,
            "text_encoder": published.TEXT_ENCODER,
            "scheduler": published.SCHEDULER,
        },
        size=(480, 720),
        layout=(0, 2, 1, 3, 4),
        text_layers=(TextLayers("patch_embed", (("text_proj", None),)),),
        tokens=TokenInputs(("hidden_states", "encoder_hidden_states")),
    )

    def __init__(
        self,
        network: nn.Module,
        vae: nn.Module,
        text: TextSource,
        setup: Setup,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.schedule = Schedule(setup.scheduler, setup.sources.scheduler)
        super().__init__(network, vae, text, setup, device=device, dtype=dtype)

    @classmethod
    def prepare_network(cls, network: Any) -> None:
        network.patch_embed.pos_embedding = network.patch_embed.pos_embedding.float()
        for block in network.transformer_blocks:
            block.attn1.set_processor(JointAttention())
        super().prepare_network(network)

    @classmethod
    def text_size(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        return transformer["max_text_seq_length"], transformer["text_embed_dim"]

    @classmethod
    def native_size(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
        _, side = cls.strides(vae)
        return transformer["sample_height"] * side, transformer["sample_width"] * side

    @classmethod
    def built_with(cls, setup: Setup) -> dict[str, Any]:
        """Return the size by which the transformer computes its table of positions once, instead of in every pass."""
        _, frames, rows, columns = cls.latent_size(setup)
        groups = setup.transformer["temporal_compression_ratio"]
        return {
            "sample_height": rows,
            "sample_width": columns,
            "sample_frames": (frames - 1) * groups + 1,
        }

    @classmethod
    def check_configs(cls, setup: Setup) -> None:
        if setup.transformer["use_rotary_positional_embeddings"] or setup.transformer["patch_size_t"]:
            raise ValueError(
                "the transformer has rotary position embeddings, as CogVideoX-5B and 1.5 do; model.kind=cogvideox "
                "trains CogVideoX-2B, which has none"
            )
        source = setup.sources.scheduler
        schedule = Schedule(setup.scheduler, source)
        with rehearsing(source, "scheduler"):
            solver = schedule.solver(min(REHEARSED, schedule.num_times))
        rehearse_solver(solver, source)

    def prefix(self, frames: int) -> tuple[int, int]:
        """See ``VideoModel``. The VAE decodes latents in pairs, and an odd one together with the first pair; its norms
        see all latents of such a group, so a beginning is made of whole groups."""
        length, stride = self.latent_shape[1], self.strides(self.setup.vae)[0]
        odd = length % 2
        counts = [(groups, stride * groups - odd * (stride - 1)) for groups in range(2 + odd, length + 1, 2)]
        return next((found for found in counts if found[1] >= frames), (length, frames))

    def draw_timesteps(self, u: Tensor) -> Tensor:
        return self.schedule.draw(u)

    def noising_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule.scales(t)

    def target_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        kept, added = self.schedule.scales(t)
        return -added, kept

    def solver(self, steps: int) -> DDIM:
        return self.schedule.solver(steps)
