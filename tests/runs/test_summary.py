import json
import math
import random
import re

import pytest
import torch

from vpo_engine.metrics.student_t import student_t_quantile
from vpo_engine.metrics.summary import (
    change,
    format_seeds,
    format_summary,
    headline,
    number_texts,
    paired_difference,
    summarise,
    summarise_seeds,
    verdict,
)
from vpo_engine.runs.report_numbers import summary_section, tiles
from vpo_engine.runs.report_rows import MetricRows

# Two-sided 95 % and 99 % points of Student's t, as printed (Abramowitz and Stegun, table 26.10).
T_TABLE = [
    (1, 0.975, 12.706),
    (2, 0.975, 4.303),
    (3, 0.975, 3.182),
    (5, 0.975, 2.571),
    (10, 0.975, 2.228),
    (15, 0.975, 2.131),
    (30, 0.975, 2.042),
    (60, 0.975, 2.000),
    (120, 0.975, 1.980),
    (1, 0.995, 63.657),
    (4, 0.995, 4.604),
    (20, 0.995, 2.845),
]


@pytest.mark.parametrize(("degrees", "probability", "expected"), T_TABLE)
def test_t_quantiles_are_those_of_the_printed_table(degrees, probability, expected):
    assert student_t_quantile(probability, degrees) == pytest.approx(expected, abs=6e-4)
    assert student_t_quantile(1 - probability, degrees) == pytest.approx(-expected, abs=6e-4)


def test_t_quantiles_in_closed_form():
    for p in (0.5, 0.6, 0.9, 0.975, 0.9995):
        assert student_t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9, abs=1e-9)
        two = (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
        assert student_t_quantile(p, 2) == pytest.approx(two, rel=1e-9, abs=1e-9)
    assert student_t_quantile(0.975, 10**6) == pytest.approx(1.959966, abs=2e-6)
    with pytest.raises(ValueError, match="0 < probability < 1"):
        student_t_quantile(1.0, 3)


def test_a_paired_difference_by_hand():
    # Differences 1, 2, 3: mean 2, standard deviation 1, half width 4.302653 / sqrt(3).
    found = paired_difference(torch.tensor([10.0, 20.0, 30.0]), torch.tensor([11.0, 22.0, 33.0]))
    half = 4.302652729911275 / math.sqrt(3)
    assert (found.mean, found.before, found.after, found.n) == (2.0, 20.0, 22.0, 3)
    assert found.low == pytest.approx(2 - half, rel=1e-9)
    assert found.high == pytest.approx(2 + half, rel=1e-9)


def test_pairing_ignores_what_clips_have_in_common():
    clips = 1e3 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    found = paired_difference(clips, clips + 0.5)
    assert found.low == pytest.approx(0.5, abs=1e-4)
    assert found.high == pytest.approx(0.5, abs=1e-4)


def test_bounds_cover_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(500):
        found = paired_difference(torch.zeros(6), 0.3 + torch.randn(6, generator=generator))
        covered += found.low <= 0.3 <= found.high
    # Binomial with p = 0.95: three standard deviations are 0.029.
    assert 0.921 <= covered / 500 <= 0.979


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (torch.zeros(3), torch.zeros(4), r"same length, at least 1, got \[3\] and \[4\]"),
        (torch.zeros(0), torch.zeros(0), r"at least 1, got \[0\]"),
        (torch.zeros(2, 2), torch.zeros(2, 2), "two vectors"),
        (
            torch.zeros(2),
            torch.tensor([0.0, math.nan]),
            "the value after training of clip 1 is nan, not finite",
        ),
        (
            torch.tensor([math.inf, 0.0]),
            torch.zeros(2),
            "the value before training of clip 0 is inf, not finite",
        ),
    ],
)
def test_what_cannot_be_compared(before, after, text):
    with pytest.raises(ValueError, match=text):
        paired_difference(before, after)


def measures(shift: float, seed: int = 0, clips: int = 32):
    generator = torch.Generator().manual_seed(seed)

    def noisy(level, sd):
        return level + sd * torch.randn(clips, generator=generator)

    before = {
        "held_out/reward/selected": noisy(4.5, 0.1),
        "judge/selected": noisy(4.4, 0.1),
        "pixels/jitter": noisy(1.5, 0.1),
        "pixels/colour_change": noisy(0.2, 0.01),
        "pixels/displacement": noisy(8.0, 0.1),
        "pixels/blank_rate": torch.zeros(clips),
    }
    scale = {"jitter": -1.8, "colour_change": -0.2, "displacement": 0.0, "blank_rate": 0.0}
    after = {
        name: value + shift * scale.get(name.split("/")[-1], 1.0) + noisy(0, 1e-3)
        for name, value in before.items()
    }
    return before, after | {"pixels/blank_rate": torch.zeros(clips)}


