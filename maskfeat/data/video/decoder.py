"""Video files into frames, with FFmpeg through PyAV.

Frames are numbered from 0 in the order in which they are shown. A quick pass over the packets, which
decodes nothing (about 1 % of the time that decoding takes), collects the time stamps of all frames. Thus
frame counts that the container does not know, variable frame rates, streams that start late, edit lists and
files that end early need no special case: a frame is found by its time stamp, and only frames whose data is
there are counted. Then one seek to the key frame before the first frame wanted, decoding up to the last one,
and conversion of those that are used. Of H.264 and HEVC, frames that are neither wanted nor referred to are not
even decoded; where anything about that looks odd, the span is decoded again in full.

Damage: a packet that does not decode is skipped, and a frame that is missing for it is replaced by the one
shown before it (or the first one after it). Only if no frame at all comes out is the sample unreadable.

Files are opened from Python file objects, with FFmpeg's demuxers and decoders on allow-lists: a playlist or a
stream that refers to other files or to the network opens nothing.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO

import av
import numpy as np
from PIL import Image

from maskfeat.data.bad_samples import UnreadableSample, open_regular_file
from maskfeat.data.video.pts_index import PtsIndex

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,flv"
DECODERS = ("h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "libaom-av1", "mpeg4")
MAX_SIDE = 8192
MAX_PIXELS = 8192 * 4352
"""Of one frame: 8K. Checked by the decoder as well, before it allocates."""
MAX_BITS = MAX_PIXELS * 12
"""Of one frame as it is coded: 8K in 4:2:0 of 8 bits. A stream may have a decoder keep 16 of them and more."""
MAX_BYTES = 1 << 30
"""Of the frames that one call returns."""

_ATTACHED_PICTURE = 0x0400
_SKIPPING = ("h264", "hevc")
"""Decoders that can leave out a frame to which no other refers, with no effect on the bits of the others."""


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video before it is decoded.

    Attributes:
        path: the file.
        frames: how many frames it has, counted.
        fps: frames a second, on average.
        width, height: of a coded frame in pixels, before rotation.
        codec: the decoder's name.
    """

    path: str
    frames: int
    fps: float
    width: int
    height: int
    codec: str


