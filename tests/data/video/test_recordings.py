"""Files as cameras and recorders write them: in fields, joined from several, with gaps, in rare colours."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from maskfeat.data.video.decoder import open_video
from maskfeat.data.video.temporal_sampling import clip_length, clip_span, frame_indices
from tests.data.media import read_numbers, write_video

_MACROBLOCKS = 8  # of a field: 64 x 32 pixels


class _Bits:
    """A bit string of H.264 (ITU-T H.264, 9.1)."""

    def __init__(self) -> None:
        self.bits: list[int] = []

    def u(self, width: int, *values: int) -> "_Bits":
        for value in values:
            self.bits += [value >> place & 1 for place in range(width - 1, -1, -1)]
        return self

    def ue(self, *values: int) -> "_Bits":
        for value in values:
            width = (value + 1).bit_length()
            self.u(width - 1, 0).u(width, value + 1)
        return self

    def align(self) -> "_Bits":
        return self.u(-len(self.bits) % 8, 0)

    def unit(self, header: int) -> bytes:
        """As a NAL unit with its start code."""
        self.u(1, 1).align()
        body = np.packbits(self.bits).tobytes()
        escaped, zeros = bytearray(), 0
        for byte in body:
            if zeros >= 2 and byte <= 3:
                escaped.append(3)
                zeros = 0
            escaped.append(byte)
            zeros = 0 if byte else zeros + 1
        return b"\0\0\0\1" + bytes([header]) + bytes(escaped)


def _field(level: int, number: int, bottom: int, idr: int) -> bytes:
    """One field of a frame of one grey level, its macroblocks as plain samples (I_PCM)."""
    bits = _Bits().ue(0, 7, 0).u(4, number).u(1, 1, bottom)
    bits = bits.ue(0).u(1, 0, 0) if idr else bits.u(1, 0)
    bits.ue(0, 1)
    for _ in range(_MACROBLOCKS):
        bits.ue(25).align().u(8, *([level] * 256), *([128] * 128))
    return bits.unit(0x65 if idr else 0x61)


def write_fields(path: Path, levels: list[int]) -> Path:
    """Field-coded H.264 at 25 frames a second, the two fields of a frame under one timestamp."""
    sequence = _Bits().u(8, 77, 0, 30).ue(0, 0, 2, 1).u(1, 0).ue(3, 1).u(1, 0, 0, 1, 0, 1)
    sequence.u(1, 0, 0, 0, 0, 1).u(32, 1, 50).u(1, 1, 0, 0, 0, 0)
    picture = _Bits().ue(0, 0).u(1, 0, 0).ue(0, 0, 0).u(1, 0).u(2, 0).ue(0, 0, 0).u(1, 1, 0, 0)
    start, delimiter = sequence.unit(0x67) + picture.unit(0x68), _Bits().u(3, 0).unit(9)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number, level in enumerate(levels):
            idr = int(number % 10 == 0)
            top, bottom = (_field(level, number % 10, which, idr and not which) for which in (0, 1))
            packet = av.Packet(delimiter + (start if idr else b"") + top + delimiter + bottom)
            packet.pts = packet.dts = 3600 * number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 90000), stream, bool(idr)
            container.mux(packet)
    return path


@pytest.mark.parametrize("suffix", [".ts", ".mp4"])
def test_fields(suffix: str, tmp_path: Path) -> None:
    """MPEG-TS gives the second field of each frame as a packet of its own, without a time."""
    levels = [16 + 5 * number for number in range(40)]
    with open_video(write_fields(tmp_path / f"a{suffix}", levels)) as video:
        assert video.info.frames == 40 and video.info.fps == 25
        found = video.frames(range(40)).mean(axis=(1, 2, 3))
        expected = (np.array(levels) - 16) * 255 / 219
        assert np.abs(found - expected).max() < 2
    with open_video(tmp_path / f"a{suffix}") as video:
        assert abs(video.frames([33]).mean() - expected[33]) < 2


def joined(folder: Path, milliseconds: int) -> Path:
    """Two recordings of 30 frames, one after the other, the second of which begins at this time."""
    options = {"bf": "2", "g": "12"}
    first = write_video(folder / "a.ts", frames=30, options=options)
    times = [40 * number + milliseconds for number in range(30)]
    second = write_video(
        folder / "b.ts", frames=30, first=100, times=times, time_base=Fraction(1, 1000), options=options
    )
    both = folder / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    return both


@pytest.mark.parametrize("milliseconds", [0, 1010, 1_000_000])
def test_joined_recordings(milliseconds: int, tmp_path: Path) -> None:
    """The second begins anew, before the end of the first, or long after it."""
    with open_video(joined(tmp_path, milliseconds)) as video:
        assert video.info.frames == 60
        assert video.info.fps == pytest.approx(25, rel=0.05)
        assert read_numbers(video.frames(range(60))) == [*range(30), *range(100, 130)]
        start, end = clip_span(60, clip_length(16, 4, 30, video.info.fps), 0, 1, use_offset=True)
        assert len(set(frame_indices(start, end, 16, 60))) == 16, "no still picture"


@pytest.mark.parametrize("short_side", [None, 32])
@pytest.mark.parametrize("matrix", ["bt2020c", "YCgCo", "smpte2085", "bt709"])
def test_rare_colour_matrices(matrix: str, short_side: int | None, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=3, options={"x264-params": f"colormatrix={matrix}"})
    with open_video(path, short_side) as video:
        assert video.frames([1]).shape[1] == (short_side or 64)
