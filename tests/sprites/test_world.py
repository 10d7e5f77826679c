"""Test the sprites world: captions, rendering, damage and pixel measures."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from vpo_engine.data.sprites import world
from vpo_engine.data.sprites.damage import (
    BLUR_PX,
    CLEAN_SHARE,
    DESTRUCTIONS,
    FLICKER_GAIN,
    JITTER_HOLD_FRAMES,
    JITTER_PX,
    KINDS,
    MIXTURE_SEVERITY,
    SINGLE_SHARE,
    TILE_SHARE,
    _unmistakable,
    apply,
    damaged,
    draw_severities,
    mismatched_captions,
    sample_clean,
    sample_destroyed,
    sample_mixture,
    sample_wrecks,
)
from vpo_engine.data.sprites.measure import MEASURES, measure
from vpo_engine.data.sprites.world import FRAMES, SIZE, Attributes, draw_scene, rasterise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def only(kind: str, severity: float, count: int = 64) -> torch.Tensor:
    severities = torch.zeros(count, len(KINDS))
    severities[:, KINDS.index(kind)] = severity
    return severities


def test_captions_parse_back_to_their_sprites():
    captions = world.all_captions()
    assert len(captions) == len(set(captions)) == 60
    assert "a red circle moving left" in captions
    assert [world.parse_caption(text) for text in captions] == world.all_sprites()
    assert Attributes.of(captions).captions() == captions


@pytest.mark.parametrize(
    "text", ["", "a red circle", "A red circle moving left", "a pink circle moving left"]
)
def test_unknown_caption_is_an_error_naming_it_and_the_choices(text):
    with pytest.raises(ValueError, match="not one of the sprites world") as error:
        world.parse_caption(text)
    assert repr(text) in str(error.value)
    assert "triangle" in str(error.value)


def test_withheld_captions_are_sixteen_known_and_balanced():
    withheld = world.withheld_captions()
    assert len(set(withheld)) == 16
    assert set(withheld) < set(world.all_captions())
    sprites = [world.parse_caption(text) for text in withheld]
    for field, values in (("colour", 5), ("shape", 3), ("direction", 4)):
        counts = Counter(getattr(sprite, field) for sprite in sprites)
        assert len(counts) == values
        assert max(counts.values()) - min(counts.values()) <= 1


def test_withheld_captions_never_change():
    assert world.withheld_captions()[:3] == [
        "a red circle moving left",
        "a green square moving right",
        "a blue triangle moving up",
    ]


@pytest.mark.parametrize("sample", [sample_clean, sample_mixture, sample_destroyed, sample_wrecks])
def test_clips_are_a_function_of_the_seed(sample):
    one, same, other = sample(24, seeded(3)), sample(24, seeded(3)), sample(24, seeded(4))
    assert one.videos.shape == (24, FRAMES, SIZE, SIZE, 3)
    assert one.videos.dtype == torch.uint8
    assert torch.equal(one.videos, same.videos)
    assert one.captions == same.captions
    assert torch.equal(one.severities, same.severities)
    assert not torch.equal(one.videos, other.videos)


def test_clean_sprites_stay_in_view_and_move_as_captioned():
    attributes = Attributes.draw(512, seeded(1))
    scene = draw_scene(attributes, seeded(2))
    margin = (scene.radius + world.EDGE).view(-1, 1, 1)
    assert (scene.centre >= margin - 1e-4).all()
    assert (scene.centre <= SIZE - 1 - margin + 1e-4).all()
    heading = torch.tensor(list(world.DIRECTIONS.values()), dtype=torch.float32)[attributes.direction]
    travel = scene.centre[:, -1] - scene.centre[:, 0]
    along = (travel * heading).sum(1)
    assert along.min() >= world.TRAVEL[0] - 1e-3
    assert along.max() <= world.TRAVEL[1] + 1e-3
    torch.testing.assert_close(travel.norm(dim=1), along, atol=1e-4, rtol=0)
    assert scene.centre.diff(n=2, dim=1).abs().max() < 1e-4


def one_scene(shape: str, radius: float = 6.0, x: float = 15.0, y: float = 14.0) -> world.Scene:
    scene = draw_scene(Attributes.of([f"a white {shape} moving right"]), seeded())
    return scene.changed(
        centre=torch.tensor([x, y]).expand(1, FRAMES, 2),
        radius=torch.tensor([radius]),
        background=torch.tensor([40.0]),
    )


@pytest.mark.parametrize(("shape", "area"), [("circle", torch.pi), ("square", 1.76**2), ("triangle", 2.28)])
def test_shapes_cover_their_area_around_their_centroid(shape, area):
    frame = rasterise(one_scene(shape))[0, 0, :, :, 0].double()
    coverage = (frame - 40) / (245 - 40)
    assert coverage.sum().item() == pytest.approx(area * 36, rel=0.02)
    grid = torch.arange(SIZE, dtype=torch.float64)
    assert (coverage.sum(0) * grid).sum() / coverage.sum() == pytest.approx(15.0, abs=0.05)
    assert (coverage.sum(1) * grid).sum() / coverage.sum() == pytest.approx(14.0, abs=0.1)
    assert ((coverage > 0.05) & (coverage < 0.95)).any()  # antialiased


def test_blur_keeps_the_light_and_widens_by_sigma_squared():
    sharp, sigma = one_scene("circle", radius=5.0), 2.0
    blurred = sharp.changed(blur=torch.tensor([sigma]))
    grid = torch.arange(SIZE, dtype=torch.float64)
    light, spread = [], []
    for scene in (sharp, blurred):
        column = (rasterise(scene)[0, 0, :, :, 0].double() - 40).sum(0)
        mean = (column * grid).sum() / column.sum()
        light.append(column.sum().item())
        spread.append(((column * (grid - mean).square()).sum() / column.sum()).item())
    assert light[1] == pytest.approx(light[0], rel=0.02)
    assert spread[1] - spread[0] == pytest.approx(sigma**2, rel=0.1)


def test_no_damage_is_exactly_the_clean_clip():
    attributes = Attributes.draw(16, seeded(5))
    scene = draw_scene(attributes, seeded(6))
    assert torch.equal(rasterise(apply(scene, torch.zeros(16, 5), seeded(7))), rasterise(scene))


def test_severities_are_the_numbers_they_claim_to_be():
    attributes, severity = Attributes.draw(64, seeded(8)), 0.6
    clean = draw_scene(attributes, seeded(9))

    def after(kind: str) -> world.Scene:
        return apply(clean, only(kind, severity), seeded(10))

    offset = (after("jitter").centre - clean.centre).norm(dim=2)
    torch.testing.assert_close(offset, torch.full_like(offset, JITTER_PX * severity), atol=1e-3, rtol=0)
    moved = (after("jitter").centre - clean.centre).diff(dim=1).norm(dim=2)
    jumps = moved[moved > 1e-3]
    assert jumps.min() >= JITTER_PX * severity * 2**0.5 * 0.999
    assert (moved > 1e-3).sum(1).max() <= FRAMES // JITTER_HOLD_FRAMES + 1

    gain = after("flicker").gain - 1
    assert gain.abs().max() <= FLICKER_GAIN * severity + 1e-6
    assert gain.amax(1).min() > 0.8 * FLICKER_GAIN * severity

    assert torch.equal(after("blur").blur, torch.full((64,), BLUR_PX * severity))

    length = (clean.centre[:, -1] - clean.centre[:, 0]).norm(dim=1)
    frozen = after("freeze").centre
    torch.testing.assert_close(
        (frozen[:, -1] - frozen[:, 0]).norm(dim=1), (1 - severity) * length, atol=1e-3, rtol=0
    )

    changed = after("identity")
    palette = torch.tensor(list(world.COLOURS.values()), dtype=torch.float32)
    end = (changed.rgb[:, -1] - (1 - severity) * clean.rgb[:, -1]) / severity
    distance = (end.unsqueeze(1) - palette).norm(dim=2)
    assert distance.amin(1).max() < 1e-2
    assert (distance.argmin(1) != attributes.colour).all()
    assert torch.equal(changed.rgb[:, 0], clean.rgb[:, 0])
    morphed = changed.morph.amax(1)
    assert morphed.unique().tolist() == pytest.approx([0.0, severity])
    assert (changed.other_shape != changed.shape).all()


@pytest.mark.parametrize(
    "severities", [torch.zeros(4, 4), torch.full((4, 5), 1.1), torch.full((4, 5), torch.nan)]
)
def test_severities_that_make_no_sense_are_refused(severities):
    scene = draw_scene(Attributes.draw(4, seeded()), seeded())
    with pytest.raises(ValueError, match="severities"):
        apply(scene, severities, seeded())


def test_mixture_has_the_documented_shares():
    severities = draw_severities(20000, seeded(11))
    kinds = (severities > 0).sum(1)
    assert (kinds == 0).float().mean() == pytest.approx(CLEAN_SHARE, abs=0.015)
    assert (kinds == 1).float().mean() == pytest.approx(SINGLE_SHARE, abs=0.015)
    assert kinds.max() == 2
    positive = severities[severities > 0]
    assert positive.min() >= MIXTURE_SEVERITY[0]
    assert positive.max() <= MIXTURE_SEVERITY[1]
    share = (severities > 0).float().mean(0)
    assert (share - share.mean()).abs().max() < 0.015


def test_mismatched_captions_are_wrong_and_known():
    attributes = Attributes.draw(200, seeded(12))
    wrong = mismatched_captions(attributes, seeded(13))
    assert all(one != other for one, other in zip(wrong, attributes.captions(), strict=True))
    assert set(wrong) <= set(world.all_captions())


@pytest.mark.parametrize(
    ("kind", "name", "sign"),
    [
        ("flicker", "flicker", 1),
        ("jitter", "jitter", 1),
        ("blur", "sharpness", -1),
        ("identity", "colour_change", 1),
        ("freeze", "displacement", -1),
    ],
)
def test_measures_follow_the_severity_clip_by_clip(kind, name, sign):
    attributes = Attributes.draw(64, seeded(14))
    values = torch.stack(
        [
            measure(damaged(attributes, only(kind, severity), seeded(15)).videos, attributes.captions())[name]
            for severity in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
    )
    assert (sign * values.diff(dim=0) > 0).float().mean() > 0.98
    assert (sign * values.mean(1).diff() > 0).all()
    assert MEASURES[name].better == -sign


@pytest.mark.parametrize("kind", ["flicker", "jitter", "blur", "freeze"])
def test_colour_change_ignores_other_damage(kind):
    clips = damaged(Attributes.draw(64, seeded(16)), only(kind, 1.0), seeded(17))
    assert measure(clips.videos, clips.captions)["colour_change"].mean() < 0.02


def test_measures_are_exact_on_a_square_that_hops_by_whole_pixels():
    """A 5 x 5 block moving right 2 px every second frame, and one step up at the end."""
    video = torch.full((1, 9, SIZE, SIZE, 3), 50, dtype=torch.uint8)
    for frame in range(9):
        x, y = 3 + 2 * (frame // 2), 10 - (frame == 8)
        video[0, frame, y : y + 5, x : x + 5] = torch.tensor([200, 50, 50], dtype=torch.uint8)
    values = measure(video, ["a red square moving right"])
    second = torch.tensor([2.0] * 6 + [5.0**0.5])  # steps 0 2 0 2 0 2 0 (2, -1)
    assert values["jitter"].item() == pytest.approx(second.mean().item(), abs=1e-5)
    time = torch.arange(9.0) - 4
    place = torch.tensor([[2.0 * (frame // 2), -float(frame == 8)] for frame in range(9)])
    slope = (place * time.unsqueeze(1)).sum(0) / time.square().sum()
    assert values["displacement"].item() == pytest.approx(8 * slope[0].item(), abs=1e-4)
    assert values["displacement_absolute"].item() == pytest.approx(8 * slope.norm().item(), abs=1e-4)
    assert values["flicker"].item() == 0
    assert values["colour_change"].item() == pytest.approx(0, abs=1e-6)
    assert values["sharpness"].item() == pytest.approx(1.0, abs=1e-5)
    assert values["blank_rate"].item() == 0


def test_flicker_and_colour_change_are_exact_on_built_clips():
    video = torch.full((1, 10, SIZE, SIZE, 3), 40, dtype=torch.uint8)
    video[0, 1::2] = 60
    video[0, :, 10:16, 10:16] = torch.tensor([200, 100, 100], dtype=torch.uint8)
    video[0, 5:, 10:16, 10:16] = torch.tensor([100, 100, 200], dtype=torch.uint8)
    values = measure(video, ["a red square moving left"])
    assert values["flicker"].item() == pytest.approx(20 / 50, abs=1e-6)
    assert values["colour_change"].item() == pytest.approx(0.25 * 2**0.5 / 2, abs=1e-3)
    assert values["displacement"].item() == pytest.approx(0, abs=1e-4)


def test_displacement_has_the_sign_of_the_caption():
    clips = sample_clean(32, seeded(18))
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    turned = []
    for caption in clips.captions:
        head, _, last = caption.rpartition(" ")
        turned.append(f"{head} {opposite[last]}")
    ahead, back = measure(clips.videos, clips.captions), measure(clips.videos, turned)
    torch.testing.assert_close(ahead["displacement"], -back["displacement"])
    assert ahead["displacement"].min() > 7.5


def test_clips_without_a_sprite_get_the_worst_value_and_are_counted():
    clips = sample_destroyed(8 * len(DESTRUCTIONS), seeded(19))
    values = measure(clips.videos, clips.captions)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in values.values())
    for kind in ("noise", "blotches", "grey", "empty"):
        rows = slice(DESTRUCTIONS.index(kind), None, len(DESTRUCTIONS))
        assert (values["blank_rate"][rows] == 1).all(), kind
        for name, meaning in MEASURES.items():
            if name != "flicker":
                assert (values[name][rows] == meaning.worst).all(), (kind, name)


def largest_tile(videos: torch.Tensor) -> torch.Tensor:
    """Of what differs from the frame's median, the share in its brightest 8 px tile, mean over frames, [B]."""
    frames = videos.float().flatten(2, 3)
    light = (frames - frames.median(dim=2, keepdim=True).values).abs().amax(-1)
    tiles = light.view(-1, FRAMES, 4, 8, 4, 8).sum(dim=(3, 5)).flatten(2)
    return (tiles.amax(2) / tiles.sum(2).clamp_min(1)).mean(1)


