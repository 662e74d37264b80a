"""Video decoding with FFmpeg through PyAV.

Frames are numbered from 0 in presentation order. A pass over the packets, which decodes nothing and takes about 1 % of
the time of decoding, collects the timestamps of all frames. Unknown frame counts, variable frame rates, streams that
start late, edit lists and truncated files therefore need no special case: a frame is found by its timestamp, and only
frames whose data is in the file are counted. The decoder then seeks to the key frame before the first requested frame,
decodes up to the last one, and converts the requested ones to RGB, in the same pass scaled to the short side that was
asked for. In H.264 and HEVC, frames that are neither requested nor used as references are not decoded; if that leads to
any inconsistency, the range is decoded again in full.

Damaged files: a packet that cannot be decoded is skipped, and its frame is replaced by the preceding one (or the first
one that follows). A sample is unreadable only if no frame can be decoded.

Files are opened as Python file objects, with allow-lists of FFmpeg's demuxers and decoders, so that a playlist or
stream that refers to other files or to the network cannot open them.
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
from maskfeat.data.video.scaling import Scaler, scaled_size

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv"
DECODERS = (
    *("h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "libaom-av1"),
    *("mpeg4", "mpeg1video", "mpeg2video"),
)
MAX_SIDE = 8192
MAX_PIXELS = 8192 * 4352
"""Of one frame: 8K. The decoder checks it too, before it allocates memory."""
MAX_BITS = MAX_PIXELS * 12
"""Of one coded frame: 8K in 4:2:0 with 8 bits. A stream may require the decoder to keep 16 frames and more."""
MAX_BYTES = 1 << 30
"""Of the frames returned by one call."""

_ATTACHED_PICTURE = 0x0400
_CAN_SKIP_FRAMES = ("h264", "hevc")
"""Decoders that can skip a frame that is not a reference, without changing the other frames by a bit."""


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video that are known before decoding.

    Attributes:
        path: the file.
        frames: number of frames, counted from the packets.
        fps: average frame rate, in frames per second.
        width, height: of a coded frame in pixels, before rotation.
        codec: name of the decoder.
    """

    path: str
    frames: int
    fps: float
    width: int
    height: int
    codec: str


