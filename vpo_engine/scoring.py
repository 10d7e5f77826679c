"""From latents of candidates to scores: videos are decoded, scored and dropped, group by group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from vpo_engine.memory.residency import Residency
from vpo_engine.metrics.stages import Stages
from vpo_engine.protocols import Reward, VideoModel
from vpo_engine.rollout.rows import Group, Rows

Scores = dict[str, Tensor]


class Ahead:
    """Scores of groups of candidates that come one after the other, while later ones are sampled.

    To be given to ``Rollout.begin`` or ``finish``. What decoder or reward model raise is raised when the next group
    comes, at the latest when the scores are asked for.
    """

    def __init__(self, scoring: Scoring, prompts: Sequence[str]) -> None:
        self._scoring, self._prompts = scoring, prompts
        self._waiting: list[Future[Scores]] = []
        self.candidates = 0

    def __call__(self, group: Group, latents: Tensor) -> None:
        """A group's latents [P * N, C, T, H, W]; groups come in order."""
        for future in self._waiting:
            if future.done():
                future.result()
        shaped = latents.unflatten(0, (len(group.prompts), len(group.candidates)))
        prompts = self._prompts[group.prompts.start : group.prompts.stop]
        self._waiting.append(self._scoring.submit(shaped, prompts))
        self.candidates += len(group)

    def results(self) -> list[Scores]:
        """Of each group in its order; waits for them."""
        return [future.result() for future in self._waiting]


class Scoring:
    """Decoder and reward model, one after the other on groups of candidates, those that rollouts are sampled in.

    rows: the limit of videos that are decoded at once. residency: which of the two is on the device when; where they
    take turns, all videos wait on the host, as bytes, for one turn. overlap: begin with the groups that are sampled
    while others are not: on a GPU in a thread and a stream of their own, on a CPU, whose cores the sampling takes,
    between two groups. The scores are the same. threaded: None is on GPUs only.
    """

    def __init__(
        self,
        model: VideoModel,
        reward: Reward,
        rows: Rows,
        residency: Residency,
        overlap: bool = False,
        threaded: bool | None = None,
    ) -> None:
        self.model, self.reward, self.rows, self.residency = model, reward, rows, residency
        self._overlap, self._threaded = overlap, threaded
        assert not (overlap and residency.active)
        self._stream: torch.cuda.Stream | None = None
        self._thread: ThreadPoolExecutor | None = None

    def ahead(self, prompts: Sequence[str]) -> Ahead | None:
        """For the candidates of these prompts; None without overlap."""
        return Ahead(self, prompts) if self._overlap else None

    @torch.no_grad()
    def score(
        self, candidates: Tensor, prompts: Sequence[str], stages: Stages, ahead: Ahead | None = None
    ) -> Scores:
        """{dimension: float32 [P, N]} of clean latents [P, N, C, T, H, W]; prompts: P strings.

        ahead: has been given all of these candidates.
        """
        if ahead is None:
            parts = self._score(candidates, prompts, stages)
        else:
            assert ahead.candidates == candidates.shape[:2].numel()
            with stages("reward"):
                parts = ahead.results()
        return {
            name: torch.cat([part[name] for part in parts]).unflatten(0, candidates.shape[:2])
            for name in self.reward.dimensions
        }

    def submit(self, candidates: Tensor, prompts: Sequence[str]) -> Future[Scores]:
        """``score`` of candidates that the current stream makes, flat, [P * N]; perhaps later."""
        made = None
        if candidates.is_cuda:
            self._stream = self._stream or torch.cuda.Stream(candidates.device)
            made = torch.cuda.current_stream(candidates.device).record_event()
        if candidates.is_cuda if self._threaded is None else self._threaded:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="scoring")
            return self._thread.submit(self._apart, candidates, prompts, made)
        future: Future[Scores] = Future()
        future.set_result(self._apart(candidates, prompts, made))
        return future

    @torch.no_grad()
    def _apart(self, candidates: Tensor, prompts: Sequence[str], made: torch.cuda.Event | None) -> Scores:
        """In the thread, which waits here until its stream is done: ``candidates`` is held until then."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and made is not None:
                self._stream.wait_event(made)
            parts = self._score(candidates, prompts, None)
            if self._stream is not None:
                self._stream.synchronize()
        return {name: torch.cat([part[name] for part in parts]) for name in self.reward.dimensions}

    def _score(self, candidates: Tensor, prompts: Sequence[str], stages: Stages | None) -> list[Scores]:
        captions = [prompt for prompt in prompts for _ in range(candidates.shape[1])]
        videos = self._videos(candidates, stages)
        if self.residency.active:
            videos = iter([video.cpu() for video in videos])
        parts: list[Scores] = []
        first = 0
        for chunk in videos:
            with _stage(stages, "reward"), self.residency.phase("reward"):
                parts.append(self.reward.score(chunk, captions[first : first + len(chunk)]))
            first += len(chunk)
            del chunk
        return parts

    def _videos(self, candidates: Tensor, stages: Stages | None) -> Iterator[Tensor]:
        """Videos of candidates [P, N, ...], group by group in their order."""

        def decode(group: Group) -> Tensor:
            chosen = candidates[
                group.prompts.start : group.prompts.stop, group.candidates.start : group.candidates.stop
            ]
            with _stage(stages, "decode"):
                return self.model.decode(chosen.flatten(0, 1))

        return self.rows.run(decode, *candidates.shape[:2])


def _stage(stages: Stages | None, name: str) -> AbstractContextManager[None]:
    """None: nobody measures apart from what goes on meanwhile."""
    return nullcontext() if stages is None else stages(name)
