"""Videos encoded anew, at a smaller size and with short groups of pictures: no frame is dropped, none doubled."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from maskfeat.data.bad_samples import UnreadableSample
from maskfeat.data.video.decoder import Video, open_video
from maskfeat.errors import UserError

_AT_ONCE = 128
"""Frames in memory."""
_CLOCK = 90_000
"""Ticks a second."""
_GROUP = 12
_QUALITY = 20


def encode(source: str, target: Path, short_side: int) -> int:
    """Write a video as H.264 in MP4, without sound, and return its number of frames.

    The file appears under its name when it is complete and has been compared with the source, so that one that is there
    need not be written again. Frames keep their order and their times; they are turned upright, and never enlarged.

    Args:
        source: a video.
        target: the file to write, ending in .mp4; its folder is made.
        short_side: in pixels.

    Raises:
        UnreadableSample: the source cannot be decoded, or the result has another number of frames.
        OSError: it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.stem}.partial.mp4")  # one that a killed call left is overwritten
    try:
        with open_video(source) as video:
            smaller = short_side < min(video.info.width, video.info.height)
        with open_video(source, short_side=short_side if smaller else None) as video:
            number = video.info.frames
            _write(video, draft)
        with open_video(draft) as written:
            if written.info.frames != number:
                raise UnreadableSample(source, f"{written.info.frames} of its {number} frames could be encoded")
        draft.replace(target)
        return number
    finally:
        draft.unlink(missing_ok=True)


def _ticks(video: Video) -> list[int]:
    """Return the time of every frame in ticks; evenly spaced where the file's times do not ascend."""
    seconds = video.seconds(range(video.info.frames))
    if seconds is not None:
        found = [round((second - seconds[0]) * _CLOCK) for second in seconds]
        if all(one < other for one, other in zip(found, found[1:], strict=False)):
            return found
    return [round(number * _CLOCK / video.info.fps) for number in range(video.info.frames)]


def _write(video: Video, path: Path) -> None:
    ticks = _ticks(video)
    try:
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            rate = Fraction(video.info.fps).limit_denominator(1001)
            stream = container.add_stream("libx264", rate=rate, options={"crf": str(_QUALITY), "g": str(_GROUP)})
            stream.pix_fmt = "yuv420p"
            stream.thread_count = 1  # videos are encoded in parallel
            stream.codec_context.time_base = Fraction(1, _CLOCK)
            for start in range(0, len(ticks), _AT_ONCE):
                numbers = range(start, min(start + _AT_ONCE, len(ticks)))
                for number, pixels in zip(numbers, video.frames(numbers), strict=True):
                    height, width = (side - side % 2 for side in pixels.shape[:2])  # colours are stored for 2 x 2
                    if not number:
                        stream.height, stream.width = height, width
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
                    frame.pts, frame.time_base = ticks[number], Fraction(1, _CLOCK)
                    container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        if isinstance(error, OSError) and error.errno in (28, 13, 30):  # no space, not allowed, read-only
            raise
        raise UserError(f"{video.path} cannot be encoded: {error}") from error
