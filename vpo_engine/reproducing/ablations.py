"""One change at a time to the default, beyond the paper."""

from __future__ import annotations

from vpo_engine.reproducing.budgets import BRIEF
from vpo_engine.reproducing.columns import COLOUR, DYNAMIC, JITTER, JUDGE, MOTION, SUBJECT
from vpo_engine.reproducing.spec import Claim, Column, Row, Table

_DEFAULT = "default: refresh every 10"
ABLATIONS = Table(
    "ablations",
    "Further than the paper: one change at a time",
    "Each row changes one thing in the default. A change becomes a default only where its intervals over three seeds "
    "say so.",
    rows=(
        Row(_DEFAULT),
        Row(
            "soft refresh (TR-DPO): 6 % a step", ("reference.refresh_every=1", "reference.refresh_share=0.06")
        ),
        Row("soft refresh: 60 % every 10", ("reference.refresh_share=0.6",)),
        Row("pairs weighted by their gap", ("pairs.gap_power=1",)),
        Row("Diffusion-SDPO, mu = 0.2", ("objective.loser_scaling=0.2",)),
        Row(
            "half the rollouts, twice the updates",
            ("steps=7", "objective.updates_per_rollout=8"),
            budget="half the samples",
            quick=(*BRIEF, "steps=5", "objective.updates_per_rollout=8"),
        ),
        Row("trajectory-aligned noise", ("objective.noise=trajectory",)),
    ),
    columns=(Column("reward, mean", "reward/mean"), JUDGE, DYNAMIC, SUBJECT, JITTER, COLOUR, MOTION),
    claims=tuple(
        Claim(f"{label} is better than the default", JUDGE.measure, (label,), (_DEFAULT,))
        for label in (
            "soft refresh (TR-DPO): 6 % a step",
            "soft refresh: 60 % every 10",
            "pairs weighted by their gap",
            "Diffusion-SDPO, mu = 0.2",
            "half the rollouts, twice the updates",
            "trajectory-aligned noise",
        )
    ),
    quick=BRIEF,
)
