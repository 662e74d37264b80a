"""torchcodec returns the same frames as PyAV, or is not used."""

import builtins
import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskfeat.batch import SampleKey
from maskfeat.data.bad_samples import UnreadableSample
from maskfeat.data.datasets.kinetics import VideoClips
from maskfeat.data.transforms import ClipTestTransform
from maskfeat.data.video import decoder, torchcodec_decoder
from tests.data.media import read_numbers, write_video
from tests.data.samples import clip_of
from tests.data.video.test_decoder import KINDS, make


@pytest.fixture
def used_torchcodec(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether torchcodec decoded each video so far. Skips the test if it cannot be loaded."""
    try:
        torchcodec_decoder.load_decoder()
    except ValueError as error:
        pytest.skip(str(error))
    outcomes: list[bool] = []
    plain = torchcodec_decoder._decode_with_torchcodec

    def noted(*args: Any) -> np.ndarray | None:
        frames = plain(*args)
        outcomes.append(frames is not None)
        return frames

    monkeypatch.setattr(torchcodec_decoder, "_decode_with_torchcodec", noted)
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_frames(tmp_path: Path, kind: str, used_torchcodec: list[bool]) -> None:
    path = make(tmp_path, kind)
    for indices in ([0], [39, 99], [13, 13, 14], [31, 8, 31], [23, 25, 39], [-3, 12]):
        frames, info = torchcodec_decoder.decode_frames(path, indices)
        expected, expected_info = decoder.decode_frames(path, indices)
        assert read_numbers(frames) == [min(max(index, 0), 39) for index in indices] and info == expected_info
        assert np.abs(frames.astype(int) - expected).mean() < 0.5  # another version of FFmpeg may round differently
    # torchcodec seeks wrongly in open groups of pictures, which its timestamps reveal.
    assert all(used_torchcodec) or kind == "h264_open_gop" or path.suffix in (".ts", ".flv", ".avi"), used_torchcodec
    assert path.suffix in (".mp4", ".mkv", ".webm") or not any(used_torchcodec)


def test_rotation(tmp_path: Path, used_torchcodec: list[bool]) -> None:
    path = write_video(tmp_path / "turned.mp4", frames=5, rotation=90)
    frames, expected = torchcodec_decoder.decode_frames(path, [0, 4])[0], decoder.decode_frames(path, [0, 4])[0]
    assert frames.shape == expected.shape and np.abs(frames.astype(int) - expected).mean() < 0.5
    assert used_torchcodec == [True]


def test_shared_videos(shared: Path, used_torchcodec: list[bool]) -> None:
    for path in sorted((shared / "data" / "kinetics_samples" / "videos").iterdir()):
        if path.stem == "juggle":
            continue  # slow to decode
        frames, info = torchcodec_decoder.decode_frames(path, lambda info: [0, info.frames // 2, info.frames - 1])
        expected = decoder.decode_frames(path, [0, info.frames // 2, info.frames - 1])[0]
        assert frames.shape == expected.shape and np.abs(frames.astype(int) - expected).mean() < 0.5, path
    assert all(used_torchcodec)


def test_shared_damaged_videos(shared: Path, used_torchcodec: list[bool]) -> None:
    for path in sorted((shared / "data" / "damaged" / "videos").iterdir()):
        try:
            expected = decoder.decode_frames(path, range(0, 300, 25))[0]
        except UnreadableSample as error:
            with pytest.raises(UnreadableSample, match=error.cause.split("(")[0]):
                torchcodec_decoder.decode_frames(path, range(16))
            continue
        frames = torchcodec_decoder.decode_frames(path, range(0, 300, 25))[0]
        assert frames.shape == expected.shape and np.abs(frames.astype(int) - expected).mean() < 0.5, path


def test_a_playlist_in_a_stream_is_not_passed_to_it(tmp_path: Path, used_torchcodec: list[bool]) -> None:
    stream = make(tmp_path, "h264_ts").read_bytes()
    path = tmp_path / "a.mp4"
    path.write_bytes(b"#EXTM3U\n#EXTINF:10,\nsecret.mp4\n" + stream)
    with contextlib.suppress(UnreadableSample):
        torchcodec_decoder.decode_frames(path, [3])
    assert not any(used_torchcodec)


def test_clips(tmp_path: Path, used_torchcodec: list[bool]) -> None:
    videos = [(str(make(tmp_path, "h264_b_frames")), 0)]
    transform = ClipTestTransform(32, 36, 1, (0.5,) * 3, (0.25,) * 3)
    views = [
        clip_of(VideoClips(videos, transform, 4, 4, 30, seed=0, mode="val", torchcodec=on)[SampleKey(0, 0)][0])
        for on in (True, False)
    ]
    assert (views[0] - views[1]).abs().mean() < 0.01 and used_torchcodec == [True]


def test_without_torchcodec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.startswith("torchcodec"):
            raise ModuleNotFoundError("No module named 'torchcodec'")
        return plain(name, *args)

    for name in [name for name in sys.modules if name.split(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"DATA.DECODING_BACKEND.*pip install '.\[torchcodec\]'.*No module"):
        VideoClips([("a.mp4", 0)], None, 4, 4, 30, seed=0, torchcodec=True)  # type: ignore[arg-type]
