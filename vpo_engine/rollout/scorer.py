"""Decode candidates and score their videos, batch by batch; a video is dropped as soon as it has its scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor

from vpo_engine.rollout.batches import Batch, Batches

Scores = dict[str, Tensor]
"""{dimension: float32 [...]}."""
Decode = Callable[[Tensor], Tensor]
"""Latents [B, C, T, H, W] to videos, uint8 [B, F, Hpx, Wpx, 3]."""
Score = Callable[[Tensor, Sequence[str]], Scores]
"""Videos and their B prompts to scores [B]."""


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
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="scoring")
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