class Video:
    """A video file that is open for one reading. Use as a context manager, see `open_video`."""

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        self.path = os.fspath(path)
        self._threads = threads
        self._file: BinaryIO | None = None
        self._container: Any = None
        self._open()
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close)
            self._packets = self._scan()
            self.info = self._describe()
            on_error.pop_all()

    def __enter__(self) -> "Video":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file."""
        if self._container is not None:
            self._container.close()
            self._container = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Decodes the frames with these numbers, in this order; repeats are fine, numbers out of range are
        clamped.

        Returns:
            (T, H, W, 3) uint8 RGB, turned as the file says it is to be shown.

        Raises:
            UnreadableSample: nothing decodes, or the frames are too large.
        """
        if not len(indices):
            raise ValueError(f"{self.path}: no frame was asked for")
        numbers = np.clip(np.asarray(indices, dtype=np.int64), 0, self.info.frames - 1)
        wanted = sorted(set(numbers.tolist()))
        images = None
        can_skip = self._threads == 1 and self._stream.codec_context.name in _SKIPPING
        ways = (True, False) if can_skip else (False,)
        for timestamp, skip in itertools.product(self._packets.entries(wanted[0]), ways):
            if self._seek(timestamp):
                images = self._collect(wanted, from_start=False, skip=skip)
            if images is not None:
                break
        if images is None:  # no time stamps to go by, or every seek went astray: from the beginning, then
            self.close()
            self._open()
            images = self._collect(wanted, from_start=True)
        if not images:
            raise UnreadableSample(self.path, "no frame could be decoded")
        return np.stack([images[number] for number in numbers.tolist()])

    @property
    def stream_index(self) -> int:
        """The place of the video stream among all streams of the file."""
        return int(self._stream.index)

    @property
    def is_alone(self) -> bool:
        """Whether no stream but sound and timing is beside it: a reader without lists would decode others too."""
        others = [s for s in self._container.streams if s.index != self._stream.index]
        return all(s.type in ("audio", "data") for s in others)

    def seconds(self, numbers: Sequence[int]) -> list[float] | None:
        """When these frames are shown, as the container counts; None where time stamps do not tell frames apart."""
        times = self._packets.times
        return None if times is None else [float(times[number] * self._stream.time_base) for number in numbers]

    def _open(self) -> None:
        self._file = open_regular_file(self.path)
        try:
            self._container = av.open(
                self._file,
                mode="r",
                container_options={"format_whitelist": DEMUXERS, "codec_whitelist": ",".join(DECODERS)},
                options={"max_pixels": str(MAX_PIXELS)},
                metadata_errors="replace",
                io_open=_refuse_other_files,
            )
            self._stream = self._choose_stream()
        except (av.FFmpegError, OSError, ValueError) as error:
            self.close()
            if isinstance(error, UnreadableSample):
                raise
            raise UnreadableSample(self.path, f"not a video that can be read ({_words(error)})") from error

    def _choose_stream(self) -> Any:
        """The stream that a player would show: cover pictures do not count."""
        streams = self._container.streams
        videos = [s for s in streams.video if not int(s.disposition) & _ATTACHED_PICTURE]
        if not videos:
            kinds = sorted({s.type for s in streams}) or ["none"]
            raise UnreadableSample(self.path, f"no video stream (streams: {', '.join(kinds)})")
        best = streams.best("video")
        stream = best if best is not None and best in videos else videos[0]
        context = stream.codec_context
        if context is None or context.name not in DECODERS:
            name = "unknown" if context is None else context.name
            raise UnreadableSample(self.path, f"codec {name} is not one of {', '.join(DECODERS)}")
        self._check_size(context)
        context.options = {"max_pixels": str(MAX_PIXELS)}
        context.thread_count = self._threads
        context.thread_type = "SLICE" if self._threads == 1 else "AUTO"
        return stream

    def _check_size(self, coded: Any) -> None:
        """Of a frame, or of the decoder's context before there is one."""
        width, height = coded.width, coded.height
        bits = coded.format.padded_bits_per_pixel if coded.format is not None else 12
        if width > MAX_SIDE or height > MAX_SIDE or width * height > MAX_PIXELS or width * height * bits > MAX_BITS:
            raise UnreadableSample(self.path, f"frames of {width}x{height} are too large ({bits} bits a pixel)")

    def _scan(self) -> PtsIndex:
        packets = PtsIndex()
        for packet in self._demux():
            packets.add(packet, self._stream.codec_context.name)
        # AVI keeps no time of display: what FFmpeg makes up for it is wrong where frames are reordered.
        reordered = bool(self._stream.codec_context.has_b_frames)
        packets.finish(trusted=not (reordered and self._container.format.name == "avi"))
        if not packets.count:
            raise UnreadableSample(self.path, "the video stream is empty")
        return packets

    def _demux(self) -> Iterator[Any]:
        """Packets of the stream up to the end or to where the file is damaged, without the empty one that
        flushes."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.FFmpegError, OSError):
                return
            if packet.size:
                yield packet

    def _describe(self) -> VideoInfo:
        context = self._stream.codec_context
        return VideoInfo(
            path=self.path,
            frames=self._packets.count,
            fps=self._frame_rate(),
            width=context.width,
            height=context.height,
            codec=context.name,
        )

    def _frame_rate(self) -> float:
        """The container's average rate, unless the time stamps belie it."""
        promised = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        measured = self._packets.rate(self._stream.time_base)
        if measured and abs(promised - measured) > 0.05 * measured:
            return measured
        return promised if promised > 0 else 30.0

    def _seek(self, timestamp: int) -> bool:
        try:
            self._container.seek(timestamp, stream=self._stream, backward=True)
        except (av.FFmpegError, ValueError, OverflowError):
            return False
        return True

    def _decode(self, only: Sequence[int] | None = None) -> Iterator[Any]:
        """Frames in display order; packets that do not decode are skipped.

        Args:
            only: the numbers of frames, ascending: others before the last of them are left out where no frame refers
                to them, and the first packet that does not decode is the end.
        """
        context = self._stream.codec_context
        context.skip_frame = "DEFAULT"
        wanted = frozenset(only or ())
        for packet in self._demux():
            if only is not None:
                number = self._packets.number(packet.pts)
                needed = number is None or number in wanted or number > only[-1]
                context.skip_frame = "DEFAULT" if needed else "NONREF"
            try:
                yield from packet.decode()
            except (av.FFmpegError, ValueError):
                if only is not None:
                    return
        try:
            yield from context.decode(None)
        except (av.FFmpegError, ValueError, EOFError):
            return

    def _collect(self, wanted: list[int], from_start: bool, skip: bool = False) -> dict[int, np.ndarray] | None:
        """The wanted frames by number; {} if nothing decodes; None if decoding began behind the first one.

        With `skip`, frames that are not needed are left out, and None also says that a wanted one did not come out
        or is marked as damaged: what is shown in its stead then depends on frames that were left out.
        """
        images: dict[int, np.ndarray] = {}
        pending = iter(wanted)
        target: int | None = next(pending)
        previous: Any = None
        for count, frame in enumerate(self._decode(wanted if skip else None)):
            self._check_size(frame)  # it may change in the middle of a stream
            number = self._packets.number(frame.pts)
            if number is None:
                number = count
            if previous is None and not from_start and (frame.pts is None or number > wanted[0]):
                return None
            while target is not None and target <= number:
                if skip and (target != number or frame.is_corrupt):
                    return None
                # A frame that did not decode is replaced by the one before it, the first ones by the one
                # after.
                source = frame if previous is None or target == number else previous
                images[target] = self._to_rgb(source, wanted, images)
                target = next(pending, None)
            if target is None:
                return images
            previous = frame
        if skip:
            return None
        if previous is None:
            return {} if from_start else None
        while target is not None:
            images[target] = self._to_rgb(previous, wanted, images)
            target = next(pending, None)
        return images

    def _to_rgb(self, frame: Any, wanted: list[int], images: dict[int, np.ndarray]) -> np.ndarray:
        if frame.width * frame.height * 3 * len(wanted) > MAX_BYTES:
            raise UnreadableSample(self.path, f"{len(wanted)} frames of {frame.width}x{frame.height} are too large")
        try:
            # One thread: workers are the parallelism, and a converter with threads of its own, left over in a
            # process that forks, would hang the child that clears it away.
            image = _upright(frame.to_ndarray(format="rgb24", threads=1), frame)
        except (av.FFmpegError, ValueError) as error:
            raise UnreadableSample(self.path, f"a frame cannot be turned into RGB ({_words(error)})") from error
        first = next(iter(images.values()), image)
        if image.shape != first.shape:  # the size may change in the middle of a stream
            height, width = first.shape[:2]
            image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        return image


