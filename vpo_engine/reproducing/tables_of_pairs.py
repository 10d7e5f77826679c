"""Tables 4a, 4b, 4d, 5a and 5b: what pairs are made of, and how the policy learns from them."""

from __future__ import annotations

from vpo_engine.reproducing.budgets import BRIEF
from vpo_engine.reproducing.columns import (
    AESTHETIC,
    COMMON,
    DYNAMIC,
    ONLINE,
    OPEN_SORA,
    OURS,
    SUBJECT,
    paper_row,
)
from vpo_engine.reproducing.spec import BASE, Claim, Row, Table

OFFLINE = "offline DPO"

_VIDEO, _ALL = (
    "VideoScore's place: sprites, temporal consistency",
    "sprites, mean of all (the engine's default)",
)
_LAION, _IMAGE = "aesthetic's place: BRISQUE", "ImageReward's place: sprites_image"

TABLE_4A = Table(
    "table4a",
    "Table 4a: which scorer chooses the pairs",
    "Runs differ in the reward that chooses winner and loser, and in nothing else.",
    rows=(
        OPEN_SORA,
        Row(
            _LAION,
            ("reward.kind=brisque", "reward.dimensions=[visual_quality]"),
            paper_row(40.1, 95.04, 52.33),
        ),
        Row(
            _IMAGE, ("reward.kind=sprites_image", "reward.dimensions=[global]"), paper_row(46.0, 96.26, 51.04)
        ),
        Row(_VIDEO, ("reward.dimensions=[temporal_consistency]",), OURS),
        Row(_ALL),
    ),
    columns=COMMON,
    claims=(
        Claim(
            "VideoScore gives the most consistent policy (97.58 against 95.04 and 96.26)",
            SUBJECT.measure,
            (_VIDEO,),
            (_LAION, _IMAGE),
        ),
        Claim(
            "VideoScore gives the most aesthetic policy (55.37 against 52.33 and 51.04)",
            AESTHETIC.measure,
            (_VIDEO,),
            (_LAION, _IMAGE),
        ),
        Claim(
            "ImageReward keeps the most motion (46.0 against 40.1 and 43.0)",
            DYNAMIC.measure,
            (_IMAGE,),
            (_LAION, _VIDEO),
        ),
    ),
    quick=BRIEF,
    cannot="MPS and Q-Align have no stand-in: two frame-wise scorers are there already.",
)

_DIMENSIONS = {
    "visual quality": ("visual_quality", paper_row(38.0, 96.56, 52.97)),
    "dynamic degree": ("dynamic_degree", paper_row(57.0, 92.09, 49.02)),
    "alignment": ("text_alignment", paper_row(44.0, 96.19, 50.52)),
    "temporal consistency": ("temporal_consistency", OURS),
    "factual consistency": ("factual_consistency", {}),
}
TABLE_4B = Table(
    "table4b",
    "Table 4b: which dimension of the reward chooses the pairs",
    "Runs differ in the dimension of the sprites reward that chooses winner and loser.",
    rows=(
        OPEN_SORA,
        *(
            Row(label, (f"reward.dimensions=[{name}]",), paper)
            for label, (name, paper) in _DIMENSIONS.items()
        ),
        Row("global", (), paper_row(55.0, 95.37, 51.33)),
    ),
    columns=COMMON,
    claims=(
        Claim(
            "dynamic degree gives the most motion (57 against 38 to 44)",
            DYNAMIC.measure,
            ("dynamic degree",),
            ("visual quality", "alignment", "temporal consistency"),
        ),
        Claim(
            "temporal consistency gives the most consistent policy (97.58 against 92.09 to 96.56)",
            SUBJECT.measure,
            ("temporal consistency",),
            ("visual quality", "dynamic degree", "alignment"),
        ),
        Claim(
            "dynamic degree costs consistency: below the base policy (92.09 against 95.35)",
            SUBJECT.measure,
            (BASE,),
            ("dynamic degree",),
        ),
        Claim(
            "temporal consistency gives the most aesthetic policy (55.37 against 49.02 to 52.97)",
            AESTHETIC.measure,
            ("temporal consistency",),
            ("visual quality", "dynamic degree", "alignment", "global"),
        ),
        Claim(
            "global moves more than temporal consistency (55 against 43)",
            DYNAMIC.measure,
            ("global",),
            ("temporal consistency",),
        ),
        Claim(
            "global is less consistent than temporal consistency (95.37 against 97.58)",
            SUBJECT.measure,
            ("temporal consistency",),
            ("global",),
        ),
    ),
    quick=(*BRIEF, "steps=7"),
    cannot="The paper has no row for factual consistency.",
)

