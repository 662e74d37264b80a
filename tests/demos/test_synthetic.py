"""The synthetic data: the same pixels each time, a class that only shape or motion tells, readable files."""

import json
import logging
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from maskfeat.demos import scenes, synthetic
from maskfeat.demos.scenes import MOTIONS, SHAPES, contour, motion_track, render_clip, render_image
from maskfeat.demos.synthetic import make_clips, make_images


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# ---------------------------------------------------------------- images


def test_shapes_have_area_one_and_their_centre_at_the_origin() -> None:
    y, x = np.mgrid[-2:2:401j, -2:2:401j]
    for shape in SHAPES:
        points = contour(shape)
        inside = np.zeros(x.shape, dtype=bool)  # even-odd rule
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            crosses = (y0 > y) != (y1 > y)
            with np.errstate(divide="ignore", invalid="ignore"):
                inside ^= crosses & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
        assert inside.sum() * 0.01**2 == pytest.approx(1.0, abs=0.02), shape
        assert abs(x[inside].mean()) < 0.01 and abs(y[inside].mean()) < 0.01, shape
    with pytest.raises(ValueError, match="blob"):
        contour("blob")


def test_an_image_is_a_pure_function_of_its_name() -> None:
    first = render_image("star", "train", 3, seed=5)
    assert first.shape == (96, 96, 3) and first.dtype == np.uint8
    for other in SHAPES:
        render_image(other, "train", 0)
    np.testing.assert_array_equal(render_image("star", "train", 3, seed=5), first)
    others = [
        ("star", "val", 3, 5),
        ("star", "train", 4, 5),
        ("star", "train", 3, 6),
        ("ring", "train", 3, 5),
    ]
    for shape, split, number, seed in others:
        assert (render_image(shape, split, number, seed=seed) != first).any()