def test_the_summary_is_json_with_the_promised_keys():
    summary = json.loads(json.dumps(summarise(*measures(0.3), {"rollout": 84.5}), allow_nan=False))
    assert summary["clips"] == 32
    assert summary["timings"] == {"rollout": 84.5}
    assert list(summary["measures"])[:2] == ["reward/selected", "judge/selected"]
    reward = summary["measures"]["reward/selected"]
    assert set(reward) == {"before", "after", "difference", "low", "high"}
    assert reward["after"] - reward["before"] == pytest.approx(reward["difference"])
    jitter = summary["measures"]["pixels/jitter"]
    assert jitter["relative"] == pytest.approx(jitter["difference"] / jitter["before"])
    assert "relative" not in summary["measures"]["pixels/blank_rate"], "a base of zero has no percentage"


def test_the_table_is_aligned_and_ends_with_the_verdict():
    timings = {"rollout": 84.5, "update": 70.2, "refresh": 0.01, "step": 160.0}
    text = format_summary(summarise(*measures(0.3), timings))
    lines = text.splitlines()
    assert lines[0] == "32 held-out clips, the same prompts and noise before and after"
    table = lines[2:12]
    assert table[0].split() == ["base", "final", "change", "±", "95", "%", "of", "base"]
    assert [line for line in table if line.endswith(":")] == ["Reward:", "Judge:", "Pixels:"]
    rows = [line for line in table[1:] if not line.endswith(":")]
    assert len({re.search("(better|not clear)$", line).start() for line in rows}) == 1, (
        "the last column is aligned"
    )
    assert rows[0].split() == ["Combined", "score", *rows[0].split()[2:5], rows[0].split()[5], "better"]
    assert "Jitter (px)" in rows[2]
    assert "-35.9 %" in rows[2]
    assert rows[5].startswith(" Blank frames (share)")
    assert rows[5].endswith("not clear")
    assert "Time: 2 min 40 s in all: rollout 1 min 24 s, update 1 min 10 s, other 5.3 s" in lines
    said = " ".join(lines[-4:])
    assert "Held-out reward: improved (+0.300, 95 % bounds +0." in said
    assert "Jitter is 36 % lower than before. Colour change is 30 % lower than before." in said
    assert "Displacement is about the same as before" in said
    assert max(map(len, lines)) < 80


def test_the_bounds_in_the_table_are_those_of_the_summary():
    summary = summarise(*measures(0.3), {})
    numbers = summary["measures"]["judge/selected"]
    half = (numbers["high"] - numbers["low"]) / 2
    row = format_summary(summary).splitlines()[6].split()
    assert row[:2] == ["Combined", "score"]
    assert float(row[5]) == pytest.approx(half, rel=0.1)
    assert float(row[4]) == pytest.approx(numbers["difference"], abs=1e-3)


@pytest.mark.parametrize(
    ("level", "names"), [(1e-9, ["pixels/jitter"]), (250.0, ["pixels/motion", "pixels/flicker"])]
)
def test_lines_fit_a_terminal_whatever_the_numbers(level, names):
    generator = torch.Generator().manual_seed(0)
    before = {
        name: level * (1 + torch.rand(8, generator=generator))
        for name in ["reward/temporal_consistency", *names]
    }
    after = {name: value * 1.1 for name, value in before.items()}
    timings = dict.fromkeys(
        ("text", "rollout", "decode", "reward", "update", "refresh", "evaluate"), 300000.0
    )
    lines = format_summary(summarise(before, after, timings)).splitlines()
    assert max(map(len, lines)) < 80


def test_verdicts_go_by_the_bounds():
    summary = summarise(*measures(0.3), {})
    assert headline(summary) == "Held-out reward and judge are better"
    worse = summarise(*measures(-0.3), {})
    assert headline(worse) == "Held-out reward and judge are worse"
    assert "Held-out reward: got worse (-0.300" in verdict(worse)
    assert "Jitter is 36 % higher than before." in verdict(worse)
    summary["measures"]["judge/selected"] |= {"low": -0.1}
    assert headline(summary) == "Held-out reward is better, the judge shows no clear change"
    assert "Judge: no clear change" in verdict(summary)
    del summary["measures"]["judge/selected"]
    assert headline(summary) == "Held-out reward is better"
    assert headline({"measures": {}}) == "Held-out reward was not measured"
    assert verdict({"measures": {}}) == "No held-out reward was measured."


def test_a_doubtful_percentage_says_so():
    summary = summarise(*measures(0.3), {})
    summary["measures"]["pixels/jitter"] |= {"high": 0.1}
    assert "Jitter is 36 % lower than before (bounds include zero)." in verdict(summary)


