"""The sampler of candidates: N videos for every prompt are sampled, decoded and scored (rollout and reward)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vpo_engine.config import RolloutConfig
from vpo_engine.distributed.processes import Processes
from vpo_engine.protocols import Denoised, Network, SamplerSettings, TextEmbedding, VideoModel
from vpo_engine.rollout.batches import Batch, Batches, as_slice
from vpo_engine.rollout.scorer import OverlappedScores, Scores
from vpo_engine.seeding import normal
from vpo_engine.values import Candidate, Prompt, stacked_embeddings

Sampled = Callable[[Batch, Tensor], None]
"""Is given a batch as soon as it is sampled, with the latents to be scored, [B, C, T, H, W]."""
Extremes = Callable[[Scores, int], Tensor]
"""Scores [P, N] and how many to keep, to the numbers [P, keep], ascending, of the best and worst candidates."""


class Pass(NamedTuple):
    """A run of all or some steps of the sampling loop.

    network: what predicts. steps: which of the settings' steps. previews: whether the clean latents that the last
    prediction points to are scored, and not the latents that are reached.
    """

    network: Network
    settings: SamplerSettings
    steps: slice = slice(None)
    previews: bool = False


class Denoiser:
    """Run passes of the sampling loop over noise or latents of any number of candidates, in batches."""

    def __init__(self, model: VideoModel, batches: Batches, device: torch.device) -> None:
        self._model, self._batches, self._device = model, batches, device

    @torch.no_grad()
    def __call__(
        self,
        run: Pass,
        latents: Tensor,
        text: TextEmbedding,
        sampled: Sampled | None = None,
    ) -> Denoised:
        """Advance latents [P, N, C, T, H, W] of the P prompts of ``text``; both results have that shape."""

        def denoise(batch: Batch) -> Denoised:
            rows = latents[batch.index].flatten(0, 1).to(self._device)
            made = self._model.denoise(run.network, rows, text[batch.index[0]], run.settings, run.steps)
            if sampled is not None:
                sampled(batch, made.preview if run.previews else made.latents)
            return made

        parts = list(self._batches.run(denoise, *latents.shape[:2]))
        return Denoised(
            torch.cat([part.latents for part in parts]).view(latents.shape),
            torch.cat([part.preview for part in parts]).view(latents.shape),
        )


class CandidateSampler:
    """Sample, decode and score the candidates of a step's prompts.

    The noise of a candidate is a function of the seed, its prompt's position in the stream and its number. With
    rollout.prune all candidates go part of the way, their previews are scored, and only the extremes are finished. With
    rollout.explore all candidates are sampled cheaply, and the extremes are sampled again from the same noise.
    """

    def __init__(
        self,
        config: RolloutConfig,
        seed: int,
        latent_shape: Sequence[int],
        networks: tuple[Network, Network],
        denoise: Callable[[Pass, Tensor, TextEmbedding, Sampled | None], Denoised],
        overlapped: Callable[[Sequence[str]], OverlappedScores | None],
        score: Callable[[Tensor, Sequence[str], OverlappedScores | None], Scores],
        extremes: Extremes,
        team: Processes,
    ) -> None:
        """``networks``: what predicts in the first pass, and in the second where there is one.

        ``denoise``: a ``Denoiser``. ``overlapped`` and ``score``: of a ``VideoScorer``. All may be wrapped, to be timed
        for example. ``team``: the processes that share the candidates of every prompt; each samples and scores an
        equal part.
        """
        self._config, self._seed, self._shape = config, seed, tuple(latent_shape)
        self._denoise, self._overlapped, self._score = denoise, overlapped, score
        self._extremes, self._team = extremes, team
        first = config.first_pass
        cheap = SamplerSettings(
            first.steps or config.steps,
            config.guidance,
            first.guidance_interval,
            first.cache,
            compile=config.compile,
        )
        exact = SamplerSettings(
            config.steps, config.guidance, config.guidance_interval, config.cache, compile=config.compile
        )
        if config.explore is not None:
            self._first, self._second = Pass(networks[0], cheap), Pass(networks[1], exact)
        else:
            cut, pruned = config.prune_step, config.prune is not None
            self._first = Pass(networks[0], cheap, slice(0, cut), previews=pruned)
            self._second = Pass(networks[1], exact, slice(cut, None))

    def sample(self, prompts: Sequence[Prompt], attempt: int = 0) -> list[list[Candidate]]:
        """Return the scored candidates of each prompt, all that the team made, in the order of their numbers.

        ``attempt``: they are candidates attempt * N to (attempt + 1) * N - 1 of their prompts.
        """
        count, keep = self._config.candidates, self._config.keep
        numbers = torch.arange(attempt * count, (attempt + 1) * count).repeat(len(prompts), 1)
        noise = self._noise(prompts, attempt)
        latents, scores = self._shared(self._first, noise, prompts)
        if keep is not None:
            kept = self._extremes(scores, keep).cpu()
            rows = torch.arange(len(prompts))[:, None]
            begun = noise if self._config.explore is not None else latents
            latents, scores = self._shared(self._second, begun[rows, kept], prompts)
            numbers = numbers.gather(1, kept)
        return [
            [
                Candidate(prompt, number, latents[row, place], scores_of[place])
                for place, number in enumerate(numbers[row].tolist())
            ]
            for row, (prompt, scores_of) in enumerate(zip(prompts, _by_candidate(scores), strict=True))
        ]

    def _noise(self, prompts: Sequence[Prompt], attempt: int) -> Tensor:
        """Return the noise of all candidates, [P, N, C, T, H, W], on the host."""
        shape, which = (self._config.candidates, *self._shape), [attempt] if attempt else []
        return torch.stack(
            [normal(shape, self._seed, "rollout", prompt.position, *which) for prompt in prompts]
        )

    def _shared(self, run: Pass, latents: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, Scores]:
        """Let each process of the team run an equal part of the candidates [P, N, ...]; return what all have made."""
        mine = as_slice(self._team.part(latents.shape[1]))
        made, scores = self._run(run, latents[:, mine], prompts)
        return self._team.gather(made, 1), {
            name: self._team.gather(value, 1) for name, value in scores.items()
        }

    def _run(self, run: Pass, latents: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, Scores]:
        """Return the latents that a pass reaches from ``latents`` [P, N, ...], and their scores [P, N]."""
        texts = [prompt.text for prompt in prompts]
        begun = self._overlapped(texts)
        made = self._denoise(run, latents, stacked_embeddings(prompts), None if begun is None else begun.add)
        return made.latents, self._score(made.preview if run.previews else made.latents, texts, begun)


def _by_candidate(scores: Scores) -> list[list[dict[str, float]]]:
    """Return scores {dimension: [P, N]} as a dictionary for each candidate of each prompt."""
    names = list(scores)
    values = torch.stack([scores[name].float() for name in names], dim=-1).tolist()
    return [[dict(zip(names, candidate, strict=True)) for candidate in prompt] for prompt in values]
