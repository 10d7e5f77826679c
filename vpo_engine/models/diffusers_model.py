"""The base class of families whose parts are classes of diffusers, loaded from a pipeline's folder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vpo_engine.config import MemoryConfig, ModelConfig
from vpo_engine.distributed.sequence import SequenceGroup
from vpo_engine.memory.checkpointing import Activations, recomputed
from vpo_engine.memory.rounding import is_kept_in_float32
from vpo_engine.model_values import Network, SamplerSettings, TextEmbedding
from vpo_engine.models.base import BaseModel
from vpo_engine.models.diffusers_facts import (
    Parts,
    Setup,
    Sources,
    check_parts_fit,
    refuse_settings_of_others,
)
from vpo_engine.models.diffusers_folder import (
    INDEX,
    Read,
    build_part,
    completed,
    find_parts,
    load_part,
    load_weights,
    read_config,
    read_planned,
)
from vpo_engine.models.diffusers_network import CompiledBlocks, Loop, prepare_network, set_activations
from vpo_engine.models.diffusers_sequence import divide
from vpo_engine.models.diffusers_text import NoText, encoder_loader, text_model, text_settings
from vpo_engine.models.gradient_check import check_division
from vpo_engine.models.guidance import guided, guided_pass, texts_of_pass
from vpo_engine.models.lora import has_adapter, load_adapter
from vpo_engine.models.rehearsal import META, once, rehearse
from vpo_engine.models.step_graph import Predict
from vpo_engine.video_model import Blueprint, LoadContext, ReadConfig, TextRule, TextSource


class DiffusersModel(BaseModel):
    """A ``VideoModel`` made of a diffusers transformer and VAE, with the text encoder of their pipeline.

    A family states ``card`` and ``facts``, defines its schedule (``draw_timesteps``, ``noising_scales``,
    ``target_scales``, ``solver``), ``text_size``, and what else differs from the defaults here. ``dtype`` is that of
    the arithmetic and of the VAE. With bfloat16, networks of float32 weights run under autocast, others as they are.
    Times are given to the network in float32, by ``network_time``, in rollouts, for the policy and for the reference.
    """

    facts: ClassVar[Parts]
    network: Any

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
        self.prepare_network(network)
        super().__init__(network, None, text, device=device, dtype=dtype)
        self._compiled: CompiledBlocks | None = None
        # diffusers' own ``to`` warns of a type, whatever the module.
        self.vae: Any = nn.Module.to(vae, device, dtype).eval().requires_grad_(False)
        self._parts["vae"] = self.vae
        self.setup = setup
        self.fps = setup.fps
        self.video_size = (setup.num_frames, setup.height, setup.width)
        self.latent_shape = self.latent_size(setup)
        tokens, channels = self.text_size(setup.transformer)
        self.text_rule = TextRule(tokens, channels, self.facts.padding)

    # --- for a family to define, or to override ------------------------------------------------------------

    @classmethod
    @abstractmethod
    def text_size(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """Return the tokens of a prompt and the channels of its embeddings, by the transformer's config.json."""

    @classmethod
    def published(cls, settings: ModelConfig) -> tuple[str, Mapping[str, Mapping[str, Any]]]:
        """Return the published model that the settings mean, by its name and config files; see ``Parts.published``."""
        return cls.card.name, cls.facts.published

    @classmethod
    def native_size(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
        """Return the height and width in pixels that a model with these config.json was made for."""
        return cls.facts.size

    @classmethod
    def strides(cls, vae: Mapping[str, Any]) -> tuple[int, int]:
        """Return how many frames, and how many pixels of a side, a latent stands for, by the VAE's config.json."""
        return vae["temporal_compression_ratio"], 2 ** (len(vae["block_out_channels"]) - 1)

    @classmethod
    def check_index(cls, index: Mapping[str, Any], folder: Path) -> None:
        """Raise ValueError for a pipeline's folder with a model_index.json that this family cannot run with."""

    @classmethod
    def built_with(cls, setup: Setup) -> dict[str, Any]:
        """Return settings of the transformer's class that differ from its config.json for videos of this size."""
        return {}

    @classmethod
    def check_configs(cls, setup: Setup) -> None:
        """Raise ValueError for folders of the right classes whose config files this family cannot run with."""

    @classmethod
    def prepare_network(cls, network: Any) -> None:
        """Let a transformer as diffusers builds it take the engine's options."""
        prepare_network(network, cls.facts.text_layers)

    @classmethod
    def rewrite(cls, prompt: str) -> str:
        """Return the text of a prompt as the tokenizer gets it."""
        return prompt

    def network_time(self, t: Tensor) -> Tensor:
        """Return the times [B] that the network is given at times t [B] of the schedule."""
        return t

    def arguments(self, text: TextEmbedding) -> dict[str, Any]:
        """Return the network's arguments beside latents and time, for the text of B samples."""
        return {"encoder_hidden_states": text.embeddings}

    def to_layout(self, latents: Tensor) -> Tensor:
        """Return latents [B, C, T, H, W] as the network takes them."""
        return latents.permute(self.facts.layout)

    def from_layout(self, prediction: Tensor) -> Tensor:
        """Return what the network predicts as [B, C, T, H, W]."""
        layout = self.facts.layout
        return prediction.permute([layout.index(dimension) for dimension in range(len(layout))])

    def pipeline_arguments(self) -> dict[str, Any]:
        """Return arguments with which the diffusers pipeline does what this model does, beside those that all have."""
        return {}

    def denormalised(self, latents: Tensor) -> Tensor:
        """Return latents [B, C, T, H, W] in the scale that the VAE decodes."""
        return latents / self.setup.vae["scaling_factor"]

    def pixels(self, latents: Tensor) -> Tensor:
        """Return frames [B, 3, F, height, width] from -1 to 1, of latents in the VAE's scale and dtype."""
        frames: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return frames

    # --- before anything is loaded -------------------------------------------------------------------------

    @classmethod
    def check(cls, settings: ModelConfig) -> None:
        """See ``VideoModel``. Sizes are checked as far as the settings alone tell them."""
        super().check(settings)
        refuse_settings_of_others(settings, cls.card.name)
        height, width = cls.facts.size
        cls.card.sizes.check_sides(settings.height or height, settings.width or width)

    @classmethod
    def readable_part(cls, settings: ModelConfig, prompt: str) -> str:
        return cls.rewrite(prompt)

    @classmethod
    def load(cls, settings: ModelConfig, context: LoadContext) -> Self:
        """Load transformer and VAE, after all folders are checked; the text encoder is loaded when it is needed."""
        assert settings.policy is not None  # the settings have been checked
        facts = cls.facts
        folder = find_parts(
            settings.policy, settings.vae, settings.text_encoder, cls.card.pipelines, settings.kind
        )
        if (settings.policy / INDEX).is_file():
            cls.check_index(read_config(settings.policy / INDEX), settings.policy)
        setup = cls._setup(settings, folder.read())
        tokens, _ = cls.text_size(setup.transformer)
        load_encoder = encoder_loader(
            facts.text_encoder,
            folder,
            setup.text_encoder,
            tokens,
            masked=facts.encoder_mask,
            attended=facts.padding == "attended",
            dtype=context.dtype,
            device=context.device,
        )
        encoded = f"{folder.text_encoder}, {tokens} tokens, {settings.dtype}"
        text = context.text_source(load_encoder, encoded, cls.rewrite)
        if cls.__module__.startswith("vpo_engine."):  # a user's own class may need values
            described = (setup.sources.transformer, facts.transformer), (setup.sources.vae, facts.vae)
            once(lambda: rehearse(cls._bare(setup, torch.float32, 1), *described), cls, setup)
        network = load_part(
            facts.transformer, folder.transformer, mapped=context.base.mapped, **cls.built_with(setup)
        )
        context.base.hold(network)
        vae = load_part(facts.vae, folder.vae)
        return cls(network, vae, text, setup, device=context.device, dtype=context.dtype)

    @classmethod
    def blueprint(cls, settings: ModelConfig, read: ReadConfig, depth: int | None = None) -> Blueprint:
        facts = cls.facts
        setup = cls._setup(settings, read_planned(settings, read, *cls.published(settings)))
        configured = setup.transformer["num_layers"]
        model = cls._bare(setup, getattr(torch, settings.dtype), depth or configured)

        def text_encoder() -> nn.Module:
            with META:
                encoder = text_model(facts.text_encoder, setup.text_encoder, setup.sources.text_encoder)
            return encoder.eval().requires_grad_(False)

        return Blueprint(model, configured, text_encoder)

    @classmethod
    def _bare(cls, setup: Setup, dtype: torch.dtype, depth: int) -> Self:
        """Return the model on the meta device, with a network of ``depth`` layers."""
        changes = cls.built_with(setup) | {"num_layers": depth}
        network = build_part(cls.facts.transformer, setup.transformer, setup.sources.transformer, **changes)
        vae = build_part(cls.facts.vae, setup.vae, setup.sources.vae)
        return cls(network, vae, NoText(*cls.text_size(setup.transformer)), setup, device=META, dtype=dtype)

    @classmethod
    def _setup(cls, settings: ModelConfig, files: Read) -> Setup:
        """Return what the model is built by, from its files.

        Raise ValueError for settings that a part cannot take, for files that do not go together, and for sizes.
        """
        facts = cls.facts
        transformer = completed(facts.transformer, *files["transformer"], facts.needed)
        vae = completed(facts.vae, *files["vae"], facts.needed)
        text_encoder = text_settings(facts.text_encoder, *files["text_encoder"])
        height, width = cls.native_size(transformer, vae)
        negative = settings.negative_prompt
        setup = Setup(
            transformer,
            vae,
            files["scheduler"][1],
            height=settings.height or height,
            width=settings.width or width,
            num_frames=settings.num_frames,
            fps=settings.fps,
            negative_prompt=facts.negative_prompt if negative is None else negative,
            flow_shift=settings.flow_shift,
            text_encoder=text_encoder,
            sources=Sources(**{part: file for part, (file, _) in files.items()}),
        )
        cls.card.sizes.check_sides(setup.height, setup.width)
        channels = vae[facts.latent_channels], transformer["in_channels"]
        of_text = text_encoder["d_model"], cls.text_size(transformer)[1]
        check_parts_fit([("latent channels", "VAE", *channels), ("text channels", "text encoder", *of_text)])
        cls.check_configs(setup)
        return setup

    @classmethod
    def latent_size(cls, setup: Setup) -> tuple[int, int, int, int]:
        """Return (C, T, H, W) of one sample."""
        frames, side = cls.strides(setup.vae)
        length = (setup.num_frames - 1) // frames + 1
        return setup.transformer["in_channels"], length, setup.height // side, setup.width // side

    # --- text ----------------------------------------------------------------------------------------------

    def prepare(self, prompts: Sequence[str]) -> None:
        """See ``VideoModel``. The negative prompt is encoded with the others."""
        super().prepare([*prompts, self.setup.negative_prompt])

    def null_text(self, text: TextEmbedding) -> TextEmbedding:
        """See ``VideoModel``. Return the negative prompt; a masked one has its own number of tokens."""
        null = self.embed([self.setup.negative_prompt])
        like = TextEmbedding(null.embeddings.to(text.embeddings), null.mask)
        return like.repeat_interleave(len(text))

    # --- what the network predicts -------------------------------------------------------------------------

    def predict(
        self, network: Network, latents: Tensor, t: Tensor, text: TextEmbedding, guidance: float = 1.0
    ) -> Tensor:
        branch = partial(self._branch, network)
        return guided(branch, latents, t, text, self.null_text, guidance, self.facts.negative_first)

    def predictor(
        self, network: Network, text: TextEmbedding, settings: SamplerSettings, guidance: float
    ) -> Predict:
        """See ``BaseModel``. What depends on the text alone is computed once, in the first step."""
        run = None
        if settings.compile == "blocks":
            run = self._compiled = self._compiled or CompiledBlocks(self.network, self.device)
        first = self.facts.negative_first
        shared: list[tuple[TextEmbedding, Loop]] = []

        def predict(latents: Tensor, t: Tensor) -> Tensor:
            samples = len(latents) // len(text)
            if not shared:
                texts = texts_of_pass(text, self.null_text, guidance, samples, first, settings.split)
                texts = texts.to(latents.device, self._weights_dtype())
                shared.append((texts, Loop(samples, settings.cache, run, self.network.sequence)))
            [(texts, loop)] = shared
            assert loop.repeat == samples, "a sampling loop keeps its batch size"
            branch = partial(self._branch, network, loop=loop)
            return guided_pass(branch, latents, t, texts, guidance, first, settings.split)

        return predict

    def _branch(
        self, network: Network, latents: Tensor, t: Tensor, text: TextEmbedding, *, loop: Loop | None = None
    ) -> Tensor:
        weights = self._weights_dtype()
        with self._autocast(weights):
            out = network(
                # torch multiplies rows that are not contiguous otherwise by trained weights than by frozen ones.
                self.to_layout(latents).to(weights).contiguous(),
                timestep=self.network_time(t),
                return_dict=False,
                loop=loop,
                **self.arguments(text.to(latents.device, weights)),
            )[0]
        out = self.from_layout(out)
        return out if out.dtype == torch.float64 else out.float()

    def _weights_dtype(self) -> torch.dtype:
        """Return the type of the weights, but for those that stay float32 beside bfloat16 ones."""
        weights = (weight for weight in self.network.parameters() if not is_kept_in_float32(weight))
        return next(weight.dtype for weight in weights if weight.is_floating_point())

    def _autocast(self, weights: torch.dtype) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != weights)

    # --- videos and files ----------------------------------------------------------------------------------

    def to_video(self, latents: Tensor) -> Tensor:
        """See ``BaseModel``. Samples are decoded one by one, which bounds the memory and changes no value."""
        return torch.cat([self._frames(sample) for sample in self.denormalised(latents).split(1)])

    def _frames(self, latents: Tensor) -> Tensor:
        """Return frames uint8 [1, F, height, width, 3] of latents [1, C, T, H, W]."""
        frames = self.pixels(latents.to(self.dtype)).float()
        shade = (frames / 2 + 0.5).clamp(0, 1).mul(255).round()
        return shade.to(torch.uint8).permute(0, 2, 3, 4, 1)

    def to_latents(self, pixels: Tensor) -> Tensor:
        """See ``BaseModel``. The inverse of ``denormalised``, whose scale is the same for all latents of a channel."""
        raw = self.vae.encode(pixels.to(self.dtype)).latent_dist.mode().float()
        shift = self.denormalised(torch.zeros_like(raw))
        return (raw - shift) / (self.denormalised(torch.ones_like(raw)) - shift)

    def to_pixels(self, latents: Tensor, frames: Sequence[int] | None) -> Tensor:
        """See ``BaseModel``. Samples are decoded one by one; where the VAE decodes a beginning on its own, no further
        than the last frame that is wanted."""
        if frames is not None and "rollout.prune.frames" in self.card.supports:
            latents = latents[:, :, : self.prefix(max(frames) + 1)[0]]
        if self.vae._supports_gradient_checkpointing and not self.vae.is_gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        videos = torch.cat(
            [recomputed(self.pixels, sample.to(self.dtype)) for sample in self.denormalised(latents).split(1)]
        ).transpose(1, 2)
        return videos if frames is None else videos[:, torch.as_tensor(frames, device=videos.device)]

    def use_memory(self, memory: MemoryConfig) -> None:
        set_activations(
            self.network,
            Activations(memory.activation_checkpointing, memory.offload_activations, memory.mlp_chunks),
        )

    def choose_backends(self, settings: ModelConfig) -> str:
        return str(self.network.choose_backends(settings.attention, dtype=self.dtype))

    def share_sequence(self, group: SequenceGroup) -> None:
        check_division(self, group)
        divide(self.network, self.facts.tokens, group)

    def save_full_policy(self, folder: Path) -> None:
        """See ``BaseModel``. The folder is what diffusers' save_pretrained writes, in one file."""
        self.network.save_pretrained(folder, max_shard_size="1TB")

    def load_policy(self, folder: Path) -> None:
        if has_adapter(self.network):
            load_adapter(self.network, folder)
        else:
            load_weights(self.network, folder, self.facts.transformer)