@pytest.mark.long
def test_tiles_of_wrecks_show_no_nearly_whole_sprite():
    number, kinds = DESTRUCTIONS.index("tiles"), len(DESTRUCTIONS)
    loose = largest_tile(sample_destroyed(150 * kinds, seeded(21)).videos[number::kinds])
    strict = largest_tile(sample_wrecks(150, seeded(21), ("tiles",)).videos)
    assert (loose > TILE_SHARE + 0.02).float().mean() > 0.02
    assert strict.max() < TILE_SHARE + 0.02  # levels are rounded, and so is the background


def test_overlaid_sprites_that_show_but_one_are_told_from_several():
    clip, others = (rasterise(one_scene("circle", x=x, y=8.0)).float() for x in (8.0, 22.0))
    assert _unmistakable("crowd", clip, others).all()
    assert not _unmistakable("crowd", clip, torch.full_like(clip, 40)).any()


def test_wrecks_come_in_the_order_of_their_kinds_under_captions_of_sprites():
    kinds = ("empty", "noise", "empty")
    clips = sample_wrecks(7, seeded(22), kinds)
    spread = clips.videos.float().std(dim=(2, 3)).mean(dim=(1, 2))
    assert [value > 30 for value in spread.tolist()] == [False, True, False, False, True, False, False]
    assert clips.captions == clips.attributes.captions()
    assert (clips.severities == 1).all()


