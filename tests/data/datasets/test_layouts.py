"""Where pre-training finds samples: any folder, any list, several of them; and class folders of videos."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskfeat.build import build_loader
from maskfeat.config import dump_config, load_config
from maskfeat.data.datasets.base import DatasetRequest, NoValidation
from maskfeat.data.datasets.classes import describe_split
from maskfeat.data.datasets.layouts import Split, find_split
from maskfeat.errors import UserError
from tests.data.media import write_video
from tests.small import MVIT_FT, MVIT_PT, RECIPES, VIT_FT, VIT_PT, images

PT, FT = RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml"
CLIPS_PT, CLIPS_FT = RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml", RECIPES / "k400_MVITv2_S_16x4_FT.yaml"


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def split(root: Path, name: str = "train", noun: str = "image", **keys: object) -> Split:
    opts = [word for key, value in keys.items() for word in (f"DATA.{key}", value)]
    recipe, small = (PT, VIT_PT) if noun == "image" else (CLIPS_PT, MVIT_PT)
    cfg = load_config(recipe, [*small, *(images(root) if "SOURCES" not in keys else []), *opts])
    return find_split(cfg, DatasetRequest(name, augmented=name == "train"), noun)


def names(found: Split, root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path, _ in found.samples]


# ------------------------------------------------------------------------------------------------ which files count


def test_a_flat_folder(tmp_path: Path) -> None:
    found = split(touch(tmp_path, "b.JPG", "a.png", "c.webp", "readme.txt", ".x.jpg"))
    assert names(found, tmp_path) == ["a.png", "b.JPG", "c.webp"]
    assert {label for _, label in found.samples} == {-1} and found.classes is None
    assert "at any depth (1 .png, 1 .jpg, 1 .webp in 1 folder)" in found.place
    assert found.left_out == "1 .txt file, 1 hidden file"


def test_a_nested_folder_without_train_leaves_held_out_folders_out(tmp_path: Path) -> None:
    touch(tmp_path, "0.tiff", "x/1.bmp", "x/y/z/2.jpg", "val/3.jpg", "val/in/4.jpg", "test/5.jpg", "x/val/6.jpg")
    found = split(tmp_path)
    assert names(found, tmp_path) == ["0.tiff", "x/1.bmp", "x/val/6.jpg", "x/y/z/2.jpg"]
    assert found.left_out == "1 folder test/, 1 folder val/"
    assert names(split(tmp_path, "val"), tmp_path) == ["val/3.jpg", "val/in/4.jpg"]


def test_a_flat_train_folder(tmp_path: Path) -> None:
    touch(tmp_path, "train/0.jpg", "train/1.jpg", "train/more/2.jpg", "other/3.jpg")
    assert names(split(tmp_path), tmp_path) == ["train/0.jpg", "train/1.jpg", "train/more/2.jpg"]


def test_class_folders_are_read_as_before(tmp_path: Path) -> None:
    """Order, labels and what is left out: goldens hold the batches."""
    touch(tmp_path, "train/b/0.jpg", "train/a/0.jpg", "train/a/1.jpg", "train/loose.jpg", "val/b/1.jpg")
    found = split(tmp_path)
    assert [(os.path.relpath(path, tmp_path), label) for path, label in found.samples] == [
        ("train/a/0.jpg", 0),
        ("train/a/1.jpg", 0),
        ("train/b/0.jpg", 1),
    ]
    assert found.classes == ["a", "b"] and "1 image directly in train/" in found.left_out
    assert split(tmp_path, "val").samples == [(str(tmp_path / "val/b/1.jpg"), 1)]
    touch(tmp_path, "val/new/2.jpg")
    assert names(split(tmp_path, "val"), tmp_path) == ["val/b/1.jpg", "val/new/2.jpg"], "no class is asked for"


def test_videos_in_any_container(tmp_path: Path) -> None:
    kinds = ("a.mp4", "b.mkv", "c.webm", "d.avi", "e.mov", "f.ts", "in/g.mpg", "in/h.MP4")
    touch(tmp_path, *kinds, "in/h.srt", "poster.jpg")
    found = split(tmp_path, noun="video")
    assert names(found, tmp_path) == list(kinds)
    assert found.left_out == "1 .jpg file, 1 .srt file"


@pytest.mark.parametrize("text", ["a.jpg\nin/b.png\n", "a.jpg,1\nin/b.png,0\n", "path\tlabel\na.jpg\t1\nin/b.png\t0\n"])
def test_a_list_of_images(text: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "in/b.png")
    (tmp_path / "mine.txt").write_text(text)
    found = split(tmp_path / "mine.txt")
    assert names(found, tmp_path) == ["a.jpg", "in/b.png"] and found.place == f"list {tmp_path / 'mine.txt'}"
    moved = tmp_path / "elsewhere.csv"
    (tmp_path / "mine.txt").rename(moved)
    assert names(split(moved, PATH_PREFIX=str(tmp_path)), tmp_path) == ["a.jpg", "in/b.png"]
    with pytest.raises(NoValidation, match=r"the list .*elsewhere.csv is a training set"):
        split(moved, "val")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "no image below .*: pre-training reads .jpg"),
        (["a.mp4", "b.txt"], r"no image below .*, which holds 1 .mp4 file, 1 .txt file: pre-training reads"),
        (["val/a.jpg"], "no image below .*, which holds 1 folder val/"),
        (["a.jpg", "b.heic", "c.heic"], "only 1 image below .*, which holds 2 .heic files"),
        (["train/a.txt", "b.jpg"], r"no image below .*train, which holds 1 .txt file"),
    ],
)
def test_nothing_to_train_on(files: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        split(touch(tmp_path, *files))


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(touch(tmp_path, "a.jpg"))
    for place in ("nowhere", ""):
        with pytest.raises(UserError, match="no folder .*train: DATA.PATH_TO_DATA_DIR must hold"):
            split(place)  # type: ignore[arg-type]  # "" is not the working folder
    with pytest.raises(UserError, match=r"gone.csv cannot be read \(no such file\)"):
        split(tmp_path / "gone.csv")


def test_no_validation_set(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    with pytest.raises(NoValidation, match=r"there is no .*val"):
        split(tmp_path, "val")
    (tmp_path / "val").mkdir()
    with pytest.raises(NoValidation, match=r"val has no image"):
        split(tmp_path, "val")


# ------------------------------------------------------------------------------------------------ several sources


def test_sources(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.jpg", "one/b.jpg", "two/train/x/c.jpg", "two/val/x/d.jpg", "e.png", "f.png", "one/n.txt")
    (tmp_path / "three.csv").write_text("e.png\nf.png\n")
    given = [[str(tmp_path / name), weight] for name, weight in (("one", 1), ("two", 0.5), ("three.csv", 1))]
    found = split(tmp_path, SOURCES=given)
    assert names(found, tmp_path) == ["one/a.jpg", "one/b.jpg", "two/train/x/c.jpg", "e.png", "f.png"]
    assert found.mixture == [(2, 1.0), (1, 0.5), (2, 1.0)] and {label for _, label in found.samples} == {-1}
    assert "3 sources [" in found.place and "1 image, 20 % of an epoch, each shown 1 times" in found.place
    assert found.left_out.startswith("1 .txt file of folder")
    assert names(split(tmp_path, "val", SOURCES=given), tmp_path) == ["two/val/x/d.jpg"]
    with pytest.raises(NoValidation, match="none of the 1 source of DATA.SOURCES"):
        split(tmp_path, "val", SOURCES=given[:1])
    with pytest.raises(UserError, match=r"gives .*two less than one of the 5 samples of an epoch: raise its weight"):
        split(tmp_path, SOURCES=[given[0], [given[1][0], 0.01], given[2]])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("/a", 'DATA.SOURCES must be a list of pairs of a path and a weight, such as \\[\\["/data/a", 2\\]'),
        ([["/a", 1, 2]], "must be a list of pairs"),
        ([[1, "/a"]], "must be a list of pairs"),
        ([["/a", 0]], r"pairs of a path and a weight between 1e-06 and 1e\+06; given \['/a', 0.0\]"),
        ([["", 1]], r"given \['', 1.0\]"),
        ([["/a", 1], ["/a/", 2]], "names /a more than once: add their weights"),
        ([["$NOT_THERE/a", 1]], "the environment variable NOT_THERE is not set"),
        ([["/a", "nan"]], "must be a list of pairs"),
    ],
)
def test_bad_sources(given: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(PT, [*VIT_PT, "DATA.SOURCES", given])


@pytest.mark.parametrize(
    ("recipe", "opts", "said"),
    [
        (PT, [*VIT_PT, "DATA.PATH_TO_DATA_DIR", "/b"], "PATH_TO_DATA_DIR must be '' where DATA.SOURCES is given"),
        (FT, VIT_FT, "DATA.SOURCES is for pre-training"),
        (PT, [*VIT_PT, "DATA_LOADER.RESIDENT", "True", "AUG.INTERPOLATION", "bilinear"], "RESIDENT must be False"),
    ],
)
def test_what_does_not_go_with_sources(recipe: Path, opts: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(recipe, [*opts, "DATA.SOURCES", "[['/a', 1]]"])


def test_sources_are_expanded_and_written_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", str(tmp_path))
    cfg = load_config(PT, [*VIT_PT, "DATA.SOURCES", "[['$MINE/a', 2], ['/x$$y', 1]]"])
    assert [[f"{tmp_path}/a", 2.0], ["/x$y", 1.0]] == cfg.DATA.SOURCES
    (tmp_path / "again.yaml").write_text(dump_config(cfg))
    assert load_config(tmp_path / "again.yaml") == cfg


# ------------------------------------------------------------------------------------------------ what is read


def test_mixed_formats_make_batches(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for kind in ("webp", "bmp", "tiff", "gif", "jpg"):
        Image.fromarray(pixels[..., :3]).save(tmp_path / f"colour.{kind}")
    loader = build_loader(load_config(PT, [*VIT_PT, *images(tmp_path)]), "train")
    (batch,) = loader
    assert batch.clip.shape == (8, 3, 32, 32) and not batch.bad and batch.label is not None
    assert batch.label.tolist() == [-1] * 8
    assert describe_split("train", loader.dataset, None).endswith("8 samples, no labels")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/{run,wave}/, val/{wave}/: two videos a folder."""
    root = tmp_path_factory.mktemp("films")
    one = write_video(root / "one.mp4", frames=8)
    for place in ("train/run", "train/wave", "val/wave"):
        (root / place).mkdir(parents=True)
        for number in range(2):
            shutil.copy(one, root / place / f"{number}.mp4")
    one.unlink()
    return root


