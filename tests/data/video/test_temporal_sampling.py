"""Temporal sampling: which frames of a video form a clip."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from maskfeat.data.video.temporal_sampling import clip_length, clip_span, frame_indices

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
