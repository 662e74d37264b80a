"""Lists of videos, and clips sampled from them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from maskfeat.batch import SampleKey
from maskfeat.config import load_config
from maskfeat.config.recipes import CONFIG_ROOT
from maskfeat.data.datasets import kinetics
from maskfeat.data.datasets.kinetics import VideoClips
from maskfeat.data.datasets.sample_list import read_sample_list
from maskfeat.data.device_transforms import DeferredTransform
from maskfeat.data.loader import Loader
from maskfeat.data.sample import Sample
from maskfeat.data.samplers import EpochSampler
from maskfeat.data.transforms import ClipTestTransform, ClipTrainTransform
from maskfeat.data.video.temporal_sampling import clip_span, frame_indices
from maskfeat.errors import UserError
from tests.data.media import read_numbers, write_video
from tests.data.samples import clip_of

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class Raw:
    """Records the frames it is given, so that tests can read their numbers."""

    crop = 8

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []
        self.positions: list[int] = []

    def __call__(self, frames: np.ndarray, rng: np.random.Generator, position: int = 1) -> Sample:
        self.seen.append(frames)
        self.positions.append(position)
        grey = torch.from_numpy(rng.integers(0, 256, (len(frames), 8, 8, 3), dtype=np.uint8))
        return Sample(grey, DeferredTransform((3, len(frames), 8, 8), MEAN, STD))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    folder = tmp_path_factory.mktemp("videos")
    lengths = (100, 60, 5)
    return [
        (str(write_video(folder / f"{n}.mp4", frames=n, rate=30, options={"g": "20"})), i)
        for i, n in enumerate(lengths)
    ]


def test_list(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("\ufeffa/b c.mp4 3\n\n  d.mp4 10 \r\n", encoding="utf-8")
    assert read_sample_list(path, " ", "/data") == [("/data/a/b c.mp4", 3), ("/data/d.mp4", 10)]
    assert read_sample_list(path) == [("a/b c.mp4", 3), ("d.mp4", 10)]
    path.write_text("a,b.mp4,7\n/x/../y.mp4,0\n")
    assert read_sample_list(path, ",") == [("a,b.mp4", 7), ("/x/../y.mp4", 0)]


@pytest.mark.parametrize(
    "line, words",
    [
        ("a.mp4", ["line 2", "'a.mp4'", "DATA.PATH_LABEL_SEPARATOR"]),
        ("a.mp4,3", ["line 2", "DATA.PATH_LABEL_SEPARATOR"]),
        ("a.mp4 -1", ["line 2", "'a.mp4 -1'"]),
        ("a.mp4 cat", ["line 2"]),
        ("http://host/a.mp4 3", ["line 2", "not a local file"]),
        ("/etc/a.mp4 3", ["line 2", "DATA.PATH_PREFIX"]),
        ("../a.mp4 3", ["line 2", "DATA.PATH_PREFIX"]),
        ("x/../../a.mp4 3", ["line 2", "DATA.PATH_PREFIX"]),
    ],
)
def test_bad_lines_name_file_line_and_key(tmp_path: Path, line: str, words: list[str]) -> None:
    path = tmp_path / "train.csv"
    path.write_text(f"fine.mp4 0\n{line}\n")
    with pytest.raises(ValueError) as caught:
        read_sample_list(path, " ", "/data")
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_missing_and_empty_lists(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DATA.PATH_TO_DATA_DIR"):
        read_sample_list(tmp_path / "train.csv")
    (tmp_path / "train.csv").write_text("\n\n")
    with pytest.raises(ValueError, match="is empty"):
        read_sample_list(tmp_path / "train.csv")


def test_training_draws_one_clip_that_all_views_share(videos: list[tuple[str, int]]) -> None:
    raw = Raw()
    dataset = VideoClips(videos, raw, 4, 4, 30, seed=0, num_views=2)
    starts = []
    for epoch in range(40):
        views = dataset[SampleKey(epoch, 0)]
        assert len(views) == 2 and [v.label for v in views] == [0, 0]
        assert raw.seen[-1] is raw.seen[-2]  # decoded once
        assert not torch.equal(clip_of(views[0]), clip_of(views[1]))  # augmented twice
        numbers = read_numbers(raw.seen[-1])
        starts.append(numbers[0])
        assert numbers == frame_indices(numbers[0], numbers[0] + 15, 4, 100) or np.diff(numbers).tolist() in (
            [5, 5, 5],
            [5, 5, 6],
            [5, 6, 5],
            [6, 5, 5],
            [5, 5, 4],
        )
    assert min(starts) < 20 and max(starts) > 64 and max(starts) <= 84
    assert len(set(starts)) > 20
    again = VideoClips(videos, Raw(), 4, 4, 30, seed=0, num_views=1)
    again[SampleKey(39, 0)]
    assert read_numbers(again.transform.seen[0])[0] == starts[39]  # whatever the number of views


def test_target_fps_is_scaled_by_the_frame_rate_of_the_video(videos: list[tuple[str, int]], tmp_path: Path) -> None:
    raw = Raw()
    dataset = VideoClips(videos, raw, 4, 4, target_fps=15, seed=0, mode="test")
    dataset[SampleKey(0, 0, 0)]
    assert read_numbers(raw.seen[0]) == [0, 10, 20, 31]  # 4 x 4 frames at 15 a second are 32 at 30
    slow = [(str(write_video(tmp_path / "slow.mp4", frames=60, rate=10)), 0)]
    VideoClips(slow, raw, 4, 4, target_fps=15, seed=0, mode="test")[SampleKey(0, 0, 0)]
    assert read_numbers(raw.seen[1]) == frame_indices(0, 16 / 15 * 10 - 1, 4, 60) == [0, 3, 6, 9]


@pytest.mark.parametrize("use_offset", [False, True])
def test_clips_and_crops_of_testing(
    videos: list[tuple[str, int]], use_offset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    plain = kinetics.decode_frames
    monkeypatch.setattr(
        kinetics, "decode_frames", lambda *args, **options: decoded.append(args[0]) or plain(*args, **options)
    )
    raw = Raw()
    dataset = VideoClips(
        videos,
        raw,
        4,
        4,
        30,
        seed=0,
        mode="test",
        use_offset=use_offset,
        num_clips=5,
        num_crops=3,
        num_views=2,
    )
    for view in range(15):
        (sample,) = dataset[SampleKey(0, 0, view)]
        start, end = clip_span(100, 16, view // 3, 5, use_offset)
        assert read_numbers(raw.seen[-1]) == frame_indices(start, end, 4, 100)
        assert raw.positions[-1] == view % 3
        assert (sample.index, sample.label) == (0, 0)
    assert len(decoded) == 5  # once per clip, not per crop
    dataset[SampleKey(0, 1, 14)]
    assert read_numbers(raw.seen[-1])[0] == int(clip_span(60, 16, 4, 5, use_offset)[0])


def test_validation_takes_the_centre_clip(videos: list[tuple[str, int]]) -> None:
    raw = Raw()
    (sample,) = VideoClips(videos, raw, 4, 4, 30, seed=0, mode="val")[SampleKey(3, 0)]
    assert read_numbers(raw.seen[0]) == [42, 47, 52, 57]


def test_a_video_shorter_than_the_clip_repeats_its_last_frame(videos: list[tuple[str, int]]) -> None:
    for mode in ("train", "val", "test"):
        raw = Raw()
        VideoClips(videos, raw, 8, 4, 30, seed=0, mode=mode)[SampleKey(0, 2)]
        assert read_numbers(raw.seen[0]) == [0, 4, 4, 4, 4, 4, 4, 4]


def test_with_real_transforms(videos: list[tuple[str, int]]) -> None:
    train = ClipTrainTransform(32, (0.5, 1.0), (3 / 4, 4 / 3), MEAN, STD)
    draw = lambda rng: rng.random((2, 4, 4)) < 0.4  # noqa: E731
    (sample,) = VideoClips(videos, train, 4, 4, 30, seed=0, draw_hidden=draw)[SampleKey(0, 1)]
    assert clip_of(sample).shape == (3, 4, 32, 32) and sample.hidden is not None and sample.hidden.shape == (2, 4, 4)
    test = ClipTestTransform(32, 36, 3, MEAN, STD)
    dataset = VideoClips(videos, test, 4, 4, 30, seed=0, mode="test", num_clips=2, num_crops=3)
    clips = [clip_of(dataset[SampleKey(0, 0, view)][0]) for view in range(6)]
    assert len({clip.numpy().tobytes() for clip in clips}) == 6
    assert torch.equal(clip_of(dataset[SampleKey(0, 0, 2)][0]), clips[2])


@pytest.mark.slow
def test_clips_do_not_depend_on_the_number_of_workers(videos: list[tuple[str, int]], tmp_path: Path) -> None:
    """Crops of many sizes, and an unreadable video."""
    (tmp_path / "text.mp4").write_text("not a video " * 50)
    listed = [*videos, (str(tmp_path / "text.mp4"), 7)]
    train = ClipTrainTransform(32, (0.3, 1.0), (3 / 4, 4 / 3), MEAN, STD, erase_prob=0.5)
    dataset = VideoClips(listed, train, 4, 4, 30, seed=0, num_views=2, replace_bad=False)
    batches = []
    for workers in (0, 2):
        loader = Loader(dataset, EpochSampler(4, 2, shuffle=False), num_workers=workers)
        loader.set_epoch(3)
        batches.append(list(loader))
    for here, there in zip(*batches, strict=True):
        assert here.clip.shape == (4, 3, 4, 32, 32)
        assert torch.equal(here.clip, there.clip) and here.bad == there.bad
    assert not batches[0][1].clip[2:].any() and batches[0][1].clip[:2].all(dim=0).any()


def test_bad_videos(videos: list[tuple[str, int]], tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video " * 50)
    listed = [videos[0], (str(tmp_path / "text.mp4"), 7), videos[1]]
    replaced = VideoClips(listed, Raw(), 4, 4, 30, seed=0, num_views=2)[SampleKey(0, 1)]
    assert [(s.index, s.label, s.bad[0].index) for s in replaced] == [(2, 1, 1)] * 2
    tested = VideoClips(listed, Raw(), 4, 4, 30, seed=0, mode="test", replace_bad=False)[SampleKey(0, 1)]
    assert (tested[0].index, tested[0].label, tested[0].bad[0].path) == (1, 7, str(tmp_path / "text.mp4"))
    zeros = clip_of(tested[0])
    assert zeros.shape == (3, 4, 8, 8) and not zeros.any()


def test_shared_videos(shared: Path) -> None:
    folder = shared / "data" / "kinetics_samples"
    listed = read_sample_list(folder / "train.csv", " ", str(folder))
    assert len(listed) == 11 and all(Path(path).is_file() for path, _ in listed)
    dataset = VideoClips(listed, ClipTestTransform(32, 36, 1, MEAN, STD), 4, 4, 30, seed=0, mode="val")
    for index, (path, label) in enumerate(listed):
        if "juggle" in path:
            continue  # 720p: slow
        (sample,) = dataset[SampleKey(0, index)]
        assert sample.bad == () and sample.label == label and clip_of(sample).std() > 0.05, path


def test_segments(videos: list[tuple[str, int]]) -> None:
    """Training draws within each segment, by epoch and sample alone; validation and test take the centres."""
    raw = Raw()
    train = VideoClips(videos, raw, 4, 4, 30, seed=0, segments=True)
    for epoch in range(20):
        train[SampleKey(epoch, 0)]
    drawn = np.array([read_numbers(frames) for frames in raw.seen])
    assert (drawn // 25 == range(4)).all() and all(len(set(column)) > 8 for column in drawn.T)
    train[SampleKey(7, 0)]
    assert read_numbers(raw.seen[-1]) == drawn[7].tolist()
    VideoClips(videos, raw, 4, 4, 30, seed=0, mode="val", segments=True)[SampleKey(0, 0)]
    assert read_numbers(raw.seen[-1]) == [12, 37, 62, 87]
    test = VideoClips(videos, raw, 4, 4, 30, seed=0, mode="test", num_crops=3, segments=True)
    for view in range(3):
        test[SampleKey(0, 1, view)]
        assert read_numbers(raw.seen[-1]) == [7, 22, 37, 52] and raw.positions[-1] == view
    assert test.views == 3


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["TEST.NUM_ENSEMBLE_VIEWS", "5"], "TEST.NUM_ENSEMBLE_VIEWS must be 1 where DATA.SEGMENT_SAMPLING is True"),
        (["TEST.NUM_TEMPORAL_CLIPS", "[1, 5]"], r"TEST.NUM_TEMPORAL_CLIPS must be \[1\] where .*; given \[1, 5\]"),
    ],
)
def test_segments_have_one_clip(opts: list[str], words: str) -> None:
    recipe = CONFIG_ROOT / "video_ft" / "ssv2_MVITv2_S_16_FT.yaml"
    with pytest.raises(UserError, match=words):
        load_config(recipe, opts)
    load_config(recipe, ["TEST.NUM_TEMPORAL_CLIPS", "[1]"])
    load_config(recipe, [*opts, "TEST.ENABLE", "False"])
