"""Scaling while decoding, against averages over areas in float64; and which short side each split asks for."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maskfeat.batch import SampleKey
from maskfeat.build import build_loader
from maskfeat.config import load_config
from maskfeat.data.bad_samples import UnreadableSample
from maskfeat.data.datasets.kinetics import VideoClips
from maskfeat.data.video import torchcodec_decoder
from maskfeat.data.video.decoder import decode_frames
from maskfeat.data.video.scaling import Scaler, scaled_size
from maskfeat.objectives.hog import hog
from tests.data.media import write_video
from tests.small import MVIT_FT, MVIT_PT, RECIPES, clips

SIZES = [(320, 426, 256), (720, 1280, 256), (180, 320, 256), (426, 320, 255), (258, 346, 256)]
"""Height, width and short side. The scaled width is odd: only then does swscale give every pixel its own colour."""


def write_texture(path: Path, height: int, width: int, frames: int = 2, rotation: int = 0) -> Path:
    """An H.264 video of coloured noise with details of three pixels and more."""
    draw = torch.Generator().manual_seed(height * width)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "8", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for _ in range(frames):
            noise = torch.rand(1, 3, height // 3, width // 3, generator=draw)
            image = F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
            pixels = (image * 255).byte().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def _weights(before: int, after: int) -> np.ndarray:
    """(after, before) float64: shares of the area where there are fewer samples after, else linear interpolation."""
    step = before / after
    places = np.arange(before)
    if step > 1:
        start = np.arange(after)[:, None] * step
        shares = np.minimum(start + step, places + 1) - np.maximum(start, places)
    else:
        centres = np.clip((np.arange(after)[:, None] + 0.5) * step - 0.5, 0, before - 1)
        shares = 1 - np.abs(centres - places)
    shares = shares.clip(min=0)
    return shares / shares.sum(axis=1, keepdims=True)


def area_scaled(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(T, H, W, 3) uint8: all frames, each plane scaled in float64, as RGB by BT.601."""
    images = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            height, width = frame.height, frame.width
            data = frame.to_ndarray(format="yuv420p").astype(np.float64)
            u, v = data[height:].reshape(2, height // 2, width // 2)
            y, u, v = (
                _weights(len(plane), size[0]) @ plane @ _weights(plane.shape[1], size[1]).T
                for plane in (data[:height], u, v)
            )
            y, u, v = (y - 16) * 255 / 219, (u - 128) * 255 / 224, (v - 128) * 255 / 224
            images.append(np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], axis=-1))
    return np.stack(images).clip(0, 255).round().astype(np.uint8)


def hog_error(frames: np.ndarray, expected: np.ndarray) -> float:
    """Squared error of HOG targets, as a share of the error of predicting their mean."""
    pixels = (torch.from_numpy(x[:, :248, :248].copy()).permute(0, 3, 1, 2) for x in (frames, expected))
    given, wanted = (hog(x / 57.4) for x in pixels)
    return float((given - wanted).square().mean() / (wanted - wanted.mean(dim=(0, 3, 4), keepdim=True)).square().mean())


@pytest.mark.slow
@pytest.mark.parametrize("height, width, side", SIZES)
def test_frames_are_averaged_over_areas(tmp_path: Path, height: int, width: int, side: int) -> None:
    path = write_texture(tmp_path / "a.mp4", height, width)
    frames = decode_frames(path, [0, 1], short_side=side)[0]
    expected = area_scaled(path, frames.shape[1:3])
    assert min(frames.shape[1:3]) == side and frames.shape[2] % 2
    assert np.abs(frames.astype(int) - expected).max() <= 1, "swscale rounds in 14 bits"
    assert hog_error(frames, expected) < 0.005
    own = torch.from_numpy(decode_frames(path, [0, 1])[0]).permute(0, 3, 1, 2).float()
    resized = F.interpolate(own, frames.shape[1:3], mode="bilinear", align_corners=False)
    assert hog_error(resized.round().byte().permute(0, 2, 3, 1).numpy(), expected) > 0.02, "the test can fail"


def test_files_of_the_size_are_left_as_they_are(tmp_path: Path) -> None:
    for height, width in ((256, 340), (340, 256), (256, 256)):
        path = write_texture(tmp_path / f"{height}x{width}.mp4", height, width)
        assert np.array_equal(decode_frames(path, [0, 1], short_side=256)[0], decode_frames(path, [0, 1])[0])


