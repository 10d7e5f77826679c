"""The published sizes of videos in pixels, by resolution and aspect (Open-Sora v1.2.0).

The table is that of ``opensora/datasets/aspect.py``; an aspect is height:width, so "9:16" is landscape.
"""

from __future__ import annotations

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

CHUNK_FRAMES = 17
"""Frames that the VAE encodes and decodes as one chunk."""


def pixel_size(resolution: str, aspect: str) -> tuple[int, int]:
    """Return (height, width) in pixels; ``aspect`` is height:width."""
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution is {resolution!r}; known: {', '.join(RESOLUTIONS)}")
    if aspect not in _PIXELS:
        raise ValueError(f"aspect (height:width) is {aspect!r}; known: {', '.join(ASPECTS)}")
    return _PIXELS[aspect][RESOLUTIONS.index(resolution)]


def named_size(height: int, width: int) -> tuple[str, str]:
    """Return (resolution, aspect) of a size in pixels; ValueError names the nearest size of the table."""
    sizes = {
        size: (resolution, aspect)
        for aspect, row in _PIXELS.items()
        for resolution, size in zip(RESOLUTIONS, row, strict=True)
    }
    if (height, width) not in sizes:
        near = min(sizes, key=lambda size: abs(size[0] - height) + abs(size[1] - width))
        raise ValueError(
            f"{height} x {width} pixels is not among the published sizes; the nearest is {near[0]} x {near[1]}"
        )
    return sizes[height, width]
