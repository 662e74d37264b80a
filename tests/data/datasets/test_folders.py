"""What a folder of images holds: classes, samples at any depth, and what is left out of them."""

import os
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from maskfeat.data.datasets.classes import (
    check_labels,
    check_numbering,
    check_same_classes,
    describe_split,
    missing_classes,
)
from maskfeat.data.datasets.folders import class_folders, list_class_folders, scan_folder
from maskfeat.errors import UserError


def tree(root: Path, *names: str) -> Path:
    """Files of some names, which are not read here; a name that ends in / is an empty folder."""
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def test_images_are_found_at_any_depth_and_in_the_same_order(tmp_path: Path) -> None:
    root = tree(tmp_path / "train", "b/2.JPG", "b/1.tiff", "b/more/deep/0.bmp", "a/x.gif", "a/y.jfif", "a/.z.jpg")
    samples, classes = list_class_folders(root)
    found = [(os.path.relpath(path, root), label) for path, label in samples]
    assert classes == ["a", "b"]
    assert found == [("a/x.gif", 0), ("a/y.jfif", 0), ("b/1.tiff", 1), ("b/2.JPG", 1), ("b/more/deep/0.bmp", 1)]
    assert scan_folder(root).left_out_in_words() == "1 hidden file"


def test_what_is_left_out_is_counted_by_kind(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "train",
        *(f"a/{n}.jpg" for n in range(6)),
        *("a/0.txt", "a/in/1.TXT", "a/2.txt", "b/0.heic", "b/README", "loose.png", "also.webp", "notes.csv"),
        *(".hidden/0.jpg", "__MACOSX/a/._0.jpg", "a/@eaDir/0.jpg/thumb.jpg", "a/.DS_Store"),
    )
    (root / "a" / "gone").symlink_to(tmp_path / "nowhere")
    scan = scan_folder(root)
    assert scan.left_out_in_words().split(", ") == [
        "3 .txt files",
        "3 hidden folders",
        "2 images directly in train/",
        "outside of a class folder",
        "1 .csv file",
        "1 .heic file and 3 more",
    ]
    assert dict(scan.left_out) == {
        (".txt file", ""): 3,
        ("hidden folder", ""): 3,
        ("image", " directly in train/, outside of a class folder"): 2,
        (".csv file", ""): 1,
        (".heic file", ""): 1,
        ("broken link", ""): 1,
        ("file", " without an ending"): 1,
        ("hidden file", ""): 1,
    }
    assert (scan.number, scan.empty, scan.media) == (6, ["b"], 4)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    other = tree(tmp_path / "other", "1.jpg", "below/2.jpg")
    root = tree(tmp_path / "train", "a/0.jpg")
    (root / "a" / "linked").symlink_to(other)
    (root / "b").symlink_to(other)  # a class that is a link
    (other / "below" / "up").symlink_to(other)
    (root / "a" / "self").symlink_to("self")
    scan = scan_folder(root)
    assert {name: len(files) for name, files in scan.files.items()} == {"a": 3, "b": 2}
    assert scan.left_out["link", " to a folder above it"] == 2


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([*(f"{n}.jpg" for n in range(12)), *(f"a/{n}.jpg" for n in range(4))], "12 images directly in train/"),
        ([*(f"a/{n}.heic" for n in range(5)), *(f"b/{n}.jpg" for n in range(4))], "5 .heic files"),
        ([*(f"a/{n}" for n in range(5)), *(f"b/{n}.jpg" for n in range(4))], "5 files without an ending"),
        (["0.jpg", "1.jpg"], "no image .* which holds 2 images directly in train/"),
        (["a/0.avif", "b/0.ppm"], "no image .* which holds 1 .avif file, 1 .ppm file"),
    ],
)
def test_a_set_whose_pictures_are_mostly_left_out_is_refused(tmp_path: Path, names: list[str], said: str) -> None:
    with pytest.raises(UserError, match=f"{said}.*DATA.PATH_TO_DATA_DIR"):
        list_class_folders(tree(tmp_path / "train", *names))


