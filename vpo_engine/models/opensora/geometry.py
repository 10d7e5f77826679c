"""Sizes: pixels by resolution and aspect, frame-count names, latents, tokens (Open-Sora v1.2.0).

The tables are those of ``opensora/datasets/aspect.py``; an aspect is height:width, so "9:16" is landscape.
"""

from __future__ import annotations

import math

RESOLUTIONS = ("144p", "240p", "360p", "480p", "720p", "1080p")

# (height, width) in pixels: one row per aspect, one column per entry of RESOLUTIONS.
_PIXELS: dict[str, tuple[tuple[int, int], ...]] = {
    "3:8": ((117, 312), (196, 522), (294, 784), (392, 1046), (588, 1568), (882, 2352)),
    "9:21": ((125, 291), (210, 490), (314, 732), (420, 980), (628, 1466), (942, 2198)),
    "12:25": ((133, 277), (222, 462), (332, 692), (444, 925), (666, 1388), (998, 2080)),
    "1:2": ((135, 270), (226, 452), (340, 680), (452, 904), (678, 1356), (1018, 2036)),
    "9:17": ((139, 262), (232, 438), (350, 662), (466, 880), (698, 1318), (1048, 1980)),
    "27:50": ((141, 260), (236, 436), (352, 652), (470, 870), (706, 1306), (1058, 1958)),
    "9:16": ((144, 256), (240, 426), (360, 640), (480, 854), (720, 1280), (1080, 1920)),
    "5:8": ((151, 241), (252, 404), (380, 608), (506, 810), (758, 1212), (1138, 1820)),
    "2:3": ((156, 234), (262, 393), (392, 588), (522, 784), (784, 1176), (1176, 1764)),
    "3:4": ((166, 221), (276, 368), (416, 554), (554, 738), (832, 1110), (1248, 1664)),
    "1:1": ((192, 192), (320, 320), (480, 480), (640, 640), (960, 960), (1440, 1440)),
    "4:3": ((221, 165), (370, 278), (554, 416), (740, 555), (1108, 832), (1662, 1246)),
    "3:2": ((235, 156), (392, 262), (588, 392), (784, 522), (1176, 784), (1764, 1176)),
    "16:9": ((256, 144), (426, 240), (640, 360), (854, 480), (1280, 720), (1920, 1080)),
    "17:9": ((263, 139), (440, 232), (660, 350), (880, 466), (1320, 698), (1980, 1048)),
    "2:1": ((271, 135), (452, 226), (678, 340), (906, 454), (1358, 680), (2036, 1018)),
    "50:27": ((277, 132), (462, 222), (692, 332), (924, 444), (1386, 666), (2078, 998)),
}
ASPECTS = tuple(_PIXELS)

FRAMES = {
    "1x": 51,
    "2x": 102,
    "4x": 204,
    "8x": 408,
    "16x": 816,
    "2s": 51,
    "4s": 102,
    "8s": 204,
    "16s": 408,
    "32s": 816,
}
"""Frame counts by name: multiples of 51 frames, or seconds as the project rounds them."""

CHUNK_FRAMES = 17
TEMPORAL_FACTOR = 4
SPATIAL_FACTOR = 8
PATCH = 2
POSITION_SIZE = 512
"""Side in pixels of the square whose position embedding is unscaled."""


def pixel_size(resolution: str, aspect: str) -> tuple[int, int]:
    """(height, width) in pixels; ``aspect`` is height:width."""
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution is {resolution!r}; known: {', '.join(RESOLUTIONS)}")
    if aspect not in _PIXELS:
        raise ValueError(f"aspect (height:width) is {aspect!r}; known: {', '.join(ASPECTS)}")
    return _PIXELS[aspect][RESOLUTIONS.index(resolution)]


def num_frames(frames: str | int) -> int:
    """A frame count, or its name ("2s", "1x"), as a number."""
    if isinstance(frames, str) and not frames.isdecimal():
        if frames not in FRAMES:
            raise ValueError(f"frames is {frames!r}; give a number or one of {', '.join(FRAMES)}")
        return FRAMES[frames]
    count = int(frames)
    if count < 1:
        raise ValueError(f"frames is {count}; a video needs 1 frame or more")
    return count


def chunk_frames(frames: int) -> list[int]:
    """Frame counts of the chunks that the VAE handles one by one."""
    full, rest = divmod(frames, CHUNK_FRAMES)
    return [CHUNK_FRAMES] * full + ([rest] if rest else [])


def latent_size(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(T, h, w) of the published VAE: 5 per chunk of 17 frames and ceil(rest / 4); 8 pixels per cell."""
    latents = sum(-(-chunk // TEMPORAL_FACTOR) for chunk in chunk_frames(frames))
    return latents, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR


def decoded_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels of what the decoder gives back: 240 x 426 comes back as 240 x 424."""
    return height // SPATIAL_FACTOR * SPATIAL_FACTOR, width // SPATIAL_FACTOR * SPATIAL_FACTOR


def patch_grid(latent: tuple[int, int, int]) -> tuple[int, int, int]:
    """(T, rows, columns) of STDiT3's tokens for a latent size; odd rows or columns are padded by one."""
    return latent[0], -(-latent[1] // PATCH), -(-latent[2] // PATCH)


def position_scale(height: int, width: int) -> float:
    """By how much STDiT3 shrinks patch coordinates, for a size in pixels."""
    return math.sqrt(height * width) / POSITION_SIZE