def test_class_folders_of_videos_number_the_classes(films: Path) -> None:
    cfg = load_config(CLIPS_FT, [*MVIT_FT, *images(films), "MODEL.NUM_CLASSES", "2", "TRAIN.BATCH_SIZE", "4"])
    train = build_loader(cfg, "train")
    assert train.classes == ["run", "wave"] and train.labels == [0, 0, 1, 1]
    assert build_loader(cfg, "val").labels == [1, 1]
    test = build_loader(cfg, "test")
    assert test.labels == [1, 1] and "there is no" in describe_split("test", test.dataset, 2)
    (batch,) = train
    assert batch.label is not None and sorted(batch.label.tolist()) == [0] * 4 + [1] * 4, "two views of each"


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        (["MODEL.NUM_CLASSES", "4"], None),
        (["MODEL.NUM_CLASSES", "1"], "has 2 class folders and MODEL.NUM_CLASSES is 1"),
        (["DATA.CLASS_NAMES", "x.txt"], "names the classes of lists"),
    ],
)
def test_class_folders_of_videos_that_do_not_fit(opts: list[str], said: str | None, films: Path) -> None:
    cfg = load_config(CLIPS_FT, [*MVIT_FT, *images(films), "MODEL.NUM_CLASSES", "2", "TRAIN.BATCH_SIZE", "4", *opts])
    if said is None:
        build_loader(cfg, "train")
        return
    with pytest.raises(UserError, match=said):
        build_loader(cfg, "train")