class Video:
    """An open video file, for decoding frames once. Use it as a context manager, see `open_video`."""

    def __init__(self, path: str | os.PathLike[str], short_side: int | None = None) -> None:
        self.path = os.fspath(path)
        self._short_side = short_side
        self._scaler = Scaler()
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
        """Close the file."""
        if self._container is not None:
            self._container.close()
            self._container = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Decode frames by number, in the order given. Numbers may repeat; those out of range are clamped.

        Returns:
            (T, H, W, 3) uint8 RGB, scaled to the short side, rotated and mirrored by the display matrix of the file.

        Raises:
            UnreadableSample: no frame can be decoded, or the frames are too large.
        """
        if not len(indices):
            raise ValueError(f"{self.path}: no frame was requested")
        numbers = np.clip(np.asarray(indices, dtype=np.int64), 0, self.info.frames - 1)
        wanted = sorted(set(numbers.tolist()))
        images = None
        can_skip = self._stream.codec_context.name in _CAN_SKIP_FRAMES
        skip_options = (True, False) if can_skip else (False,)
        # After a seek in an MPEG program stream, frames can get the times of others.
        can_seek = self._container.format.name != "mpeg"
        starts = self._packets.seek_timestamps(wanted[0]) if can_seek else []
        for timestamp, skip in itertools.product(starts, skip_options):
            if self._seek(timestamp):
                images = self._collect(wanted, from_start=False, skip=skip)
            if images is not None:
                break
        if images is None:  # no seek, no usable timestamps, or every seek ended too late: decode from the beginning
            self.close()
            self._open()
            images = self._collect(wanted, from_start=True)
        if not images:
            raise UnreadableSample(self.path, "no frame could be decoded")
        return np.stack([images[number] for number in numbers.tolist()])

    @property
    def scales(self) -> bool:
        """Whether frames have another short side than was asked for."""
        return self._short_side not in (None, min(self.info.width, self.info.height))

    @property
    def stream_index(self) -> int:
        """Index of the video stream among all streams of the file."""
        return int(self._stream.index)

    @property
    def is_only_visual_stream(self) -> bool:
        """Whether all other streams are audio or data: a decoder without allow-lists would decode others too."""
        others = [s for s in self._container.streams if s.index != self._stream.index]
        return all(s.type in ("audio", "data") for s in others)

    def seconds(self, numbers: Sequence[int]) -> list[float] | None:
        """Return the presentation times of frames in seconds; None if timestamps do not identify frames."""
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
            raise UnreadableSample(self.path, f"not a video that can be read ({_describe_error(error)})") from error

    def _choose_stream(self) -> Any:
        """Return the stream that a player would show, which is not an attached cover image."""
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
        context.thread_count = 1  # data workers run in parallel already
        context.thread_type = "SLICE"
        return stream

    def _check_size(self, coded: Any) -> None:
        """Check the size of a frame, or of the codec context before any frame is decoded."""
        width, height = coded.width, coded.height
        bits = coded.format.padded_bits_per_pixel if coded.format is not None else 12
        if width > MAX_SIDE or height > MAX_SIDE or width * height > MAX_PIXELS or width * height * bits > MAX_BITS:
            raise UnreadableSample(self.path, f"frames of {width}x{height} are too large ({bits} bits a pixel)")

    def _scan(self) -> PtsIndex:
        rate = self._stream.average_rate or self._stream.guessed_rate
        packets = PtsIndex(float(1 / (rate * self._stream.time_base)) if rate else 0.0)
        for packet in self._demux():
            packets.add(packet, self._stream.codec_context.name)
        # AVI stores no presentation times, and FFmpeg's guess is wrong if frames are reordered.
        reordered = bool(self._stream.codec_context.has_b_frames)
        guessed = reordered and self._container.format.name == "avi"
        # Recordings that were joined may show a time twice, and are decoded in the order of the file.
        joined = packets.goes_back and self._container.format.name in ("mpegts", "mpeg")
        packets.finish(trusted=not (guessed or joined))
        if not packets.count:
            raise UnreadableSample(self.path, "the video stream is empty")
        return packets

    def _demux(self) -> Iterator[Any]:
        """Yield the packets of the stream up to its end or to damage in the file, without the empty flush packet."""
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
        """The container's average frame rate, unless the timestamps contradict it, on average and from one frame to the
        next: a gap between two recordings makes no clip slower.
        """
        declared = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        base = self._stream.time_base
        measured = self._packets.rate(base)
        if measured and abs(declared - measured) > 0.05 * measured and not self._packets.is_regular(declared, base):
            return measured
        return declared if declared > 0 else 30.0

    def _seek(self, timestamp: int) -> bool:
        try:
            self._container.seek(timestamp, stream=self._stream, backward=True)
        except (av.FFmpegError, ValueError, OverflowError):
            return False
        return True

    def _decode(self, only: Sequence[int] | None = None) -> Iterator[Any]:
        """Yield frames in presentation order, skipping packets that cannot be decoded.

        Args:
            only: frame numbers, ascending. Other frames before the last of them are skipped if they are not references,
                and decoding ends at the first packet that cannot be decoded. None = all frames.
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
        """Return the wanted frames by number; {} if no frame can be decoded; None if decoding began after the first.

        With `skip`, frames that are not needed are skipped. None is then also returned if a wanted frame is missing or
        marked as corrupt, because the frame to replace it with may have been skipped.
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
                # A frame that could not be decoded is replaced by the one before, the first ones by the one after.
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
        height, width = scaled_size(frame.height, frame.width, self._short_side)
        if width * height * 3 * len(wanted) > MAX_BYTES:
            raise UnreadableSample(self.path, f"{len(wanted)} frames of {width}x{height} are too large")
        try:
            image = _upright(self._scaler.to_rgb(frame, height, width), frame)
        except (av.FFmpegError, ValueError) as error:
            raise UnreadableSample(
                self.path, f"a frame cannot be turned into RGB ({_describe_error(error)})"
            ) from error
        first = next(iter(images.values()), image)
        if image.shape != first.shape:  # the size may change in the middle of a stream
            height, width = first.shape[:2]
            image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        return image


def open_video(path: str | os.PathLike[str], short_side: int | None = None) -> Video:
    """Open a video file: `with open_video(path) as video: video.frames([0, 4, 8])`.

    Args:
        path: a local, regular file.
        short_side: that frames are scaled to in pixels, see `scaling`; None = the file's own size.

    Raises:
        UnreadableSample: missing, empty, not a video, no video stream, a codec that is not allowed, or too large.
    """
    return Video(path, short_side)


def decode_frames(
    path: str | os.PathLike[str],
    wanted: Callable[[VideoInfo], Sequence[int]] | Sequence[int],
    short_side: int | None = None,
) -> tuple[np.ndarray, VideoInfo]:
    """Decode some frames of a video.

    Args:
        path: a local, regular file.
        wanted: frame numbers, or a function that computes them from the properties of the video.
        short_side: that frames are scaled to, see `open_video`; None = the file's own size.

    Returns:
        (T, H, W, 3) uint8 RGB, upright, and the properties of the video.

    Raises:
        UnreadableSample: the file cannot be opened or no frame can be decoded, with the cause.
    """
    with open_video(path, short_side) as video:
        indices = wanted(video.info) if callable(wanted) else wanted
        return video.frames(indices), video.info


def _upright(image: np.ndarray, frame: Any) -> np.ndarray:
    """Rotate by multiples of 90 degrees and mirror (H, W, 3) by the frame's display matrix.

    The matrix [a b u; c d v; x y w] maps a coded point (x, y) to (a x + c y, b x + d y), in 16.16 fixed point.
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


def _describe_error(error: Exception) -> str:
    """Return FFmpeg's or Python's description of an error, without error numbers and file names."""
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
