"""The measures that tables show, and the measures of the paper that they stand for."""

from __future__ import annotations

from vpo_engine.reproducing.spec import BASE, Column, Row

STAND_INS = {
    "dynamic degree (VBench)": "the judge's dynamic degree: 4 without a freeze",
    "subject consistency (VBench)": "the judge's temporal consistency: flicker and jitter",
    "background consistency (VBench)": "nothing: the background of a sprites clip has one colour",
    "temporal flickering (VBench)": "flicker of the background, from pixels; less is better",
    "motion smoothness (VBench)": "jitter of the sprite, from pixels; less is better",
    "aesthetic quality (VBench)": "the image scorer's mean over frames",
    "imaging quality (VBench)": "the judge's visual quality: blur",
    "FVD": "Frechet distance of the judge's readings between a policy's clips and clean ones",
    "dynamic quality (DEVIL)": "share of the judge's other four scores times share of its dynamic degree, per cent",
}
"""What stands here for measures whose networks have no weights here."""

DYNAMIC = Column("dynamic degree", "judge/dynamic_degree", "dynamic")
SUBJECT = Column("temporal consistency", "judge/temporal_consistency", "subject")
AESTHETIC = Column("image score", "reward/image", "aesthetic")
JUDGE = Column("judge, mean", "judge/mean")
JITTER = Column("jitter, px", "pixels/jitter")
COLOUR = Column("colour change", "pixels/colour_change")
MOTION = Column("displacement, px", "pixels/displacement")
COMMON = (DYNAMIC, SUBJECT, AESTHETIC, JUDGE, JITTER, COLOUR, MOTION)


def paper_row(dynamic: float, subject: float, aesthetic: float) -> dict[str, float]:
    """Return the paper's numbers of a row of its Tables 4 and 5: VBench's measures in per cent."""
    return {"dynamic": dynamic, "subject": subject, "aesthetic": aesthetic}


OURS = paper_row(43.0, 97.58, 55.37)
"""OnlineVPO's row of the paper."""
OPEN_SORA = Row(BASE, paper=paper_row(44.0, 95.35, 52.74))
"""The base policy, beside the paper's."""
ONLINE = "OnlineVPO"
