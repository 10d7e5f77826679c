"""The sampler of candidates: sample N videos for every prompt, decode them and score them, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vpo_engine.config import RolloutConfig
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.batches import Batch, Batches, as_slice
from vpo_engine.protocols import Network, SamplerSettings, SamplerState, TextEmbedding
from vpo_engine.seeding import normal
from vpo_engine.values import Candidate, Prompt, stacked_embeddings
from vpo_engine.video_model import VideoModel

Scores = dict[str, Tensor]
"""Scores by dimension: {dimension: float32 [...]}."""
Decode = Callable[[Tensor], Tensor]
"""A function that turns latents [B, C, T, H, W] into videos, uint8 [B, F, Hpx, Wpx, 3]."""
Score = Callable[[Tensor, Sequence[str]], Scores]
"""A function of videos and their B prompts that returns their scores [B]."""
Sampled = Callable[[Batch, Tensor], None]
"""A function that is given each batch as soon as it is sampled, with the latents to be scored, [B, C, T, H, W]."""
Extremes = Callable[[Scores, int], Tensor]
"""A function of scores [P, N] and ``keep`` that returns the numbers [P, keep], ascending, of the best and the worst."""


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
        prepare: Callable[[], object],
        start: Callable[[Tensor], SamplerState],
        denoise: Callable[[Pass, SamplerState, TextEmbedding, Sampled | None], SamplerState],
        overlapped: Callable[[Sequence[str]], OverlappedScores | None],
        score: Callable[[Tensor, Sequence[str], OverlappedScores | None], Scores],
        extremes: Extremes,
        team: Processes,
        preview_latents: int | None = None,
        share: Callable[[Processes], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """``networks``: the networks that predict in the first pass, and in the second if there is one.

        ``prepare``: is called before every rollout. ``start``: the model's method. ``denoise``: a ``Denoiser``.
        ``overlapped`` and ``score``: of a ``VideoScorer``. All may be wrapped, to be timed for example.
        ``extremes``: the selector's method.
        ``team``: the processes that share the candidates of every prompt; each of its ``sharers`` samples and scores
        an equal part.
        ``preview_latents``: the number of latent frames of a preview that are scored, the first ones; None: all.
        ``share``: surrounds what each process of the team does for itself.
        """
        self._share = share
        self._config, self._seed, self._shape = config, seed, tuple(latent_shape)
        self._prepare, self._start, self._denoise = prepare, start, denoise
        self._overlapped, self._score = overlapped, score
        self._extremes, self._team = extremes, team
        first, split = config.first_pass, team.couple
        cheap = SamplerSettings(
            first.steps or config.steps,
            config.guidance,
            first.guidance_interval,
            first.cache,
            config.compile,
            split,
        )
        exact = SamplerSettings(
            config.steps, config.guidance, config.guidance_interval, config.cache, config.compile, split
        )
        if config.explore is not None:
            self._first, self._second = Pass(networks[0], cheap), Pass(networks[1], exact)
        else:
            self._first = Pass(
                networks[0], cheap, config.prune_step, config.prune is not None, preview_latents
            )
            self._second = Pass(networks[1], exact)

    def sample(self, prompts: Sequence[Prompt], attempt: int = 0) -> list[list[Candidate]]:
        """Return the scored candidates of each prompt, all that the team made, in the order of their numbers.

        ``attempt``: they are candidates attempt * N to (attempt + 1) * N - 1 of their prompts.
        """
        count, keep = self._config.candidates, self._config.keep
        numbers = torch.arange(attempt * count, (attempt + 1) * count).repeat(len(prompts), 1)
        if attempt == 0:
            self._prepare()
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
        noise = [self._noise(prompt, attempt) for prompt in prompts]
        return self._start(torch.cat(noise)).map(lambda tensor: tensor.unflatten(0, (len(prompts), -1)))

    def _noise(self, prompt: Prompt, attempt: int) -> Tensor:
        """Return the noise of a prompt's candidates, float32 [N, C, T, H, W]."""
        shape, which = (self._config.candidates, *self._shape), [attempt] if attempt else []
        return normal(shape, self._seed, "rollout", prompt.position, *which)

    def sampled_from(self, candidate: Candidate) -> Tensor:
        """Return the noise that a candidate was sampled from, float32 [C, T, H, W], on the host."""
        attempt, place = divmod(candidate.number, self._config.candidates)
        return self._noise(candidate.prompt, attempt)[place]

    def _shared(
        self, run: Pass, state: SamplerState, prompts: Sequence[Prompt]
    ) -> tuple[SamplerState, Scores]:
        """Let each process of the team run an equal part of the candidates [P, N, ...]; return what all have made."""
        sharers = self._team.sharers
        mine = as_slice(sharers.rank_range(state.latents.shape[1]))
        with self._share(self._team):
            made, scores = self._run(run, state.map(lambda tensor: tensor[:, mine]), prompts)
        return made.map(lambda tensor: sharers.gather(tensor, 1)), {
            name: sharers.gather(value, 1) for name, value in scores.items()
        }

    def _run(self, run: Pass, state: SamplerState, prompts: Sequence[Prompt]) -> tuple[SamplerState, Scores]:
        """Return what a pass reaches from ``state``, [P, N, ...], and the scores [P, N]."""
        texts = [prompt.text for prompt in prompts]
        begun = self._overlapped(texts)
        made = self._denoise(run, state, stacked_embeddings(prompts), None if begun is None else begun.add)
        return made, self._score(run.scored(made), texts, begun)