def test_a_few_blank_frames_are_left_out_not_averaged_in():
    clips = sample_clean(8, seeded(20))
    whole = measure(clips.videos, clips.captions)
    videos = clips.videos.clone()
    videos[:, 4:6] = videos[:, 4:6, :1, :1]
    values = measure(videos, clips.captions)
    torch.testing.assert_close(values["blank_rate"], torch.full((8,), 2 / FRAMES))
    torch.testing.assert_close(values["displacement"], whole["displacement"], atol=0.1, rtol=0)
    assert values["jitter"].max() < 0.2


@pytest.mark.parametrize(
    ("videos", "prompts", "message"),
    [
        (torch.zeros(1, 5, 32, 32, 3), ["a red circle moving left"], "uint8"),
        (torch.zeros(5, 32, 32, 3, dtype=torch.uint8), ["a red circle moving left"], r"\[B, F, H, W, 3\]"),
        (torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8), ["a red circle moving left"], "F >= 3"),
        (torch.zeros(2, 5, 32, 32, 3, dtype=torch.uint8), ["a red circle moving left"], "1 prompts for 2"),
        (torch.zeros(1, 5, 32, 32, 3, dtype=torch.uint8), ["a dog"], "'a dog'"),
    ],
)
def test_measure_refuses_what_it_cannot_measure(videos, prompts, message):
    with pytest.raises(ValueError, match=message):
        measure(videos, prompts)


def test_a_sprite_that_shows_in_every_second_frame_has_the_worst_jitter():
    """Nothing tells how it moves, though more than half of the frames show it."""
    clips = sample_clean(4, seeded(24))
    videos = clips.videos.clone()
    videos[:, 1::2] = videos[:, 1::2, :1, :1]
    values = measure(videos, clips.captions)
    torch.testing.assert_close(values["blank_rate"], torch.full((4,), 8 / FRAMES))
    assert (values["jitter"] == MEASURES["jitter"].worst).all()
    assert (values["sharpness"] > 0).all()
