"""Temporal sampling: which frames of a video form a clip."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from maskfeat.data.video.temporal_sampling import clip_length, clip_span, frame_indices, segment_indices

GOLDEN = Path(__file__).parents[2] / "golden" / "temporal_sampling.json.gz"


def check(cases: list[dict]) -> None:
    assert len(cases) == 294
    for case in cases:
        start, end = clip_span(
            case["video_size"], case["clip_size"], case["clip_idx"], case["num_clips"], case["use_offset"]
        )
        assert (start, end) == (case["start"], case["end"]), case
        assert frame_indices(start, end, 16, case["video_size"]) == case["frame_indices"], case


def test_published_cases() -> None:
    with gzip.open(GOLDEN) as file:
        check(json.load(file))


def test_published_cases_in_full(shared: Path) -> None:
    check(json.loads((shared / "goldens" / "temporal_sampling.json").read_text()))


def test_clip_length_scales_with_the_frame_rate_of_the_video() -> None:
    assert clip_length(16, 4, 30, 30) == 64
    assert clip_length(16, 4, 30, 15) == 32
    assert clip_length(16, 4, 30, 30000 / 1001) == pytest.approx(63.936, abs=1e-3)


def test_random_start_is_uniform() -> None:
    rng = np.random.default_rng(0)
    starts = np.array([clip_span(300, 64, -1, 1, rng=rng)[0] for _ in range(4000)])
    assert starts.min() >= 0 and starts.max() <= 236
    counts = np.histogram(starts, bins=8, range=(0, 236))[0]
    assert counts.min() > 400 and counts.max() < 600
    assert clip_span(10, 64, -1, 1, rng=rng) == (0.0, 63.0)


def test_a_single_clip_is_central_with_offset_only() -> None:
    assert clip_span(100, 16, 0, 1, use_offset=True)[0] == 42
    assert clip_span(100, 16, 0, 1, use_offset=False)[0] == 0


@pytest.mark.parametrize("size", [1, 5, 16, 17, 40, 300])
def test_one_frame_of_each_segment(size: int) -> None:
    """Segments follow one another and differ by a frame at most; the draw is uniform in each, the centre fixed."""
    rng = np.random.default_rng(0)
    drawn = np.array([segment_indices(16, size, rng) for _ in range(2000)])
    centre = segment_indices(16, size)
    assert centre == sorted(centre) and (np.diff(drawn, axis=1) >= 0).all()
    lengths = []
    for i in range(16):
        first, end = i * size // 16, (i + 1) * size // 16
        frames = list(range(first, end)) or [first]
        assert set(drawn[:, i]) == set(frames) and centre[i] == frames[(len(frames) - 1) // 2]
        lengths.append(end - first)
        counts = np.bincount(drawn[:, i] - first, minlength=len(frames))
        assert counts.min() > 0.6 * 2000 / len(frames)
    assert sum(lengths) == size and max(lengths) - min(lengths) <= 1
    assert segment_indices(16, 40.7) == segment_indices(16, 40)
