"""Videos that the tests write; each frame shows its own number in its pixels."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

BITS = 8
HEIGHT, WIDTH = 64, 16 * BITS


def paint(number: int) -> np.ndarray:
    """(HEIGHT, WIDTH, 3) uint8: the number in binary along the upper half, a gradient from dark to bright below."""
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    for bit in range(BITS):
        image[: HEIGHT // 2, 16 * bit : 16 * (bit + 1)] = 220 if number >> bit & 1 else 30
    image[HEIGHT // 2 :] = np.linspace(20, 230, WIDTH).astype(np.uint8)[None, :, None]
    return image


def read_number(image: np.ndarray) -> int:
    """Read the number that `paint` wrote; fails if it is not clearly legible."""
    blocks = image[4 : HEIGHT // 2 - 4].mean(axis=(0, 2)).reshape(BITS, 16)[:, 4:12].mean(axis=1)
    assert np.all((blocks < 75) | (blocks > 175)), f"illegible frame: {blocks}"
    return int(sum(int(value > 125) << bit for bit, value in enumerate(blocks)))


def read_numbers(frames: np.ndarray) -> list[int]:
    """The numbers of (T, H, W, 3) frames."""
    return [read_number(frame) for frame in frames]


@contextmanager
def scheduling_restored() -> Iterator[None]:
    """Restore the scheduling policy. SVT-AV1, run by root, gives the encoding thread the real-time priority 99, with
    which this process and all that it starts would starve every other process.
    """
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def write_video(
    path: Path,
    frames: int = 40,
    codec: str = "libx264",
    rate: int = 25,
    times: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int = 0,
    audio: bool = False,
    first: int = 0,
) -> Path:
    """Write a numbered video. `times` are presentation times in `time_base`. Skips if the encoder is missing."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")
    with scheduling_restored(), av.open(str(path), "w", options=container_options or {}) as container:
        try:
            stream = container.add_stream(codec, rate=rate, options=options or {})
        except (av.FFmpegError, ValueError) as error:
            pytest.skip(f"this PyAV cannot encode with {codec}: {error}")
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 2_000_000
        stream.thread_count = 1
        if time_base is not None:
            stream.codec_context.time_base = time_base
        if rotation:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV cannot write a rotation")
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(paint(first + number), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
    return path
