"""The time stamps of a video stream, from its packets, without decoding."""

from bisect import bisect_right
from fractions import Fraction
from typing import Any


class PtsIndex:
    """The time stamps of a stream: which frames there are, when each is shown, and where decoding can
    begin."""

    def __init__(self) -> None:
        self.count = 0
        self._times: list[int] | None = []
        self._keys: list[tuple[int, int]] = []

    def add(self, packet: Any, codec: str) -> None:
        """Takes note of one packet, in file order."""
        pts, dts = packet.pts, packet.dts
        if packet.is_keyframe and pts is not None:
            self._keys.append((pts, pts if dts is None else min(pts, dts)))
        if packet.is_discard or (codec in ("vp8", "libvpx") and not bytes(packet)[0] & 0x10):
            return  # cut away by an edit list, or a reference picture of VP8 that is never shown
        self.count += 1
        if pts is None:
            self._times = None
        elif self._times is not None:
            self._times.append(pts)

    def finish(self, trusted: bool) -> None:
        """After the last packet. Time stamps that are not trusted, not there or not distinct are of no use:
        then frames are counted from the beginning."""
        self._keys.sort()
        if self._times is not None:
            self._times.sort()
            distinct = all(a < b for a, b in zip(self._times, self._times[1:], strict=False))
            if not (trusted and distinct):
                self._times = None

    @property
    def times(self) -> list[int] | None:
        """When each frame is shown, ascending, in units of the stream; None where time stamps are of no use."""
        return self._times

    def number(self, pts: int | None) -> int | None:
        """The number of the frame that is on screen at `pts`; None where only counting helps."""
        if self._times is None or pts is None:
            return None
        return max(bisect_right(self._times, pts) - 1, 0)

    def entries(self, number: int) -> list[int]:
        """Time stamps to seek to in order to decode frame `number`, the best first."""
        if self._times is None:
            return []
        place = bisect_right(self._keys, (self._times[number], 1 << 62)) - 1
        if place < 0:
            return []
        # Some demuxers seek by the time of display, some by the time of decoding.
        return list(dict.fromkeys(self._keys[place]))

    def rate(self, time_base: Fraction) -> float:
        """Frames a second by the time stamps; 0 where they do not tell."""
        if self._times is None or len(self._times) < 2:
            return 0.0
        return float((len(self._times) - 1) / ((self._times[-1] - self._times[0]) * time_base))
