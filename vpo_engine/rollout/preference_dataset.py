"""The preference dataset of a run: its pairs are written to it, and an offline run trains on them without a rollout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from vpo_engine.data.preference_dataset import DatasetWriter, StoredPair, read_dataset, truncate_dataset
from vpo_engine.data.prompts import PlacedPrompts, PromptItem, Stream
from vpo_engine.distributed.processes import Processes
from vpo_engine.values import Candidate, Choice, Pair, Prompt


class PairRecorder:
    """Write the choices of a run's steps; the first process of every team has a recorder."""

    def __init__(self, seed: int, folder: Path, rank: int, with_latents: bool) -> None:
        """Write to ``folder``, where the run keeps its preference dataset; of latents, those of pairs."""
        self._seed, self._with_latents = seed, with_latents
        self._writer = DatasetWriter(folder, rank)

    def record(self, step: int, choices: Sequence[Choice], pairs: Sequence[Pair]) -> None:
        """Append the choices of a step, ties included, and the latents of the pairs that were made of them."""
        weights = {pair.prompt.position: pair.weight for pair in pairs}
        rows = {position: row for row, position in enumerate(weights)} if self._with_latents else {}
        lines = [
            StoredPair(
                step=step,
                position=choice.prompt.position,
                prompt=choice.prompt.text,
                seed=self._seed,
                candidates=tuple(candidate.number for candidate in choice.candidates),
                scores=_by_dimension(choice.candidates),
                selected=choice.selected,
                winner=choice.winner.number,
                loser=choice.loser.number,
                gap=choice.gap,
                kept=not choice.tied,
                weight=weights.get(choice.prompt.position, 0.0),
                row=rows.get(choice.prompt.position),
            )
            for choice in choices
        ]
        latents = None
        if rows:
            latents = (
                torch.stack([pair.winner.latents for pair in pairs]),
                torch.stack([pair.loser.latents for pair in pairs]),
            )
        self._writer.write(step, lines, latents)

    def sync(self) -> None:
        """Bring what was recorded to the disk."""
        self._writer.sync()


def _by_dimension(candidates: Sequence[Candidate]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(each.scores[name] for each in candidates) for name in candidates[0].scores}


class StoredPairs:
    """The pairs of a preference dataset as an endless stream of prompts, in the order they were made, ties included.

    Place q of the stream is pair q modulo the number of pairs, so that a run of the same settings takes the same
    pairs in the same steps, and with the same timesteps and noise, as the run that wrote them.
    """

    def __init__(self, path: Path, min_gap: float = 0.0, count: int | None = None) -> None:
        """Read a dataset; for ``path`` see ``read_dataset``. Pairs with gaps of at most ``min_gap`` are ties, and so
        are those that were ties when they were stored. count: how many pairs are taken, from the first; None: all.

        Raise ValueError for a dataset without any other, or without their latents.
        """
        self._pairs = list(islice(read_dataset(path), count))
        self._path, self._min_gap = path, min_gap
        untied = [pair for pair in self._pairs if not self._is_tied(pair)]
        self.ties = len(self._pairs) - len(untied)
        if not untied:
            raise ValueError(
                f"all {len(self._pairs)} pairs of the preference dataset at {path} are ties; nothing is learned"
            )
        if any(pair.row is None for pair in untied):
            raise ValueError(
                f"the preference dataset at {path} holds scores without latents, which cannot be trained on; write it "
                "with pairs.dataset=latents"
            )

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def prompts(self) -> PlacedPrompts:
        """Return the prompts of all pairs that are trained on."""
        return PlacedPrompts(
            (pair.prompt, f"{self._path}, step {pair.step}, position {pair.position}")
            for pair in self._pairs
            if not self._is_tied(pair)
        )

    def texts(self) -> list[str]:
        """Return a text for each pair that tells it from any other, for the record of the run."""
        return [
            repr((pair.step, pair.position, pair.prompt, pair.winner, pair.loser, pair.gap, pair.kept))
            for pair in self._pairs
        ]

    def check(self, latent_shape: Sequence[int]) -> None:
        """Raise ValueError unless the latents of all pairs are there and have this shape; they are not read."""
        by_file = {pair.latents_file: pair for pair in self._pairs if not self._is_tied(pair)}
        for pair in by_file.values():
            _check_shape(pair.latent_shape(), tuple(latent_shape))

    def take(self, cursor: int, count: int) -> list[PromptItem]:
        """Return the prompts at ``cursor, ..., cursor + count - 1`` of the stream, as a ``PromptStream`` does."""
        places = (position % len(self) for position in range(cursor, cursor + count))
        return [PromptItem(place, self._pairs[place].prompt) for place in places]

    def choices(
        self, prompts: Sequence[Prompt], latent_shape: Sequence[int], device: torch.device
    ) -> list[Choice]:
        """Return the stored choices of prompts of this stream, each of the winner and the loser alone.

        Latents are [*latent_shape] on ``device``, and zeros where a pair is a tie. Raise ValueError if the stored
        ones are of another shape.
        """
        return [self._choice(prompt, tuple(latent_shape), device) for prompt in prompts]

    def _choice(self, prompt: Prompt, latent_shape: tuple[int, ...], device: torch.device) -> Choice:
        stored = self._pairs[prompt.position % len(self)]
        tied = self._is_tied(stored)
        latents = (torch.zeros(latent_shape),) * 2 if tied else _latents(stored, latent_shape)
        winner, loser = (
            Candidate(prompt, number, value.to(device), stored.score(number))
            for number, value in zip((stored.winner, stored.loser), latents, strict=True)
        )
        selected = dict(zip(stored.candidates, stored.selected, strict=True))
        return Choice(
            (winner, loser),
            (selected[winner.number], selected[loser.number]),
            winner,
            loser,
            stored.gap,
            tied,
        )

    def _is_tied(self, pair: StoredPair) -> bool:
        return not pair.kept or pair.gap <= self._min_gap


