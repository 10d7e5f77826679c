"""The clips of a run that its report shows: pairs of some steps, and held-out clips before and after training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.method import Step
from vpo_engine.metrics.held_out import HeldOut
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.gallery import MOST_CLIPS, HeldOutGallery, PairGallery, write_held_out, write_pairs
from vpo_engine.values import Candidate
from vpo_engine.video_model import VideoModel

_STEPS = 8
MOST_PAIRS = 4
MOST_PAIR_FILES = 2 * _STEPS
"""The first step and about eight others have a file of pairs, at most sixteen."""


def shown_clips(config: Config, held_out: HeldOut) -> range:
    """Return the numbers of the held-out clips that the report shows."""
    return range(min(MOST_CLIPS, len(held_out.prompts) * config.evaluation.samples_per_prompt))


def keep_held_out(
    config: Config, model: VideoModel, held_out: HeldOut, run: RunDirectory, before: Tensor, after: Tensor
) -> None:
    """Write the shown clips of the base policy and of the trained one, uint8 [clips, F, H, W, 3]."""
    clips = shown_clips(config, held_out)
    gallery = HeldOutGallery(
        before=before,
        after=after,
        prompts=[held_out.caption(clip) for clip in clips],
        before_scores=held_out.scores(before, clips),
        after_scores=held_out.scores(after, clips),
        fps=model.fps,
        settings=f"{config.held_out_steps} steps, guidance {config.rollout.guidance:g}, same noise before and after",
    )
    write_held_out(run.held_out_gallery, gallery)


def keep_pairs(config: Config, model: VideoModel, run: RunDirectory, step: int, result: Step) -> None:
    """Write a few pairs of about eight steps of the run, those with the widest gaps first."""
    every = max(1, config.steps // _STEPS)
    if (step != 1 and step % every) or not result.pairs:
        return
    shown = sorted(result.pairs, key=lambda pair: pair.gap, reverse=True)[:MOST_PAIRS]
    winners, losers = [pair.winner for pair in shown], [pair.loser for pair in shown]
    gallery = PairGallery(
        winner=_decoded(model, winners),
        loser=_decoded(model, losers),
        prompts=[pair.prompt.text for pair in shown],
        winner_scores=[candidate.scores for candidate in winners],
        loser_scores=[candidate.scores for candidate in losers],
        gap=[pair.gap for pair in shown],
        fps=model.fps,
    )
    write_pairs(run.pairs_file(step), gallery)


def _decoded(model: VideoModel, candidates: Sequence[Candidate]) -> Tensor:
    return model.decode(torch.stack([candidate.latents for candidate in candidates])).cpu()