def test_videos_without_class_folders_cannot_be_told_apart(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    cfg = load_config(CLIPS_FT, [*MVIT_FT, *images(tmp_path)])
    with pytest.raises(UserError, match=r"no folder .*train: .* train.csv, .* or train/ and val/ with one folder a cl"):
        build_loader(cfg, "train")


def test_clips_of_a_mixture_of_a_folder_and_a_list(films: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("".join(f"{films}/train/run/{n}.mp4\n" for n in range(2)))
    given = [[str(films / "train"), 1], [str(tmp_path), 3]]
    cfg = load_config(CLIPS_PT, [*MVIT_PT, "DATA.SOURCES", given, "TRAIN.BATCH_SIZE", "3"])
    loader = build_loader(cfg, "train")
    assert len(loader.dataset) == 6 and len(loader) == 2
    drawn = [int(index) for batch in loader for index in batch.index]
    assert sum(index >= 4 for index in drawn) == 4 or sum(index >= 4 for index in drawn) == 5


def test_lists_of_images_with_classes(tmp_path: Path, image_data: Path) -> None:
    """As they are of videos; folders come first."""
    paths = sorted((image_data / "val").glob("*/*"))
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.csv").write_text("".join(f"{path} {n % 4}\n" for n, path in enumerate(paths)))
    cfg = load_config(FT, [*VIT_FT, *images(tmp_path)])
    for name in ("train", "val", "test"):
        loader = build_loader(cfg, name)
        assert loader.labels == [0, 1, 2, 3] * 4 and loader.classes is None
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    assert build_loader(cfg, "test").classes == ["a", "b", "c", "d"]
    assert split(tmp_path).place == f"list {tmp_path / 'train.csv'}"
    shutil.copytree(image_data / "val", tmp_path / "train")
    assert build_loader(cfg, "train").classes == sorted(path.name for path in (image_data / "val").iterdir())
