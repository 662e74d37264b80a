"""Temporal sampling: which frames of a video form a clip. Pure functions.

Positions are frame numbers from 0, in presentation order.
"""

import math

import numpy as np
import torch


def clip_length(num_frames: int, sampling_rate: int, target_fps: float, fps: float) -> float:
    """Return how many frames of a video at `fps` are spanned by num_frames x sampling_rate frames at `target_fps`."""
    return num_frames * sampling_rate / target_fps * fps


def clip_span(
    video_size: float,
    clip_size: float,
    clip_idx: int,
    num_clips: int,
    use_offset: bool = False,
    rng: np.random.Generator | None = None,
) -> tuple[float, float]:
    """Return the first and last position of a clip.

    Args:
        video_size: number of frames of the video; may be fractional.
        clip_size: number of frames of the video that a clip spans, see `clip_length`; may exceed the video's.
        clip_idx: index of one of `num_clips` uniform clips; -1 = a random start, drawn uniformly from `rng`.
        num_clips: number of uniform clips.
        use_offset: True spaces the clips evenly from the first to the last frame, in whole frames (a single clip is
            central); False starts clip i at i / num_clips of video_size - clip_size.
        rng: required for clip_idx -1.

    Returns:
        (start, end), both inclusive, with end = start + clip_size - 1. `end` may be after the last frame.
    """
    slack = max(video_size - clip_size, 0)
    if clip_idx == -1:
        assert rng is not None, "a random clip needs a generator"
        start = float(rng.uniform(0.0, slack)) if slack > 0 else 0.0
    else:
        assert 0 <= clip_idx < num_clips, f"clip {clip_idx} of {num_clips}"
        if not use_offset:
            start = slack * clip_idx / num_clips
        elif num_clips == 1:
            start = float(math.floor(slack / 2))
        else:
            start = float(clip_idx * math.floor(slack / (num_clips - 1)))
    return start, start + clip_size - 1


def frame_indices(start: float, end: float, num_frames: int, video_size: float) -> list[int]:
    """Return `num_frames` evenly spaced frame numbers: floor(linspace(start, end)), clamped to the video.

    Computed in float32 as in the published code: in float64, rounding errors of whole positions differ, and with them
    the floor.
    """
    positions = torch.linspace(start, end, num_frames, dtype=torch.float32)
    return torch.clamp(positions, 0, max(video_size - 1, 0)).long().tolist()


def segment_indices(num_frames: int, video_size: float, rng: np.random.Generator | None = None) -> list[int]:
    """Return one frame number from each of `num_frames` segments of a video, which are equal up to one frame.

    Segment i of T has the frames from floor(i N / T) to floor((i + 1) N / T) - 1. Of a video of fewer frames than
    segments, some are returned several times.

    Args:
        num_frames: T.
        video_size: N, whole frames of it count.
        rng: draws uniformly within each segment; None = its centre, the earlier one of two.
    """
    size = max(int(video_size), 1)
    edges = np.arange(num_frames + 1) * size // num_frames
    first, last = edges[:-1], np.maximum(edges[1:] - 1, edges[:-1])
    chosen = (first + last) // 2 if rng is None else rng.integers(first, last, endpoint=True)
    return chosen.tolist()
