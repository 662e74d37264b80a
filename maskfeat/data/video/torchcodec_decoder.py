"""Video decoding with FFmpeg through torchcodec; returns the same frames as `decoder`.

torchcodec is an optional package (`pip install '.[torchcodec]'`) and uses the FFmpeg libraries of the system. Every
file is first opened and scanned by `decoder`, so that its allow-lists, size limits and frame numbers apply. torchcodec
then decodes it only if

- its first bytes are those of MP4 or Matroska, so that another version of FFmpeg cannot take it for a playlist;
- it contains no other images, subtitles or attachments, because torchcodec has no allow-list of decoders;
- its timestamps are distinct, and torchcodec counts the same number of frames;
- every decoded frame has the timestamp that belongs to its number;
- frames are not to be scaled: it cannot average areas, and averaging its RGB frames gives other pixels.

All others (damaged or truncated files, other containers, other sizes) are decoded by `decoder`. One check is weaker:
the size limit does not apply to a stream whose frames become larger in its middle.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maskfeat.data.bad_samples import open_regular_file
from maskfeat.data.video.decoder import MAX_BYTES, Video, VideoInfo, open_video
from maskfeat.errors import UserError

_TOLERANCE = 1e-4
"""Largest difference of timestamps in seconds, for rounding to float64."""


def load_decoder() -> Any:
    """Import and return torchcodec's VideoDecoder.

    Raises:
        UserError: torchcodec is not installed, or does not find the FFmpeg libraries.
    """
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:
        cause = str(error).strip().splitlines()
        raise UserError(
            "DATA.DECODING_BACKEND torchcodec needs the package torchcodec (pip install '.[torchcodec]') and FFmpeg's "
            f"libraries: {cause[0] if cause else type(error).__name__}"
        ) from error
    return VideoDecoder


def decode_frames(
    path: str | os.PathLike[str],
    wanted: Callable[[VideoInfo], Sequence[int]] | Sequence[int],
    short_side: int | None = None,
) -> tuple[np.ndarray, VideoInfo]:
    """Decode some frames of a video. Arguments, results and errors are those of `decoder.decode_frames`."""
    with open_video(path, short_side) as video:
        indices = wanted(video.info) if callable(wanted) else wanted
        frames = _decode_with_torchcodec(video, indices)
        return video.frames(indices) if frames is None else frames, video.info


def _decode_with_torchcodec(video: Video, indices: Sequence[int]) -> np.ndarray | None:
    """Return (T, H, W, 3) uint8 RGB; None if torchcodec must not be used or does not return the right frames."""
    info = video.info
    numbers = np.clip(np.asarray(indices, dtype=np.int64), 0, info.frames - 1)
    distinct, positions = np.unique(numbers, return_inverse=True)
    times = video.seconds(distinct.tolist())
    if (
        times is None
        or video.scales
        or not video.is_only_visual_stream
        or not _is_mp4_or_matroska(video.path)
        or info.width * info.height * 3 * len(distinct) > MAX_BYTES
    ):
        return None
    # torchcodec raises RuntimeError and ValueError for damaged files, which are then decoded with PyAV.
    with open_regular_file(video.path) as file, contextlib.suppress(RuntimeError, ValueError, IndexError):
        decoder = load_decoder()(
            file,
            stream_index=video.stream_index,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            device="cpu",
        )
        if len(decoder) != info.frames:
            return None
        batch = decoder.get_frames_at(distinct.tolist())
        if np.abs(batch.pts_seconds.numpy() - times).max() > _TOLERANCE:
            return None
        return batch.data.numpy()[positions]
    return None


def _is_mp4_or_matroska(path: str) -> bool:
    """Whether the first bytes are those of MP4 or Matroska."""
    with open_regular_file(path) as file:
        start = file.read(8)
    return start[4:8] == b"ftyp" or start[:4] == b"\x1a\x45\xdf\xa3"
