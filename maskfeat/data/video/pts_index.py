"""Presentation timestamps (PTS) of a video stream, read from its packets without decoding."""

import itertools
from bisect import bisect_right
from fractions import Fraction
from typing import Any


class PtsIndex:
    """Index of the presentation timestamps of a stream: its frames, their times, and where decoding can start.

    Args:
        ticks: units of the stream's time base in a frame, as the container declares; 0 = not known.
    """

    def __init__(self, ticks: float = 0.0) -> None:
        self.count = 0
        self.goes_back = False
        self._ticks = ticks
        self._times: list[int] | None = []
        self._key_frames: list[tuple[int, int]] = []
        self._before: tuple[int | None, int | None] = None, None

    def add(self, packet: Any, codec: str) -> None:
        """Add one packet, in file order."""
        pts, dts = packet.pts, packet.dts
        if packet.is_keyframe and pts is not None:
            self._key_frames.append((pts, pts if dts is None else min(pts, dts)))
        (before, decoded), self._before = self._before, (pts, dts)
        self.goes_back |= dts is not None and decoded is not None and dts < decoded
        if pts is None and before is not None and codec == "h264" and 0 < 1.5 * (packet.duration or 0) < self._ticks:
            return  # the second field of a frame, whose packets MPEG-TS may give one timestamp
        if packet.is_discard or (codec in ("vp8", "libvpx") and not bytes(packet)[0] & 0x10):
            return  # removed by an edit list, or a reference frame of VP8 that is not displayed
        self.count += 1
        if pts is None:
            self._times = None
        elif self._times is not None:
            self._times.append(pts)

    def finish(self, trusted: bool) -> None:
        """Complete the index after the last packet.

        Timestamps that are missing, not distinct or not trusted are discarded; frames are then identified by counting
        from the beginning.

        Args:
            trusted: whether the container stores presentation times.
        """
        self._key_frames.sort()
        if self._times is not None:
            self._times.sort()
            distinct = all(a < b for a, b in itertools.pairwise(self._times))
            if not (trusted and distinct):
                self._times = None

    @property
    def times(self) -> list[int] | None:
        """Timestamps of the frames, ascending, in the time base of the stream; None if they were discarded."""
        return self._times

    def number(self, pts: int | None) -> int | None:
        """Return the number of the frame displayed at `pts`; None if frames have to be counted."""
        if self._times is None or pts is None:
            return None
        return max(bisect_right(self._times, pts) - 1, 0)

    def seek_timestamps(self, number: int) -> list[int]:
        """Return the timestamps to seek to in order to decode frame `number`, the best first."""
        if self._times is None:
            return []
        position = bisect_right(self._key_frames, (self._times[number], 1 << 62)) - 1
        if position < 0:
            return []
        # Some demuxers seek by presentation time (PTS), some by decoding time (DTS).
        return list(dict.fromkeys(self._key_frames[position]))

    def rate(self, time_base: Fraction) -> float:
        """Return the frame rate in frames per second according to the timestamps; 0 if they do not determine it."""
        if self._times is None or len(self._times) < 2:
            return 0.0
        return float((len(self._times) - 1) / ((self._times[-1] - self._times[0]) * time_base))

    def is_regular(self, rate: float, time_base: Fraction) -> bool:
        """Return whether nine in ten times from one frame to the next are those of a frame rate, within 5 %."""
        if self._times is None or len(self._times) < 2 or not rate:
            return False
        ticks = 1 / (rate * float(time_base))
        near = sum(abs(b - a - ticks) <= 0.05 * ticks for a, b in itertools.pairwise(self._times))
        return near >= 0.9 * (len(self._times) - 1)
