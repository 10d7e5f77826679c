"""The whole command on the sprites world, against a measurement that uses none of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from evaluation_case import results_of, run

from vpo_engine import train
from vpo_engine.data.sprites.measure import measure
from vpo_engine.data.sprites.world import withheld_captions
from vpo_engine.metrics.student_t import student_t_quantile
from vpo_engine.policy_source import find_source
from vpo_engine.rewards.sprites import SpritesJudge
from vpo_engine.sample import load_source

SAMPLES = 2


@pytest.mark.long
def test_an_aligned_policy_against_its_start_agrees_with_an_independent_measurement(tmp_path: Path) -> None:
    """Other noise, no files, another interval: both intervals of a difference must overlap.

    Each holds the true difference in about 95 % of cases. Two independent ones of equal width miss each other in
    P(|z| > 1.96 * sqrt(2)) = 0.6 % of cases, and these two share their prompts.
    """
    root, out = tmp_path / "run", tmp_path / "out"
    assert (
        train.main(
            [
                "sprites_fast.yaml",
                "method=refl",  # it makes a policy better in a third of the time
                "refl.steps=12",
                "refl.last_steps=3",
                "refl.margin=null",
                "steps=8",
                "optimizer.warmup_steps=1",
                "evaluation.every=null",
                "evaluation.samples_per_prompt=1",
                f"run_dir={root}",
            ]
        )
        == 0
    )
    began = time.process_time()
    assert run(root, "--baseline", "--samples", str(SAMPLES), "--out", out) == 0
    assert time.process_time() - began < 200, "seconds of processors, which two cores do in half of it"
    own = {
        "judge:sprites/visual_quality": lambda found: found["judge/visual_quality"],
        "judge:sprites/temporal_consistency": lambda found: found["judge/temporal_consistency"],
        "pixels:sprites/jitter": lambda found: found["jitter"],
        "pixels:sprites/sharpness": lambda found: found["sharpness"],
    }
    before, after = _measured(root / "config.yaml"), _measured(root)
    for name, of in own.items():
        differences = (of(after) - of(before)).double().unflatten(0, (-1, SAMPLES)).mean(1)
        half = student_t_quantile(0.975, 15) * float(differences.std()) / 4
        middle = float(differences.mean())
        found = results_of(out)["measures"][name]["comparison"]
        assert found["prompts"] == 16
        assert found["low"] <= middle + half, name
        assert middle - half <= found["high"], name
    quality = results_of(out)["measures"]["judge:sprites/mean"]["comparison"]
    assert quality["low"] > 0, "eight optimizer steps make the policy better by the judge"


def _measured(path: Path) -> dict[str, torch.Tensor]:
    """Sample from a policy with noise of its own, and measure the frames as they are: {measure: [16 * SAMPLES]}."""
    source = find_source(path, None, [])
    model = load_source(source)
    prompts = withheld_captions()
    model.prepare(prompts)
    texts = [prompt for prompt in prompts for _ in range(SAMPLES)]
    noise = torch.randn(len(texts), *model.latent_shape, generator=torch.Generator().manual_seed(9))
    rollout = source.config.rollout
    with torch.no_grad():
        latents = model.sample(
            model.network, noise, model.embed(texts), steps=rollout.steps, guidance=rollout.guidance
        )
        frames = model.decode(latents)
    judged = SpritesJudge().score(frames, texts)
    return {**measure(frames, texts), **{f"judge/{name}": value for name, value in judged.items()}}