class Pass(NamedTuple):
    """A part of the sampling loop, or the whole of it.

    network: what predicts. stop: after how many of the settings' steps the pass ends; None: after all. previews:
    whether the clean latents that the last prediction points to are scored, and not the latents that are reached.
    length: how many latent frames of what is scored reach the decoder, the first ones; None: all.
    """

    network: Network
    settings: SamplerSettings
    stop: int | None = None
    previews: bool = False
    length: int | None = None

    def scored(self, made: SamplerState) -> Tensor:
        """Return the latents to be scored, [..., T, H, W], of what this pass has made."""
        return (made.preview if self.previews else made.latents)[..., : self.length, :, :]


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
                sampled(batch, run.scored(made))
            return made

        size = state.latents.shape[:2]
        made = SamplerState.cat(list(self._batches.run(denoise, *size)))
        return made.map(lambda tensor: tensor.unflatten(0, size))


class OverlappedScores:
    """Scores of batches that are computed while later batches are still sampled.

    An error of the decoder or the reward model is raised when the next batch comes, at the latest when the scores are
    asked for.
    """

    def __init__(self, scorer: VideoScorer, texts: Sequence[str]) -> None:
        self._scorer, self._texts = scorer, texts
        self._waiting: list[Future[Scores]] = []
        self.candidates = 0

    def add(self, batch: Batch, latents: Tensor) -> None:
        """Begin to score a batch's latents [B, C, T, H, W]; batches come in order."""
        for future in self._waiting:
            if future.done():
                future.result()
        shaped = latents.unflatten(0, (len(batch.prompts), len(batch.candidates)))
        texts = self._texts[batch.prompts.start : batch.prompts.stop]
        self._waiting.append(self._scorer.submit(shaped, texts))
        self.candidates += len(batch)

    def results(self) -> list[Scores]:
        """Wait for the scores, and return those of each batch in order."""
        return [future.result() for future in self._waiting]


