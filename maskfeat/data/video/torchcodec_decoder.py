"""Video files into frames, with FFmpeg through torchcodec: the same frames as `decode` gives.

torchcodec is an optional package (`pip install '.[torchcodec]'`) and takes the FFmpeg libraries of the system. Every
file is opened and scanned by `decode` first, so that its allow-lists, sizes and frame numbers hold, and goes to
torchcodec only where

- it is an MP4 or Matroska file by its first bytes, so that no other FFmpeg can take it for a playlist;
- it holds no other pictures, subtitles or attachments, for which torchcodec has no list of decoders;
- its time stamps are distinct, and torchcodec counts the same frames;
- every frame comes out with the time stamp of its number.

Anything else (damaged files, cut ones, other containers) is decoded by `decode`. One limit is weaker: a stream that
grows in its middle is not held to the largest size.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maskfeat.data.bad_samples import open_regular_file
from maskfeat.data.video.decoder import MAX_BYTES, Video, VideoInfo, open_video

_TOLERANCE = 1e-4
"""Seconds that a time stamp may lose on its way through float64."""


def load_decoder() -> Any:
    """torchcodec's VideoDecoder.

    Raises:
        ValueError: torchcodec is not installed, or finds no FFmpeg libraries.
    """
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:
        cause = str(error).strip().splitlines()
        raise ValueError(
            "DATA.DECODING_BACKEND torchcodec needs the package torchcodec (pip install '.[torchcodec]') and FFmpeg's "
            f"libraries: {cause[0] if cause else type(error).__name__}"
        ) from error
    return VideoDecoder


def decode_frames(
    path: str | os.PathLike[str],
    wanted: Callable[[VideoInfo], Sequence[int]] | Sequence[int],
    threads: int = 1,
) -> tuple[np.ndarray, VideoInfo]:
    """Decodes some frames of a video; arguments, results and errors are those of `decode.decode_frames`."""
    with open_video(path, threads) as video:
        indices = wanted(video.info) if callable(wanted) else wanted
        frames = _by_torchcodec(video, indices, threads)
        return video.frames(indices) if frames is None else frames, video.info


def _by_torchcodec(video: Video, indices: Sequence[int], threads: int) -> np.ndarray | None:
    """(T, H, W, 3) uint8 RGB; None where torchcodec is not to be asked or does not give the frames that are meant."""
    info = video.info
    numbers = np.clip(np.asarray(indices, dtype=np.int64), 0, info.frames - 1)
    distinct, places = np.unique(numbers, return_inverse=True)
    times = video.seconds(distinct.tolist())
    if (
        times is None
        or not video.is_alone
        or not _is_plain(video.path)
        or info.width * info.height * 3 * len(distinct) > MAX_BYTES
    ):
        return None
    # RuntimeError and ValueError: what torchcodec raises on damage; what is to be shown then, PyAV's side knows.
    with open_regular_file(video.path) as file, contextlib.suppress(RuntimeError, ValueError, IndexError):
        decoder = load_decoder()(
            file,
            stream_index=video.stream_index,
            dimension_order="NHWC",
            num_ffmpeg_threads=threads,
            device="cpu",
        )
        if len(decoder) != info.frames:
            return None
        batch = decoder.get_frames_at(distinct.tolist())
        if np.abs(batch.pts_seconds.numpy() - times).max() > _TOLERANCE:
            return None
        return batch.data.numpy()[places]
    return None


def _is_plain(path: str) -> bool:
    """Whether the first bytes are those of MP4 or Matroska."""
    with open_regular_file(path) as file:
        start = file.read(8)
    return start[4:8] == b"ftyp" or start[:4] == b"\x1a\x45\xdf\xa3"
