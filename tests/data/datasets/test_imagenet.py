"""Reading images of the kinds found in real data sets, and the folder data set."""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskfeat.batch import SampleKey
from maskfeat.data import image_reader
from maskfeat.data.bad_samples import UnreadableSample
from maskfeat.data.datasets.folders import list_class_folders, scan_folder
from maskfeat.data.datasets.imagenet import ImageFolder
from maskfeat.data.image_reader import FORMATS, MAX_PIXELS, read_image, read_tensor
from maskfeat.data.sample import Sample
from maskfeat.data.transforms import ImageEvalTransform, ImageTrainTransform, ImageTransform
from maskfeat.errors import UserError
from tests.data.pictures import overlapping_tags, run_lengths, tiff
from tests.data.samples import clip_of

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def colours(height: int = 40, width: int = 60) -> np.ndarray:
    """A smooth image whose four corners differ."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, np.full_like(x, 90.0)], -1).astype(np.uint8)


def close(image: Image.Image, expected: np.ndarray, tolerance: float = 4) -> bool:
    assert image.mode == "RGB"
    return np.abs(np.asarray(image).astype(float) - expected).mean() < tolerance


def test_formats_are_recognised_by_content(tmp_path: Path) -> None:
    for kind in FORMATS:
        path = tmp_path / f"{kind}_named.JPEG"
        Image.fromarray(colours()).save(path, kind)
        assert close(read_image(path), colours(), 12 if kind == "GIF" else 4), kind


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP"])
def test_the_first_page_is_read(kind: str, tmp_path: Path) -> None:
    pages = [Image.fromarray(np.roll(colours(), 20 * n, axis=1)) for n in range(3)]
    pages[0].save(tmp_path / "pages", kind, save_all=True, append_images=pages[1:], lossless=True)
    assert close(read_image(tmp_path / "pages"), colours(), 12)


def test_modes_of_tiff_bmp_and_gif(tmp_path: Path) -> None:
    rgb = Image.fromarray(colours())
    grey = np.asarray(rgb.convert("L"))
    in_grey = grey[..., None].repeat(3, 2)
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(grey))
    rgba.save(tmp_path / "alpha.tif")
    rgba.save(tmp_path / "alpha.bmp")
    rgb.convert("CMYK").save(tmp_path / "cmyk.tif", compression="tiff_lzw")
    rgb.save(tmp_path / "jpeg.tif", compression="jpeg", quality=95)
    for name in ("alpha.tif", "alpha.bmp", "cmyk.tif", "jpeg.tif"):
        assert close(read_image(tmp_path / name), colours(), 1), name
    rgb.convert("L").save(tmp_path / "grey.gif")
    rgb.convert("L").save(tmp_path / "grey.bmp")
    rgba.convert("LA").save(tmp_path / "grey_alpha.tif")
    Image.fromarray(grey.astype(np.uint16) * 256 + 100).save(tmp_path / "sixteen.tif")
    Image.fromarray(65535 - grey.astype(np.uint16) * 257).save(tmp_path / "white_is_0.tif", tiffinfo={262: 0})
    (tmp_path / "twelve.tif").write_bytes(tiff(60, 40, 12, pack_12(grey.astype(np.uint16) * 16 + 7)))
    for name in ("grey.gif", "grey.bmp", "grey_alpha.tif", "sixteen.tif", "white_is_0.tif", "twelve.tif"):
        assert close(read_image(tmp_path / name), in_grey, 1.1), name
    rgb.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.gif", transparency=0)
    assert close(read_image(tmp_path / "palette.gif"), colours(), 12)
    (tmp_path / "runs.bmp").write_bytes(run_lengths(20, 10))
    assert read_image(tmp_path / "runs.bmp").size == (20, 10)
    rgb.convert("1").save(tmp_path / "fax.tif", compression="group4")
    assert set(np.unique(np.asarray(read_image(tmp_path / "fax.tif")))) == {0, 255}
    for values in (grey / np.float32(255), grey.astype(np.int32)):
        Image.fromarray(values).save(tmp_path / "range.tif")
        with pytest.raises(UnreadableSample, match="32 bits or a sign, and no known range"):
            read_image(tmp_path / "range.tif")


def pack_12(values: np.ndarray) -> bytes:
    """Pairs of 12-bit numbers in three bytes."""
    a, b = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()


def test_modes(tmp_path: Path) -> None:
    rgb = Image.fromarray(colours())
    grey = np.asarray(rgb.convert("L"))
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert close(read_image(tmp_path / "cmyk.jpg"), colours())
    rgb.convert("L").save(tmp_path / "grey.jpg")
    assert close(read_image(tmp_path / "grey.jpg"), grey[..., None].repeat(3, 2))
    rgb.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png", transparency=b"\x80" * 256)
    assert close(read_image(tmp_path / "palette.png"), colours(), 12)
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(grey))
    rgba.save(tmp_path / "alpha.png")
    assert close(read_image(tmp_path / "alpha.png"), colours(), 0.1)
    rgba.convert("LA").save(tmp_path / "grey_alpha.png")
    assert close(read_image(tmp_path / "grey_alpha.png"), grey[..., None].repeat(3, 2), 0.1)
    Image.fromarray(grey.astype(np.uint16) * 256 + 100).save(tmp_path / "sixteen.png")
    assert close(read_image(tmp_path / "sixteen.png"), grey[..., None].repeat(3, 2), 1.1)
    rgb.convert("1").save(tmp_path / "bits.png")
    assert set(np.unique(np.asarray(read_image(tmp_path / "bits.png")))) == {0, 255}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = colours()
    # What a camera stores so that rotating it by the tag gives the upright image.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    assert close(read_image(tmp_path / f"a.{suffix}"), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_image_with_broken_exif_is_read(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(colours()).save(file, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\0" * 20)
    (tmp_path / "a.jpg").write_bytes(file.getvalue())
    assert close(read_image(tmp_path / "a.jpg"), colours())


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_causes(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(colours(200, 300)).save(file, "JPEG")
    jpeg = file.getvalue()
    icon = io.BytesIO()
    Image.fromarray(colours()).save(icon, "ICO")
    gif = io.BytesIO()
    Image.fromarray(colours()).save(gif, "GIF")
    bmp = io.BytesIO()
    Image.fromarray(colours()).save(bmp, "BMP")
    cases = {
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"not an image " * 30, "not a JPEG, PNG, WEBP, BMP, TIFF, GIF image"),
        "icon.jpg": (icon.getvalue(), "not a JPEG, PNG, WEBP, BMP, TIFF, GIF image"),
        "header.jpg": (jpeg[:200], "damaged image|not a JPEG"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "huge.png": (bomb(60_000), "more than 80 million"),
        "large.png": (bomb(9_500), "more than 80 million"),
        "larger.png": (bomb(8_980), "more than 80 million"),
        "huge.tif": (tiff(60_000, 60_000, 8, b"\0" * 99), "more than 80 million"),
        "larger.tif": (tiff(8_980, 8_980, 8, b"\0" * 99), "more than 80 million"),
        "tags.tif": (overlapping_tags(2000, 100_000), "its tags claim more bytes than it has"),
        "rows.bmp": (run_lengths(8_000_000, 1), "more than 8 million"),
        "huge.gif": (gif.getvalue()[:6] + b"\xff\xff" * 2 + gif.getvalue()[10:], "more than 80 million"),
        "huge.bmp": (bmp.getvalue()[:18] + struct.pack("<ii", 60_000, 60_000) + bmp.getvalue()[26:], "more than 80 m"),
        "cut.gif": (gif.getvalue()[: len(gif.getvalue()) // 2], "damaged image"),
        "cut.bmp": (bmp.getvalue()[: len(bmp.getvalue()) // 2], "damaged image"),
    }
    for name, (content, cause) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableSample, match=cause) as caught:
            read_image(tmp_path / name)
        assert caught.value.path == str(tmp_path / name)
    with pytest.raises(UnreadableSample, match="no such file"):
        read_image(tmp_path / "missing.jpg")


def test_mutated_files_never_raise_anything_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    originals = []
    for kind in FORMATS:
        file = io.BytesIO()
        Image.fromarray(colours()).save(file, kind)
        originals.append(file.getvalue())
    outcomes = set()
    for turn in range(600):
        data = bytearray(originals[turn % 6])
        for position in rng.integers(0, len(data), rng.integers(1, 12)):
            data[position] = rng.integers(256)
        (tmp_path / "a.jpg").write_bytes(data[: rng.integers(1, len(data) + 1)] if turn % 2 else data)
        try:
            outcomes.add(read_image(tmp_path / "a.jpg").mode)
        except UnreadableSample:
            outcomes.add("unreadable")
    assert outcomes == {"RGB", "unreadable"}


def test_shared_damaged_images(shared: Path) -> None:
    folder = shared / "data" / "damaged" / "images"
    sizes = {
        "cmyk.JPEG": (392, 294),
        "gray.JPEG": (392, 294),
        "exif_rotated.JPEG": (100, 160),
        "png_named.JPEG": (120, 90),
        "rgba.png": (120, 90),
        "one_pixel.JPEG": (1, 1),
        "sliver.JPEG": (2000, 4),
    }
    for name, size in sizes.items():
        image = read_image(folder / name)
        assert (image.mode, image.size) == ("RGB", size), name
        assert clip_of(ImageEvalTransform(64, MEAN, STD)(image)).shape == (3, 64, 64)
    # Five copies of one photograph must have the same colours.
    means = [np.asarray(read_image(folder / n)).mean((0, 1)) for n in sizes if n not in ("gray.JPEG", "one_pixel.JPEG")]
    assert np.ptp(np.stack(means), axis=0).max() < 3
    for name in ("empty.JPEG", "header_only.JPEG", "text.JPEG", "truncated.JPEG", "bomb_60000x60000.png"):
        with pytest.raises(UnreadableSample):
            read_image(folder / name)


def both(path: Path) -> np.ndarray | str:
    """The pixels that both readers read, or the cause that both give; fails if they differ by a bit."""
    try:
        read = np.asarray(read_image(path))
    except UnreadableSample as error:
        with pytest.raises(UnreadableSample) as caught:
            read_tensor(path)
        assert caught.value.cause == error.cause
        return error.cause
    tensor = read_tensor(path)
    assert tensor.dtype == torch.uint8 and np.array_equal(tensor.numpy(), read)
    return read


def test_both_readers_read_the_same_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(24):
        size = tuple(rng.integers(1, 90, 2))
        image = Image.fromarray(
            rng.integers(0, 256, (*size, 3), dtype=np.uint8) // 2 + np.resize(colours(), (*size, 3)) // 2
        )
        options = {"quality": int(rng.integers(20, 100)), "subsampling": number % 3, "progressive": number % 2 == 0}
        image.convert(("RGB", "L", "CMYK")[number // 8]).save(tmp_path / "a.jpg", **options)
        assert both(tmp_path / "a.jpg").shape == (*size, 3)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(colours()).save(tmp_path / "a.jpg", exif=exif)
        both(tmp_path / "a.jpg")
    for kind in FORMATS[1:]:
        Image.fromarray(colours()).save(tmp_path / "a.jpg", kind)
        both(tmp_path / "a.jpg")


def test_both_readers_on_mutated_files(tmp_path: Path) -> None:
    """Both readers reject the same files, and read the same pixels of damaged ones."""
    rng = np.random.default_rng(1)
    originals = []
    for number, mode in enumerate(("RGB", "RGB", "L", "CMYK")):
        file = io.BytesIO()
        Image.fromarray(colours()).convert(mode).save(file, "JPEG", progressive=number == 1)
        originals.append(file.getvalue())
    outcomes = set()
    for turn in range(400):
        data = bytearray(originals[turn % 4])
        for position in rng.integers(0, len(data), rng.integers(1, 12)):
            data[position] = rng.integers(256)
        (tmp_path / "a.jpg").write_bytes(data[: rng.integers(1, len(data) + 1)] if turn % 3 else data)
        outcomes.add(isinstance(both(tmp_path / "a.jpg"), str))
    assert outcomes == {True, False}


@pytest.mark.slow
def test_both_readers_on_shared_images(shared: Path) -> None:
    for path in sorted((shared / "data" / "imagenet_samples").rglob("*.JPEG")):
        assert isinstance(both(path), np.ndarray), path
    for path in sorted((shared / "data" / "damaged" / "images").iterdir()):
        both(path)


def make_folder(root: Path, classes: dict[str, int]) -> Path:
    for label, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            image = np.roll(colours(), 7 * number, axis=1).copy()
            image[..., 2] = 40 * label
            Image.fromarray(image).save(root / name / f"{number}.JPEG")
    return root


def test_listing(tmp_path: Path) -> None:
    train = make_folder(tmp_path / "train", {"b": 2, "a": 1, "d": 1, "c": 0})
    (train / "a" / "notes.txt").write_text("not an image")
    (train / "readme.txt").write_text("not a class")
    scan = scan_folder(train)
    samples, classes = list_class_folders(scan)
    assert classes == ["a", "b", "c", "d"]
    assert [(Path(path).parent.name, label) for path, label in samples] == [
        ("a", 0),
        ("b", 1),
        ("b", 1),
        ("d", 3),
    ]
    assert list_class_folders(train) == (samples, classes)
    assert (scan.empty, scan.left_out_in_words()) == (["c"], "2 .txt files")
    val = make_folder(tmp_path / "val", {"d": 1, "b": 1})
    assert [label for _, label in list_class_folders(val, classes)[0]] == [1, 3]
    with pytest.raises(ValueError, match="training set lacks .*zebra.*"):
        list_class_folders(make_folder(tmp_path / "other", {"zebra": 1}), classes)
    with pytest.raises(ValueError, match="DATA.PATH_TO_DATA_DIR"):
        list_class_folders(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no image"):
        list_class_folders(make_folder(tmp_path / "hollow", {"a": 0}))


def draw(rng: np.random.Generator) -> np.ndarray:
    return rng.random((4, 4)) < 0.4


def test_samples(tmp_path: Path) -> None:
    samples, _ = list_class_folders(make_folder(tmp_path, {"a": 3, "b": 3}))
    transform = ImageTrainTransform(32, (0.3, 1.0), (3 / 4, 4 / 3), MEAN, STD)
    dataset = ImageFolder(samples, transform, seed=1, draw_hidden=draw, num_views=2)
    first, second = dataset[SampleKey(0, 4, 0)]
    assert (first.label, first.index, first.bad) == (1, 4, ())
    assert clip_of(first).shape == (3, 32, 32) and first.pixels.dtype == torch.uint8
    assert first.hidden is not None and first.hidden.shape == (4, 4) and first.hidden.dtype == torch.bool
    assert not torch.equal(clip_of(first), clip_of(second)) and not torch.equal(first.hidden, second.hidden)
    again = dataset[SampleKey(0, 4, 0)]
    assert torch.equal(clip_of(again[1]), clip_of(second)) and torch.equal(again[1].hidden, second.hidden)
    assert not torch.equal(clip_of(dataset[SampleKey(1, 4, 0)][0]), clip_of(first))
    other_seed = ImageFolder(samples, transform, seed=2, draw_hidden=draw)
    assert not torch.equal(clip_of(other_seed[SampleKey(0, 4, 0)][0]), clip_of(first))
    # The mask does not depend on the augmentation.
    plainer = ImageFolder(samples, ImageEvalTransform(32, MEAN, STD), seed=1, draw_hidden=draw)
    assert torch.equal(plainer[SampleKey(0, 4, 0)][0].hidden, first.hidden)


def test_bad_samples_are_replaced_by_the_next_and_others_do_not_change(tmp_path: Path) -> None:
    samples, _ = list_class_folders(make_folder(tmp_path, {"a": 3, "b": 3}))
    transform = ImageTrainTransform(32, (0.3, 1.0), (3 / 4, 4 / 3), MEAN, STD)
    dataset = ImageFolder(samples, transform, seed=1)
    before = [dataset[SampleKey(0, index)][0] for index in range(6)]
    Path(samples[1][0]).write_bytes(b"")
    Path(samples[2][0]).unlink()
    after = [dataset[SampleKey(0, index)][0] for index in range(6)]
    for index in (0, 3, 4, 5):
        assert torch.equal(clip_of(before[index]), clip_of(after[index])) and after[index].bad == ()
    assert [sample.index for sample in after] == [0, 3, 3, 3, 4, 5]
    assert [sample.label for sample in after] == [0, 1, 1, 1, 1, 1]
    assert [(bad.index, bad.cause) for bad in after[1].bad] == [(1, "the file is empty"), (2, "no such file")]
    assert after[1].bad[0].path == samples[1][0]
    # The replacement of sample 1 uses the random numbers of sample 1.
    assert not torch.equal(clip_of(after[1]), clip_of(after[3]))
    assert torch.equal(clip_of(after[1]), clip_of(dataset[SampleKey(0, 1)][0]))


def test_the_last_sample_is_replaced_by_the_first(tmp_path: Path) -> None:
    samples, _ = list_class_folders(make_folder(tmp_path, {"a": 3}))
    Path(samples[2][0]).write_bytes(b"?")
    assert ImageFolder(samples, ImageEvalTransform(32, MEAN, STD), seed=0)[SampleKey(0, 2)][0].index == 0


def test_error_if_no_sample_can_be_read(tmp_path: Path) -> None:
    samples = [(str(tmp_path / f"{i}.jpg"), 0) for i in range(3)]
    with pytest.raises(UnreadableSample, match="1.jpg.*no such file; nor can any of the 2 samples after it"):
        ImageFolder(samples, ImageEvalTransform(32, MEAN, STD), seed=0)[SampleKey(0, 1)]


def test_an_unreadable_image_in_testing_is_zeros_with_its_label(tmp_path: Path) -> None:
    samples, _ = list_class_folders(make_folder(tmp_path, {"a": 2, "b": 2}))
    Path(samples[2][0]).write_bytes(b"?")
    dataset = ImageFolder(samples, ImageEvalTransform(32, MEAN, STD), seed=0, replace_bad=False)
    (sample,) = dataset[SampleKey(0, 2)]
    assert (sample.label, sample.index, len(sample.bad)) == (1, 2, 1)
    assert clip_of(sample).shape == (3, 32, 32) and not clip_of(sample).any()


def test_other_errors_name_the_file(tmp_path: Path) -> None:
    samples, _ = list_class_folders(make_folder(tmp_path, {"a": 1}))

    class Broken(ImageEvalTransform):
        def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Sample:
            raise IndexError("a bug")

    with pytest.raises(RuntimeError, match="0.JPEG.*IndexError: a bug"):
        ImageFolder(samples, Broken(32, MEAN, STD), seed=0)[SampleKey(0, 0)]


def segments(jpeg: bytes, at: int, *added: tuple[int, bytes]) -> bytes:
    """The file with segments of these markers and contents after its first `at` bytes."""
    inserted = b"".join(struct.pack(">HH", marker, len(content) + 2) + content for marker, content in added)
    return jpeg[:at] + inserted + jpeg[at:]


def test_headers_that_are_read_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain files take the short way; whatever may be turned, coded or limited otherwise is checked by Pillow."""
    headers, asked = [], image_reader._opened
    monkeypatch.setattr(image_reader, "_opened", lambda path: headers.append(path) or asked(path))

    def pillow_asked(content: bytes) -> int:
        headers.clear()
        (tmp_path / "a.jpg").write_bytes(content)
        read_tensor(tmp_path / "a.jpg")
        return len(headers)

    def jpeg(mode: str = "RGB", **options: object) -> bytes:
        file = io.BytesIO()
        Image.fromarray(colours()).convert(mode).save(file, "JPEG", **options)
        return file.getvalue()

    plain, exif = jpeg(), Image.Exif()
    exif[0x0112] = 1
    assert pillow_asked(plain) == pillow_asked(jpeg("L")) == 0
    assert pillow_asked(segments(plain, 2, (0xFFE2, b"ICC_PROFILE\0"), (0xFFFE, b"a comment"))) == 0
    assert pillow_asked(jpeg(progressive=True)) == pillow_asked(jpeg(exif=exif)) == 1  # then simplejpeg decodes
    assert pillow_asked(segments(plain, 2, (0xFFE1, b"http://ns.adobe.com/xap/1.0/\0"))) == 1
    exif[0x0112] = 6
    assert pillow_asked(jpeg(exif=exif)) == pillow_asked(jpeg("CMYK")) == 2  # and Pillow decodes
    png = io.BytesIO()
    Image.fromarray(colours()).save(png, "PNG")
    assert pillow_asked(png.getvalue()) == 1