def scaled_at_once(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: one scaler, straight to packed pixels."""
    graph = av.filter.Graph()
    graph.threads = 1
    graph.link_nodes(
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)),
        graph.add("scale", f"w={width}:h={height}:flags=area:in_chroma_loc=center"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    ).configure()
    graph.push(frame)
    return graph.pull().to_ndarray()


@pytest.mark.parametrize("kind", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv444p12le", "gray"])
def test_pixels_do_not_depend_on_the_way_through_planes(kind: str) -> None:
    draw = np.random.default_rng(0)
    sizes = [(512, 682, 256, 341), (540, 960, 256, 455), (720, 1280, 256, 455), (854, 480, 399, 225)]
    for height, width, *scaled in [*sizes, (640, 480, 341, 256), (400, 532, 256, 341), (180, 320, 256, 455)]:
        noise = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        frame = av.VideoFrame.from_ndarray(noise, format="rgb24").reformat(format=kind, threads=1)
        assert np.array_equal(Scaler().to_rgb(frame, *scaled), scaled_at_once(frame, *scaled)), (height, width)


@pytest.mark.parametrize(
    "size, expected",
    [
        ((320, 426), (256, 341)),  # 340.8
        ((720, 1280), (256, 455)),  # 455.1
        ((240, 322), (256, 343)),  # 343.47
        ((512, 683), (256, 342)),  # 341.5, up
        ((1280, 720), (455, 256)),
        ((100, 100), (256, 256)),
        ((256, 257), (256, 257)),
    ],
)
def test_the_long_side_is_rounded_half_up(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert scaled_size(*size, 256) == expected
    assert scaled_size(*size, None) == size


def test_a_rotated_file_is_scaled_and_turned(tmp_path: Path) -> None:
    plain = decode_frames(write_texture(tmp_path / "a.mp4", 96, 130), [0], short_side=64)[0]
    turned = decode_frames(write_texture(tmp_path / "b.mp4", 96, 130, rotation=90), [0], short_side=64)[0]
    assert plain.shape == (1, 64, 87, 3) and turned.shape == (1, 87, 64, 3)
    assert np.array_equal(np.rot90(plain[0]), turned[0])


def test_a_strip_is_not_enlarged_beyond_the_limit(tmp_path: Path) -> None:
    path = write_texture(tmp_path / "strip.mp4", 4, 4096)
    assert decode_frames(path, [0, 1])[0].shape == (2, 4, 4096, 3)
    with pytest.raises(UnreadableSample, match="2 frames of 1048576x1024 are too large"):
        decode_frames(path, [0, 1], short_side=1024)


def test_torchcodec_does_not_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_texture(tmp_path / "a.mp4", 96, 128)
    loaded: list[int] = []

    def load() -> None:
        loaded.append(1)
        raise RuntimeError("as for a damaged file")

    monkeypatch.setattr(torchcodec_decoder, "load_decoder", load)
    expected = decode_frames(path, [0, 1], short_side=64)[0]
    assert np.array_equal(torchcodec_decoder.decode_frames(path, [0, 1], short_side=64)[0], expected) and not loaded
    torchcodec_decoder.decode_frames(path, [0, 1], short_side=96)
    assert loaded, "a file of that size is decoded by torchcodec"


def _shapes(split: str, root: Path, config: str, small: Sequence[str], *options: str) -> tuple[int, ...]:
    cfg = load_config(RECIPES / config, [*small, *clips(root), *options])
    dataset = build_loader(cfg, split).dataset
    assert isinstance(dataset, VideoClips)
    return dataset._decode(0, SampleKey(0, 0, 0)).shape[1:3]


PT, FT = "k400_MVITv2_S_16x4_MaskFeat_PT.yaml", "k400_MVITv2_S_16x4_FT.yaml"


@pytest.mark.parametrize(
    "split, config, small, options, expected",
    [
        ("train", PT, MVIT_PT, [], (36, 46)),
        ("train", FT, MVIT_FT, [], (36, 46)),
        ("train", FT, MVIT_FT, ["DATA.TRAIN_JITTER_SCALES_RELATIVE", "[]"], (36, 46)),
        ("val", FT, MVIT_FT, [], (36, 46)),
        ("val", FT, MVIT_FT, ["DATA.TEST_CROP_SIZE", "40", "DATA.TRAIN_CROP_SIZE", "40"], (40, 51)),
        ("test", FT, MVIT_FT, [], (36, 46)),
        ("test", FT, MVIT_FT, ["TEST.NUM_SPATIAL_CROPS", "3"], (32, 41)),
        ("train", PT, MVIT_PT, ["DATA.DECODER_SCALE", "False"], (80, 102)),
        ("test", FT, MVIT_FT, ["DATA.DECODER_SCALE", "False"], (80, 102)),
    ],
)
def test_the_short_side_of_each_split(
    tmp_path: Path, split: str, config: str, small: list[str], options: list[str], expected: tuple[int, int]
) -> None:
    write_texture(tmp_path / "a.mp4", 80, 102, frames=20)
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.csv").write_text("a.mp4 0\na.mp4 1\n" * 4)
    assert _shapes(split, tmp_path, config, small, *options) == expected


def test_frames_that_change_their_size_end_in_one(tmp_path: Path) -> None:
    """Of the first frame; written as MPEG-TS, which may change in the middle."""
    parts = [write_texture(tmp_path / f"{w}.ts", 64, w) for w in (96, 128)]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    frames = decode_frames(tmp_path / "both.ts", lambda info: list(range(info.frames)), short_side=32)[0]
    assert frames.shape[1:] == (32, 48, 3)


def test_numbers_are_legible_at_half_the_size(tmp_path: Path) -> None:
    """The right frames are scaled, whichever of them are decoded."""
    path = write_video(tmp_path / "a.mp4", frames=30, options={"g": "12", "bf": "3"})
    own, half = (decode_frames(path, [3, 17, 29], short_side=side)[0] for side in (None, 32))
    assert half.shape == (3, 32, 64, 3)
    averaged = own.reshape(3, 32, 2, 64, 2, 3).mean(axis=(2, 4))
    assert np.abs(averaged - half).mean() < 4