def test_annotations_beside_images_are_not_pictures(tmp_path: Path) -> None:
    root = tree(tmp_path / "train", "a/0.jpg", *(f"a/0.{ending}" for ending in ("txt", "xml", "json", "npy", "csv")))
    assert len(list_class_folders(root)[0]) == 1


FOUR = ("a/0.jpg", "b/0.jpg", "c/0.jpg", "d/0.jpg")


@pytest.mark.parametrize(
    ("names", "classes", "said"),
    [
        (("a/0.jpg", "b.tar", "c/0.jpg"), 3, "b.tar may be classes"),
        (("a/0.jpg", "b.zip", "c/0.jpg"), 10, "b.zip may be classes"),
        (tuple(f"images/{name}" for name in FOUR), 4, "lie in: move the classes up"),
        (("animals/cat/0.jpg", "animals/dog/0.jpg", "things/car/0.jpg"), 3, "lie in: move the classes up"),
        ((*FOUR, "labels/0.txt"), 4, r"1 without an image are counted \(labels\): remove them, or set .*NUM_CLASSES 5"),
        (FOUR, 3, "set MODEL.NUM_CLASSES 4"),
    ],
)
def test_folders_that_cannot_number_the_classes(
    tmp_path: Path, names: tuple[str, ...], classes: int, said: str
) -> None:
    scan = scan_folder(tree(tmp_path / "train", *names))
    with pytest.raises(UserError, match=f"class folders? and MODEL.NUM_CLASSES is {classes}.*{said}"):
        scan.check_numbers(classes)


def test_a_class_folder_that_is_a_broken_link(tmp_path: Path) -> None:
    root = tree(tmp_path / "train", "a/0.jpg", "c/0.jpg")
    (root / "b").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="b may be classes, without which the others would get other numbers"):
        scan_folder(root).check_numbers(3)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (FOUR, 4),
        (FOUR, 1000),  # a subset, for a classifier of all of them
        ((*FOUR, "all_of_it.tar"), 4),
        (("a/0.jpg", "a.tar.gz", "b/0.jpg"), 1000),  # unpacked beside itself
        (("a/day/0.jpg", "a/night/0.jpg", "b/day/0.jpg"), 2),
    ],
)
def test_folders_that_number_the_classes(tmp_path: Path, names: tuple[str, ...], classes: int) -> None:
    scan_folder(tree(tmp_path / "train", *names)).check_numbers(classes)


def test_unicode_forms_of_a_name_are_one_class(tmp_path: Path) -> None:
    composed, split = "écureuil", unicodedata.normalize("NFD", "écureuil")
    assert composed != split
    train = tree(tmp_path / "train", f"{split}/0.jpg", "zèbre/0.jpg", "fox/0.jpg")
    other = tree(tmp_path / "copy", f"{composed}/0.jpg", "zèbre/0.jpg", "fox/0.jpg")
    assert class_folders(train) == class_folders(other) == ["fox", "zèbre", "écureuil"]
    assert [label for _, label in list_class_folders(other, class_folders(train))[0]] == [0, 1, 2]
    with pytest.raises(UserError, match="two folders écureuil, in different Unicode forms"):
        scan_folder(tree(train, f"{composed}/1.jpg"))


@pytest.mark.parametrize(("there", "here"), [("Cat", "cat"), ("polar_bear", "Polar Bear"), ("STRASSE", "straße")])
def test_names_that_differ_by_case_or_spaces_are_named(tmp_path: Path, there: str, here: str) -> None:
    with pytest.raises(UserError, match=rf"the training set lacks \({here} \({there} but for case or spaces\)\)"):
        list_class_folders(tree(tmp_path / "val", f"{here}/0.jpg"), [there, "dog"])


