"""V-JEPA: how well the hidden parts of a video can be predicted, in feature space, from the parts in sight.

VADER (arXiv 2407.08737) names V-JEPA among its rewards; its code has none. The score here is minus V-JEPA's training
loss (arXiv 2404.08471; facebookresearch/jepa, app/vjepa/train.py): the L1 distance between the target encoder's
normalised features of hidden patches and what the predictor makes of the context encoder's. In training the masks are
drawn anew for every batch; here one seed draws them once for all videos, so that scores are reproducible, candidates
are compared on the same patches, and the batch does not matter. The prompt is not read.

Letters: B videos, F frames of a video, T frames that are scored, N patches, K and M patches in sight and hidden, D
channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpo_engine.foreign_settings import check_settings
from vpo_engine.rewards.card import RewardCard
from vpo_engine.rewards.frames import (
    batches,
    check_enough_frames,
    check_finite,
    check_video_pixels,
    check_videos,
)
from vpo_engine.rewards.imagenet import square_clips
from vpo_engine.rewards.loading import build, local_folder, read_json
from vpo_engine.rewards.refusals import refusal
from vpo_engine.rewards.videos import Videos
from vpo_engine.rewards.vit import Block
from vpo_engine.weights import WHOLE, load_strict, read_file

NAME = "V-JEPA"
CARD = RewardCard(
    name="vjepa",
    dimensions={"vjepa": (None, 0.0)},
    frames="16, every 4th (fewer than 61 frames: closer together), around the middle",
    resolution="short side 224 (vith16-384: 384), centre crop",
    reads_prompt=False,
    differentiable=True,
    parameters=633_666_944,
    licence="CC-BY-NC-4.0",
    source="https://dl.fbaipublicfiles.com/jepa/vitl16/vitl16.pth.tar (or vith16, vith16-384)",
)
REMEDY = "V-JEPA needs a local folder with facebookresearch/jepa's vitl16.pth.tar, vith16.pth.tar or vith16-384.pth.tar"
PARTS = ("encoder", "target_encoder", "predictor")
STRIDE = 4
"""Frames from one scored frame to the next in training."""
BLOCKS = ((8, 0.15), (2, 0.7))
"""The number of blocks that a mask hides, and each one's share of a frame's patches (configs/pretrain/vitl16.yaml)."""
ASPECT_RATIOS = (0.75, 1.5)
Masks = Sequence[tuple[Tensor, Tensor]]
"""Patches in sight and hidden, int64 [B, K] and [B, M], for each of the predictor's mask tokens."""


@dataclass(frozen=True, kw_only=True)
class VJepaConfig:
    """The published ViT-L/16; the names are those of the authors' constructors."""

    img_size: int = 224
    patch_size: int = 16
    num_frames: int = 16
    tubelet_size: int = 2
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    pred_embed_dim: int = 384
    pred_depth: int = 12

    @property
    def grid(self) -> tuple[int, int, int]:
        """Return how many patches there are along time, height and width."""
        side = self.img_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side


CHECKPOINTS = {
    "vitl16.pth.tar": VJepaConfig(),
    "vith16.pth.tar": VJepaConfig(embed_dim=1280, depth=32),
    "vith16-384.pth.tar": VJepaConfig(embed_dim=1280, depth=32, img_size=384),
}


