"""Pairs to a ledger and from it: what a run writes, and what an offline run trains on in place of a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.data.ledger import LedgerPair, LedgerWriter, read_ledger, stack_latents
from vpo_engine.data.prompts import PromptItem
from vpo_engine.objectives.pairs import Pairs
from vpo_engine.rewards.combine import combine
from vpo_engine.rollout.pool import Pool


class Recorder:
    """Writes a run's ledger; the first process of every team has one."""

    def __init__(self, config: Config, folder: Path, rank: int) -> None:
        """``folder``: the run's ledger."""
        self._config = config
        self._with_latents = config.pairs.ledger == "latents"
        self._writer = LedgerWriter(folder, rank)

    def record(
        self,
        step: int,
        prompts: Sequence[str],
        positions: Sequence[int],
        pool: Pool,
        pairs: Pairs,
        weights: Tensor,
    ) -> None:
        """Append a step's prompts, which stand at these positions. weights: float32 [P], of the pairs' losses."""
        kept = pairs.kept.nonzero().squeeze(1)
        place = {row: number for number, row in enumerate(kept.tolist())} if self._with_latents else {}
        lines = [
            LedgerPair(
                step=step,
                position=positions[row],
                prompt=prompt,
                seed=self._config.seed,
                **self._compared(pool, pairs, row),
                weight=float(weights[row]),
                row=place.get(row),
            )
            for row, prompt in enumerate(prompts)
        ]
        latents = (pool.pick(kept, pairs.winner[kept]), pool.pick(kept, pairs.loser[kept])) if place else None
        self._writer.write(step, lines, latents)

    def _compared(self, pool: Pool, pairs: Pairs, row: int) -> dict[str, Any]:
        numbers = pool.numbers[row, pool.numbers[row] >= 0].tolist()
        scores = {name: value[row, : len(numbers)] for name, value in pool.scores.items()}
        reward = self._config.reward
        return {
            "candidates": tuple(numbers),
            "scores": {name: tuple(value.tolist()) for name, value in scores.items()},
            "selected": tuple(combine(scores, reward.dimensions, reward.normalise).tolist()),
            "winner": numbers[int(pairs.winner[row])],
            "loser": numbers[int(pairs.loser[row])],
            "gap": float(pairs.gap[row]),
            "kept": bool(pairs.kept[row]),
        }


class StoredPairs:
    """The pairs of a ledger as an endless stream of prompts, in the order in which they were made, ties included.

    Place q of the stream is pair q modulo the pairs of the ledger, so that a run of the same settings takes the same
    pairs in the same steps, and with the same draws of (t, noise), as the run that wrote them.
    """

    def __init__(self, path: Path, min_gap: float = 0.0) -> None:
        """``path``: see ``read_ledger``. Pairs with gaps of at most ``min_gap`` are ties, as are those that were.

        ValueError for a ledger without any other, or without their latents.
        """
        self._pairs = list(read_ledger(path))
        self._min_gap = min_gap
        kept = [pair for pair in self._pairs if self._is_kept(pair)]
        if not kept:
            raise ValueError(
                f"all {len(self._pairs)} pairs of the ledger at {path} are ties; nothing is learned"
            )
        if any(pair.row is None for pair in kept):
            raise ValueError(
                f"the ledger at {path} holds scores without latents, which cannot be trained on; write it with "
                "pairs.ledger=latents"
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def take(self, cursor: int, count: int) -> list[PromptItem]:
        """The prompts at ``cursor, ..., cursor + count - 1`` of the stream, as of a ``PromptStream``."""
        places = (position % len(self) for position in range(cursor, cursor + count))
        return [PromptItem(place, self._pairs[place].prompt) for place in places]

    def compared(
        self, positions: Sequence[int], latent_shape: Sequence[int], device: torch.device
    ) -> tuple[Pool, Pairs]:
        """Winner and loser, in this order, of the prompts at these places of the stream, and the pairs of them.

        Latents are [P, 2, *latent_shape] on ``device``, zeros where a pair is a tie; ValueError if the stored ones are
        of another shape.
        """
        lines = [self._pairs[position % len(self)] for position in positions]
        kept = torch.tensor([self._is_kept(line) for line in lines])
        latents = torch.zeros(len(lines), 2, *latent_shape)
        if kept.any():
            members = torch.stack(stack_latents([line for line in lines if self._is_kept(line)]), dim=1)
            if tuple(members.shape[2:]) != tuple(latent_shape):
                raise ValueError(
                    f"the ledger holds latents {list(members.shape[2:])}, but the model's are {list(latent_shape)}; "
                    "train the model, resolution and num_frames that wrote it"
                )
            latents = latents.to(members.dtype).index_copy(0, kept.nonzero().squeeze(1), members)
        numbers = torch.tensor([(line.winner, line.loser) for line in lines])
        both = [(line.score(line.winner), line.score(line.loser)) for line in lines]
        scores = {name: torch.tensor([[one[name] for one in pair] for pair in both]) for name in both[0][0]}
        first = torch.zeros(len(lines), dtype=torch.int64)
        gap = torch.tensor([line.gap for line in lines])
        return Pool(latents.to(device), scores, numbers), Pairs(first, first + 1, gap, kept)

    def _is_kept(self, pair: LedgerPair) -> bool:
        return pair.kept and pair.gap > self._min_gap
