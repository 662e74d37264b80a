"""Encoding keeps every frame, in order and at its time, and goes on where it was killed."""

import os
import signal
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from maskfeat.analysis.preparation.encode import encode
from maskfeat.analysis.preparation.ucf_hmdb import main
from maskfeat.data.bad_samples import UnreadableSample
from maskfeat.data.video.decoder import open_video
from tests.data.media import read_numbers, write_video


def numbers(path: Path) -> list[int]:
    with open_video(path) as video:
        frames = video.frames(range(video.info.frames))
    times = 64 // frames.shape[1]
    return read_numbers(frames.repeat(times, axis=1).repeat(times, axis=2))


def times(path: Path) -> list[float]:
    with open_video(path) as video:
        found = video.seconds(range(video.info.frames))
    assert found is not None
    return [second - found[0] for second in found]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.mp4", {}),
        ("b_frames.mkv", {"options": {"g": "250", "bf": "3"}}),
        ("xvid.avi", {"codec": "mpeg4"}),
        ("old.mpg", {"codec": "mpeg2video", "options": {"bf": "2"}}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}),
        ("late.ts", {"times": [7000 + 40 * n for n in range(140)], "time_base": Fraction(1, 1000)}),
    ],
)
def test_every_frame_in_order(name: str, options: dict, tmp_path: Path) -> None:
    """More frames than are in memory at once; the number of each is drawn into it."""
    source = write_video(tmp_path / name, frames=140, audio=name == "plain.mp4", **options)
    target = tmp_path / "out" / "small.mp4"
    assert encode(str(source), target, 32) == 140
    assert numbers(target) == list(range(140))
    with open_video(target) as video:
        assert (video.info.height, video.info.width, video.info.codec) == (32, 64, "h264")
        assert video.info.fps == pytest.approx(25, rel=1e-3)
    with av.open(str(target)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        keys = [number for number, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    assert max(np.diff([*keys, 140])) <= 12
    assert [path.name for path in target.parent.iterdir()] == ["small.mp4"]


def test_uneven_times_are_kept(tmp_path: Path) -> None:
    gaps = np.random.default_rng(3).integers(5, 200, 40).cumsum().tolist()
    source = write_video(tmp_path / "uneven.mkv", times=gaps, time_base=Fraction(1, 1000))
    encode(str(source), tmp_path / "even.mp4", 32)
    assert numbers(tmp_path / "even.mp4") == list(range(40))
    assert np.abs(np.subtract(times(tmp_path / "even.mp4"), times(source))).max() < 1e-3


def test_small_videos_keep_their_size_and_turned_ones_stand_upright(tmp_path: Path) -> None:
    source = write_video(tmp_path / "turned.mp4", frames=6, rotation=90)
    encode(str(source), tmp_path / "a.mp4", 320)
    with open_video(source) as one, open_video(tmp_path / "a.mp4") as other:
        before, after = one.frames(range(6)), other.frames(range(6))
    assert after.shape == before.shape == (6, 128, 64, 3)
    assert np.abs(after.astype(int) - before).mean() < 6


def test_what_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(UnreadableSample, match="not a video"):
        encode(str(tmp_path / "bad.mp4"), tmp_path / "out" / "bad.mp4", 32)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    """Files that are there are whole, and are not written again."""
    for label in ("run", "wave"):
        (tmp_path / "videos" / label).mkdir(parents=True)
        for n in range(9):
            write_video(tmp_path / "videos" / label / f"{n}.mp4", frames=60)
    words = [str(tmp_path / "videos"), str(tmp_path / "out"), "--short-side", "32", "--workers", "0"]
    done: dict[Path, int] = {}
    for kill in range(4):
        child = os.fork()
        if not child:
            os._exit(main(words))
        written: list[Path] = []
        while len(written) <= len(done):
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it was killed"
            written = list((tmp_path / "out").rglob("[0-9].mp4"))
        time.sleep(0.01 * kill)  # into the next one
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        for path in (tmp_path / "out").rglob("[0-9].mp4"):
            assert numbers(path) == list(range(60))
            assert done.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert 4 <= len(done) < 18, "each was killed before the last one"
    assert main(words) == 0
    for label in ("run", "wave"):
        assert sorted(path.name for path in (tmp_path / "out" / "videos" / label).iterdir()) == [
            f"{n}.mp4" for n in range(9)
        ]
    assert all(path.stat().st_mtime_ns == changed for path, changed in done.items())
