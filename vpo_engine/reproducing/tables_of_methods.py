"""Tables 3, 4c and 5c, Figure 5 and the long runs: OnlineVPO beside methods that follow the reward's gradient."""

from __future__ import annotations

from vpo_engine.reproducing.budgets import BRIEF, INSTRUCT, LENGTH, LONG, QUICK_LONG, REFL, VADER
from vpo_engine.reproducing.columns import (
    AESTHETIC,
    COMMON,
    DYNAMIC,
    JITTER,
    JUDGE,
    MOTION,
    ONLINE,
    OPEN_SORA,
    OURS,
    SUBJECT,
    paper_row,
)
from vpo_engine.reproducing.spec import BASE, AlarmClaim, Claim, Column, Curve, CurveClaim, Row, Table

NO_CURRICULUM = "OnlineVPO, no curriculum"

TABLE_4C = Table(
    "table4c",
    "Table 4c: OnlineVPO and ReFL",
    "ReFL follows the gradient of the same reward; it is run once with as many videos scored and once with as many "
    "processor seconds as OnlineVPO.",
    rows=(
        OPEN_SORA,
        *REFL.rows(paper_row(40.0, 96.59, 51.84) | {"imaging": 63.06}),
        Row(ONLINE, (), OURS | {"imaging": 67.36}),
    ),
    columns=(*COMMON, Column("visual quality", "judge/visual_quality", "imaging")),
    claims=(
        Claim("OnlineVPO is more consistent (97.58 against 96.59)", SUBJECT.measure, (ONLINE,), REFL.labels),
        Claim("OnlineVPO is more aesthetic (55.37 against 51.84)", AESTHETIC.measure, (ONLINE,), REFL.labels),
        Claim("OnlineVPO keeps more motion (43.0 against 40.0)", DYNAMIC.measure, (ONLINE,), REFL.labels),
        Claim(
            "OnlineVPO has better pictures (67.36 against 63.06)",
            "judge/visual_quality",
            (ONLINE,),
            REFL.labels,
        ),
    ),
    quick=BRIEF,
)

_VBENCH = ("subject", "background", "flicker", "motion", "aesthetic", "dynamic", "imaging")


def _vbench(*values: float) -> dict[str, float]:
    return dict(zip(_VBENCH, values, strict=True))


_BASELINES = (*INSTRUCT.labels, *VADER.labels)
TABLE_3 = Table(
    "table3",
    "Table 3: OnlineVPO, InstructVideo and VADER",
    "Every method starts from the same policy, with the same prompts and reward. Each baseline is run once with as "
    "many videos scored as OnlineVPO, and once with as many processor seconds.",
    rows=(
        Row(BASE, paper=_vbench(95.35, 96.42, 98.34, 98.71, 52.74, 44.00, 62.41)),
        *INSTRUCT.rows(_vbench(96.45, 97.08, 95.30, 96.76, 50.01, 61.22, 70.09)),
        *VADER.rows(_vbench(95.53, 97.11, 97.42, 98.89, 53.43, 41.12, 66.08)),
        Row(ONLINE, (), _vbench(97.58, 97.74, 98.73, 99.36, 55.37, 43.00, 67.36)),
    ),
    columns=(
        SUBJECT,
        Column("flicker", "pixels/flicker", "flicker"),
        Column("jitter, px", "pixels/jitter", "motion"),
        AESTHETIC,
        DYNAMIC,
        Column("visual quality", "judge/visual_quality", "imaging"),
        JUDGE,
    ),
    claims=(
        Claim(
            "OnlineVPO is the most consistent (97.58 against 96.45 and 95.53)",
            SUBJECT.measure,
            (ONLINE,),
            _BASELINES,
        ),
        Claim(
            "OnlineVPO flickers least (98.73 against 95.30 and 97.42)",
            "pixels/flicker",
            (ONLINE,),
            _BASELINES,
        ),
        Claim(
            "OnlineVPO moves most smoothly (99.36 against 96.76 and 98.89)",
            JITTER.measure,
            (ONLINE,),
            _BASELINES,
        ),
        Claim(
            "OnlineVPO is the most aesthetic (55.37 against 50.01 and 53.43)",
            AESTHETIC.measure,
            (ONLINE,),
            _BASELINES,
        ),
        Claim(
            "InstructVideo has the most motion (61.22 against 41.12 and 43.00)",
            DYNAMIC.measure,
            INSTRUCT.labels,
            (ONLINE, *VADER.labels),
        ),
        Claim(
            "InstructVideo has the best pictures (70.09 against 66.08 and 67.36)",
            "judge/visual_quality",
            INSTRUCT.labels,
            (ONLINE, *VADER.labels),
        ),
    ),
    quick=BRIEF,
    cannot="Background consistency has no stand-in, since the background of a sprites clip has one colour.",
)

