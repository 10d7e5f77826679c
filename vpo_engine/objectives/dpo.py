"""Diffusion-DPO on latents: how a policy learns from winner and loser (paper, section 3; Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vpo_kernels import error_weight, paired_dpo_loss

from vpo_engine.config import ObjectiveConfig
from vpo_engine.protocols import Network, ReferenceStore, TextEmbedding, VideoModel
from vpo_engine.seeding import generator, normal


@dataclass(frozen=True)
class PreferenceBatch:
    """Pairs to learn from.

    winner, loser: clean latents [P, C, T, H, W]. text: their P prompts. positions: where each prompt stands in
    the stream, which seeds its noise. total: pairs of the whole step, over all processes.
    """

    winner: Tensor
    loser: Tensor
    text: TextEmbedding
    positions: Sequence[int]
    total: int


class DPO:
    """The paired loss against the reference, ``draws`` times (t, noise) per pair with a sigmoid each.

    Winner and loser of a pair share t and noise. Policy and reference see the same rows in the same order in
    the same autocast state; neither is in a state with dropout.
    """

    METRICS = ("loss", "margin", "implicit_accuracy", "winner_gap", "loser_gap")

    def __init__(self, model: VideoModel, config: ObjectiveConfig, guidance: float, seed: int) -> None:
        self._model = model
        self._config = config
        self._guidance = guidance if config.branch == "guided" else 1.0
        self._seed = seed

    def step(self, batch: PreferenceBatch, reference: ReferenceStore, world: int = 1) -> dict[str, float]:
        """Add this batch's gradient to the policy's parameters and return the metrics' sums over its rows.

        The gradient is that of ``world`` times the sum over rows divided by all rows of the step, so that the
        mean over ``world`` processes is the gradient of the mean over all pairs, however they are spread.
        Keys of the result: METRICS and "rows".
        """
        times, noise = self._draws(batch.positions, batch.winner.device)
        draws = self._config.draws
        pair_of_row = torch.arange(len(times)) // draws  # on the host, where text masks are
        rows = self._config.rows or len(times)
        sums = dict.fromkeys((*self.METRICS, "rows"), 0.0)
        for start in range(0, len(times), rows):
            index = pair_of_row[start : start + rows]
            result = self._loss(
                batch, index, times[start : start + rows], noise[start : start + rows], reference
            )
            (result.loss * (len(index) * world / (batch.total * draws))).backward()
            sums["loss"] += float(result.loss.detach()) * len(index)
            sums["margin"] += float(result.margin.sum())
            sums["implicit_accuracy"] += float((result.margin > 0).sum())
            sums["winner_gap"] += float(result.winner_gap.sum())
            sums["loser_gap"] += float(result.loser_gap.sum())
            sums["rows"] += len(index)
        return sums

    def _draws(self, positions: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Times [P * draws] and noise [P * draws, C, T, H, W], a pair's draws in a row.

        The draws of one pair are stratified: each falls in another of ``draws`` equal parts of (0, 1), which
        leaves their distribution as it is and lowers the variance of the mean.
        """
        draws, shape = self._config.draws, self._model.latent_shape
        strata, noise = [], []
        for position in positions:
            random = generator(self._seed, "time", position)
            strata.append((torch.arange(draws) + torch.rand(draws, generator=random)) / draws)
            noise.append(normal((draws, *shape), self._seed, "noise", position))
        times = self._model.draw_timesteps(torch.cat(strata).clamp(1e-6, 1 - 1e-6))
        return times.to(device), torch.cat(noise).to(device)

    def _loss(self, batch, index, times, noise, reference):  # type: ignore[no-untyped-def]
        model = self._model
        winner, loser, text = batch.winner[index], batch.loser[index], batch.text[index]
        inputs = torch.cat([model.add_noise(winner, noise, times), model.add_noise(loser, noise, times)])
        both_times, both_texts = times.repeat(2), TextEmbedding.cat([text, text])

        def predict(network: Network) -> tuple[Tensor, ...]:
            return model.predict(network, inputs, both_times, both_texts, self._guidance).chunk(2)

        reference_winner, reference_loser = predict(reference)
        policy_winner, policy_loser = predict(model.network)
        return paired_dpo_loss(
            policy_winner,
            policy_loser,
            reference_winner,
            reference_loser,
            winner,
            loser,
            beta=self._beta(times),
            target_noise=noise,
            target_scales=model.target_scales(times),
            winner_anchor=self._config.winner_anchor,
            loser_scaling=self._config.loser_scaling,
        )

    def _beta(self, times: Tensor) -> float | Tensor:
        if self._config.weighting == "prediction":
            return self._config.beta
        return self._config.beta * error_weight(self._config.weighting, *self._model.noising_scales(times))