def open_video(path: str | os.PathLike[str], threads: int = 1) -> Video:
    """Opens a video file: `with open_video(path) as video: video.frames([0, 4, 8])`.

    Args:
        path: a local, regular file.
        threads: for the decoder. The workers of a loader are the parallelism; more than one is for single
            videos.

    Raises:
        UnreadableSample: missing, empty, not a video, no video stream, a codec that is not allowed, too
        large.
    """
    return Video(path, threads)


def decode_frames(
    path: str | os.PathLike[str],
    wanted: Callable[[VideoInfo], Sequence[int]] | Sequence[int],
    threads: int = 1,
) -> tuple[np.ndarray, VideoInfo]:
    """Decodes some frames of a video.

    Args:
        path: a local, regular file.
        wanted: the frames' numbers, or what computes them once the length and frame rate are known.
        threads: for the decoder.

    Returns:
        (T, H, W, 3) uint8 RGB, upright, and what is known of the video.

    Raises:
        UnreadableSample: with the cause, whenever no frame can be had.
    """
    with open_video(path, threads) as video:
        indices = wanted(video.info) if callable(wanted) else wanted
        return video.frames(indices), video.info


def _upright(image: np.ndarray, frame: Any) -> np.ndarray:
    """Turns and mirrors (H, W, 3) as the frame's display matrix says, in quarter turns.

    The matrix [a b u; c d v; x y w] maps a coded point (x, y) to (a x + c y, b x + d y), in 16.16 fixed
    point.
    """
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None or matrix.buffer_size < 36:
        return image
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32, count=5).tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
        image = image.transpose(1, 0, 2)
        flip_rows, flip_columns = b < 0, c < 0
    else:
        flip_rows, flip_columns = d < 0, a < 0
    return image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def _refuse_other_files(url: str, flags: int, options: dict[str, str]) -> BinaryIO:
    raise PermissionError(f"a video may not open another file or address ({url})")


def _words(error: Exception) -> str:
    """FFmpeg's or Python's description of an error, without numbers and file names."""
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