TABLE_5C = Table(
    "table5c",
    "Table 5c: FVD and dynamic quality",
    "Rows are those of Table 3. FVD's stand-in is the Frechet distance of the judge's readings from those of clean "
    "clips. The stand-in of dynamic quality is the share of the judge's other scores times that of its dynamic degree.",
    rows=(
        Row(BASE, paper={"FVD": 316.21, "dynamic quality": 60.12}),
        *INSTRUCT.rows({"FVD": 296.50, "dynamic quality": 58.37}),
        *VADER.rows({"FVD": 244.78, "dynamic quality": 61.89}),
        Row(ONLINE, (), {"FVD": 201.51, "dynamic quality": 65.74}),
    ),
    columns=(
        Column("Frechet distance", "judge/frechet", "FVD"),
        Column("quality of what moves, %", "judge/moving_quality", "dynamic quality"),
        JUDGE,
    ),
    claims=(
        Claim(
            "OnlineVPO is nearest to real videos (201.51 against 244.78 and 296.50)",
            "judge/frechet",
            (ONLINE,),
            _BASELINES,
        ),
        Claim(
            "every method comes nearer to real videos (from 316.21)",
            "judge/frechet",
            (ONLINE, *_BASELINES),
            (BASE,),
        ),
        Claim(
            "OnlineVPO has the best dynamic quality (65.74 against 61.89 and 58.37)",
            "judge/moving_quality",
            (ONLINE,),
            _BASELINES,
        ),
    ),
    quick=BRIEF,
)

_REWARD = Curve("held-out reward (trained on)", "held_out/reward/selected")
_JUDGE_CURVE = Curve("judge (never trained on)", "held_out/judge/selected")
_PIXELS = (
    Curve("jitter, px", "held_out/pixels/jitter"),
    Curve("displacement, px", "held_out/pixels/displacement"),
)

FIGURE_5 = Table(
    "figure5",
    "Figure 5: reward during training",
    "Held-out clips, by the reward that is trained on and by the judge. Without the curriculum the reference is never "
    "refreshed. ReFL has as many processor seconds as OnlineVPO.",
    rows=(
        Row(ONLINE),
        Row(NO_CURRICULUM, ("reference.refresh_every=null",)),
        REFL.timed(evaluations=8),
    ),
    columns=(Column("reward, mean", "reward/mean"), JUDGE, JITTER, MOTION),
    claims=(
        Claim("with the curriculum the reward ends higher", "reward/mean", (ONLINE,), (NO_CURRICULUM,)),
        CurveClaim("OnlineVPO's reward does not fall", _REWARD.key, ONLINE, falls=False),
        CurveClaim("ReFL's reward rises, then falls", _REWARD.key, "ReFL"),
    ),
    settings=("evaluation.every=2", "evaluation.samples_between=4"),
    quick=BRIEF,
    curves=(_REWARD, _JUDGE_CURVE),
)

_COLLAPSING = REFL.timed(evaluations=12, length=LENGTH, lr="3e-3")
OVEROPTIMISATION = Table(
    "overoptimisation",
    "Over-optimisation: three times the usual length",
    "Reward, judge and pixel measures of held-out clips while ReFL, VADER and OnlineVPO are trained for three times as "
    "long as in the other tables; and ReFL with thirty times the learning rate, which is made to collapse. Dotted "
    "lines: alarms of the guards (docs/guards.md).",
    rows=(
        Row(ONLINE, LONG, quick=QUICK_LONG),
        REFL.timed(evaluations=12, length=LENGTH),
        _COLLAPSING,
        VADER.timed(evaluations=12, length=LENGTH),
    ),
    columns=(Column("reward, mean", "reward/mean"), JUDGE, JITTER, MOTION),
    claims=(
        CurveClaim("ReFL is over-optimised: its reward rises, then falls", _REWARD.key, "ReFL"),
        CurveClaim("OnlineVPO is not: the judge does not fall", _JUDGE_CURVE.key, ONLINE, falls=False),
        *(
            AlarmClaim(f"guards: {label} raises an alarm if it collapses, and only then", label)
            for label in (ONLINE, "ReFL", _COLLAPSING.label, "VADER")
        ),
    ),
    settings=("evaluation.samples_between=4",),
    quick=BRIEF,
    curves=(_REWARD, _JUDGE_CURVE, *_PIXELS),
    length=LENGTH,
)

_RATES = ("3e-5", "1e-4", "3e-4", "1e-3")
LEARNING_RATES = Table(
    "learning_rates",
    "Learning rates: each method at four, before the methods are compared",
    "Each method at four learning rates, with as many processor seconds. The other tables use the rate that is best by "
    "the judge's mean.",
    rows=(
        Row(BASE),
        *(Row(f"{ONLINE}, lr {lr}", (f"optimizer.lr={lr}",)) for lr in _RATES),
        *(budget.rated(lr) for budget in (REFL, VADER, INSTRUCT) for lr in _RATES),
    ),
    columns=(Column("reward, mean", "reward/mean"), JUDGE, DYNAMIC, SUBJECT, JITTER, MOTION),
    quick=(*BRIEF, "steps=5"),
)