@pytest.fixture
def classless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the class out of the key of every draw, so that only what the class itself does can differ."""
    keyed = scenes._rng
    monkeypatch.setattr(scenes, "_rng", lambda seed, kind, split, name, number: keyed(seed, split, number))


@pytest.mark.usefixtures("classless")
def test_only_the_shape_differs_between_classes() -> None:
    for number in range(5):
        disc, ring = (render_image(shape, "train", number).astype(int) for shape in ("disc", "ring"))
        differs = (disc != ring).any(axis=2).mean()
        assert 0.01 < differs < 0.4  # the hole, and the rim that makes up for its area


def test_colour_does_not_tell_the_class() -> None:
    """The best linear guess from colours, learned on half of the images, fails on the others."""
    images = [[render_image(shape, "train", n, size=(48, 48)) for n in range(60)] for shape in SHAPES]
    pixels = np.array(images, dtype=np.float64) / 255
    border = np.concatenate([pixels[:, :, 0], pixels[:, :, -1]], axis=2)
    parts = [pixels.mean((2, 3)), pixels.std((2, 3)), border.mean(2), np.ones(pixels.shape[:2] + (1,))]
    features = np.concatenate(parts, axis=2)
    labels = np.broadcast_to(np.arange(len(SHAPES))[:, None], features.shape[:2])
    half = features.shape[1] // 2
    learned, tested = features[:, :half].reshape(-1, 10), features[:, half:].reshape(-1, 10)
    weights = np.linalg.lstsq(learned, np.eye(len(SHAPES))[labels[:, :half].ravel()], rcond=None)[0]
    right = ((tested @ weights).argmax(1) == labels[:, half:].ravel()).mean()
    assert right < 1 / 8 + 4 * np.sqrt(1 / 8 * 7 / 8 / len(tested))


def test_make_images_writes_imagenet_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {
        "classes": ("star", "disc"),
        "train_per_class": 3,
        "val_per_class": 2,
        "size": (40, 56),
        "seed": 1,
    }
    with caplog.at_level(logging.INFO):
        root = make_images(tmp_path / "images", **options)
    assert "10 synthetic images" in caplog.text
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg"))
    assert files == [f"train/{c}/{n:04d}.jpg" for c in ("disc", "star") for n in range(3)] + [
        f"val/{c}/{n:04d}.jpg" for c in ("disc", "star") for n in range(2)
    ]
    with Image.open(root / "train/star/0002.jpg") as image:
        assert image.size == (56, 40) and image.mode == "RGB"
        read = np.asarray(image).astype(int)
    drawn = render_image("star", "train", 2, (40, 56), seed=1)
    assert np.abs(read - drawn).mean() < 8  # JPEG stores colour at half size


# ---------------------------------------------------------------- clips


def test_first_frames_are_alike_and_motions_differ() -> None:
    tracks = {m: motion_track(m, np.random.default_rng(3), num_frames=32, fps=30) for m in MOTIONS}
    for track in tracks.values():
        assert track.shape == (32, 3) and (track >= 0).all() and (track < 1).all()
        np.testing.assert_allclose(track[0], tracks["bob"][0])
    moving = {m: set(np.flatnonzero(np.ptp(track, axis=0) > 1e-6)) for m, track in tracks.items()}
    assert moving == {"bob": {1}, "fall": {1}, "rise": {1}, "grow": {2}, "shrink": {2}, "sway": {0}}
    with pytest.raises(ValueError, match="spin"):
        motion_track("spin", np.random.default_rng(3), 4, 30)


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("frame", [0, 13, 31])
def test_no_single_frame_tells_the_motion(motion: str, frame: int) -> None:
    """Kolmogorov-Smirnov distance of each coordinate from a fixed reference motion, at any frame."""
    count = 800
    rng, other = np.random.default_rng(1), np.random.default_rng(2)
    here = np.sort([motion_track(motion, rng, 32, 30)[frame] for _ in range(count)], axis=0)
    reference = np.sort([motion_track("rise", other, 1, 30)[0] for _ in range(count)], axis=0)
    for k in range(3):
        both = np.concatenate([here[:, k], reference[:, k]])
        a, b = (np.searchsorted(v[:, k], both, side="right") / count for v in (here, reference))
        assert np.abs(a - b).max() < 1.95 * np.sqrt(2 / count)  # p = 0.001


@pytest.fixture
def scene_log(monkeypatch: pytest.MonkeyPatch) -> list[scenes.Scene]:
    """Every scene that is made from here on, so that a test can tell a shape from its background."""
    made: list[scenes.Scene] = []
    make = scenes._scene
    monkeypatch.setattr(scenes, "_scene", lambda *options: made.append(make(*options)) or made[-1])
    return made


def test_motion_can_be_read_from_the_pixels(scene_log: list[scenes.Scene]) -> None:
    """Seen through its pixels, the shape's centre and area move as the class says, and only so."""
    for number in range(3):
        across, height, area = {}, {}, {}
        for motion in MOTIONS:
            frames = render_clip(motion, "train", number, difficulty=0.0)
            where = (frames != np.asarray(scene_log[-1].background)).any(3)
            area[motion] = where.sum((1, 2))
            across[motion] = (where.sum(1) * np.arange(128)).sum(1) / area[motion]
            turn = np.exp(2j * np.pi * np.arange(96) / 96)  # height runs on a loop
            height[motion] = np.unwrap(np.angle((where.sum(2) * turn).sum(1))) / (2 * np.pi)
        assert height["fall"][-1] - height["fall"][0] > 0.6 and (np.diff(height["fall"]) > 0).mean() > 0.9
        assert height["rise"][-1] - height["rise"][0] < -0.6 and (np.diff(height["rise"]) < 0).mean() > 0.9
        assert 0.3 < np.ptp(height["bob"]) < 0.65
        assert np.ptp(across["sway"]) > 25 > 10 > np.ptp(across["rise"])
        assert (np.diff(area["grow"]) > 0).sum() >= 25 and (np.diff(area["shrink"]) < 0).sum() >= 25


@pytest.mark.usefixtures("classless")
def test_first_frames_are_the_same_picture() -> None:
    for number in range(3):
        clips = {m: render_clip(m, "train", number, num_frames=2) for m in MOTIONS}
        for clip in clips.values():
            np.testing.assert_array_equal(clip[0], clips["bob"][0])
        assert len({clip[1].tobytes() for clip in clips.values()}) == len(MOTIONS)