TABLE_4D = Table(
    "table4d",
    "Table 4d: online and offline",
    "Offline DPO takes its pairs from the policy that the run starts from, and never refreshes its reference.",
    rows=(
        OPEN_SORA,
        Row(OFFLINE, ("method=offline_dpo",), paper_row(28.0, 97.07, 53.28), "equal samples"),
        Row(ONLINE, (), OURS),
    ),
    columns=COMMON,
    claims=(
        Claim("online keeps more motion (43.0 against 28.0)", DYNAMIC.measure, (ONLINE,), (OFFLINE,)),
        Claim("online is more consistent (97.58 against 97.07)", SUBJECT.measure, (ONLINE,), (OFFLINE,)),
        Claim("online is more aesthetic (55.37 against 53.28)", AESTHETIC.measure, (ONLINE,), (OFFLINE,)),
    ),
    quick=BRIEF,
)

_CANDIDATES = {
    2: paper_row(42.4, 96.09, 49.16),
    4: paper_row(42.0, 97.09, 54.33),
    6: OURS,
    8: paper_row(43.1, 97.21, 54.75),
}
TABLE_5A = Table(
    "table5a",
    "Table 5a: candidates per prompt",
    "Runs differ in N, the number of candidates of which the best and the worst make a pair; all make as many steps.",
    rows=(
        OPEN_SORA,
        *(
            Row(f"N = {count}", () if count == 4 else (f"rollout.candidates={count}",), paper)
            for count, paper in _CANDIDATES.items()
        ),
    ),
    columns=COMMON,
    claims=(
        Claim(
            "two candidates are the least consistent (96.09 against 97.09 to 97.58)",
            SUBJECT.measure,
            ("N = 4", "N = 6", "N = 8"),
            ("N = 2",),
        ),
        Claim(
            "two candidates are the least aesthetic (49.16 against 54.33 to 55.37)",
            AESTHETIC.measure,
            ("N = 4", "N = 6", "N = 8"),
            ("N = 2",),
        ),
        Claim("eight are no better than six (97.21 against 97.58)", SUBJECT.measure, ("N = 6",), ("N = 8",)),
    ),
    quick=(*BRIEF, "steps=7"),
)

_REFRESHES = {
    5: (100, paper_row(42.7, 97.02, 53.74)),
    10: (200, OURS),
    20: (400, paper_row(41.0, 96.64, 51.26)),
    30: (600, paper_row(45.0, 96.11, 51.88)),
}
TABLE_5B = Table(
    "table5b",
    "Table 5b: optimizer steps between refreshes of the reference",
    "Runs differ in K. A run here has 56 optimizer steps, and K is a twentieth of the paper's.",
    rows=(
        OPEN_SORA,
        *(
            Row(
                f"K = {every} (paper: {theirs})",
                () if every == 10 else (f"reference.refresh_every={every}",),
                paper,
            )
            for every, (theirs, paper) in _REFRESHES.items()
        ),
    ),
    columns=COMMON,
    claims=(
        Claim(
            "K = 200 is more consistent than 400 and 600 (97.58 against 96.64 and 96.11)",
            SUBJECT.measure,
            ("K = 10 (paper: 200)",),
            ("K = 20 (paper: 400)", "K = 30 (paper: 600)"),
        ),
        Claim(
            "K = 200 is more consistent than 100 (97.58 against 97.02)",
            SUBJECT.measure,
            ("K = 10 (paper: 200)",),
            ("K = 5 (paper: 100)",),
        ),
        Claim(
            "K = 200 is the most aesthetic (55.37 against 51.26 to 53.74)",
            AESTHETIC.measure,
            ("K = 10 (paper: 200)",),
            ("K = 5 (paper: 100)", "K = 20 (paper: 400)", "K = 30 (paper: 600)"),
        ),
    ),
    quick=BRIEF,
)
