"""The prompts of an evaluation, and which of their videos each metric looks at. Nothing here imports torch.

VBench measures each dimension on prompts of its own: those of a prompt file that names dimensions, as its
VBench_full_info.json does, or of the list in this package (``vbench``). Any other prompts go through all metrics.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from vpo_engine.data.prompts import PromptFile
from vpo_engine.metrics.metric_card import MetricCard
from vpo_engine.metrics.provenance import hash_prompts
from vpo_engine.texts import read_json

VBENCH = "vbench"
"""The word that stands for the published prompts of VBench's seven dimensions."""
VIDEOS_PER_PROMPT = 5
"""Videos of each prompt that VBench asks for, but for flickering, whose static filter chooses among more."""


@dataclass(frozen=True)
class Suite:
    """Prompts in order, without repeats.

    source: where they come from. dimensions: for each prompt the dimensions of VBench that it is for; empty where all
    metrics look at all prompts. samples: videos for each prompt; None: as many as VBench asks for. given: the videos
    that there are, by prompt and number, where they come from a folder.
    """

    prompts: tuple[str, ...]
    source: str
    dimensions: Mapping[str, frozenset[str]] = field(default_factory=dict)
    samples: int | None = None
    given: tuple[tuple[str, int], ...] = ()

    def covers(self, card: MetricCard, prompt: str, index: int) -> bool:
        """Return whether a metric looks at video ``index`` of a prompt."""
        if not self._has(card.dimension):
            return True
        return card.dimension in self.dimensions[prompt] and (
            bool(self.given) or index < self._count_for(card)
        )

    def videos(self, cards: Collection[MetricCard]) -> list[tuple[int, str, int]]:
        """Return the videos that the metrics look at: the prompt's number, the prompt, and the video's own number."""
        if self.given:
            numbers = {prompt: number for number, prompt in enumerate(self.prompts)}
            return [(numbers[prompt], prompt, index) for prompt, index in self.given]
        own = [card for card in cards if self._has(card.dimension)]
        everything = len(own) < len(cards) or not cards
        found = []
        for number, prompt in enumerate(self.prompts):
            counts = [self._count_for(card) for card in own if card.dimension in self.dimensions[prompt]]
            count = max([*counts, *([self.samples or VIDEOS_PER_PROMPT] if everything else [])], default=0)
            found += [(number, prompt, index) for index in range(count)]
        return found

    def _has(self, dimension: str) -> bool:
        return bool(dimension) and any(dimension in names for names in self.dimensions.values())

    def _count_for(self, card: MetricCard) -> int:
        """Return the number of videos of a prompt: a filter of still videos chooses among all that VBench asks for."""
        published = _published()["videos_per_prompt"] if card.name != card.dimension else {}
        return self.samples or published.get(card.dimension, VIDEOS_PER_PROMPT)

    def to_json(self) -> dict[str, Any]:
        """Return what identifies the suite."""
        return {"source": self.source, "count": len(self.prompts), "sha256": hash_prompts(self.prompts)}


def read_suite(where: str, samples: int | None = None) -> Suite:
    """Read prompts: ``vbench``, a file as for training, or VBench_full_info.json, whose dimensions are kept.

    Raise ValueError for a file that cannot be read, and for a prompt that occurs twice.
    """
    if where == VBENCH and not Path(where).exists():
        return vbench_suite(samples)
    path = Path(where)
    if not path.suffix and not path.exists() and get_close_matches(where, [VBENCH]):
        raise ValueError(f"--prompts {where} is no file; did you mean {VBENCH}?")
    file = PromptFile(path, choose="write the prompts under the key 'prompt'")
    prompts = [file[number] for number in range(len(file))]
    dimensions = _dimensions_in(path)
    if not set(prompts) <= dimensions.keys():
        dimensions = {}
    if dimensions:
        prompts = list(dict.fromkeys(prompts))
    return given_suite(prompts, str(path), samples if dimensions else samples or 1, dimensions)


def given_suite(
    prompts: Sequence[str],
    source: str,
    samples: int | None,
    dimensions: Mapping[str, frozenset[str]] | None = None,
) -> Suite:
    """Make a suite of a list of prompts. Raise ValueError for one that occurs twice."""
    seen: dict[str, int] = {}
    for number, prompt in enumerate(prompts, start=1):
        if prompt in seen:
            raise ValueError(
                f"{source}: prompts {seen[prompt]} and {number} are both {prompt!r}, and their videos would have the "
                "same names; keep one of them, and ask for more videos of each prompt by --samples"
            )
        seen[prompt] = number
    return Suite(tuple(prompts), source, dimensions or {}, samples)


def vbench_suite(samples: int | None = None) -> Suite:
    """Return the published prompts of VBench's seven dimensions that this engine measures."""
    content = _published()
    dimensions: dict[str, set[str]] = {}
    for dimension, suite in content["suite_of_dimension"].items():
        for prompt in content["suites"][suite]:
            dimensions.setdefault(prompt, set()).add(dimension)
    frozen = {prompt: frozenset(names) for prompt, names in dimensions.items()}
    return Suite(tuple(dimensions), VBENCH, frozen, samples)


def _dimensions_in(path: Path) -> dict[str, frozenset[str]]:
    """Return the dimensions of each prompt of a file in the form of VBench_full_info.json; {} for any other file."""
    if path.suffix.lower() != ".json":
        return {}
    try:
        rows = read_json(path)
    except ValueError:  # it is valid, as it was read before: an object per line, which has no dimensions
        return {}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "dimension" in row for row in rows):
        return {}
    found: dict[str, frozenset[str]] = {}
    for row in rows:
        prompt, names = row.get("prompt_en"), row["dimension"]
        if isinstance(prompt, str) and isinstance(names, list):
            key = prompt.strip()
            found[key] = found.get(key, frozenset()) | frozenset(map(str, names))
    return found


@cache
def _published() -> dict[str, Any]:
    text = files("vpo_engine.evaluation").joinpath("vbench_prompts.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content