def samples(labels: list[int], **others: object) -> SimpleNamespace:
    class Samples(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.labels)

    return Samples(labels=labels, **others)


def test_the_line_of_a_split() -> None:
    images = samples([0, 0, 2], classes=["a", "b", "c"], place="folder /data/val", left_out="2 .txt files")
    expected = "val: folder /data/val, 3 samples, 2 of 3 classes (no sample of b)"
    assert describe_split("val", images, 3) == f"{expected}; left out: 2 .txt files"
    assert describe_split("val", images, 1000) == f"{expected}, MODEL.NUM_CLASSES is 1000; left out: 2 .txt files"
    listed = samples([5, 1, 1], place="list /data/val.csv")
    assert describe_split("val", listed, None) == "val: list /data/val.csv, 3 samples, 2 classes (labels 1 to 5)"
    assert describe_split("train", samples([0, 1]), 2) == "train: 2 samples, 2 classes (labels 0 to 1)"


def test_labels_that_a_classifier_cannot_learn() -> None:
    check_labels("train", samples([0, 1, 3]), 4, trains=True)
    check_labels("val", samples([2, 2]), 4, trains=False)
    check_labels("train", samples([3]), 4, trains=True)
    check_labels("train", samples([0, 0]), 1, trains=True)
    with pytest.raises(UserError, match="labels of train go up to 4, but MODEL.NUM_CLASSES is 4: .* must be 0, not 1"):
        check_labels("train", samples([1, 2, 3, 4]), 4, trains=True)
    with pytest.raises(UserError, match="all 2 samples of train have the label 2, and MODEL.NUM_CLASSES is 4"):
        check_labels("train", samples([2, 2]), 4, trains=True)
    with pytest.raises(UserError, match="have the class 'images'"):
        check_labels("train", samples([0, 0], classes=["images", "labels"]), 4, trains=True)


def test_classes_without_a_sample_are_warned_about() -> None:
    assert missing_classes("train", samples([0, 1, 2]), 3) == ""
    gaps = missing_classes("train", samples([0, 2, 5]), 8)
    assert "samples of 3 classes and MODEL.NUM_CLASSES is 8" in gaps and "other 5 (1, 3, 4, 6, 7)" in gaps
    assert "other 2 (b, 2)" in missing_classes("train", samples([0], classes=["a", "b"]), 3)


def test_class_folders_that_do_not_number_a_test() -> None:
    check_numbering("test", samples([0, 1], classes=["a", "b"]), 2, "a.pyth")
    check_numbering("test", samples([0, 1]), 1000, "a.pyth")  # a list gives numbers
    with pytest.raises(UserError, match=r"a.pyth does not name .* 2 class folders \(a, b\).*NUM_CLASSES is 4"):
        check_numbering("test", samples([0, 1], classes=["a", "b"]), 4, "a.pyth")


def test_other_classes_than_those_of_a_checkpoint() -> None:
    images = samples([0, 1, 2], classes=["a", "c", "d"])
    check_same_classes("a.pyth", None, images)
    check_same_classes("a.pyth", ["a", "c", "d"], images)
    check_same_classes("a.pyth", ["x"], samples([0]))
    with pytest.raises(UserError, match=r"\(a, b, c\).* has 3 \(a, c, d\); missing: b, new: d\. Restore"):
        check_same_classes("a.pyth", ["a", "b", "c"], images)
    with pytest.raises(UserError, match="in another order"):
        check_same_classes("a.pyth", ["d", "c", "a"], images)


def test_a_real_set(tmp_path: Path) -> None:
    root = tree(tmp_path / "train", "a/", "b/")
    for number, (name, kind) in enumerate((("a/0.bmp", "BMP"), ("b/0.tif", "TIFF"), ("b/1.gif", "GIF"))):
        Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(root / name, kind)
    assert [label for _, label in list_class_folders(root)[0]] == [0, 1, 1]
