"""Measure the held-out clips of a cell's policy, clip by clip, by scorers that are the same for all cells.

    python -m vpo_engine.reproducing.measuring FOLDER

A run is measured at its last step; a base cell measures the policy that runs start from. Whatever a run was trained by,
its clips are scored by the sprites reward, by the judge, by the image scorer and by pixel measures. ``MEASURES`` names
those that tables show; the networks of VBench and DEVIL have no weights here, and what stands for them is named so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vpo_engine.build import build_model, build_prompts
from vpo_engine.config import Config
from vpo_engine.config_file import load_config, parse_config
from vpo_engine.data.sprites.assets import load_vae, round_trip
from vpo_engine.data.sprites.damage import KINDS, damaged
from vpo_engine.data.sprites.measure import measure
from vpo_engine.data.sprites.world import Attributes
from vpo_engine.distributed.processes import Processes
from vpo_engine.metrics.held_out import HeldOut, HeldOutScorers
from vpo_engine.reproducing.cells import RESULT, RUN, Record
from vpo_engine.rewards.frames import VideoOfFrames
from vpo_engine.rewards.sprites import SpritesJudge, SpritesReward
from vpo_engine.rewards.sprites_image import SpritesImage
from vpo_engine.runs.checkpoint import newest_complete
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.seeding import generator

_RIDGE = 1e-6
"""Share of the mean variance that is added to each variance, so that square roots of covariances exist."""


class _Scorers:
    """The sprites reward and the image scorer as one reward, and the judge's readings of every clip kept."""

    def __init__(self) -> None:
        self._video, self._image = SpritesReward(), VideoOfFrames(SpritesImage())
        self.judge = SpritesJudge()
        self.dimensions = (*self._video.dimensions, "image")
        self.readings: list[Tensor] = []

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.readings.append(read(self.judge, videos))
        image = next(iter(self._image.score(videos, prompts).values()))
        return {**self._video.score(videos, prompts), "image": image}


@torch.no_grad()
def read(judge: SpritesJudge, videos: Tensor) -> Tensor:
    """Return what the judge reads in uint8 clips [B, F, H, W, 3]: float64 [B, 18] in 0..1.

    These are the severities of the kinds of damage, whether there is no sprite at all, and the probabilities of the
    attributes. Their logits have no bound: a few clips of which the judge is very sure would decide the distance.
    """
    found = judge.network(videos)
    attributes = (found.colour, found.shape, found.direction)
    return torch.cat([found.defects.sigmoid(), *(logits.softmax(1) for logits in attributes)], dim=1).double()


def frechet(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of two sets of features, [n, D] and [m, D], as of two Gaussians."""
    (mean_a, cov_a), (mean_b, cov_b) = _gaussian(first), _gaussian(second)
    root_a = _root(cov_a)
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def frechet_by_clip(clips: Tensor, real: Tensor) -> Tensor:
    """Return a number for each clip, float64 [n], whose mean is ``frechet(clips, real)``.

    They are the jackknife's pseudo-values, moved so that their mean is the distance itself: their spread is that of the
    distance, so it is given intervals as any measure that has one number for each clip. The jackknife's own mean would
    correct the bias of few clips too far, to below zero; all rows of a table have the same number of clips, and so
    nearly the same bias.
    """
    count, whole = len(clips), frechet(clips, real)
    kept = torch.ones(count, dtype=torch.bool)
    without = []
    for clip in range(count):
        kept[clip] = False
        without.append(frechet(clips[kept], real))
        kept[clip] = True
    distances = torch.tensor(without, dtype=torch.float64)
    return whole - (count - 1) * (distances - distances.mean())


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    covariance = torch.cov(features.T)
    ridge = _RIDGE * covariance.diagonal().mean()
    return features.mean(0), covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def clean_clips(captions: Sequence[str], seed: int) -> Tensor:
    """Render undamaged clips of the captions and pass them through the autoencoder, as all clips of a policy are."""
    random = generator(seed, "clean sprites")
    severities = torch.zeros(len(captions), len(KINDS))
    return round_trip(load_vae(), damaged(Attributes.of(list(captions)), severities, random).videos)


def measured_config(resolved: str, policy: Path | None, run_dir: Path) -> Config:
    """Return the configuration with which a cell's held-out clips are sampled.

    It keeps what sampling depends on, and leaves out how the run was trained.
    """
    trained = parse_config(resolved, "the cell's configuration")
    evaluation = trained.evaluation.model_copy(update={"steps": trained.held_out_steps})
    model = trained.model if policy is None else trained.model.model_copy(update={"policy": policy})
    return load_config(None, [f"run_dir={run_dir}"]).model_copy(
        update={
            "seed": trained.seed,
            "model": model,
            "prompts": trained.prompts,
            "evaluation": evaluation,
            "rollout": trained.rollout,
        }
    )


def measure_policy(config: Config) -> dict[str, list[float]]:
    """Return the measures of all held-out clips of the policy that ``config`` names: {measure: one number a clip}."""
    processes = Processes.start("cpu")
    model = build_model(config, processes, lambda _: None)
    _, prompts = build_prompts(config)
    model.prepare(prompts)
    scorers = _Scorers()
    held_out = HeldOut(config, model, prompts, HeldOutScorers(scorers, measure, scorers.judge), processes)
    samples = config.evaluation.samples_per_prompt
    found = held_out.evaluate(model.network, samples)
    captions = [held_out.caption(clip) for clip in range(len(prompts) * samples)]
    real = read(scorers.judge, clean_clips(captions, config.seed))
    found |= _put_together(found)
    found["judge/frechet"] = frechet_by_clip(torch.cat(scorers.readings), real)
    return {name: values.double().tolist() for name, values in found.items() if name != "reward/selected"}


def _put_together(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return measures that are made of others: means of five dimensions, and the quality of what moves."""
    names = SpritesJudge.dimensions
    means = {
        f"{kind}/mean": torch.stack([found[f"{kind}/{name}"] for name in names]).mean(0)
        for kind in ("reward", "judge")
    }
    others = torch.stack([found[f"judge/{name}"] for name in names if name != "dynamic_degree"]).mean(0)
    moving = 100 * (others - 1) / 3 * (found["judge/dynamic_degree"] - 1) / 3
    return {**means, "judge/moving_quality": moving}


def main(arguments: Sequence[str] | None = None) -> int:
    (folder,) = map(Path, sys.argv[1:] if arguments is None else arguments)
    record = Record.read(folder)
    assert record is not None, folder
    policy = None
    if record.kind == "run":
        newest = newest_complete(RunDirectory.open(folder / RUN).checkpoints)
        assert newest is not None, folder
        policy = newest / "policy"
    clips = measure_policy(measured_config(record.resolved, policy, folder / RUN))
    unfinished = folder / f".{RESULT}"
    unfinished.write_text(json.dumps({"clips": clips}), encoding="utf-8")
    unfinished.replace(folder / RESULT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
