"""Decoding: the right frames of every kind of file, and a cause for every file that cannot be decoded."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from maskfeat.data.bad_samples import UnreadableSample
from maskfeat.data.video import decoder
from maskfeat.data.video.decoder import decode_frames, open_video
from tests.data.media import HEIGHT, WIDTH, paint, read_numbers, write_video

B_FRAMES = {"g": "12", "bf": "3"}
KINDS = {
    "h264_b_frames": {"suffix": ".mp4", "codec": "libx264", "options": B_FRAMES},
    "h264_one_gop": {"suffix": ".mp4", "codec": "libx264", "options": {"g": "250", "bf": "2"}},
    "h264_open_gop": {
        "suffix": ".mp4",
        "codec": "libx264",
        "options": {**B_FRAMES, "x264-params": "open-gop=1"},
    },
    "h264_mkv": {"suffix": ".mkv", "codec": "libx264", "options": B_FRAMES},
    "h264_ts": {"suffix": ".ts", "codec": "libx264", "options": B_FRAMES},
    "h264_flv": {"suffix": ".flv", "codec": "libx264", "options": B_FRAMES},
    "h264_avi": {"suffix": ".avi", "codec": "libx264", "options": B_FRAMES},
    "h264_fragments": {
        "suffix": ".mp4",
        "codec": "libx264",
        "options": B_FRAMES,
        "container_options": {"movflags": "frag_keyframe+empty_moov"},
    },
    "hevc": {
        "suffix": ".mp4",
        "codec": "libx265",
        "options": {"g": "12", "x265-params": "log-level=none:pools=1"},
    },
    "vp9": {
        "suffix": ".webm",
        "codec": "libvpx-vp9",
        "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"},
    },
    "vp8": {"suffix": ".webm", "codec": "libvpx", "options": {"g": "12", "deadline": "realtime"}},
    "av1": {"suffix": ".mkv", "codec": "libsvtav1", "options": {"g": "12", "preset": "12"}},
    "mpeg4": {"suffix": ".mp4", "codec": "mpeg4", "options": {"g": "12"}},
    "mpeg4_b_frames": {"suffix": ".mp4", "codec": "mpeg4", "options": B_FRAMES},
    "mpeg4_avi": {"suffix": ".avi", "codec": "mpeg4", "options": {"g": "12"}},
    "mpeg4_avi_b_frames": {"suffix": ".avi", "codec": "mpeg4", "options": B_FRAMES},
    "mpeg1": {"suffix": ".mpg", "codec": "mpeg1video", "options": {"g": "12"}},
    "mpeg2_b_frames": {"suffix": ".mpg", "codec": "mpeg2video", "options": {"bf": "2"}},
}


def make(folder: Path, kind: str) -> Path:
    settings = dict(KINDS[kind])
    return write_video(folder / f"{kind}{settings.pop('suffix')}", **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_requested_frames(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path, kind)
    with open_video(path) as video:
        assert video.info.frames == 40
        assert video.info.fps == pytest.approx(25, rel=1e-3)
        frames = video.frames(range(40))
        assert frames.shape == (40, HEIGHT, WIDTH, 3) and frames.dtype == np.uint8
        assert read_numbers(frames) == list(range(40))
    for indices in ([0], [39], [13, 13, 14], [31, 8, 31], [23, 25, 39], [24, 36], [11], [12]):
        frames, info = decode_frames(path, indices)
        assert read_numbers(frames) == indices, indices
        assert np.abs(frames[0].astype(int) - paint(indices[0])).mean() < 12


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="no scheduling policies here")
def test_writing_a_video_leaves_the_scheduling_alone(tmp_path: Path) -> None:
    """In a process at real-time priority every later test would starve the machine."""
    before = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    write_video(tmp_path / "v.mkv", 12, "libsvtav1", options={"g": "12", "preset": "12"})
    assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before


def test_numbers_out_of_range_are_clamped(tmp_path: Path) -> None:
    path = make(tmp_path, "h264_b_frames")
    assert read_numbers(decode_frames(path, [-4, 38, 40, 1000])[0]) == [0, 38, 39, 39]


def test_wanted_may_depend_on_the_video(tmp_path: Path) -> None:
    path = make(tmp_path, "mpeg4")
    frames, info = decode_frames(path, lambda info: [info.frames - 1, round(info.fps)])
    assert read_numbers(frames) == [39, 25]
    assert (info.width, info.height, info.codec, info.path) == (WIDTH, HEIGHT, "mpeg4", str(path))


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_frames_are_rotated(tmp_path: Path, rotation: int) -> None:
    plain = decode_frames(write_video(tmp_path / "plain.mp4", frames=5), [0, 4])[0]
    turned = decode_frames(write_video(tmp_path / "turned.mp4", frames=5, rotation=rotation), [0, 4])[0]
    expected = np.rot90(plain, rotation // 90, axes=(1, 2))
    assert turned.shape == expected.shape
    assert np.abs(turned.astype(int) - expected).mean() < 1


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts"])
def test_stream_that_starts_late(tmp_path: Path, suffix: str) -> None:
    times = [7000 + 40 * i for i in range(40)]
    path = write_video(tmp_path / f"late{suffix}", times=times, time_base=Fraction(1, 1000), options=B_FRAMES)
    for indices in ([0, 1, 2], [30, 39], [12]):
        assert read_numbers(decode_frames(path, indices)[0]) == indices


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_variable_frame_rate_goes_by_presentation_order(tmp_path: Path, suffix: str) -> None:
    gaps = np.random.default_rng(3).integers(5, 200, 40)
    path = write_video(
        tmp_path / f"uneven{suffix}",
        times=np.cumsum(gaps).tolist(),
        time_base=Fraction(1, 1000),
        options=B_FRAMES,
    )
    with open_video(path) as video:
        assert video.info.frames == 40
        assert video.info.fps == pytest.approx(39_000 / gaps[1:].sum(), rel=0.05)
    for indices in (list(range(40)), [5, 17, 38], [39]):
        assert read_numbers(decode_frames(path, indices)[0]) == indices


def test_file_without_the_first_frames(tmp_path: Path) -> None:
    """A cut in the middle of a group of pictures: an edit list in mp4 makes players skip what precedes it."""
    whole = write_video(tmp_path / "whole.mp4", options={"g": "12", "bf": "0"})
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        step = int(1 / (25 * source.streams.video[0].time_base))
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts -= 5 * step
                packet.dts -= 5 * step
                packet.stream = stream
                target.mux(packet)
    with av.open(str(tmp_path / "cut.mp4")) as container:
        shown = read_numbers(np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]))
    with open_video(tmp_path / "cut.mp4") as video:
        assert video.info.frames == len(shown)
    for places in ([0, 1], [20], [len(shown) - 1]):
        numbers = read_numbers(decode_frames(tmp_path / "cut.mp4", places)[0])
        assert numbers == [shown[place] for place in places]


def test_video_with_sound(tmp_path: Path) -> None:
    path = write_video(tmp_path / "sound.mp4", audio=True)
    assert read_numbers(decode_frames(path, [3, 30])[0]) == [3, 30]


def test_only_the_range_is_decoded_and_each_frame_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "long.mp4", frames=120, options={"g": "10", "bf": "0"})
    decoded, converted = [], []
    plain_decode, plain_convert = decoder.Video._decode, decoder.Video._to_rgb

    def counting_decode(self: decoder.Video, *args: object):  # type: ignore[no-untyped-def]
        for frame in plain_decode(self, *args):  # type: ignore[arg-type]
            decoded.append(frame.pts)
            yield frame

    def counting_convert(self: decoder.Video, *args: object) -> np.ndarray:
        converted.append(args)
        return plain_convert(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder.Video, "_decode", counting_decode)
    monkeypatch.setattr(decoder.Video, "_to_rgb", counting_convert)
    assert read_numbers(decode_frames(path, [101, 101, 105, 109, 109])[0]) == [101, 101, 105, 109, 109]
    assert len(decoded) <= 12
    assert len(converted) == 3


SKIPPED = ["h264_b_frames", "h264_one_gop", "h264_open_gop", "h264_mkv", "h264_ts", "h264_fragments", "hevc"]


def in_full(path: Path, wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The same frames decoded without skipping any."""
    with monkeypatch.context() as context:
        context.setattr(decoder, "_CAN_SKIP_FRAMES", ())
        return decode_frames(path, wanted)[0]


