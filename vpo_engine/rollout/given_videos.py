"""Videos that a method starts from, in place of noise: a stream of their prompts, and their clean latents.

They come from a folder of videos, from the winners of another run's preference dataset, or from a world that draws its
own. A place of the stream has the same video in every run of the same seed. Latents are made when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vpo_engine.data.clips import find_clips
from vpo_engine.data.preference_file import PreferenceFile, PreferredFiles, RowTexts
from vpo_engine.data.prompt_record import Texts
from vpo_engine.data.prompts import PromptItem, Prompts, PromptStream
from vpo_engine.distributed.processes import Processes
from vpo_engine.rollout.preference_dataset import StoredPairs
from vpo_engine.rollout.preferred_files import FilePairs
from vpo_engine.seeding import generator
from vpo_engine.values import Prompt
from vpo_engine.video_model import VideoModel


class GivenVideos(Protocol):
    """An endless stream of prompts that have a video each; see ``Stream``."""

    def __len__(self) -> int: ...

    def take(self, cursor: int, count: int) -> list[PromptItem]: ...

    def prepare(
        self, model: VideoModel, folder: Path, processes: Processes, say: Callable[[str], None]
    ) -> None:
        """Encode videos of files that are not in ``folder`` yet. Raise ValueError for those that the model cannot take.

        Every process must call this.
        """
        ...

    def latents(self, model: VideoModel, prompt: Prompt) -> Tensor:
        """Return the clean latents [C, T, H, W] of the video at the prompt's place of the stream."""
        ...


class DrawnVideos(PromptStream):
    """Videos that the model's own world draws for the training prompts, another one at every place of the stream."""

    def prepare(
        self, model: VideoModel, folder: Path, processes: Processes, say: Callable[[str], None]
    ) -> None:
        return

    def latents(self, model: VideoModel, prompt: Prompt) -> Tensor:
        video = model.real_video(prompt.text, generator(self._seed, "real video", prompt.position))
        assert video is not None, "open_given_videos refuses families without videos of their own"
        return model.encode(video[None])[0]


class FileVideos(FilePairs):
    """Video files (or files of latents) with a prompt each, in an order that the seed draws, again and again."""

    def __init__(self, path: Path, files: Sequence[PreferredFiles], seed: int) -> None:
        """``path``: where the files were named. Each stands as the winner and as the loser of its row."""
        order = torch.randperm(len(files), generator=generator(seed, "given videos")).tolist()
        self.rows = [files[place] for place in order]
        self.path, self._kept = path, {}

    def prepare(
        self, model: VideoModel, folder: Path, processes: Processes, say: Callable[[str], None]
    ) -> None:
        self.encode(model, folder, processes, say)

    def latents(self, model: VideoModel, prompt: Prompt) -> Tensor:
        return self.choices([prompt], model.latent_shape, model.device)[0].winner.latents


class StoredWinners(StoredPairs):
    """The winners of a preference dataset, whose latents are stored; ties are left out."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._pairs = [pair for pair in self._pairs if pair.kept]

    def prepare(
        self, model: VideoModel, folder: Path, processes: Processes, say: Callable[[str], None]
    ) -> None:
        """See ``GivenVideos``; there is nothing to encode."""
        shape = tuple(self._pairs[0].latents()[0].shape)
        if shape != tuple(model.latent_shape):
            raise ValueError(
                f"the winners are latents {list(shape)}, but the model's are {list(model.latent_shape)}; train the "
                "model and the size of videos that the run with them had"
            )

    def latents(self, model: VideoModel, prompt: Prompt) -> Tensor:
        [choice] = self.choices([prompt], model.latent_shape, model.device)
        return choice.winner.latents


def open_given_videos(
    setting: str, path: Path | None, prompts: Prompts, seed: int, family: type[VideoModel]
) -> tuple[GivenVideos, Texts]:
    """Return the videos that ``setting`` names, and the texts of which the run's directory keeps a record.

    path: a folder of videos, a file of pairs, or a run directory (or its folder preference_dataset); of pairs the
    winners are taken. None: what the family draws for the training ``prompts``. ValueError where there is nothing to
    take or a file cannot be read, FileNotFoundError for a path that is not there.
    """
    if path is None:
        if family.real_video.__func__ is VideoModel.real_video.__func__:  # type: ignore[attr-defined]
            raise ValueError(
                f"{setting} is not set, and {family.card.name} has no videos of its own; give a folder of videos with "
                "their prompts (python -m vpo_engine.sample makes one), a file of pairs, or a run with "
                "pairs.dataset=latents"
            )
        return DrawnVideos(prompts, seed), {"prompts.train": prompts}
    if not path.exists():
        raise FileNotFoundError(
            f"{setting}={path} is not there; give a folder of videos, a file of pairs, or a run"
        )
    if path.is_dir() and ((path / "preference_dataset").is_dir() or any(path.glob("pairs_*.jsonl"))):
        stored = StoredWinners(path)
        return stored, {setting: stored.texts()}
    files = _in_folder(path, setting) if path.is_dir() else list(PreferenceFile(path))
    given = FileVideos(
        path, [PreferredFiles(each.winner, each.winner, each.prompt, each.place) for each in files], seed
    )
    return given, {setting: RowTexts(given.rows)}


def _in_folder(folder: Path, setting: str) -> list[PreferredFiles]:
    """Return the videos of a folder. ValueError for one without a prompt."""
    clips = find_clips(folder)
    empty = next((clip for clip in clips if not clip.prompt.strip()), None)
    if empty is not None:
        raise ValueError(
            f"{setting}={folder}: the prompt of {empty.name} is empty; give the folder a prompts.csv, prompts.jsonl or "
            "prompts.txt (see docs/rewards.md)"
        )
    return [PreferredFiles(clip.path, clip.path, clip.prompt, f"{folder}, {clip.name}") for clip in clips]