def test_limits_hold_for_the_fast_reader(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(colours(200, 300)).save(file, "JPEG")
    plain = file.getvalue()
    at = plain.index(b"\xff\xc0")
    large = plain[: at + 5] + struct.pack(">HH", 60_000, 60_000) + plain[at + 9 :]
    Image.fromarray(colours()).save(tmp_path / "b.jpg", progressive=True)
    scans = (tmp_path / "b.jpg").read_bytes()
    scan = scans[scans.index(b"\xff\xda") : scans.index(b"\xff\xc4", scans.index(b"\xff\xda"))]
    cases = {
        "more than 80 million": large,
        "more than 100 passes": scans[:-2] + scan * 101 + scans[-2:],
        "truncated": plain[: len(plain) * 2 // 3],
        "the file is empty": b"",
        "not a JPEG|damaged": plain[:2],
    }
    for cause, content in cases.items():
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(UnreadableSample, match=cause):
            read_tensor(tmp_path / "a.jpg")


@pytest.mark.parametrize("progressive", [False, True])
def test_what_follows_a_photograph_is_none_of_its_scans(progressive: bool, tmp_path: Path) -> None:
    """Phones append a film, whose bytes look like markers now and then."""
    path = tmp_path / "a.jpg"
    Image.fromarray(colours()).save(path, progressive=progressive)
    plain = np.asarray(read_image(path))
    path.write_bytes(path.read_bytes() + b"a film \xff\xda" * 200)
    assert np.array_equal(np.asarray(read_image(path)), plain)
    assert read_tensor(path) is not None


def test_a_missing_decoder_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(UserError, match=r"simplejpeg \(pip install '.\[simplejpeg\]'\)"):
        ImageFolder([], ImageEvalTransform(32, MEAN, STD), 0, backend="simplejpeg")


def photograph(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Noise whose amplitude falls with frequency, as that of photographs does, with an edge."""
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width))) / np.maximum(np.hypot(y, x), 1 / 500)
    picture = np.fft.irfft2(spectrum, (height, width)).transpose(1, 2, 0)
    picture = 128 + 50 * picture / picture.std() + np.where(np.arange(width) < width // 3, 40, 0)[None, :, None]
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


TRANSFORMS = (
    (ImageTrainTransform(224, (0.5, 1.0), (3 / 4, 4 / 3), MEAN, STD), 0.5),
    (ImageTrainTransform(224, (0.08, 1.0), (3 / 4, 4 / 3), MEAN, STD, "bilinear"), 0.5),
    (ImageTrainTransform(96, (0.3, 1.0), (3 / 4, 4 / 3), MEAN, STD, "lanczos"), 0.0),
    (ImageEvalTransform(224, MEAN, STD), 0.5),
)


def apart(listed: list[tuple[str, int]], transform: ImageTransform) -> float:
    """Mean absolute difference of both readers in grey levels, 0 to 255, with the same random numbers."""
    pil, fast = (ImageFolder(listed, transform, seed=0, backend=name) for name in ("pil", "simplejpeg"))
    differences = []
    for index in range(len(listed)):
        (plain,), (other,) = pil[SampleKey(0, index)], fast[SampleKey(0, index)]
        assert other.transform == plain.transform  # the same draws
        differences.append((other.pixels.float() - plain.pixels.float()).abs().mean())
    return torch.stack(differences).mean().item()


def test_the_fast_reader_differs_by_little(tmp_path: Path) -> None:
    rng, listed = np.random.default_rng(0), []
    for number in range(9):
        exif = Image.Exif()
        exif[0x0112] = number  # 0: none
        size = rng.integers(150, 450, 2)
        options = {"quality": int(rng.integers(60, 98)), "subsampling": number % 3, "progressive": number % 4 == 0}
        picture = photograph(rng, *size).convert("L" if number == 5 else "RGB")
        picture.save(path := str(tmp_path / f"{number}.jpg"), exif=exif, **options)
        listed.append((path, 0))
    for transform, bound in TRANSFORMS:
        assert apart(listed, transform) <= bound


@pytest.mark.slow
def test_the_fast_reader_differs_by_little_on_photographs(shared: Path) -> None:
    listed, _ = list_class_folders(shared / "data" / "imagenet_samples" / "train")
    for transform, bound in TRANSFORMS:
        assert apart(listed[::4], transform) <= bound


@pytest.mark.parametrize(
    "augment", [{"auto_augment": "rand-m9-mstd0.5-inc1"}, {"color_jitter": 0.4}, {"erase_prob": 1.0}]
)
def test_the_fast_reader_augments(tmp_path: Path, augment: dict) -> None:
    listed, _ = list_class_folders(make_folder(tmp_path, {"a": 3}))
    transform = ImageTrainTransform(32, (1.0, 1.0), (1.0, 1.0), MEAN, STD, **augment)
    views = [ImageFolder(listed, transform, 1, backend=name)[SampleKey(0, 1)][0] for name in ("pil", "simplejpeg")]
    first, second = (clip_of(view) for view in views)
    assert (first - second).abs().mean() < 0.03 and first.std() > 0.1


def test_size_limit_is_below_pillows() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None and MAX_PIXELS < Image.MAX_IMAGE_PIXELS
