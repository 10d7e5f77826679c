"""The sampler of candidates: N videos for every prompt are sampled, decoded and scored (rollout and reward)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vpo_engine.config import RolloutConfig
from vpo_engine.distributed.processes import Processes
from vpo_engine.protocols import Network, SamplerSettings, SamplerState, TextEmbedding, VideoModel
from vpo_engine.rollout.batches import Batch, Batches, as_slice
from vpo_engine.rollout.scorer import OverlappedScores, Scores
from vpo_engine.seeding import normal
from vpo_engine.values import Candidate, Prompt, stacked_embeddings

Sampled = Callable[[Batch, Tensor], None]
"""Is given a batch as soon as it is sampled, with the latents to be scored, [B, C, T, H, W]."""
Extremes = Callable[[Scores, int], Tensor]
"""Scores [P, N] and how many to keep, to the numbers [P, keep], ascending, of the best and worst candidates."""


class Pass(NamedTuple):
    """A part of the sampling loop, or the whole of it.

    network: what predicts. stop: after how many of the settings' steps the pass ends; None: after all. previews:
    whether the clean latents that the last prediction points to are scored, and not the latents that are reached.
    """

    network: Network
    settings: SamplerSettings
    stop: int | None = None
    previews: bool = False


class Denoiser:
    """Run passes of the sampling loop over noise or latents of any number of candidates, in batches."""

    def __init__(self, model: VideoModel, batches: Batches, device: torch.device) -> None:
        self._model, self._batches, self._device = model, batches, device

    @torch.no_grad()
    def __call__(
        self, run: Pass, state: SamplerState, text: TextEmbedding, sampled: Sampled | None = None
    ) -> SamplerState:
        """Go on from ``state``, whose tensors are [P, N, ...], with the P prompts of ``text``.

        ``sampled``: is given each batch as soon as it is there.
        """

        def denoise(batch: Batch) -> SamplerState:
            begun = state.map(lambda tensor: tensor[batch.index].flatten(0, 1).to(self._device))
            made = self._model.denoise(run.network, begun, text[batch.index[0]], run.settings, run.stop)
            if sampled is not None:
                sampled(batch, made.preview if run.previews else made.latents)
            return made

        size = state.latents.shape[:2]
        made = SamplerState.cat(list(self._batches.run(denoise, *size)))
        return made.map(lambda tensor: tensor.unflatten(0, size))


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
        start: Callable[[Tensor], SamplerState],
        denoise: Callable[[Pass, SamplerState, TextEmbedding, Sampled | None], SamplerState],
        overlapped: Callable[[Sequence[str]], OverlappedScores | None],
        score: Callable[[Tensor, Sequence[str], OverlappedScores | None], Scores],
        extremes: Extremes,
        team: Processes,
    ) -> None:
        """``networks``: what predicts in the first pass, and in the second where there is one.

        ``start``: the model's. ``denoise``: a ``Denoiser``. ``overlapped`` and ``score``: of a ``VideoScorer``. All may
        be wrapped, to be timed for example. ``extremes``: the selector's. ``team``: the processes that share the
        candidates of every prompt; each samples and scores an equal part.
        """
        self._config, self._seed, self._shape = config, seed, tuple(latent_shape)
        self._start, self._denoise, self._overlapped, self._score = start, denoise, overlapped, score
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
            self._first = Pass(networks[0], cheap, config.prune_step, previews=config.prune is not None)
            self._second = Pass(networks[1], exact)

    def sample(self, prompts: Sequence[Prompt], attempt: int = 0) -> list[list[Candidate]]:
        """Return the scored candidates of each prompt, all that the team made, in the order of their numbers.

        ``attempt``: they are candidates attempt * N to (attempt + 1) * N - 1 of their prompts.
        """
        count, keep = self._config.candidates, self._config.keep
        numbers = torch.arange(attempt * count, (attempt + 1) * count).repeat(len(prompts), 1)
        begun = self._begun(prompts, attempt)
        made, scores = self._shared(self._first, begun, prompts)
        if keep is not None:
            kept = self._extremes(scores, keep).cpu()
            rows = torch.arange(len(prompts))[:, None]
            begun = (begun if self._config.explore is not None else made).map(
                lambda tensor: tensor[rows, kept]
            )
            made, scores = self._shared(self._second, begun, prompts)
            numbers = numbers.gather(1, kept)
        return [
            [
                Candidate(prompt, number, made.latents[row, place], scores_of[place])
                for place, number in enumerate(numbers[row].tolist())
            ]
            for row, (prompt, scores_of) in enumerate(zip(prompts, _by_candidate(scores), strict=True))
        ]

    def _begun(self, prompts: Sequence[Prompt], attempt: int) -> SamplerState:
        """Return all candidates before the first step, [P, N, ...], on the host."""
        shape, which = (self._config.candidates, *self._shape), [attempt] if attempt else []
        noise = [normal(shape, self._seed, "rollout", prompt.position, *which) for prompt in prompts]
        return self._start(torch.cat(noise)).map(lambda tensor: tensor.unflatten(0, (len(prompts), -1)))

    def _shared(
        self, run: Pass, state: SamplerState, prompts: Sequence[Prompt]
    ) -> tuple[SamplerState, Scores]:
        """Let each process of the team run an equal part of the candidates [P, N, ...]; return what all have made."""
        mine = as_slice(self._team.part(state.latents.shape[1]))
        made, scores = self._run(run, state.map(lambda tensor: tensor[:, mine]), prompts)
        return made.map(lambda tensor: self._team.gather(tensor, 1)), {
            name: self._team.gather(value, 1) for name, value in scores.items()
        }

    def _run(self, run: Pass, state: SamplerState, prompts: Sequence[Prompt]) -> tuple[SamplerState, Scores]:
        """Return what a pass reaches from ``state``, [P, N, ...], and the scores [P, N]."""
        texts = [prompt.text for prompt in prompts]
        begun = self._overlapped(texts)
        made = self._denoise(run, state, stacked_embeddings(prompts), None if begun is None else begun.add)
        return made, self._score(made.preview if run.previews else made.latents, texts, begun)


def _by_candidate(scores: Scores) -> list[list[dict[str, float]]]:
    """Return scores {dimension: [P, N]} as a dictionary for each candidate of each prompt."""
    names = list(scores)
    values = torch.stack([scores[name].float() for name in names], dim=-1).tolist()
    return [[dict(zip(names, candidate, strict=True)) for candidate in prompt] for prompt in values]
