import base64
import html
import io
import itertools
import math
import re

import pytest
import torch
from fake_run import clip
from PIL import Image

from vpo_engine.runs.charts import Chart, Series, format_number, line_chart, nice_ticks, running_mean
from vpo_engine.runs.frame_sheets import make_frame_sheet
from vpo_engine.runs.report_curves import chart_section
from vpo_engine.runs.report_rows import MetricRows


def test_shares_begin_at_zero():
    for ys in ([0.0, 0.0], [0.4, 0.9], [1.0, 1.0]):
        chart = Chart("Tie rate", [Series("ties", list(enumerate(ys)), 1)], percent=True, from_zero=True)
        ticks = re.findall(r'class="end">(-?[\d.]+)', line_chart(chart))
        assert ticks[0] == "0"
        assert ticks[-1] == "100"


def test_steps_are_whole_numbers():
    svg = line_chart(Chart("t", [Series("s", [(float(x), 1.0) for x in range(1, 13)], 1)]))
    assert re.findall(r'class="mid">([\d.]+)', svg) == ["3", "6", "9", "12"]


def unpack(strip):
    data = base64.b64decode(strip.url.split(",")[1])
    sheet = torch.frombuffer(
        bytearray(Image.open(io.BytesIO(data)).convert("RGB").tobytes()), dtype=torch.uint8
    )
    sheet = sheet.view(-1, strip.columns * strip.width, 3)
    frames = []
    for index in range(strip.frames):
        x, y = index % strip.columns * strip.width, index // strip.columns * strip.height
        frames.append(sheet[y : y + strip.height, x : x + strip.width])
    return torch.stack(frames), len(data)


@pytest.mark.parametrize(("frames", "side"), [(1, 8), (5, 9), (17, 32), (13, 64)])
def test_small_clips_keep_every_pixel(frames, side):
    video = clip(torch.Generator().manual_seed(0), 1.0, frames=frames, side=side)
    strip = make_frame_sheet(video, 200_000)
    assert strip.exact
    assert torch.equal(unpack(strip)[0], video)


def test_large_clips_are_reduced_to_their_budget():
    video = clip(torch.Generator().manual_seed(0), 1.0, frames=24, side=320)
    strip = make_frame_sheet(video, 60_000)
    shown, size = unpack(strip)
    assert not strip.exact
    assert size <= 60_000
    assert shown.shape[0] == 24
    assert 60 <= strip.width == strip.height < 320
    # The picture is still the same one: compare coarse means.
    coarse = [
        torch.nn.functional.adaptive_avg_pool2d(v.float().permute(0, 3, 1, 2), 6) for v in (shown, video)
    ]
    assert (coarse[0] - coarse[1]).abs().mean() < 4


def test_noise_larger_than_any_budget_still_fits():
    video = torch.randint(
        0, 256, (16, 128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    shown, size = unpack(make_frame_sheet(video, 20_000))
    assert size <= 20_000
    assert len(shown) == 16


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.4, 0.8), (-0.01, 0.015), (3, 3), (0, 0), (-5, -5), (1e-9, 3e-9), (0, 1e7), (97, 103)],
)
def test_ticks_are_few_round_and_cover_the_data(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert all(step == pytest.approx(steps[0], rel=1e-6) for step in steps)


def test_a_running_mean_follows_a_line_exactly():
    points = [(float(x), 2.0 * x + 1) for x in range(30)]
    assert running_mean(points, 7) == [(x, pytest.approx(y)) for x, y in points]
    assert running_mean([(0.0, 0.0), (1.0, 3.0), (2.0, 0.0)], 3)[1] == (1.0, 1.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (4.567, "4.57"),
        (-0.0062, "-0.0062"),
        (2e-5, "2e-5"),
        (1234.5, "1234"),
        (100, "100"),
        (1.5e7, "1.5e7"),
    ],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


def test_percentages_keep_the_digits_that_tell_ticks_apart():
    assert [format_number(v, percent=True) for v in (0.95, 0.975, 1.0)] == [
        "95\N{NO-BREAK SPACE}%",
        "97.5\N{NO-BREAK SPACE}%",
        "100\N{NO-BREAK SPACE}%",
    ]


def test_a_chart_stays_within_its_frame():
    points = [(float(x), math.sin(x) * 10**6) for x in range(200)]
    for series in (points, points[:1], [(5.0, 0.0)] * 3):
        svg = line_chart(
            Chart("t", [Series("s", series, 1, noisy=True)], baseline=(0.0, "zero"), marks=(5.0,))
        )
        for pair in re.findall(r"(-?[\d.]+),(-?[\d.]+)", " ".join(re.findall(r'points="([^"]*)"', svg))):
            assert 0 <= float(pair[0]) <= 300
            assert 0 <= float(pair[1]) <= 190


def test_a_chart_without_points_is_left_out():
    assert line_chart(Chart("t", [Series("s", [], 1)])) == ""


def test_the_curves_of_the_report_are_those_that_their_names_say():
    names = (
        "reward/selected",
        "judge/selected",
        "reward/visual_quality",
        "pixels/jitter",
        "pixels/sharpness",
    )
    first, last = (
        {"step": step, "kind": "eval"} | {f"held_out/{n}": v for n, v in zip(names, values, strict=True)}
        for step, values in ((0, (1.0, 3.0, 2.0, 2.0, 4.0)), (4, (1.5, 2.5, 2.25, 1.0, 6.0)))
    )
    numbers = {"margin": 0.5, "winner_error_change": 0.25, "loser_error_change": 0.75}
    steps = [
        {"step": step, "kind": "train", "reference_age": age, "optimizer_steps": made} | numbers
        for step, age, made in ((1, 0, 0), (2, 1, 1), (3, 0, 2), (4, 1, 3))
    ]
    page = chart_section(MetricRows([first, *steps, last]))
    spoken = html.unescape(page).replace("\N{NO-BREAK SPACE}", " ")
    for text in (
        "Reward: held out from 1 at step 0 to 1.5 at step 4; judge, held out from 3 at step 0 to 2.5 at step 4",
        "Reward by dimension: visual quality from 0 at step 0 to 0.25 at step 4",
        "Damage: jitter from 100 % at step 0 to 50 % at step 4",
        "Motion and detail: sharpness from 100 % at step 0 to 150 % at step 4",
        "winner from 0.25 at step 1 to 0.25 at step 4; loser from 0.75 at step 1 to 0.75 at step 4",
    ):
        assert f'{text}"' in spoken, text
    assert re.findall(r'class="mark" x1="([\d.]+)"', page) == ["209.3"] * 2, "of margin and errors, at step 3"