class SampledPairs:
    """The pairs that a run samples before its first step and keeps, as an endless stream of prompts.

    Place q of the stream is pair q modulo the number of pairs; pair q is of the prompt at place q of ``stream``.
    """

    def __init__(self, stream: Stream, count: int) -> None:
        """``count``: how many pairs are sampled."""
        self._stream, self._count = stream, count
        self._stored: StoredPairs | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def ties(self) -> int:
        """Return how many of the pairs are ties, once they have been read."""
        assert self._stored is not None, "the pairs have not been read"
        return self._stored.ties

    def take(self, cursor: int, count: int) -> list[PromptItem]:
        """Return the prompts at ``cursor, ..., cursor + count - 1`` of the stream, as a ``PromptStream`` does."""
        places = (position % len(self) for position in range(cursor, cursor + count))
        return [self._stream.take(place, 1)[0] for place in places]

    def find(self, folder: Path, size: int, started: bool, processes: Processes) -> int:
        """Return how many steps of ``size`` pairs are in ``folder``, and remove what comes behind them.

        Every process must call this. started: the policy has been trained already, so that what is not there cannot be
        sampled any more; then the stream has the pairs that are there, and without any this is a ValueError.
        """
        done = self._complete_steps(folder, size)
        processes.wait()
        if started:
            if not done:
                raise ValueError(
                    f"the pairs that this run has sampled are not in {folder} any more; put them back, or start "
                    "another run"
                )
            self._count = done * size
        elif processes.first and folder.is_dir():
            truncate_dataset(folder, done)
        processes.wait()
        return done

    def read(self, folder: Path, min_gap: float) -> None:
        """Take the pairs from ``folder``, once they are all there; for errors see ``StoredPairs``."""
        self._stored = StoredPairs(folder, min_gap, self._count)

    def choices(
        self, prompts: Sequence[Prompt], latent_shape: Sequence[int], device: torch.device
    ) -> list[Choice]:
        """Return the choices of prompts of this stream; see ``StoredPairs``."""
        assert self._stored is not None, "the pairs have not been read"
        return self._stored.choices(prompts, latent_shape, device)

    def _complete_steps(self, folder: Path, size: int) -> int:
        """Return how many of the first steps have all of their ``size`` pairs, of the stream's prompts, in ``folder``.

        A run that has saved no checkpoint may begin again with other prompts.
        """
        try:
            pairs = list(read_dataset(folder))
        except FileNotFoundError:
            return 0
        own = (pair for pair in pairs if self._stream.take(pair.position, 1)[0].text == pair.prompt)
        counts = Counter(pair.step for pair in own)
        return next(step for step in count(0) if counts[step + 1] < size)


def _latents(stored: StoredPair, latent_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    latents = stored.latents()
    _check_shape(tuple(latents[0].shape), latent_shape)
    return latents


def _check_shape(stored: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if stored != wanted:
        raise ValueError(
            f"the preference dataset holds latents {list(stored)}, but the model's are {list(wanted)}; train the "
            "model, resolution and num_frames that wrote it"
        )