@pytest.mark.parametrize("kind", SKIPPED)
def test_skipping_frames_does_not_change_the_others(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path, kind)
    decoded = []
    plain_decode = decoder.Video._decode

    def counting_decode(self: decoder.Video, *args: object):  # type: ignore[no-untyped-def]
        for frame in plain_decode(self, *args):  # type: ignore[arg-type]
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(decoder.Video, "_decode", counting_decode)
    counts = {True: 0, False: 0}
    for step in (1, 3, 4, 7):
        for first in (0, 5, 14, 39):
            wanted = [first + step * i for i in range(5) if first + step * i < 40]
            for skip in (True, False):
                decoded.clear()
                frames = decode_frames(path, wanted)[0] if skip else in_full(path, wanted, monkeypatch)
                counts[skip] += len(decoded)
                assert read_numbers(frames) == wanted
                if skip:
                    lean = frames
            assert np.array_equal(lean, frames), wanted
    assert counts[True] < 0.9 * counts[False]


def test_no_frames_are_skipped_in_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that cannot be decoded has the same replacement as if all frames had been decoded."""
    whole = make(tmp_path, "h264_b_frames").read_bytes()
    with av.open(str(tmp_path / "h264_b_frames.mp4")) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    path = tmp_path / "damaged.mp4"
    rng = np.random.default_rng(0)
    for _ in range(12):
        data = bytearray(whole)
        for position, size in rng.permutation(packets)[: rng.integers(1, 4)].tolist():
            data[position : position + size] = (size - 4).to_bytes(4, "big") + bytes(size - 4)
        path.write_bytes(data)
        wanted = sorted(rng.permutation(40)[:6].tolist())
        assert np.array_equal(decode_frames(path, wanted)[0], in_full(path, wanted, monkeypatch)), wanted


def test_recovery_from_a_seek_that_ends_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path, "h264_b_frames")
    plain_seek = decoder.Video._seek
    calls = []

    def late_seek(self: decoder.Video, timestamp: int) -> bool:
        calls.append(timestamp)
        return plain_seek(self, timestamp + 12 * 512)  # one group too far

    monkeypatch.setattr(decoder.Video, "_seek", late_seek)
    assert read_numbers(decode_frames(path, [14, 20])[0]) == [14, 20]
    monkeypatch.setattr(decoder.Video, "_seek", lambda self, timestamp: False)
    assert read_numbers(decode_frames(path, [14, 20])[0]) == [14, 20]
    assert calls


def test_truncated_matroska_gives_the_frames_in_the_file(tmp_path: Path) -> None:
    path = make(tmp_path, "h264_mkv")
    whole = path.read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) * 6 // 10])
    with open_video(cut) as video:
        frames = video.info.frames
        assert 10 < frames < 35
        assert read_numbers(video.frames([0, 5, frames - 3])) == [0, 5, frames - 3]
        assert len(video.frames([0, 39])) == 2


def test_frames_that_do_not_decode_are_replaced_by_those_before(tmp_path: Path) -> None:
    path = write_video(tmp_path / "damaged.mp4", frames=30, options={"g": "10", "bf": "0"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for position, size in packets[10:20]:  # all of the second group of pictures is damaged
        data[position : position + size] = (size - 4).to_bytes(4, "big") + bytes(size - 4)
    path.write_bytes(data)
    with open_video(path) as video:
        assert video.info.frames == 30
    assert read_numbers(decode_frames(path, [2, 9, 15, 20, 29])[0]) == [2, 9, 9, 20, 29]
    assert read_numbers(decode_frames(path, [12, 13, 22])[0]) == [9, 9, 22]


@pytest.mark.parametrize("share, readable", [(0.6, True), (0.05, False)])
def test_truncated_mp4_with_its_index_in_front(tmp_path: Path, share: float, readable: bool) -> None:
    path = write_video(
        tmp_path / "cut.mp4", options={"g": "12", "bf": "0"}, container_options={"movflags": "faststart"}
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    if not readable:
        with pytest.raises(UnreadableSample):
            decode_frames(path, [0])
        return
    with open_video(path) as video:
        assert 8 < video.info.frames < 38  # the frames in the file, not the number in its header
        assert read_numbers(video.frames([0, 5, video.info.frames - 2])) == [0, 5, video.info.frames - 2]


def test_truncated_mp4_without_its_index_is_unreadable(tmp_path: Path) -> None:
    path = make(tmp_path, "h264_b_frames")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UnreadableSample, match="not a video that can be read"):
        open_video(path)


def test_causes(tmp_path: Path) -> None:
    cases: dict[str, str] = {}

    def bad(name: str, content: bytes, cause: str) -> None:
        (tmp_path / name).write_bytes(content)
        cases[name] = cause

    bad("empty.mp4", b"", "empty")
    bad("text.mp4", b"this is not a video\n" * 40, "not a video")
    bad("noise.mp4", bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)), "not a video")
    cases["missing.mp4"] = "no such file"
    (tmp_path / "folder.mp4").mkdir()
    cases["folder.mp4"] = "folder"
    os.mkfifo(tmp_path / "pipe.mp4")
    cases["pipe.mp4"] = "not a regular file"
    with av.open(str(tmp_path / "audio.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    cases["audio.mp4"] = r"no video stream \(streams: audio\)"
    for name, cause in cases.items():
        with pytest.raises(UnreadableSample, match=cause) as caught:
            decode_frames(tmp_path / name, [0])
        assert caught.value.path == str(tmp_path / name)
        assert str(tmp_path / name) not in caught.value.cause


def test_codec_that_is_not_allowed(tmp_path: Path) -> None:
    path = write_video(tmp_path / "old.mkv", codec="ffv1")
    with pytest.raises(UnreadableSample, match="ffv1"):
        open_video(path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{url}\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile {url}\n"),
        ("list.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"),
    ],
)
def test_playlists_open_nothing(tmp_path: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = write_video(tmp_path / "secret.mp4", frames=3)
    opened = []
    monkeypatch.setattr(decoder, "_refuse_other_files", lambda *args: opened.append(args))
    for target in (name, name.rsplit(".", 1)[0] + ".mp4"):
        (tmp_path / target).write_text(text.format(url=secret))
        with pytest.raises(UnreadableSample):
            decode_frames(tmp_path / target, [0])
    assert not opened


def test_a_url_is_a_file_that_does_not_exist() -> None:
    with pytest.raises(UnreadableSample, match="no such file"):
        decode_frames("http://127.0.0.1:9/video.mp4", [0])


def test_large_frames_are_rejected_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path, "mpeg4")
    monkeypatch.setattr(decoder, "MAX_SIDE", 100)
    with pytest.raises(UnreadableSample, match="128x64 are too large"):
        decode_frames(path, [0])


def test_files_are_closed(tmp_path: Path) -> None:
    path = make(tmp_path, "mpeg4")
    (tmp_path / "text.mp4").write_text("no video" * 100)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else pytest.skip("no /proc")
    for _ in range(20):
        decode_frames(path, [0, 20])
        with pytest.raises(UnreadableSample):
            decode_frames(tmp_path / "text.mp4", [0])
    assert len(os.listdir("/proc/self/fd")) <= before


def test_shared_damaged_videos(shared: Path) -> None:
    folder = shared / "data" / "damaged" / "videos"
    frames = {
        "one_frame": 1,
        "three_frames": 3,
        "tiny_16x16": 40,
        "discard_first_keyframe": 25,
        "bit_flips": 252,
    }
    for name, count in frames.items():
        clip, info = decode_frames(folder / f"{name}.mp4", range(16))
        assert info.frames == count and len(clip) == 16, name
        assert name == "one_frame" or clip.std() > 5, name  # its one frame is black
    for name in ("audio_only", "empty", "text", "truncated"):
        with pytest.raises(UnreadableSample):
            decode_frames(folder / f"{name}.mp4", range(16))


@pytest.mark.slow
def test_shared_videos_against_a_plain_decoder(shared: Path) -> None:
    """Random access equals decoding from the start."""
    for path in sorted((shared / "data" / "kinetics_samples" / "videos").iterdir()):
        if path.stem in ("juggle", "test_h264", "nasa"):
            continue  # slow to decode, and no special case
        with open_video(path) as video:
            count = video.info.frames
            places = sorted({0, 1, count // 2, count - 2, count - 1})
            frames = video.frames(places)
        with av.open(str(path)) as container:
            plain = {
                i: f.to_ndarray(format="rgb24")
                for i, f in enumerate(container.decode(container.streams.best("video")))
                if i in places or i == count
            }
        assert sorted(plain) == places, path.name
        for place, frame in zip(places, frames, strict=True):
            reference = np.rot90(plain[place]) if "rotated" in path.name else plain[place]
            assert np.abs(frame.astype(int) - reference).mean() < 2, (path.name, place)


class _Damaged:
    """A frame of which the decoder says that it is corrupt."""

    is_corrupt = True

    def __init__(self, frame: av.VideoFrame) -> None:
        self._frame = frame

    def __getattr__(self, name: str) -> object:
        return getattr(self._frame, name)


def test_a_corrupt_frame_is_decoded_again_with_all_frames_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where frames were skipped, the one that would replace it may be among them."""
    path = write_video(tmp_path / "v.mp4", options=B_FRAMES)
    expected = decode_frames(path, [0, 5])[0]
    passes: list[list[int] | None] = []
    decode = decoder.Video._decode

    def damaged(video: decoder.Video, only: list[int] | None = None) -> object:
        passes.append(only)
        frames = decode(video, only)
        return (_Damaged(frame) for frame in frames) if only is not None else frames

    monkeypatch.setattr(decoder.Video, "_decode", damaged)
    assert np.array_equal(decode_frames(path, [0, 5])[0], expected)
    assert passes[0] == [0, 5] and passes[-1] is None
