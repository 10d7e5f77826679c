"""Rollout: N candidates for every prompt, in batched denoising loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vpo_engine.config import RolloutConfig
from vpo_engine.distributed.processes import Processes
from vpo_engine.protocols import Network, SamplerSettings, SamplerState, TextEmbedding, VideoModel
from vpo_engine.rollout.prune import extremes
from vpo_engine.rollout.rows import Group, Rows
from vpo_engine.seeding import normal

Done = Callable[[Group, Tensor], None]
"""Is given each group as soon as it is sampled: clean latents, or the previews to be scored, [P * N, C, T, H, W]."""
Judge = Callable[[Tensor], Tensor]
"""Latents [P, N, C, T, H, W] to the one number per candidate that pairs are made of, [P, N]."""


@dataclass(frozen=True)
class Denoised:
    """What some or all steps of sampling made: latents and previews, see ``SamplerState``."""

    latents: Tensor
    preview: Tensor


class Rollout:
    """Samples the candidates of each step.

    The noise of a candidate is a function of (seed, position of its prompt in the stream, candidate number) alone.
    ``rows`` bounds how many candidates go through the network at once; it does not change what is sampled beyond the
    batch dependence of the matrix products (config.cache apart). Each process of ``team`` samples an equal part of the
    candidates of every prompt.
    """

    def __init__(
        self,
        model: VideoModel,
        config: RolloutConfig,
        seed: int,
        device: torch.device,
        rows: Rows | None = None,
        team: Processes | None = None,
    ) -> None:
        self._model, self._config = model, config
        self._team = team or Processes(0, 1, device)
        self._seed, self._device = seed, device
        self._rows = rows or Rows(config.most_rows)
        if config.compile == "graphs" and device.type != "cuda":
            raise ValueError(
                f"rollout.compile=graphs needs a CUDA device, but this is {device.type}; set rollout.compile=none, or "
                "blocks"
            )
        first = config.first_pass
        self._first = SamplerSettings(
            first.steps or config.steps,
            config.guidance,
            first.guidance_interval,
            first.cache,
            compile=config.compile,
        )
        self._settings = SamplerSettings(
            config.steps, config.guidance, config.guidance_interval, config.cache, compile=config.compile
        )

    @torch.no_grad()
    def begin(
        self,
        network: Network,
        text: TextEmbedding,
        positions: Sequence[int],
        done: Done | None = None,
        block: int = 0,
    ) -> Denoised:
        """This process's candidates, [P, N / team, C, T, H, W] in each part, up to where they are pruned; without
        pruning, to the end. With config.explore their noise, and as previews what is found cheaply from it.

        done: is given what is scored first, the previews where there is a second pass. block: the candidates are
        numbers block * N to (block + 1) * N - 1 of their prompts.
        """
        shape, mine = self._model.latent_shape, _slice(self._team.part(self._config.candidates))
        later = [block] if block else []
        noise = torch.stack(
            [
                normal((self._config.candidates, *shape), self._seed, "rollout", position, *later)[mine]
                for position in positions
            ]
        )
        if self._config.explore is None:
            part, pruned = slice(0, self._config.prune_step), self._config.prune is not None
            return self._advance(network, noise, text, self._first, part, done, pruned)
        explored = self._advance(network, noise, text, self._first, slice(None), done)
        return Denoised(noise.to(self._device), explored.latents)

    @torch.no_grad()
    def finish(
        self,
        network: Network,
        text: TextEmbedding,
        reached: Tensor,
        scores: Tensor,
        done: Done | None = None,
    ) -> Tensor:
        """Clean latents [P, keep, C, T, H, W] of the candidates with the extreme ``scores`` [P, N], in their order; of
        them, this process's [P, keep / team, ...].

        reached: the latents of ``begin``, [P, N, ...] of the whole team.
        """
        keep, explored = self._config.keep, self._config.explore is not None
        assert keep is not None
        mine = _slice(self._team.part(keep))
        kept = extremes(scores, keep)[:, mine].to(reached.device)
        prompts = torch.arange(len(kept), device=kept.device)[:, None]
        part = slice(0 if explored else self._config.prune_step, None)
        return self._advance(network, reached[prompts, kept], text, self._settings, part, done).latents

    def _advance(
        self,
        network: Network,
        latents: Tensor,
        text: TextEmbedding,
        settings: SamplerSettings,
        part: slice,
        done: Done | None,
        previews: bool = False,
    ) -> Denoised:
        """previews: ``done`` is given these, not where the candidates are."""

        def denoise(group: Group) -> tuple[Group, SamplerState]:
            prompts, candidates = _slice(group.prompts), _slice(group.candidates)
            rows = latents[prompts, candidates].flatten(0, 1).to(self._device)
            state = replace(self._model.start(rows), step=part.start or 0)
            return group, self._model.denoise(network, state, text[prompts], settings, part.stop)

        parts = []
        for group, made in self._rows.run(denoise, *latents.shape[:2]):
            if done is not None:
                done(group, made.preview if previews else made.latents)
            parts.append(made)
        return Denoised(
            torch.cat([one.latents for one in parts]).view(latents.shape),
            torch.cat([one.preview for one in parts]).view(latents.shape),
        )


def sample_candidates(
    model: VideoModel,
    network: Network,
    text: TextEmbedding,
    positions: Sequence[int],
    config: RolloutConfig,
    seed: int,
    device: torch.device,
    judge: Judge | None = None,
) -> Tensor:
    """Latents float32 [P, N, C, T, H, W] sampled by ``network`` for the P prompts of ``text``; see ``Rollout``.

    With config.prune or explore, [P, keep, ...]: those that ``judge`` finds extreme by their previews.
    """
    rollout = Rollout(model, config, seed, device)
    begun = rollout.begin(network, text, positions)
    if config.keep is None:
        return begun.latents
    if judge is None:
        raise ValueError("rollout.prune and rollout.explore need a judge of previews")
    return rollout.finish(network, text, begun.latents, judge(begun.preview))


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)
