"""Which frames of a video make a clip: pure functions. Positions are frame numbers counted from 0, in
display order."""

import math

import numpy as np
import torch


def clip_length(num_frames: int, sampling_rate: int, target_fps: float, fps: float) -> float:
    """How many of the video's own frames a clip spans: num_frames x sampling_rate at target_fps, in a video
    of fps."""
    return num_frames * sampling_rate / target_fps * fps


def clip_span(
    video_size: float,
    clip_size: float,
    clip_idx: int,
    num_clips: int,
    use_offset: bool = False,
    rng: np.random.Generator | None = None,
) -> tuple[float, float]:
    """First and last position of a clip.

    Args:
        video_size: frames in the video (a container may promise a fraction of one).
        clip_size: frames of the video that a clip spans, see `clip_length`; may be longer than the video.
        clip_idx: which of `num_clips` uniform clips, from 0; -1 draws the start uniformly and needs `rng`.
        num_clips: how many uniform clips are laid over the video.
        use_offset: True spreads the clips from the very start to the very end in whole frames (one clip is
            then central); False starts clip i at i/num_clips of the room that is left.
        rng: for clip_idx -1.

    Returns:
        (start, end), both inclusive, end = start + clip_size - 1. `end` may lie behind the last frame.
    """
    room = max(video_size - clip_size, 0)
    if clip_idx == -1:
        assert rng is not None, "a random clip needs a generator"
        start = float(rng.uniform(0.0, room)) if room > 0 else 0.0
    else:
        assert 0 <= clip_idx < num_clips, f"clip {clip_idx} of {num_clips}"
        if not use_offset:
            start = room * clip_idx / num_clips
        elif num_clips == 1:
            start = float(math.floor(room / 2))
        else:
            start = float(clip_idx * math.floor(room / (num_clips - 1)))
    return start, start + clip_size - 1


def frame_indices(start: float, end: float, num_frames: int, video_size: float) -> list[int]:
    """`num_frames` evenly spaced frames of a span: floor(linspace(start, end)), clamped to the frames that
    exist.

    The spacing is computed in float32 as in the published code: in float64 a position that should be whole
    can land on the other side of the floor.
    """
    positions = torch.linspace(start, end, num_frames, dtype=torch.float32)
    return torch.clamp(positions, 0, max(video_size - 1, 0)).long().tolist()
