"""STDiT3, the diffusion transformer of Open-Sora 1.2, with the published configuration and key names.

Behaviour follows opensora/models/stdit/stdit3.py of hpcaitech/Open-Sora, tag v1.2.0. Shape letters: B
samples, T x H x W latent frames, rows and columns, S patches of a frame, C hidden channels, L text tokens, D
text channels.

Where processes hold slices of a video (``STDiT3.sequence``), each has some of the T frames in blocks over space, and
some of the S patches in blocks over time. They exchange tokens between blocks, and not within (DSP, arXiv 2403.10266).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from vpo_kernels.attention import (
    AttentionName,
    Choice,
    TextPlan,
    attention_dtype,
    choose_attention,
    plan_text,
    text_places,
)
from vpo_kernels.fused_ops import BackendName as FusedOpsBackend
from vpo_kernels.fused_ops import uses_triton

from vpo_engine.distributed.sequence import alone
from vpo_engine.foreign_settings import described_by
from vpo_engine.memory.checkpointing import Activations, checkpointed
from vpo_engine.memory.offload import ForwardPass, OffloadedInputs
from vpo_engine.models.opensora.blocks import Backed, Backends, Block, FinalLayer, KeysValues, rotary_tables
from vpo_engine.models.opensora.embeddings import (
    CaptionEmbedder,
    PatchEmbedder,
    ScalarEmbedder,
    position_embedding,
)
from vpo_engine.models.opensora.reuse import Constants, Reuse
from vpo_engine.models.opensora.stdit3_config import CONFIG, STDiT3Config

_CACHE_ENTRIES = 4
"""The number of position embeddings, and of layouts of captions, that are kept on the device."""


class STDiT3(nn.Module):
    """Space-time diffusion transformer: pairs of a spatial and a temporal block over latent patches.

    Dropout of any kind is absent in every mode, so train() and eval() compute the same function.
    ``activations``: what blocks keep for the backward pass. Parts of the MLP may round otherwise; no other setting
    changes a bit of the prediction. ``offloaded``: how inputs of blocks go to the host. ``sequence``: the processes
    that hold slices of the videos; each gives whole latents, and gets the whole prediction.
    """

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.settings = config
        self.activations = Activations()
        self.offloaded = OffloadedInputs()
        self.sequence = alone()
        channels, patch = config.hidden_size, config.patch_size
        self.out_channels = config.in_channels * (2 if config.pred_sigma else 1)
        head_channels = channels // config.num_heads
        frequencies = 1.0 / 10000 ** (torch.arange(0, head_channels, 2).float() / head_channels)
        self.rope = nn.ParameterDict({"freqs": nn.Parameter(frequencies, requires_grad=False)})
        self.x_embedder = PatchEmbedder(config.in_channels, channels, patch[1:])
        self.t_embedder = ScalarEmbedder(channels)
        self.fps_embedder = ScalarEmbedder(channels)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))
        self.y_embedder = CaptionEmbedder(config.caption_channels, channels, config.model_max_length)
        shape = (channels, config.num_heads, int(channels * config.mlp_ratio))
        self.spatial_blocks = nn.ModuleList(Block(*shape, temporal=False) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(Block(*shape, temporal=True) for _ in range(config.depth))
        self.final_layer = FinalLayer(channels, patch[1] * patch[2] * self.out_channels)
        self._backends = Backends()
        self._positions: dict[tuple[object, ...], Tensor] = {}
        self._texts: dict[tuple[object, ...], tuple[Tensor | None, TextPlan]] = {}
        self._initialise()
        if config.freeze_y_embedder:
            self.y_embedder.requires_grad_(False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = CONFIG) -> STDiT3:
        """Build the network from the contents of a published config.json, the file ``where``, freshly initialised."""
        with described_by(where, "STDiT3 that can be built", "download it again"):
            return cls(STDiT3Config.from_dict(config, where))

    @property
    def config(self) -> dict[str, Any]:
        """Return the dictionary that ``from_config`` takes."""
        return self.settings.to_dict()

    @property
    def num_trainable(self) -> int:
        """Return the number of parameters that train."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights. The time is rounded to it on entry, as in the published model."""
        return self.x_embedder.proj.weight.dtype

    def choose_backends(
        self, attention: AttentionName = "auto", fused_ops: FusedOpsBackend = "auto", *, dtype: torch.dtype
    ) -> Choice:
        """Choose the implementations that compute from now on; return the choice of attention, with its reason.

        attention: as for ``vpo_kernels.attention.choose_attention``. fused_ops: backend of the modulated norm,
        the gated residual, the query-key norm with rope, and, where its kernel is taken, of temporal attention.
        dtype: that of the arithmetic; under autocast, autocast's. Raise ValueError for an implementation that does not
        run on the weights' device.
        """
        weight = self.x_embedder.proj.weight
        head_dim = self.settings.hidden_size // self.settings.num_heads
        choice = choose_attention(attention, device=weight.device, dtype=dtype, head_dim=head_dim)
        uses_triton("modulated_norm", fused_ops, weight)  # refuses devices without kernels now
        self._backends = Backends(choice.name, fused_ops)
        for module in self.modules():
            if isinstance(module, Backed):
                module.backends = self._backends
        return choice

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | float | None = None,
        height: Tensor | float | None = None,
        width: Tensor | float | None = None,
        *,
        force_drop_ids: Tensor | None = None,
        reuse: Reuse | None = None,
    ) -> Tensor:
        """Predict from noisy latents: float32 (float64 for a float64 model), [B, out_channels, T, H, W].

        x: [B, in_channels, T, H, W]. The first in_channels of the prediction are the velocity.
        timestep: [B], 0 (clean) to 1000 (noise).
        y: [captions, 1, L, D], encoder states; each caption is that of B / captions samples in a row.
        mask: [rows, L], non-zero where a token counts; None = all do. With fewer rows than y it is tiled, so that
        the null captions of a guided batch use their prompts' masks. Keep it on the CPU: the host reads it, and
        would wait for a device. Padding is never computed on.
        x_mask: bool [B, T], False where a frame is a clean condition; None = none is.
        fps: [B] or one number. height, width: pixels of the whole batch, numbers or vectors whose first
        element counts (numbers spare a device synchronisation). All three must be given.
        force_drop_ids: [captions], 1 where the null caption takes the caption's place, as in the public code; its mask
        stays. None = no caption is dropped, in training mode neither.
        reuse: shared by the calls of a sampling loop with the same y, mask and fps; without grad only.
        """
        self._check(x, timestep, y, x_mask)
        if fps is None or height is None or width is None:
            raise ValueError(
                f"fps={fps}, height={height}, width={width}: STDiT3 is conditioned on all three; give frames per "
                "second and the size in pixels"
            )
        if force_drop_ids is not None:
            y = self._with_null_captions(y, force_drop_ids)
        dtype, shared = self.dtype, self.sequence
        frames, rows, columns = x.shape[2:]
        patch_rows, patch_columns = self.settings.patch_size[1:]
        x = F.pad(shared.enter(x).to(dtype), (0, -columns % patch_columns, 0, -rows % patch_rows))
        grid = (x.shape[-2] // patch_rows, x.shape[-1] // patch_columns)

        timestep = timestep.to(dtype)
        tokens = self.x_embedder(shared.own(x, dim=2))
        tokens = tokens + self._position(grid, _number(height), _number(width), tokens)
        if reuse is None:
            constants = self._constants(tokens, frames, timestep, y, mask, fps, project=False)
        else:
            assert not torch.is_grad_enabled(), "what sampling steps share has no gradient"
            constants = reuse.constants(
                self, y, len(x), lambda: self._constants(tokens, frames, timestep, y, mask, fps, project=True)
            )
        time, time_blocks, clean_time = self._embed_time(timestep, constants.rate, x_mask)
        tokens = self._run_blocks(tokens, frames, constants, time_blocks, reuse)
        patches = self.final_layer(
            tokens, time, clean_time, None if x_mask is None else shared.own(x_mask, 1)
        )
        out = self._unpatchify(shared.gather(patches, 1, frames), grid)[..., :rows, :columns]
        return out if out.dtype == torch.float64 else out.float()

    def _with_null_captions(self, y: Tensor, drop_ids: Tensor) -> Tensor:
        if drop_ids.shape != y.shape[:1]:
            raise ValueError(
                f"force_drop_ids is {list(drop_ids.shape)}, expected a number for each caption: [{y.shape[0]}]"
            )
        return self.y_embedder.replace(y, (drop_ids == 1).to(y.device))

    def _check(self, x: Tensor, timestep: Tensor, y: Tensor, x_mask: Tensor | None) -> None:
        channels, depth = self.settings.in_channels, self.settings.caption_channels
        if x.dim() != 5 or x.shape[1] != channels:
            raise ValueError(f"x is {list(x.shape)}, expected latents [B, {channels}, T, H, W]")
        if timestep.shape != x.shape[:1]:
            raise ValueError(f"timestep is {list(timestep.shape)}, expected one per sample: [{x.shape[0]}]")
        if (
            y.dim() != 4
            or y.shape[1] != 1
            or y.shape[3] != depth
            or not y.shape[0]
            or x.shape[0] % y.shape[0]
        ):
            raise ValueError(
                f"y is {list(y.shape)}, expected text states [captions, 1, L, {depth}] with captions dividing "
                f"{x.shape[0]} samples"
            )
        per_frame = (x.shape[0], x.shape[2])
        if x_mask is not None and (x_mask.dtype != torch.bool or x_mask.shape != per_frame):
            raise ValueError(
                f"x_mask is {x_mask.dtype} {list(x_mask.shape)}, expected bool {list(per_frame)}"
            )

    def _constants(
        self,
        tokens: Tensor,
        frames: int,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None,
        fps: Tensor | float,
        *,
        project: bool,
    ) -> Constants:
        """Compute what the steps of a sampling loop share, for tokens [B, T, S, C] that are of all ``frames`` or fewer.

        project: compute keys and values of all blocks now; else each block does when it runs.
        """
        patches = self.sequence.sizes(tokens.shape[2])[self.sequence.rank]
        places, over_space = self._text(y, mask, tokens, tokens.shape[1] * tokens.shape[2])
        alike = self.sequence.count == 1
        over_time = over_space if alike else self._text(y, mask, tokens, frames * patches)[1]
        y = y.to(timestep.dtype).flatten(0, 2)
        text = self.y_embedder(y if places is None else y.index_select(0, places))
        blocks = [block for pair in self._pairs() for block in pair]
        texts: Sequence[Tensor | KeysValues] = [text] * len(blocks)
        if project:
            texts = [block.cross_attn.project_text(text) for block in blocks]
        rope = rotary_tables(self.rope["freqs"], frames, tokens.dtype)
        rate = self.fps_embedder(_per_sample(fps, timestep), timestep.dtype)
        return Constants(texts, (over_space, over_time), rope, rate)

    def _embed_time(
        self, timestep: Tensor, rate: Tensor, x_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return time [B, C], modulations [B, 1 or T, 6, C], and clean frames' time [B, C] (None without x_mask)."""
        time = self.t_embedder(timestep, timestep.dtype) + rate
        blocks = self.t_block(time)[:, None]
        clean_time = None
        if x_mask is not None:
            clean_time = self.t_embedder(torch.zeros_like(timestep), timestep.dtype) + rate
            blocks = torch.where(x_mask[:, :, None], blocks, self.t_block(clean_time)[:, None])
        return time, blocks.unflatten(-1, (6, -1)), clean_time

    def _pairs(self) -> list[tuple[Block, Block]]:
        """Return pairs of a spatial and a temporal block, in their order."""
        return list(zip(self.spatial_blocks, self.temporal_blocks, strict=True))  # type: ignore[arg-type]

    def _run_blocks(
        self, tokens: Tensor, frames: int, constants: Constants, time: Tensor, reuse: Reuse | None
    ) -> Tensor:
        """Send tokens [B, T, S, C] through all blocks, or only through the first pair where the cache has the rest.

        They are of all ``frames``, or of this process's; time is [B, 1, 6, C], or of all frames.
        """
        cache, apart = (None, None) if reuse is None else (reuse.blocks, reuse.run)
        sender, shared = self.offloaded.forward_pass(), self.sequence
        texts, by_frame, by_patch = iter(constants.texts), shared.sizes(frames), shared.sizes(tokens.shape[2])
        times = (time if time.shape[1] == 1 else shared.own(time, 1), time)

        def call(block: Block, tokens: Tensor) -> Tensor:
            others = (next(texts), constants.plans[block.temporal], times[block.temporal], constants.rope)
            if apart is None:
                return self._run(block, sender, tokens, *others)
            return apart(block, tokens, *others)

        def run(tokens: Tensor, pairs: Sequence[tuple[Block, Block]]) -> Tensor:
            for spatial, temporal in pairs:
                tokens = shared.switch(call(spatial, tokens), 2, 1, by_patch, by_frame)
                tokens = shared.switch(call(temporal, tokens), 1, 2, by_frame, by_patch)
            return tokens

        pairs = self._pairs()
        if cache is None:
            return run(tokens, pairs)
        after_first = run(tokens, pairs[:1])
        rest = cache.after_first(after_first - tokens)
        if rest is not None:
            return after_first + rest
        tokens = run(after_first, pairs[1:])
        cache.keep(tokens - after_first)
        return tokens

    def _text(
        self, y: Tensor, mask: Tensor | None, tokens: Tensor, each: int
    ) -> tuple[Tensor | None, TextPlan]:
        """Return where in [B * L] the tokens that count are (None: all count), and the attention's plan, for samples of
        ``each`` tokens like ``tokens`` [B, ...].

        The cache goes by the mask's values, so that a prepared text is laid out, and sent to the device, once
        for all blocks, sampling steps and networks. A mask of FakeTensorMode has no values: all tokens count.
        """
        counts = None if mask is None or isinstance(mask, FakeTensor) else _checked_mask(mask, y)
        queries, dtype = len(tokens) * each // y.shape[0], attention_dtype(tokens)
        values = None if counts is None else counts.numpy().tobytes()
        key = (values, y.shape, queries, dtype, y.device, self._backends.attention)
        if key not in self._texts:
            if len(self._texts) >= _CACHE_ENTRIES:
                self._texts.clear()
            with torch.inference_mode(False):
                self._texts[key] = self._lay_out(y, counts, queries, dtype)
        return self._texts[key]

    def _lay_out(
        self, y: Tensor, counts: Tensor | None, queries: int, dtype: torch.dtype
    ) -> tuple[Tensor | None, TextPlan]:
        rows, _, length, _ = y.shape
        lengths, places = [length] * rows, None
        if counts is not None and not bool(counts.all()):
            counts = counts.repeat(rows // counts.shape[0], 1)
            lengths = counts.sum(dim=1).tolist()
            places = text_places(counts, y.device)
        plan = plan_text(
            lengths,
            queries=queries,
            device=y.device,
            dtype=dtype,
            head_dim=self.settings.hidden_size // self.settings.num_heads,
            backend=self._backends.attention,
        )
        return places, plan

    def _position(self, grid: tuple[int, int], height: float, width: float, like: Tensor) -> Tensor:
        """Return the position embedding [S, C] of a grid at a size in pixels, from a cache."""
        scale = (height * width) ** 0.5 / self.settings.input_sq_size
        key = (*grid, scale, like.dtype, like.device)
        if key not in self._positions:
            if len(self._positions) >= _CACHE_ENTRIES:
                self._positions.clear()
            with torch.inference_mode(False):
                self._positions[key] = position_embedding(*grid, self.settings.hidden_size, scale, like)
        return self._positions[key]

    def _run(self, block: nn.Module, sender: ForwardPass, tokens: Tensor, *others: Any) -> Tensor:
        settings = self.activations
        sending = settings.offload and torch.is_grad_enabled()
        with sender.sending(tokens) if sending else nullcontext():
            return checkpointed(
                block, tokens, *others, settings.mlp_chunks, checkpointing=settings.checkpointing
            )

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Rearrange [B, T, S, rows * columns * channels] to [B, channels, T, H, W]."""
        patch_rows, patch_columns = self.settings.patch_size[1:]
        split = patches.unflatten(-1, (patch_rows, patch_columns, self.out_channels)).unflatten(2, grid)
        return split.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialise as published: Xavier; temporal blocks and frame rate start without effect."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.fps_embedder.start_without_effect()
        for block in self.temporal_blocks:
            assert isinstance(block, Block)
            block.start_without_effect()


def _number(value: Tensor | float) -> float:
    """Return a number, or the first element of a vector, as a float."""
    return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)


def _per_sample(value: Tensor | float, like: Tensor) -> Tensor:
    """Return one value per sample, [B] like ``like``; a number is filled in on the device, without a copy."""
    if isinstance(value, Tensor):
        return value.to(like).expand_as(like)
    return torch.full_like(like, value)


def _checked_mask(mask: Tensor, y: Tensor) -> Tensor:
    """Return the mask [rows, L] of y [B, 1, L, D] as bool on the CPU; ValueError for a row without a token."""
    if mask.dim() != 2 or y.shape[0] % mask.shape[0] or mask.shape[1] != y.shape[2]:
        raise ValueError(
            f"mask is {list(mask.shape)}, expected [rows, {y.shape[2]}] with rows dividing {y.shape[0]}"
        )
    counts = mask.to("cpu", torch.bool)
    empty = (~counts.any(dim=1)).nonzero()
    if len(empty):
        raise ValueError(
            f"mask row {int(empty[0, 0])} has no valid text token; encode at least the end-of-text token"
        )
    return counts
