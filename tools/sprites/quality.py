"""Report the quality of the shipped parts: how well the rewards rank damage, and how the base policy scores."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.sprites.train_rewards import rank_report
from tools.sprites.train_vae import psnr
from vpo_engine.data.sprites.assets import load_sprites, load_vae, round_trip
from vpo_engine.data.sprites.damage import sample_clean, sample_mixture
from vpo_engine.data.sprites.measure import measure
from vpo_engine.data.sprites.world import all_captions
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.rewards.combine import combine
from vpo_engine.rewards.sprites import SpritesJudge, SpritesReward

CLIPS = 240
"""Four clips of each caption."""
STEPS = 12


def quality_report() -> str:
    """Return Markdown tables: rank correlations with the true severity; scores of clean, mixture and base clips."""
    reward, judge = SpritesReward(), SpritesJudge()
    model = load_sprites(Processes.start("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(20_000)
    vae = load_vae()
    clean, mixture = sample_clean(CLIPS, generator), sample_mixture(CLIPS, generator)
    captions = all_captions() * (CLIPS // len(all_captions()))
    model.prepare(captions)
    rows: list[tuple[str, Tensor, list[str]]] = [
        ("clean clips", clean.videos, clean.captions),
        ("mixture clips", mixture.videos, mixture.captions),
        ("mixture clips, through the VAE", round_trip(vae, mixture.videos), mixture.captions),
    ]
    for guidance in (1.0, 3.0):
        rows.append((f"base policy, guidance {guidance:g}", _sample(model, captions, guidance), captions))
    table = [_row(name, videos, texts, reward, judge) for name, videos, texts in rows]
    return "\n\n".join(
        [
            f"VAE: {psnr(vae, generator):.1f} dB on held-out clips of the mixture",
            _format_ranks(rank_report(reward.network, judge.network)),
            _format(table),
        ]
    )


def _sample(model: OpenSora, captions: list[str], guidance: float) -> Tensor:
    noise = torch.randn(len(captions), *model.latent_shape, generator=torch.Generator().manual_seed(20_001))
    text = model.embed(captions)
    return model.decode(model.sample(model.network, noise, text, steps=STEPS, guidance=guidance))


def _row(
    name: str, videos: Tensor, captions: list[str], reward: SpritesReward, judge: SpritesJudge
) -> dict[str, str]:
    scores, judged = reward.score(videos, captions), judge.score(videos, captions)
    pixels = measure(videos, captions)
    cells = {"": name, "reward": _mean(combine(scores, "global")), "judge": _mean(combine(judged, "global"))}
    cells |= {key.replace("_", " "): _mean(value) for key, value in (scores | pixels).items()}
    return cells


def _mean(values: Tensor) -> str:
    return f"{float(values.float().mean()):.3f}"


def _format(rows: list[dict[str, str]]) -> str:
    """Format a Markdown table with a line per measure and a column per kind of clips."""
    head = "| | " + " | ".join(row[""] for row in rows) + " |"
    rule = "|---|" + "---|" * len(rows)
    lines = [f"| {key} | " + " | ".join(row[key] for row in rows) + " |" for key in rows[0] if key]
    return "\n".join([head, rule, *lines])


def _format_ranks(report: dict[str, dict[str, dict[str, float]]]) -> str:
    """Format the result of ``rank_report`` as a Markdown table with a column per network."""
    names = list(report)
    lines = ["| on held-out clips | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for group, values in report[names[0]].items():
        for key in values:
            cells = " | ".join(f"{report[name][group][key]:.3f}" for name in names)
            lines.append(f"| {group.replace('_', ' ')}: {key.replace('_', ' ')} | {cells} |")
    return "\n".join(lines)
