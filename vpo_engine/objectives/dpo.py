"""Diffusion-DPO on latents: how a policy learns from winner and loser (paper, section 3; Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vpo_kernels import PairedDPOLoss, error_weight, paired_dpo_loss, sequential_backward

from vpo_engine.config import ObjectiveConfig
from vpo_engine.protocols import Network, ReferenceStore, TextEmbedding
from vpo_engine.seeding import generator, normal
from vpo_engine.values import Candidate, Pair
from vpo_engine.video_model import VideoModel


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch that goes through the networks at once: B pairs, each with a timestep and noise.

    winner, loser: clean latents [B, C, T, H, W]. text: the embeddings of the pairs' prompts. times: [B]. noise:
    [B, C, T, H, W], of winner and loser alike; loser_noise: of the losers where they have their own. weight: float32
    [B], the weights of the pairs' losses; None: 1.
    """

    winner: Tensor
    loser: Tensor
    text: TextEmbedding
    times: Tensor
    noise: Tensor
    weight: Tensor | None
    loser_noise: Tensor | None = None


class DPO:
    """The paired loss against the reference, at ``draws`` timesteps per pair with a sigmoid each.

    Winner and loser of a pair share timestep and noise, unless objective.noise=trajectory gives each the noise that its
    video was sampled from. Policy and reference see the same micro-batches in the same
    order in the same autocast state; neither is in a state with dropout.

    sequential: winner and loser go through the networks one after the other, so that one member's graph exists at
    a time; the policy's forward pass of the winner is made twice. Same gradient and metrics but for rounding.
    backward: is called with every loss, a scalar, in place of its backward pass.
    sampled_from: returns the noise [C, T, H, W] that a candidate was sampled from, for objective.noise=trajectory.
    """

    METRICS = (
        "loss",
        "margin",
        "implicit_accuracy",
        "winner_error_change",
        "loser_error_change",
        "reference_winner_error",
        "reference_loser_error",
        "sigmoid_saturation",
        "winner_error_change_squared",
    )

    def __init__(
        self,
        model: VideoModel,
        config: ObjectiveConfig,
        guidance: float,
        seed: int,
        sequential: bool = False,
        before_micro_batch: Callable[[], None] = lambda: None,
        backward: Callable[[Tensor], None] = Tensor.backward,
        sampled_from: Callable[[Candidate], Tensor] | None = None,
    ) -> None:
        assert config.noise == "fresh" or sampled_from is not None
        self._sampled_from = sampled_from if config.noise == "trajectory" else None
        self._model = model
        self._config = config
        self._guidance = guidance if config.branch == "guided" else 1.0
        self._seed = seed
        self._backward = self._one_by_one if sequential else self._jointly
        self._before_micro_batch = before_micro_batch
        self._add_gradient = backward

    def backward(
        self,
        pairs: Sequence[Pair],
        reference: ReferenceStore,
        *,
        update: int = 0,
        samples: range | None = None,
        total: int | None = None,
        processes: int = 1,
    ) -> dict[str, float]:
        """Add the gradient of the loss to the policy's parameters, and return the sums of its metrics.

        A sample is a pair at one of its timesteps, each with noise of its own; the samples of a pair follow one
        another. The gradient is that of ``processes`` times the sum over samples divided by ``total``, so that its mean
        over processes is the gradient of the mean over all pairs, however their samples are spread.

        update: how many optimizer steps were made on these pairs before; each has timesteps and noise of its own.
        samples: those of the P * draws samples to learn from in this process; None: all of them. total: the samples of
        the whole step, on all processes; None: as many as ``pairs`` have. Keys of the result: METRICS and "samples".
        """
        draws = self._config.timesteps_per_pair
        mine = range(len(pairs) * draws) if samples is None else samples
        times = self.timesteps(pairs, update, mine)
        size = self._config.micro_batch_size or len(mine)
        sums = dict.fromkeys((*self.METRICS, "samples"), 0.0)
        for start in range(0, len(mine), size):
            self._before_micro_batch()
            chosen = mine[start : start + size]
            batch = self.micro_batch(pairs, update, chosen, times[start : start + size])
            scale = len(chosen) * processes / (total or len(pairs) * draws)
            result = self._backward(batch, reference, scale)
            for name, value in _sums(result, len(chosen)).items():
                sums[name] += value
            sums["samples"] += len(chosen)
        return sums

    @staticmethod
    def means(sums: Sequence[float], samples: float, pairs: int) -> dict[str, float]:
        """Return the metrics of a step from the sums of METRICS over all of its samples, which come from ``pairs``.

        watch/se/winner_error_change is the standard error of the mean; the samples of a pair count as one, which
        errs on the side of a larger error.
        """
        means = {name: value / samples for name, value in zip(DPO.METRICS, sums, strict=True)}
        variance = means.pop("winner_error_change_squared") - means["winner_error_change"] ** 2
        return means | {"watch/se/winner_error_change": math.sqrt(max(variance, 0.0) / pairs)}

    def timesteps(self, pairs: Sequence[Pair], update: int, samples: range) -> Tensor:
        """Return the times of these samples, float32 [len(samples)] on the host.

        The timesteps of one pair are stratified: each falls in another of ``draws`` equal parts of (0, 1), which
        leaves their distribution as it is and lowers the variance of the mean.
        """
        draws = self._config.timesteps_per_pair
        uniform = []
        for number, part in _by_pair(samples, draws).items():
            random = generator(self._seed, "time", pairs[number].prompt.position, *_later(update))
            uniform.append(((torch.arange(draws) + torch.rand(draws, generator=random)) / draws)[part])
        return self._model.draw_timesteps(torch.cat(uniform).clamp(1e-6, 1 - 1e-6))

    def micro_batch(self, pairs: Sequence[Pair], update: int, samples: range, times: Tensor) -> MicroBatch:
        """Return these samples of the pairs at their ``times``, on the device of the latents."""
        draws = self._config.timesteps_per_pair
        chosen = [pairs[sample // draws] for sample in samples]
        noise, loser_noise = self._noise(pairs, update, samples, chosen)
        device = chosen[0].winner.latents.device
        weights = torch.tensor([pair.weight for pair in chosen])
        return MicroBatch(
            winner=torch.stack([pair.winner.latents for pair in chosen]),
            loser=torch.stack([pair.loser.latents for pair in chosen]),
            text=TextEmbedding.cat([pair.prompt.embedding for pair in chosen]),
            times=times.to(device),
            noise=noise.to(device),
            weight=None if bool((weights == 1).all()) else weights.to(device),
            loser_noise=None if loser_noise is None else loser_noise.to(device),
        )

    def _noise(
        self, pairs: Sequence[Pair], update: int, samples: range, chosen: Sequence[Pair]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the noise of these samples, and that of their losers if it is another. ``chosen``: their pairs."""
        own = self._sampled_from
        if own is not None:
            return torch.stack([own(pair.winner) for pair in chosen]), torch.stack(
                [own(pair.loser) for pair in chosen]
            )
        draws, shape = self._config.timesteps_per_pair, self._model.latent_shape
        drawn = [
            normal((draws, *shape), self._seed, "noise", pairs[number].prompt.position, *_later(update))[part]
            for number, part in _by_pair(samples, draws).items()
        ]
        return torch.cat(drawn), None

    def _jointly(self, batch: MicroBatch, reference: ReferenceStore, scale: float) -> PairedDPOLoss:
        """Add ``scale`` times the loss's gradient, winners and losers in one batch."""
        inputs = torch.cat(self._noised(batch))
        times, text = batch.times.repeat(2), TextEmbedding.cat([batch.text, batch.text])

        def predict(network: Network) -> tuple[Tensor, ...]:
            return self._model.predict(network, inputs, times, text, self._guidance).chunk(2)

        reference_winner, reference_loser = predict(reference)
        winner, loser = predict(self._model.network)
        out = paired_dpo_loss(
            winner, loser, reference_winner, reference_loser, **self._targets(batch), **self._options(batch)
        )
        self._add_gradient(out.loss * scale)
        return PairedDPOLoss(*(value.detach() for value in out))

    def _one_by_one(self, batch: MicroBatch, reference: ReferenceStore, scale: float) -> PairedDPOLoss:
        """Do what ``_jointly`` does, with one member of the pairs at a time."""

        def predict(network: Network, inputs: Tensor) -> Tensor:
            return self._model.predict(network, inputs, batch.times, batch.text, self._guidance)

        winner, loser = self._noised(batch)
        return sequential_backward(
            partial(predict, self._model.network, winner),
            partial(predict, self._model.network, loser),
            predict(reference, winner),
            predict(reference, loser),
            scale=scale,
            backward=self._add_gradient,
            **self._targets(batch),
            **self._options(batch),
        )

    def _noised(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return the noised latents of winners and losers."""
        loser_noise = batch.noise if batch.loser_noise is None else batch.loser_noise
        return (
            self._model.add_noise(batch.winner, batch.noise, batch.times),
            self._model.add_noise(batch.loser, loser_noise, batch.times),
        )

    def _targets(self, batch: MicroBatch) -> dict[str, Any]:
        """Return the targets of ``paired_dpo_loss``: clean latents and the noise that they share, or whole targets."""
        scales = self._model.target_scales(batch.times)
        if batch.loser_noise is None:
            return {
                "target_winner": batch.winner,
                "target_loser": batch.loser,
                "target_noise": batch.noise,
                "target_scales": scales,
            }
        members = {"winner": (batch.winner, batch.noise), "loser": (batch.loser, batch.loser_noise)}
        return {f"target_{name}": _combined(scales, *tensors) for name, tensors in members.items()}

    def _options(self, batch: MicroBatch) -> dict[str, Any]:
        """Return the options of ``paired_dpo_loss``."""
        return {
            "beta": self._beta(batch.times),
            "pair_weight": batch.weight,
            "winner_anchor": self._config.winner_anchor,
            "loser_scaling": self._config.loser_scaling,
        }

    def _beta(self, times: Tensor) -> float | Tensor:
        if self._config.weighting == "prediction":
            return self._config.beta
        return self._config.beta * error_weight(self._config.weighting, *self._model.noising_scales(times))


def _sums(result: PairedDPOLoss, samples: int) -> dict[str, float]:
    """Return the sums of METRICS over the samples of a micro-batch."""
    values = {
        "margin": result.margin,
        "implicit_accuracy": (result.margin > 0).to(result.margin.dtype),
        "winner_error_change": result.winner_error_change,
        "loser_error_change": result.loser_error_change,
        "reference_winner_error": result.reference_winner_error,
        "reference_loser_error": result.reference_loser_error,
        # |2 sigmoid(margin) - 1|: 0 at margin 0; 1 where the log-sigmoid is flat, or straight.
        "sigmoid_saturation": (result.margin / 2).tanh().abs(),
        "winner_error_change_squared": result.winner_error_change.square(),
    }
    # The numbers of a device are fetched together.
    sums = torch.stack([*values.values()]).double().sum(1).tolist()
    return {"loss": float(result.loss) * samples, **dict(zip(values, sums, strict=True))}


def _by_pair(samples: range, draws: int) -> dict[int, slice]:
    """Return which of each pair's samples are among ``samples``: {number of the pair: part of its ``draws``}."""
    numbers = range(samples.start // draws, -(-samples.stop // draws))
    return {
        number: slice(max(samples.start - number * draws, 0), min(samples.stop - number * draws, draws))
        for number in numbers
    }


def _combined(scales: Sequence[float | Tensor], latents: Tensor, noise: Tensor) -> Tensor:
    """Return scales[0] * latents + scales[1] * noise, in float32 or better; a scale is a number, or [B]."""
    dtype = torch.promote_types(latents.dtype, torch.float32)
    clean, noisy = (
        scale.to(dtype).view(-1, *[1] * (latents.dim() - 1)) if isinstance(scale, Tensor) else scale
        for scale in scales
    )
    return clean * latents.to(dtype) + noisy * noise.to(dtype)


def _later(update: int) -> tuple[int, ...]:
    """Return what is added to the key of random numbers, so that updates on the same pairs differ."""
    return (update,) if update else ()
