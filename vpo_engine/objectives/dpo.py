"""Diffusion-DPO on latents: how a policy learns from winner and loser (paper, section 3; Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vpo_kernels import PairedDPOLoss, error_weight, paired_dpo_loss, sequential_backward

from vpo_engine.config import ObjectiveConfig
from vpo_engine.protocols import Network, ReferenceStore, TextEmbedding, VideoModel
from vpo_engine.seeding import generator, normal


@dataclass(frozen=True)
class PreferenceBatch:
    """Pairs to learn from.

    winner, loser: clean latents [P, C, T, H, W]. text: their P prompts. positions: where each prompt stands in
    the stream, which seeds its noise. total: pairs of the whole step, over all processes. update: how many optimizer
    steps were made on these pairs before; each has draws of its own. rows: which of the P * draws draws of (t, noise),
    those of a pair in a row, are learned from here; None: all. weight: float32 [P], what the pairs' losses are
    multiplied by, of mean 1 over all pairs of the step; None: 1.
    """

    winner: Tensor
    loser: Tensor
    text: TextEmbedding
    positions: Sequence[int]
    total: int
    update: int = 0
    rows: range | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class _Rows:
    """What goes through the networks at once: clean latents [R, C, T, H, W], prompts, times [R], noise, weights [R]."""

    winner: Tensor
    loser: Tensor
    text: TextEmbedding
    times: Tensor
    noise: Tensor
    weight: Tensor | None


class DPO:
    """The paired loss against the reference, ``draws`` times (t, noise) per pair with a sigmoid each.

    Winner and loser of a pair share t and noise. Policy and reference see the same rows in the same order in
    the same autocast state; neither is in a state with dropout.

    sequential: winner and loser go through the networks one after the other, so that one member's graph exists at
    a time; the policy's forward pass of the winner is made twice. Same gradient and metrics but for rounding.
    """

    METRICS = ("loss", "margin", "implicit_accuracy", "winner_gap", "loser_gap")

    def __init__(
        self,
        model: VideoModel,
        config: ObjectiveConfig,
        guidance: float,
        seed: int,
        sequential: bool = False,
    ) -> None:
        self._model = model
        self._config = config
        self._guidance = guidance if config.branch == "guided" else 1.0
        self._seed = seed
        self._backward = self._one_by_one if sequential else self._jointly

    def step(self, batch: PreferenceBatch, reference: ReferenceStore, world: int = 1) -> dict[str, float]:
        """Add this batch's gradient to the policy's parameters and return the metrics' sums over its rows.

        The gradient is that of ``world`` times the sum over rows divided by all rows of the step, so that the
        mean over ``world`` processes is the gradient of the mean over all pairs, however they are spread.
        Keys of the result: METRICS and "rows".
        """
        draws = self._config.draws
        mine = range(len(batch.positions) * draws) if batch.rows is None else batch.rows
        times, noise = self._draws(batch.positions, batch.winner.device, batch.update, mine)
        pair_of_row = torch.arange(mine.start, mine.stop) // draws  # on the host, where text masks are
        weights = None if batch.weight is None else batch.weight.to(times.device)
        rows = self._config.rows or len(times)
        sums = dict.fromkeys((*self.METRICS, "rows"), 0.0)
        for start in range(0, len(times), rows):
            index = pair_of_row[start : start + rows]
            pairs = _Rows(
                batch.winner[index],
                batch.loser[index],
                batch.text[index],
                times[start : start + rows],
                noise[start : start + rows],
                None if weights is None else weights[index.to(weights.device)],
            )
            result = self._backward(pairs, reference, len(index) * world / (batch.total * draws))
            sums["loss"] += float(result.loss) * len(index)
            sums["margin"] += float(result.margin.sum())
            sums["implicit_accuracy"] += float((result.margin > 0).sum())
            sums["winner_gap"] += float(result.winner_gap.sum())
            sums["loser_gap"] += float(result.loser_gap.sum())
            sums["rows"] += len(index)
        return sums

    def _draws(
        self, positions: Sequence[int], device: torch.device, update: int = 0, rows: range | None = None
    ) -> tuple[Tensor, Tensor]:
        """Times [P * draws] and noise [P * draws, C, T, H, W], a pair's draws in a row; or ``rows`` of them.

        The draws of one pair are stratified: each falls in another of ``draws`` equal parts of (0, 1), which
        leaves their distribution as it is and lowers the variance of the mean.
        """
        draws, shape = self._config.draws, self._model.latent_shape
        strata, noise = [], []
        which = [update] if update else []
        rows = range(len(positions) * draws) if rows is None else rows
        for number, position in enumerate(positions):
            own = slice(max(rows.start - number * draws, 0), max(rows.stop - number * draws, 0))
            random = generator(self._seed, "time", position, *which)
            strata.append(((torch.arange(draws) + torch.rand(draws, generator=random)) / draws)[own])
            if len(strata[-1]):
                noise.append(normal((draws, *shape), self._seed, "noise", position, *which)[own])
        times = self._model.draw_timesteps(torch.cat(strata).clamp(1e-6, 1 - 1e-6))
        return times.to(device), torch.cat(noise).to(device)

    def _jointly(self, rows: _Rows, reference: ReferenceStore, scale: float) -> PairedDPOLoss:
        """Add ``scale`` times the loss's gradient, winners and losers in one batch."""
        inputs = torch.cat([self._noised(rows, rows.winner), self._noised(rows, rows.loser)])
        times, text = rows.times.repeat(2), TextEmbedding.cat([rows.text, rows.text])

        def predict(network: Network) -> tuple[Tensor, ...]:
            return self._model.predict(network, inputs, times, text, self._guidance).chunk(2)

        reference_winner, reference_loser = predict(reference)
        winner, loser = predict(self._model.network)
        out = paired_dpo_loss(
            winner, loser, reference_winner, reference_loser, rows.winner, rows.loser, **self._options(rows)
        )
        (out.loss * scale).backward()
        return PairedDPOLoss(*(value.detach() for value in out))

    def _one_by_one(self, rows: _Rows, reference: ReferenceStore, scale: float) -> PairedDPOLoss:
        """As ``_jointly``, one member at a time."""

        def predict(network: Network, latents: Tensor) -> Tensor:
            inputs = self._noised(rows, latents)
            return self._model.predict(network, inputs, rows.times, rows.text, self._guidance)

        return sequential_backward(
            partial(predict, self._model.network, rows.winner),
            partial(predict, self._model.network, rows.loser),
            predict(reference, rows.winner),
            predict(reference, rows.loser),
            rows.winner,
            rows.loser,
            scale=scale,
            **self._options(rows),
        )

    def _noised(self, rows: _Rows, latents: Tensor) -> Tensor:
        return self._model.add_noise(latents, rows.noise, rows.times)

    def _options(self, rows: _Rows) -> dict[str, Any]:
        """Of ``paired_dpo_loss``, whose targets are the clean latents and the noise."""
        return {
            "beta": self._beta(rows.times),
            "pair_weight": rows.weight,
            "target_noise": rows.noise,
            "target_scales": self._model.target_scales(rows.times),
            "winner_anchor": self._config.winner_anchor,
            "loser_scaling": self._config.loser_scaling,
        }

    def _beta(self, times: Tensor) -> float | Tensor:
        if self._config.weighting == "prediction":
            return self._config.beta
        return self._config.beta * error_weight(self._config.weighting, *self._model.noising_scales(times))