def test_one_clip_has_values_and_no_bounds():
    before, after = ({name: values[:1] for name, values in side.items()} for side in measures(0.3))
    summary = json.loads(json.dumps(summarise(before, after, {}), allow_nan=False))
    reward = summary["measures"]["reward/selected"]
    assert reward["low"] is reward["high"] is None
    assert reward["difference"] == pytest.approx(reward["after"] - reward["before"])
    assert change("reward/selected", reward) == "unclear"
    lines = format_summary(summary).splitlines()
    heading = (
        "1 held-out clip, the same prompt and noise before and after. It has no bounds: give a second prompt"
    )
    assert " ".join(lines[:2]).startswith(heading)
    assert lines[5].split() == ["Combined", "score", *number_texts(reward), "no", "bounds"]
    assert number_texts(reward)[3] == "none"
    assert headline(summary) == "One held-out clip, which cannot tell a change from chance"
    assert verdict(summary).startswith("Held-out reward: +0.30")
    assert "on one clip, which has no bounds. Judge: +0." in verdict(summary)
    assert " lower than before (no bounds)." in verdict(summary)
    assert summarise_seeds([summary, summary])["measures"]["reward/selected"]["improved"] == 0


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ([1.0, 2.0], [1.5, 2.75], "unclear"),
        ([3.0, 3.0, 3.0], [3.0, 3.0, 3.0], "unclear"),
        ([0.0, 0.0], [0.0, 0.0], "unclear"),
        ([1.0, 2.0], [1.5, 2.5], "better"),
    ],
)
def test_few_clips_and_equal_ones_have_finite_bounds(before, after, word):
    """Two clips have bounds, which are wide; clips that all change alike have narrow ones."""
    tensors = ({"reward/selected": torch.tensor(side)} for side in (before, after))
    summary = json.loads(json.dumps(summarise(*tensors, {}), allow_nan=False))
    numbers = summary["measures"]["reward/selected"]
    assert numbers["low"] <= numbers["difference"] <= numbers["high"]
    assert change("reward/selected", numbers) == word
    assert "Combined score" in format_summary(summary)


def test_what_cannot_be_summarised():
    before, after = measures(0.3)
    with pytest.raises(ValueError, match="only one side has: extra"):
        summarise(before, after | {"extra": torch.zeros(32)}, {})
    with pytest.raises(ValueError, match="there is no held-out measure"):
        summarise({}, {}, {})
    with pytest.raises(
        ValueError, match="measure 'pixels/jitter': the value after training of clip 0 is nan"
    ):
        summarise(before, after | {"pixels/jitter": torch.full((32,), math.nan)}, {})
    short = {"pixels/jitter": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"value for each clip, got numbers of clips \[3, 32\]"):
        summarise(before | short, after | short, {})


def test_seeds_are_the_unit_when_seeds_are_compared():
    shifts = [0.1, 0.2, 0.3]
    groups = [summarise(*measures(shift, seed), {}) for seed, shift in enumerate(shifts)]
    random.Random(0).shuffle(groups)
    combined = summarise_seeds(groups)
    reward = combined["measures"]["reward/selected"]
    assert combined["seeds"] == 3
    assert reward["difference"] == pytest.approx(0.2, abs=1e-3)
    assert reward["sd"] == pytest.approx(0.1, abs=1e-3)
    assert reward["low"] == pytest.approx(0.2 - 4.302653 * 0.1 / math.sqrt(3), abs=2e-3)
    assert reward["improved"] == 3
    assert len(reward["each"]) == 3
    one = summarise_seeds(groups[:1])
    assert "sd" not in one["measures"]["reward/selected"]
    lines = format_seeds({"online": combined, "offline": one}).splitlines()
    assert lines[3].split() == ["measure", "online", "(3", "seeds)", "offline", "(1", "seed)"]
    assert lines[4].startswith("Reward: combined score ")
    assert "+0.200 ± 0.100  3/3" in lines[4]
    assert any(line.startswith("Pixels: jitter (px) ") for line in lines)


def test_seeds_with_different_measures():
    summary = summarise(*measures(0.3), {})
    other = json.loads(json.dumps(summary))
    del other["measures"]["judge/selected"]
    with pytest.raises(ValueError, match=r"only some have: judge/selected"):
        summarise_seeds([summary, other])
    with pytest.raises(ValueError, match="there is no summary to combine"):
        summarise_seeds([])
    with pytest.raises(ValueError, match="no group of seeds"):
        format_seeds({})


def test_a_seed_that_got_worse_is_not_counted_as_improved():
    seeds = [summarise(*measures(shift, seed), {}) for seed, shift in enumerate((0.3, -0.3))]
    assert summarise_seeds(seeds)["measures"]["reward/selected"]["improved"] == 1


def test_the_report_tells_the_base_from_the_final_policy():
    numbers = {"before": 1.0, "after": 3.0, "difference": 2.0, "low": 1.5, "high": 2.5}
    summary = {"clips": 2, "measures": {"reward/selected": numbers}, "timings": {}}
    cells = dict(re.findall(r'data-head="([^"]+)">([^<]*)<', summary_section(summary)))
    assert (cells["base"], cells["final"], cells["change"]) == ("1.000", "3.000", "+2.000")
    assert cells["95 % bounds"] == "[+1.500, +2.500]"
    assert "1.00 → 3.00" in tiles(summary, MetricRows([]))
