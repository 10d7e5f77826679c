"""Pairs from a file of preferred videos or latents; videos are encoded once, by the VAE of the model, and kept."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vpo_engine.data.preference_file import LATENTS, PreferenceFile, PreferredFiles, content_hash
from vpo_engine.data.prompts import PlacedPrompts, PromptItem
from vpo_engine.distributed.processes import Processes
from vpo_engine.full_disk import sync_file, writing
from vpo_engine.values import Candidate, Choice, Prompt
from vpo_engine.video_model import VideoModel
from vpo_engine.weights import read_files

_NAME = "latents"


class FilePairs:
    """The pairs of a preference file as an endless stream of prompts, in the order of the file, again and again.

    Place q of the stream is row q modulo the number of rows. No pair has scores, and none is a tie.
    """

    ties = 0

    def __init__(self, path: Path) -> None:
        """Read the file; for its errors see ``PreferenceFile``."""
        self.rows: Sequence[PreferredFiles] = PreferenceFile(path)
        self.path = path
        self._kept: dict[Path, Path] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompts(self) -> PlacedPrompts:
        return PlacedPrompts((row.prompt, row.place) for row in self.rows)

    def take(self, cursor: int, count: int) -> list[PromptItem]:
        """Return the prompts at ``cursor, ..., cursor + count - 1`` of the stream, as a ``PromptStream`` does."""
        places = (position % len(self.rows) for position in range(cursor, cursor + count))
        return [PromptItem(place, self.rows[place].prompt) for place in places]

    def encode(
        self, model: VideoModel, folder: Path, processes: Processes, say: Callable[[str], None]
    ) -> None:
        """Check all latents, and encode the videos that are not in ``folder`` yet; every process must call this.

        The processes share the videos. A video is found again by its content and by the weights of the VAE. Raise
        ValueError, naming file and line, for a file that cannot be read and for one of another size than the model's.
        """
        self._kept = {}
        videos: dict[Path, str] = {}
        for row in self.rows:
            for path in (row.winner, row.loser):
                if path.suffix.lower() == LATENTS:
                    _latents(path, model.latent_shape, row.place)
                else:
                    videos.setdefault(path, row.place)
        if videos:
            vae = _weights_hash(model)
            self._kept = {path: folder / f"{content_hash(path)}_{vae}{LATENTS}" for path in videos}
            missing = sum(not kept.is_file() for kept in self._kept.values())
            if missing and processes.first:
                say(f"encoding {missing} of {len(videos)} videos of {self.path}; they are kept in {folder}")
            folder.mkdir(parents=True, exist_ok=True)
            mine = list(videos)[processes.rank :: processes.count]  # of all, since others may have begun
            for path in mine:
                if not self._kept[path].is_file():
                    _keep(self._kept[path], _encoded(model, path, videos[path]))
        processes.wait()

    def choices(
        self, prompts: Sequence[Prompt], latent_shape: Sequence[int], device: torch.device
    ) -> list[Choice]:
        """Return the pairs of prompts of this stream, each of a winner and a loser without scores, on ``device``."""
        return [self._choice(prompt, tuple(latent_shape), device) for prompt in prompts]

    def _choice(self, prompt: Prompt, shape: tuple[int, ...], device: torch.device) -> Choice:
        row: PreferredFiles = self.rows[prompt.position % len(self.rows)]
        winner, loser = (
            Candidate(prompt, number, _latents(self._kept.get(path, path), shape, row.place).to(device), {})
            for number, path in enumerate((row.winner, row.loser))
        )
        return Choice((winner, loser), (), winner, loser, gap=0.0, tied=False)


def _latents(path: Path, shape: Sequence[int], place: str) -> Tensor:
    """Return the one tensor of a file, float32 [C, T, H, W]. ValueError, with the place, for any other file."""
    try:
        found = read_files([path])
    except (ValueError, OSError) as error:
        raise ValueError(f"{place}: {path} is not a safetensors file ({error}); write it again") from error
    if len(found) != 1:
        raise ValueError(f"{place}: {path} holds {len(found)} tensors, expected one: latents [C, T, H, W]")
    [latents] = found.values()
    if tuple(latents.shape) != tuple(shape):
        raise ValueError(
            f"{place}: {path} holds latents {list(latents.shape)}, but the model's are {list(shape)}; train the model "
            "and the size of videos that they were made for"
        )
    if not bool(torch.isfinite(latents).all()):
        raise ValueError(f"{place}: {path} holds latents that are not finite; write it again")
    return latents.float()


def _encoded(model: VideoModel, path: Path, place: str) -> Tensor:
    """Return the latents [C, T, H, W] of a video file. ValueError, with the place, for one of another size."""
    from vpo_engine.runs.video import read_video  # PyAV is loaded where there are files

    try:
        frames, _ = read_video(path)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if model.video_size is not None:
        frames = _as_made(frames, model.video_size)
        if tuple(frames.shape[:3]) != model.video_size:
            expected = "{} frames of {} x {} pixels".format(*model.video_size)
            found = "{} frames of {} x {} pixels".format(*frames.shape[:3])
            raise ValueError(
                f"{place}: {path} has {found}, but the model's videos have {expected}; cut and resize the video, or "
                "train the size that it has"
            )
    try:
        return model.encode(frames[None])[0].cpu()
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _as_made(frames: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Return frames [F, H, W, 3] that ``vpo_engine.sample`` enlarged to be seen in their own size; others as they
    are."""
    from vpo_engine.runs.video import shown_factor

    _, height, width = size
    factor = shown_factor(height, width)
    if factor == 1 or tuple(frames.shape[1:3]) != (factor * height, factor * width):
        return frames
    squares = frames.unflatten(2, (width, factor)).unflatten(1, (height, factor))
    return squares.float().mean(dim=(2, 4)).round().to(torch.uint8)


def _keep(path: Path, latents: Tensor) -> None:
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    save_file({_NAME: latents.contiguous()}, unfinished)
    with writing(path):
        sync_file(unfinished)
    unfinished.replace(path)


def _weights_hash(model: VideoModel) -> str:
    """Return a hash of the weights of the model's VAE, and of the size of its videos."""
    found = hashlib.sha256(repr((model.latent_shape, model.video_size, model.dtype)).encode())
    for name, tensor in model.parts["vae"].state_dict().items() if "vae" in model.parts else ():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