class VideoScorer:
    """The decoder and the reward model, one after the other on batches of candidates.

    overlap: score the batches that are sampled while others are not yet. On a GPU this happens in a thread and a
    stream of their own, on a CPU, whose cores the sampling takes, between two batches. The scores are the same.
    take_turns: the decoder and the reward model are not on the device at the same time, so all videos are decoded,
    and wait on the host, before the first is scored.
    """

    def __init__(
        self,
        decode: Decode,
        score: Score,
        dimensions: Sequence[str],
        batches: Batches,
        *,
        overlap: bool = False,
        take_turns: bool = False,
        threaded: bool | None = None,
    ) -> None:
        """``threaded``: whether ``overlap`` uses a thread; None uses one on GPUs only."""
        assert not (overlap and take_turns)
        self._decode, self._score, self._dimensions, self._batches = decode, score, dimensions, batches
        self._overlap, self._take_turns, self._threaded = overlap, take_turns, threaded
        self._stream: torch.cuda.Stream | None = None
        self._thread: ThreadPoolExecutor | None = None

    def overlapped(self, texts: Sequence[str]) -> OverlappedScores | None:
        """Return what takes the batches of these P prompts while they are sampled; None without overlap."""
        return OverlappedScores(self, texts) if self._overlap else None

    @torch.no_grad()
    def __call__(
        self, candidates: Tensor, texts: Sequence[str], begun: OverlappedScores | None = None
    ) -> Scores:
        """Return the scores {dimension: float32 [P, N]} of clean latents [P, N, C, T, H, W] of P prompts.

        ``begun``: has been given all of these candidates already.
        """
        if begun is None:
            parts = self._scores(candidates, texts)
        else:
            assert begun.candidates == candidates.shape[:2].numel()
            parts = begun.results()
        return {
            name: torch.cat([part[name] for part in parts]).unflatten(0, candidates.shape[:2])
            for name in self._dimensions
        }

    def submit(self, candidates: Tensor, texts: Sequence[str]) -> Future[Scores]:
        """Begin to score candidates that the current stream makes; the scores are flat, [P * N]."""
        made = None
        if candidates.is_cuda:
            self._stream = self._stream or torch.cuda.Stream(candidates.device)
            made = torch.cuda.current_stream(candidates.device).record_event()
        if candidates.is_cuda if self._threaded is None else self._threaded:
            self._thread = self._thread or _scoring_thread(candidates)
            return self._thread.submit(self._score_in_stream, candidates, texts, made)
        future: Future[Scores] = Future()
        future.set_result(self._score_in_stream(candidates, texts, made))
        return future

    @torch.no_grad()
    def _score_in_stream(
        self, candidates: Tensor, texts: Sequence[str], made: torch.cuda.Event | None
    ) -> Scores:
        """Score in the scorer's own stream, and wait for it, so that ``candidates`` is held until it is done."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and made is not None:
                self._stream.wait_event(made)
            parts = self._scores(candidates, texts)
            if self._stream is not None:
                self._stream.synchronize()
        return {name: torch.cat([part[name] for part in parts]) for name in self._dimensions}

    def _scores(self, candidates: Tensor, texts: Sequence[str]) -> list[Scores]:
        captions = [text for text in texts for _ in range(candidates.shape[1])]
        videos = self._videos(candidates)
        if self._take_turns:
            videos = iter([video.cpu() for video in videos])
        parts: list[Scores] = []
        first = 0
        for chunk in videos:
            parts.append(self._score(chunk, captions[first : first + len(chunk)]))
            first += len(chunk)
            del chunk
        return parts

    def _videos(self, candidates: Tensor) -> Iterator[Tensor]:
        """Yield the videos of candidates [P, N, ...], batch by batch in order."""
        return self._batches.run(
            lambda batch: self._decode(candidates[batch.index].flatten(0, 1)), *candidates.shape[:2]
        )


def _scoring_thread(candidates: Tensor) -> ThreadPoolExecutor:
    """Return a thread that works on the GPU of the candidates, if they are on one.

    A new thread is on the first GPU, and would come back to it after every batch: each process would then take memory
    of that GPU for a context.
    """
    begin = partial(torch.cuda.set_device, candidates.device) if candidates.is_cuda else None
    return ThreadPoolExecutor(1, thread_name_prefix="scoring", initializer=begin)


def _by_candidate(scores: Scores) -> list[list[dict[str, float]]]:
    """Return scores {dimension: [P, N]} as a dictionary for each candidate of each prompt."""
    names = list(scores)
    values = torch.stack([scores[name].float() for name in names], dim=-1).tolist()
    return [[dict(zip(names, candidate, strict=True)) for candidate in prompt] for prompt in values]
