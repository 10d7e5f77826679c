"""Names and units of the held-out measures, and the direction that is better."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """The name, unit and direction by which a measure is shown to people."""

    label: str
    """Its name in plain words, which starts a line."""
    unit: str
    """"" for scores, which have none."""
    meaning: str
    """A sentence about what is measured."""
    better: int = 0
    """+1 if more is better, -1 if less is, 0 if neither."""

    @property
    def title(self) -> str:
        """The label with the unit, for example "Jitter (px)"."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


SCORES = {
    "selected": Measure("Combined score", "", "The one number that is made of the dimensions.", +1),
    "visual_quality": Measure("Visual quality", "", "Sharp and undisturbed pictures.", +1),
    "temporal_consistency": Measure("Temporal consistency", "", "Things stay what they are over time.", +1),
    "dynamic_degree": Measure("Dynamic degree", "", "How much moves.", +1),
    "text_alignment": Measure("Text alignment", "", "The clip shows what the prompt says.", +1),
    "factual_consistency": Measure("Factual consistency", "", "The clip shows what can happen.", +1),
}
"""The dimensions of rewards and judges. Those of other scorers get a label from their name."""

SPRITES = {
    "jitter": Measure("Jitter", "px", "Mean length of the second difference of the sprite's position.", -1),
    "colour_change": Measure(
        "Colour change",
        "share",
        "Mean distance of the sprite's chromaticity from its mean over the clip.",
        -1,
    ),
    "flicker": Measure(
        "Flicker", "share", "Mean change of the background's brightness from frame to frame.", -1
    ),
    "displacement": Measure(
        "Displacement", "px", "How far the sprite moves over the clip in the prompt's direction.", +1
    ),
    "displacement_absolute": Measure(
        "Displacement, any", "px", "How far the sprite moves over the clip in any direction.", +1
    ),
    "sharpness": Measure(
        "Sharpness", "share", "Share of the contrast that is crossed in one pixel at edges."
    ),
    "blank_rate": Measure("Blank frames", "share", "Share of frames without a visible sprite.", -1),
}
"""The pixel measures of sprites clips, ``data/sprites/measure.py``."""

VIDEOS = {
    "motion": Measure("Motion", "grey levels", "Mean absolute difference of neighbouring frames."),
    "flicker": Measure(
        "Flicker",
        "grey levels",
        "Standard deviation of the second difference of the frames' brightness.",
        -1,
    ),
    "sharpness": Measure("Sharpness", "grey levels", "Mean absolute Laplacian of the luminance."),
}
"""The pixel measures of all other clips, ``metrics/pixels.py``."""

GROUPS = {"reward": "Reward", "judge": "Judge", "pixels": "Pixels"}
"""The kinds of measures: what comes before the slash of a name, and its heading."""
GROUP_MEANINGS = {
    "reward": "the reward that the policy is trained on",
    "judge": "an independent judge, which is never trained against",
    "pixels": "measured without any network",
}
"""What a kind of measures is, as the rest of a sentence."""


def describe(name: str, measured: Container[str] = ()) -> Measure:
    """Describe a measure of a run, for example "reward/selected" or "pixels/jitter".

    measured: the names of all measures of the run. Sprites clips and others have pixel measures with the same names
    but different units; the others have "pixels/motion".
    """
    kind, _, short = name.partition("/")
    if kind != "pixels":
        label = short.replace("_", " ").capitalize()
        return SCORES.get(short) or Measure(label, "", f"A dimension of the {kind}.", +1 if short else 0)
    known = VIDEOS if "pixels/motion" in measured else SPRITES | {"motion": VIDEOS["motion"]}
    return known.get(short) or Measure(short.replace("_", " ").capitalize(), "", "A pixel measure.")