def test_make_clips_writes_kinetics_lists(tmp_path: Path) -> None:
    options = {"train_per_class": 2, "val_per_class": 1, "test_per_class": 1, "num_frames": 32, "seed": 2}
    root = make_clips(tmp_path / "clips", classes=("rise", "fall"), **options)
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        lines = (root / f"{split}.csv").read_text().splitlines()
        rows = [line.split(" ") for line in lines]
        assert [label for _, label in rows] == ["0"] * count + ["1"] * count
        for name, label in rows:
            assert not Path(name).is_absolute() and (root / name).is_file()
            assert Path(name).name.startswith(("fall", "rise")[int(label)])
    frames = decode(root / "videos/train/rise_0001.mp4")
    drawn = render_clip("rise", "train", 1, seed=2)
    assert frames.shape == drawn.shape == (32, 96, 128, 3)
    assert np.abs(frames.astype(int) - drawn).mean() < 8
    with av.open(str(root / "videos/train/rise_0001.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 30 and stream.codec_context.name in ("h264", "mpeg4")


def test_another_encoder_is_taken_where_x264_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = render_clip("bob", "train", 0, num_frames=6)
    monkeypatch.setattr(synthetic, "ENCODERS", ("no-such-encoder", "mpeg4"))
    assert synthetic.write_video(tmp_path / "a.mp4", frames, 30) == "mpeg4"
    assert np.abs(decode(tmp_path / "a.mp4").astype(int) - frames).mean() < 12
    monkeypatch.setattr(synthetic, "ENCODERS", ("no-such-encoder",))
    with pytest.raises(ValueError, match="no-such-encoder"):
        synthetic.write_video(tmp_path / "b.mp4", frames, 30)


# ---------------------------------------------------------------- folders


def test_a_finished_folder_is_kept_and_a_broken_one_mended(tmp_path: Path) -> None:
    options = {"classes": ("disc",), "train_per_class": 2, "val_per_class": 1, "size": (32, 32)}
    root = make_images(tmp_path, **options)
    assert json.loads((root / "dataset.json").read_text())["complete"] is True
    marker = root / "train/disc/0000.jpg"
    marker.write_bytes(b"kept")
    make_images(tmp_path, **options)
    assert marker.read_bytes() == b"kept"  # complete: not touched
    (root / "val/disc/0000.jpg").unlink()
    make_images(tmp_path, **options)
    assert (root / "val/disc/0000.jpg").is_file() and marker.read_bytes() != b"kept"


def test_strange_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        make_images(tmp_path / "mine", train_per_class=1, val_per_class=1)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="is a file"):
        make_images(tmp_path / "mine" / "notes.txt")
    options = {"classes": ("disc",), "train_per_class": 1, "val_per_class": 1, "size": (32, 32)}
    make_images(tmp_path / "made", **options)
    with pytest.raises(ValueError, match=r"seed 0 \(now 1\)"):
        make_images(tmp_path / "made", seed=1, **options)
    with pytest.raises(ValueError, match="kind images"):
        make_clips(tmp_path / "made")


@pytest.mark.parametrize(
    "options",
    [
        {"classes": ("disc", "blob")},
        {"classes": ()},
        {"val_per_class": 0},
        {"size": (16, 64)},
        {"difficulty": 2.0},
    ],
)
def test_bad_arguments_write_nothing(tmp_path: Path, options: dict) -> None:
    with pytest.raises(ValueError, match="given"):
        make_images(tmp_path / "new", **options)
    with pytest.raises(ValueError, match="given"):
        make_clips(tmp_path / "new", size=(97, 128))
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for kind in ("--images", "--clips"):
        with pytest.raises(SystemExit) as end:
            synthetic.main([kind, str(tmp_path / "file" / "x")])
        said = capsys.readouterr().err.splitlines()[-1]
        assert end.value.code == 2 and said.endswith(f"error: {tmp_path}/file/x cannot be written: Not a directory")


def test_a_clip_has_the_same_bytes_whatever_memory_held_before(tmp_path: Path) -> None:
    frames = render_clip("sway", "test", 14, 32, 30, (80, 80), 0, 0.4, "stripes")
    written = set()
    for number in range(30):
        for _ in range(3):
            left = [av.VideoFrame(80, 80, name) for name in ("rgb24", "yuv420p") for _ in range(24)]
            for frame in left:
                for plane in frame.planes:
                    np.frombuffer(plane, np.uint8)[...] = 7 * number
            del left
        synthetic.write_video(tmp_path / "clip.mp4", frames, 30)
        written.add((tmp_path / "clip.mp4").read_bytes())
    assert len(written) == 1


def test_vivid_stripes() -> None:
    """The largest change from one pixel to the next in a corner, where there is background."""
    steps = [
        [np.abs(np.diff(render_image("disc", "train", n, texture=texture)[:24, :24].astype(int), axis=1)).max()
         for n in range(12)]
        for texture in ("mixed", "stripes")
    ]  # fmt: skip
    assert np.median(steps[1]) > 2 * np.median(steps[0])
    with pytest.raises(ValueError, match="texture 'dots' given: expected one of mixed, stripes"):
        make_images("unused", texture="dots")


def test_a_size_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    for size in ("96", "96x", "96x128x3", "axb"):
        with pytest.raises(SystemExit):
            synthetic.main(["--images", "a", "--size", size])
        assert f"argument --size: {size!r} is not HEIGHTxWIDTH, such as 96x128" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_130(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def render(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "render_image", render)
    assert synthetic.main(["--images", str(tmp_path / "a")]) == 130
    assert [record.getMessage() for record in caplog.records] == ["interrupted"]
