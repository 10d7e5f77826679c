"""The rule of a model family about the sizes of its videos."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SizeRule:
    """The sizes of videos that a family can represent.

    Frame counts are ``frame_step`` * k + ``frame_offset``, or that with one of ``more_offsets``. With ``exact`` other
    counts are refused; without it they are possible, but the last group of frames is incomplete. Height and width are
    multiples of ``side`` pixels.
    """

    frame_step: int = 1
    frame_offset: int = 0
    exact: bool = False
    side: int = 1
    more_offsets: tuple[int, ...] = ()

    def frames(self, groups: int) -> int:
        """Return the frame count of this many whole groups."""
        return self.frame_step * groups + self.frame_offset

    def check_frames(self, frames: int) -> None:
        """Raise ValueError, naming the nearest valid counts, for a frame count that the family cannot represent."""
        if not self.exact or self._possible(frames):
            return
        below = next((count for count in range(frames - 1, 0, -1) if self._possible(count)), None)
        above = next(count for count in range(max(frames, 0) + 1, 2**31) if self._possible(count))
        near = " or ".join(str(count) for count in (below, above) if count is not None)
        forms = " or ".join(f"{self.frame_step}k + {offset}" for offset in self._offsets)
        raise ValueError(f"model.num_frames={frames} must be {forms} for this model; set it to {near}")

    @property
    def _offsets(self) -> tuple[int, ...]:
        return (self.frame_offset, *self.more_offsets)

    def _possible(self, frames: int) -> bool:
        """Return whether a count of frames, at least 1, makes whole groups."""
        return any(frames >= offset and not (frames - offset) % self.frame_step for offset in self._offsets)

    def check_sides(self, height: int, width: int) -> None:
        """Raise ValueError, naming the nearest valid size, for a size in pixels that the family cannot represent."""
        if height % self.side or width % self.side:
            near = [max(1, round(length / self.side)) * self.side for length in (height, width)]
            raise ValueError(
                f"{height} x {width} pixels must be divisible by {self.side} for this model; the nearest size is "
                f"{near[0]} x {near[1]}"
            )
