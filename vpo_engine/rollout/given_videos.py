"""Videos that a method starts from, in place of noise: a stream of their prompts, and their clean latents.

They come from a folder of videos, from the winners of another run's preference dataset, or from a world that draws its
own. A place of the stream has the same video in every run of the same seed. Latents are made when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vpo_engine.data.clips import Clip, find_clips
from vpo_engine.data.prompt_record import Texts
from vpo_engine.data.prompts import PromptItem, Prompts, PromptStream
from vpo_engine.rollout.preference_dataset import StoredPairs
from vpo_engine.runs.video_file import VideoFile
from vpo_engine.seeding import generator
from vpo_engine.values import Prompt
from vpo_engine.video_model import VideoModel


class GivenVideos(Protocol):
    """An endless stream of prompts that have a video each."""

    def take(self, cursor: int, count: int) -> list[PromptItem]: ...

    def latents(self, model: VideoModel, prompt: Prompt) -> Tensor:
        """Return the clean latents [C, T, H, W] of the video at the prompt's place of the stream."""
        ...


class DrawnVideos(PromptStream):
    """Videos that the model's own world draws for the training prompts, another one at every place of the stream."""

    def latents(self, model: VideoModel, prompt: Prompt) -> Tensor:
        video = model.real_video(prompt.text, generator(self._seed, "real video", prompt.position))
        assert video is not None, "open_given_videos refuses families without videos of their own"
        return model.encode(video[None])[0]


class FolderVideos(PromptStream):
    """The videos of a folder, each once in an epoch. Their first frames are taken, scaled and cut to the model's size.

    The scale is the smallest at which the frame covers the model's, and what stands out is cut off on both sides.
    """

    def __init__(self, clips: Sequence[Clip], seed: int) -> None:
        super().__init__([clip.prompt for clip in clips], seed)
        self._clips = clips

    def latents(self, model: VideoModel, prompt: Prompt) -> Tensor:
        """See ``GivenVideos``. ValueError, naming the file, for one with fewer frames than the model's videos."""
        clip = self._clips[self.index(prompt.position)]
        assert model.video_size is not None, "open_given_videos refuses models whose size is not known"
        frames, height, width = model.video_size
        file = VideoFile.open(clip.path)
        if file.shape[1] < frames:
            raise ValueError(
                f"'{clip.path}' has {file.shape[1]} frames, but the model's videos have {frames}; take it out of the "
                "folder, or lower model.num_frames"
            )
        video = file[:, range(frames)]
        file.close()
        return model.encode(_covering(video[0], height, width)[None])[0]


class StoredWinners(StoredPairs):
    """The winners of a preference dataset, whose latents are stored; ties are left out."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._pairs = [pair for pair in self._pairs if pair.kept]

    def latents(self, model: VideoModel, prompt: Prompt) -> Tensor:
        """See ``GivenVideos``. ValueError for latents of another shape than the model's."""
        [choice] = self.choices([prompt], model.latent_shape, model.device)
        return choice.winner.latents


def open_given_videos(
    setting: str, path: Path | None, prompts: Prompts, seed: int, family: type[VideoModel]
) -> tuple[GivenVideos, Texts]:
    """Return the videos that ``setting`` names, and the texts of which the run's directory keeps a record.

    path: a folder of videos, or a run directory (or its folder preference_dataset) whose winners are taken; None: what
    the family draws for the training ``prompts``. ValueError where there is nothing to take, FileNotFoundError for a
    folder that is not there.
    """
    if path is None:
        if family.real_video.__func__ is VideoModel.real_video.__func__:  # type: ignore[attr-defined]
            raise ValueError(
                f"{setting} is not set, and {family.card.name} has no videos of its own; give {setting}=FOLDER of videos "
                "with their prompts (python -m vpo_engine.sample makes one), or of a run with pairs.dataset=latents"
            )
        return DrawnVideos(prompts, seed), {"prompts.train": prompts}
    if not path.is_dir():
        raise FileNotFoundError(f"{setting}={path} is no folder; give one of videos, or a run directory")
    if (path / "preference_dataset").is_dir() or any(path.glob("pairs_*.jsonl")):
        stored = StoredWinners(path)
        return stored, {setting: stored.texts()}
    clips = find_clips(path)
    empty = next((clip for clip in clips if not clip.prompt.strip()), None)
    if empty is not None:
        raise ValueError(
            f"{setting}={path}: the prompt of {empty.name} is empty; give the folder a prompts.csv, prompts.jsonl or "
            "prompts.txt (see docs/rewards.md)"
        )
    return FolderVideos(clips, seed), {setting: [f"{clip.name}: {clip.prompt}" for clip in clips]}


def _covering(video: Tensor, height: int, width: int) -> Tensor:
    """Scale a video, uint8 [F, H, W, 3], until it just covers height x width, and cut out the middle; uint8."""
    if tuple(video.shape[1:3]) == (height, width):
        return video
    scale = max(height / video.shape[1], width / video.shape[2])
    size = [
        max(side, round(scale * given)) for side, given in zip((height, width), video.shape[1:3], strict=True)
    ]
    frames = F.interpolate(
        video.movedim(3, 1).float(), size, mode="bilinear", antialias=True, align_corners=False
    )
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cut = frames[:, :, top : top + height, left : left + width]
    return cut.round().clamp(0, 255).to(torch.uint8).movedim(1, 3).contiguous()
