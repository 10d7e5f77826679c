"""Held-out evaluation with prompts that are never trained on, fixed noise, and measures that never select pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.stopping import StopPoints
from vpo_engine.memory.batches import Batches, as_slice
from vpo_engine.memory.idle_offload import IdleOffload
from vpo_engine.metrics.appearance import appearance
from vpo_engine.metrics.throughput import CountedRows
from vpo_engine.protocols import Network, Reward
from vpo_engine.rewards.combine import Dimensions, combine
from vpo_engine.rewards.guards import Shuffled, check_deterministic, prompt_shuffle
from vpo_engine.seeding import normal
from vpo_engine.values import check_latents
from vpo_engine.video_model import VideoModel

_KEPT = 4
"""Videos of an evaluation that are kept for the log."""
Result = TypeVar("Result")
PixelMeasures = Callable[[Tensor, Sequence[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class HeldOutScorers:
    """The scorers of held-out clips. The policy is trained on ``reward``, and never on the others.

    judged: the dimensions of the judge whose average is ``judge/selected``; None: those that are trained on.
    """

    reward: Reward
    pixels: PixelMeasures
    judge: Reward | None = None
    judged: Sequence[str] | None = None


class HeldOut:
    """Samples the held-out prompts with the run's sampling settings, always from the same noise.

    Clip number ``s * len(prompts) + p`` is sample s of prompt p, and its noise is a function of the seed and that
    number. So evaluations can be compared clip by clip, and one with fewer samples has the first clips of the others.
    """

    def __init__(
        self,
        config: Config,
        model: VideoModel,
        prompts: Sequence[str],
        scorers: HeldOutScorers,
        processes: Processes,
        idle_offload: IdleOffload | None = None,
    ) -> None:
        self._config, self._model, self._scorers = config, model, scorers
        self._processes = processes
        self._idle_offload = idle_offload or IdleOffload.disabled()
        self.prompts = list(prompts)
        self.kept: list[Tensor] = []
        """The first videos of the last evaluation on this process, at most four, uint8 [F, H, W, 3]."""
        self.stopping = StopPoints(processes)
        self.whole_policy: Callable[[], AbstractContextManager[None]] = nullcontext
        size = config.rollout.batch_limit or self._videos_of_a_step()
        setting = "rollout.batch_size" if config.card.candidates else "objective.micro_batch_size"
        settable = config.card.candidates or not config.memory.step_in_backward
        self._batches = Batches(
            size, halved=processes.sequence.count == 1, setting=setting if settable else None
        )

    def videos(self, network: Network, clips: Sequence[int]) -> Tensor:
        """Sample the given clips: uint8 [len(clips), F, H, W, 3]."""
        with self.stopping.stoppable(), self.whole_policy():
            return torch.cat(self._in_batches(lambda chunk: self._sample(network, chunk), clips))

    def evaluate(self, network: Network, samples_per_prompt: int) -> dict[str, Tensor]:
        """Sample and measure all clips: {measure: float32 [prompts * samples_per_prompt]}, the same on every process.

        Measures are named ``reward/<dimension>``, ``reward/selected``, ``judge/...``, ``pixels/...`` and, those of
        ``appearance``, ``style/...``.
        """
        total = len(self.prompts) * samples_per_prompt
        units = self._processes.units
        each = -(-total // units.count)
        first = units.rank * each
        # The last processes may get clip numbers beyond the end: they repeat the last clip, which is cut off below.
        mine = [min(clip, total - 1) for clip in range(first, first + each)]
        self.kept = []
        with self.stopping.stoppable(), self.whole_policy():
            parts = self._in_batches(lambda chunk: self._measure_sampled(network, chunk), mine)
        names = list(parts[0])
        rows = torch.stack([torch.cat([part[name] for part in parts]) for name in names], dim=1)
        rows = self._processes.sequence.broadcast(rows.to(self._processes.device))
        rows = units.gather(rows)[:total].cpu()
        return dict(zip(names, rows.unbind(1), strict=True))

    def scores(self, videos: Tensor, clips: Sequence[int]) -> list[dict[str, float]]:
        """Return the training reward of the given clips, by dimension."""
        with self._idle_offload.phase("reward"):
            scores = self._scorers.reward.score(videos, [self.caption(clip) for clip in clips])
        return [{name: float(value[i]) for name, value in scores.items()} for i in range(len(clips))]

    def check_reward(self, videos: Tensor, clips: Sequence[int], exchange: bool) -> dict[str, Shuffled]:
        """Check the training reward on these clips, uint8 [len(clips), F, H, W, 3].

        Raise ValueError unless the first clip gets the same scores twice. With ``exchange``, return by dimension
        how clips score with their own prompts and with each other's; otherwise, or if all have the same prompt,
        return {}.
        """
        captions = [self.caption(clip) for clip in clips]
        reward = self._scorers.reward
        with self._idle_offload.phase("reward"):
            check_deterministic(reward, videos[0], captions[0])
            if not exchange or len(set(captions)) < 2:
                return {}
            found = prompt_shuffle(reward, videos, captions, self._config.seed)
        # The first process's counts are those of all: others may round otherwise, and alarms follow from them.
        said = json.dumps({name: asdict(each) for name, each in found.items()})
        counts = json.loads(self._processes.broadcast_text(said))
        return {name: Shuffled(**each) for name, each in counts.items()}

    def caption(self, clip: int) -> str:
        return self.prompts[clip % len(self.prompts)]

    def _in_batches(self, work: Callable[[Sequence[int]], Result], clips: Sequence[int]) -> list[Result]:
        """Return the results of ``work`` for batches of clips that fit in the memory of the device, in order."""
        return list(self._batches.run(lambda batch: work(clips[as_slice(batch.prompts)]), len(clips), 1))

    def _videos_of_a_step(self) -> int:
        """Return how many videos this process makes in a step, which its memory is known to hold; at most 64."""
        config, team = self._config, self._processes.team_size
        prompts = max(1, config.pairs_per_step * team // self._processes.count)
        if not config.card.candidates:
            return min(64, prompts, config.objective.micro_batch_size or prompts)
        return min(64, prompts * max(1, config.rollout.candidates // config.processes.sharers))

    @torch.no_grad()
    def _sample(self, network: Network, clips: Sequence[int]) -> Tensor:
        shape, seed = self._model.latent_shape, self._config.seed
        noise = torch.stack([normal(shape, seed, "held-out", clip) for clip in clips])
        text = self._model.embed([self.caption(clip) for clip in clips])
        rollout = self._config.rollout
        with self._idle_offload.phase("evaluation"):
            latents = self._model.sample(
                CountedRows(network, self.stopping.check),
                noise.to(self._processes.device),
                text,
                steps=self._config.held_out_steps,
                guidance=rollout.guidance,
            )
        return self._model.decode(check_latents(latents))

    def _measure_sampled(self, network: Network, clips: Sequence[int]) -> dict[str, Tensor]:
        videos = self._sample(network, clips)
        measured = self._measure(videos, clips)
        self.kept.extend(videos[: _KEPT - len(self.kept)].cpu().unbind(0))
        return measured

    def _measure(self, videos: Tensor, clips: Sequence[int]) -> dict[str, Tensor]:
        captions = [self.caption(clip) for clip in clips]
        found: dict[str, Tensor] = {}
        trained = self._config.reward.dimensions
        scorers = self._scorers
        rewards: tuple[tuple[str, Reward | None, Dimensions], ...] = (
            ("reward", scorers.reward, trained),
            ("judge", scorers.judge, scorers.judged or trained),
        )
        for name, reward, dimensions in rewards:
            if reward is not None:
                with self._idle_offload.phase("reward" if name == "reward" else "judge"):
                    scores = reward.score(videos, captions)
                scores = scores | {"selected": combine(scores, dimensions)}
                found |= {f"{name}/{key}": value.float().cpu() for key, value in scores.items()}
        for name, measures in (
            ("pixels", scorers.pixels(videos, captions)),
            ("style", appearance(videos)),
        ):
            found |= {f"{name}/{key}": value.float().cpu() for key, value in measures.items()}
        return found


def logged(measured: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the log and the summary compare of an evaluation; the guards compare the style statistics."""
    return {name: value for name, value in measured.items() if not name.startswith(("clips", "style/"))}