def pick(tokens: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens, of [B, N, D], at ``indices`` [B, K]: [B, K, D]."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


class Encoder(nn.Module):
    """A ViT over space-time patches; fixed position embeddings, stored with the weights."""

    def __init__(self, config: VJepaConfig) -> None:
        super().__init__()
        kernel = (config.tubelet_size, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, config.embed_dim, kernel, kernel)})
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(config.grid), config.embed_dim))
        self.blocks = nn.ModuleList(Block(config.embed_dim, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-6)

    def forward(self, clips: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return features of all patches [B, N, D] of normalised clips [B, 3, T, H, W], or of the ``seen`` [B, K]."""
        x = self.patch_embed["proj"](clips).flatten(2).transpose(1, 2) + self.pos_embed
        if seen is not None:
            x = pick(x, seen)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    """Predicts the features of hidden patches from those of the patches in sight."""

    def __init__(self, config: VJepaConfig) -> None:
        super().__init__()
        dim = config.pred_embed_dim
        self.predictor_embed = nn.Linear(config.embed_dim, dim)
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.empty(1, 1, dim)) for _ in BLOCKS)
        self.predictor_pos_embed = nn.Parameter(torch.empty(1, math.prod(config.grid), dim))
        self.predictor_blocks = nn.ModuleList(Block(dim, config.num_heads) for _ in range(config.pred_depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj = nn.Linear(dim, config.embed_dim)

    def forward(self, context: Tensor, seen: Tensor, hidden: Tensor, mask_token: int) -> Tensor:
        """Predict features [B, M, D] of ``hidden`` patches [B, M] from those [B, K, D] of patches ``seen`` [B, K]."""
        places = self.predictor_pos_embed.expand(len(context), -1, -1)
        x = self.predictor_embed(context) + pick(places, seen)
        x = torch.cat([x, self.mask_tokens[mask_token] + pick(places, hidden)], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x[:, seen.shape[1] :]))


class Published(nn.Module):
    """A network under the name ``module.backbone`` that it has in the published keys."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.module = nn.ModuleDict({"backbone": backbone})

    def forward(self, *inputs: object) -> Tensor:
        return self.module["backbone"](*inputs)


class VJepaNetwork(nn.Module):
    """The two encoders and the predictor; the state dict has the published key names, part by part."""

    def __init__(self, config: VJepaConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Published(Encoder(config))
        self.target_encoder = Published(Encoder(config))
        self.predictor = Published(Predictor(config))

    def targets(self, clips: Tensor) -> Tensor:
        """Return the features to predict for normalised clips [B, 3, T, H, W], float32 [B, N, D] of unit variance."""
        features = self.target_encoder(clips).float()
        return F.layer_norm(features, features.shape[-1:])

    def predictions(self, clips: Tensor, masks: Masks) -> list[Tensor]:
        """Return the predicted features of the hidden patches, [B, M, D] for each mask."""
        return [
            self.predictor(self.encoder(clips, seen), seen, hidden, index)
            for index, (seen, hidden) in enumerate(masks)
        ]

    def forward(self, clips: Tensor, masks: Masks, detach_targets: bool = False) -> Tensor:
        """Return the training loss of each of the normalised clips [B, 3, T, H, W], float32 [B]; 0 is perfect."""
        clips = clips.to(next(self.parameters()).dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_targets):
            targets = self.targets(clips)
        pairs = zip(self.predictions(clips, masks), masks, strict=True)
        losses = [(made.float() - pick(targets, hidden)).abs().mean((1, 2)) for made, (_, hidden) in pairs]
        return torch.stack(losses).mean(0)


def frame_indices(num_frames: int, count: int, stride: int = STRIDE) -> list[int]:
    """Return ``count`` frames ``stride`` apart, less where the video is too short for it, around its middle.

    Raise ValueError for fewer frames than ``count``.
    """
    check_enough_frames(num_frames, count, NAME)
    stride = min(stride, (num_frames - 1) // max(count - 1, 1))
    start = (num_frames - 1 - stride * (count - 1)) // 2
    return [start + stride * index for index in range(count)]


def draw_masks(grid: tuple[int, int, int], generator: torch.Generator) -> Masks:
    """Draw patches in sight [1, K] and hidden [1, M], ascending, for each entry of BLOCKS.

    A mask hides blocks of one size, over all frames, at random places; one that hides everything is drawn again.
    Raise ValueError where that does not end, on grids too small for it.
    """
    depth, height, width = grid
    masks = []
    for count, share in BLOCKS:
        for _ in range(1000):
            low, high = ASPECT_RATIOS
            aspect = low + (high - low) * torch.rand((), generator=generator).item()
            area = int(height * width * share)
            tall, wide = (
                min(height, round(math.sqrt(area * aspect))),
                min(width, round(math.sqrt(area / aspect))),
            )
            hidden = torch.zeros(height, width, dtype=torch.bool)
            for _ in range(count):
                top = int(torch.randint(height - tall + 1, (), generator=generator))
                left = int(torch.randint(width - wide + 1, (), generator=generator))
                hidden[top : top + tall, left : left + wide] = True
            if hidden.any() and not hidden.all():
                break
        else:
            raise ValueError(f"no mask leaves patches in sight and hidden on a grid of {height} x {width}")
        flat = hidden.expand(depth, -1, -1).flatten()
        masks.append(((~flat).nonzero().T, flat.nonzero().T))
    return masks


class VJepa:
    """V-JEPA as a ``Reward``. Its weights take no gradient; ``score_pixels`` passes one to the pixels."""

    dimensions = tuple(CARD.dimensions)

    def __init__(
        self, network: VJepaNetwork, *, seed: int = 0, detach_targets: bool = False, batch_size: int = 4
    ) -> None:
        """``seed`` draws the masks. ``batch_size``: videos per forward.

        ``detach_targets``: gradients reach the pixels through the patches in sight only, as in V-JEPA's training;
        otherwise they are those of the score.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.network = network.eval().requires_grad_(False)
        self.detach_targets, self.batch_size = detach_targets, batch_size
        self.masks = draw_masks(network.config.grid, torch.Generator().manual_seed(seed))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        detach_targets: bool = False,
        batch_size: int = 4,
    ) -> VJepa:
        """Load a local folder with one of CHECKPOINTS; nothing is downloaded.

        A model.safetensors with the checkpoint's keys ("encoder.module.backbone.norm.bias") is preferred. A
        config.json with VJepaConfig's fields describes sizes other than the published ones; model.safetensors without
        one is a ViT-L/16. Raise FileNotFoundError for a missing file, ValueError for files of another model.
        """
        folder = local_folder(folder, REMEDY)
        path = next((folder / name for name in (WHOLE[0], *CHECKPOINTS) if (folder / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no weight file in {folder}; {REMEDY}")
        config = CHECKPOINTS.get(path.name, VJepaConfig())
        if (folder / "config.json").is_file():
            config = _config(read_json(folder, "config.json", REMEDY), folder)
        weights = _flat(read_file(path), path)
        network = build(lambda: VJepaNetwork(config), folder, NAME, REMEDY)
        load_strict(network, weights, where=path, model=NAME, remedy=REMEDY, dtype=dtype, device=device)
        return cls(network, seed=seed, detach_targets=detach_targets, batch_size=batch_size)

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why videos of this size, in frames and pixels, get no score, if there is a reason."""
        return refusal(self._frames, frames)

    @torch.no_grad()
    def score(self, videos: Videos, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score uint8 videos [B, F, H, W, 3]; return {"vjepa": float32 [B]}, at most 0, on the CPU.

        The prompts are only counted. Raise ValueError for a wrong shape or type, for too few frames and for a score
        that is not finite.
        """
        check_videos(videos, prompts)
        device = next(self.network.parameters()).device
        parts = []
        for rows in batches(len(prompts), self.batch_size):
            frames = videos[rows, self._frames(videos.shape[1])].to(device)
            parts.append(self._scores(frames.permute(0, 1, 4, 2, 3).float() / 255).cpu())
        scores = torch.cat(parts)
        check_finite(scores, prompts, NAME)
        return {self.dimensions[0]: scores}

    def score_pixels(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score float videos [B, F, 3, H, W] in 0..1.

        Return {"vjepa": float32 [B]} on the network's device, with gradients.

        For uint8 levels / 255 it equals ``score``. Errors are the same.
        """
        check_video_pixels(videos, prompts)
        frames = videos[:, self._frames(videos.shape[1])].to(next(self.network.parameters()).device)
        scores = torch.cat([self._scores(part) for part in frames.split(self.batch_size)])
        check_finite(scores, prompts, NAME)
        return {self.dimensions[0]: scores}

    def preprocess(self, frames: Tensor) -> Tensor:
        """Turn frames [B, T, 3, H, W] in 0..1 into clips [B, 3, T, S, S]: short side to S, centre crop, normalised."""
        return square_clips(frames, self.network.config.img_size, "bilinear").transpose(1, 2)

    def _frames(self, num_frames: int) -> list[int]:
        return frame_indices(num_frames, self.network.config.num_frames)

    def _scores(self, frames: Tensor) -> Tensor:
        """Return scores, float32 [B], of frames [B, T, 3, H, W] in 0..1."""
        masks = [
            tuple(part.to(frames.device).expand(len(frames), -1) for part in pair) for pair in self.masks
        ]
        return -self.network(self.preprocess(frames), masks, self.detach_targets)


def _config(given: Mapping[str, int], folder: Path) -> VJepaConfig:
    """Return a VJepaConfig of the fields that it has; ValueError if one is missing."""
    names = [field.name for field in fields(VJepaConfig)]
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(missing)}; {REMEDY}")
    check_settings(given, VJepaConfig, folder / "config.json", REMEDY)
    return VJepaConfig(**{name: given[name] for name in names})


def _flat(checkpoint: Mapping[str, object], path: Path) -> dict[str, Tensor]:
    """Return the weights of all parts under "part.key"; what else training saved is left out."""
    if path.suffix == ".safetensors":
        return dict(checkpoint)  # type: ignore[arg-type]
    missing = [part for part in PARTS if not isinstance(checkpoint.get(part), Mapping)]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}, it is not a V-JEPA checkpoint; {REMEDY}")
    return {f"{part}.{key}": weight for part in PARTS for key, weight in checkpoint[part].items()}  # type: ignore[attr-defined]
