"""What a trained network is shown: files found in folders and lists, and their views."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from maskfeat.analysis.inputs import Inputs, Item, find_inputs, input_loader, split_views
from maskfeat.analysis.model import Model, load_model
from maskfeat.build import build_loader
from maskfeat.config import load_config
from maskfeat.errors import UserError
from tests.analysis.saved import CLIPS, IMAGES, PRETRAINED, save_network
from tests.small import clips, images


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(root: Path, inputs: Inputs) -> list[tuple[str, int | None]]:
    return [(os.path.relpath(item.path, root), item.label) for item in inputs]


# ---------------------------------------------------------------------------------------------------------- finding


def test_a_folder_at_any_depth(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a/x/2.png", "a/x/1.png", "notes.txt", ".hidden.jpg", "a/empty/.keep", "c/noending")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    inputs = find_inputs(str(tmp_path))
    assert found(tmp_path, inputs) == [("a/x/1.png", None), ("a/x/2.png", None), ("b.JPG", None)]
    assert inputs.media == "image" and inputs.classes is None and not inputs.labelled
    for kind in ("1 .txt file", "2 hidden files", "1 file without an ending", "1 link to a folder above it"):
        assert kind in inputs.left_out


def test_parts_of_an_extraction_are_no_class(tmp_path: Path) -> None:
    """Its output may lie beside the class folders, and the same command goes on."""
    touch(tmp_path, "cat/1.jpg", "ant/2.jpg", "a.npz.parts/job.json", "own.parts/3.jpg")
    assert find_inputs([tmp_path]).classes == ["ant", "cat", "own.parts"]


@pytest.mark.parametrize("text", ["1.jpg 0,2\n2.jpg 1\n", "1.jpg 0,2\n2.jpg 0,1\n"])
def test_lists_of_several_labels(text: str, tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "a.csv").write_text(text)
    inputs = find_inputs(str(tmp_path / "a.csv"))
    assert [os.path.basename(item.path) for item in inputs] == ["1.jpg", "2.jpg"]


def test_class_folders_are_labels(tmp_path: Path) -> None:
    touch(tmp_path, "cat/deep/1.jpg", "ant/2.jpg", "cat/0.jpg")
    (tmp_path / "bee").mkdir()
    inputs = find_inputs([tmp_path])
    assert found(tmp_path, inputs) == [("ant/2.jpg", 0), ("cat/0.jpg", 2), ("cat/deep/1.jpg", 2)]
    assert inputs.classes == ["ant", "bee", "cat"] and inputs.labelled, "as training numbers them"
    assert inputs[0] == Item(str(tmp_path / "ant" / "2.jpg"), "image", 0)
    one = find_inputs([tmp_path / "cat"])
    assert one.classes is None, "one folder tells nothing apart"
    two = find_inputs([tmp_path / "cat", tmp_path / "ant"])
    assert len(two) == 3 and two.classes is None and two[0].label is None, "folders given side by side are no classes"
    touch(tmp_path, "loose.jpg")
    assert find_inputs([tmp_path]).classes is None


def test_splits_are_no_classes(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "val/b/2.jpg", "val/a/3.jpg")
    inputs = find_inputs(tmp_path)
    assert inputs.classes == ["a", "b"] and [item.label for item in inputs] == [0, 0, 1]


def test_one_medium_at_a_time(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg", "3.mp4", "4.MKV")
    with pytest.raises(UserError, match="holds 2 images and 2 videos: give one of both kinds"):
        find_inputs(tmp_path)
    pictures, films = find_inputs(tmp_path, "image"), find_inputs(tmp_path, "video")
    assert [path for path, _ in found(tmp_path, pictures)] == ["1.jpg", "2.jpg"] and pictures.left_out == "2 videos"
    assert [path for path, _ in found(tmp_path, films)] == ["3.mp4", "4.MKV"] and films.left_out == "2 images"
    assert find_inputs([tmp_path / "3.mp4"]).media == "video"


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("1.jpg 3\nsub/2.jpg 0\n", [3, 0]),
        ("1.jpg,3\nsub/2.jpg,0\n", [3, 0]),
        ("1.jpg\t3\nsub/2.jpg\t0\n", [3, 0]),
        ("path,label\n1.jpg,3\nsub/2.jpg,0\n", [3, 0]),
        ("1.jpg\nsub/2.jpg\n", [None, None]),
        ('"1.jpg"\n"sub/2.jpg"\n', [None, None]),
    ],
)
def test_lists(text: str, labels: list[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their paths are relative to their folder, to the working folder, or to the prefix, in which they are."""
    data = touch(tmp_path / "data", "1.jpg", "sub/2.jpg")
    expected = list(zip(["1.jpg", "sub/2.jpg"], labels, strict=True))
    (data / "list.csv").write_text(text)
    assert found(data, find_inputs(data / "list.csv")) == expected
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=r"no file of .*list.txt was found \(2 were looked for, such as '1.jpg'\)"):
        find_inputs(tmp_path / "list.txt")
    assert found(data, find_inputs(tmp_path / "list.txt", prefix=str(data))) == expected
    monkeypatch.chdir(data)
    assert found(data, find_inputs(tmp_path / "list.txt")) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("none", "there is no file or folder .*none"),
        ("none.csv", r"none.csv cannot be read \(no such file\)"),
        ("empty", "no image in .*empty: .jpg"),
        ("films", "no image in .*films, which holds 2 videos, 1 .txt file: .jpg"),
        ("films/1.txt", "1.txt, line 1: 'what is this, a list' is not"),
        ("thing.xyz", "thing.xyz is neither an image .* as its ending tells"),
        (None, "no input was given"),
    ],
)
def test_nothing_to_show(given: str | None, said: str, tmp_path: Path) -> None:
    touch(tmp_path, "films/1.mp4", "films/2.mp4", "films/1.txt", "thing.xyz")
    (tmp_path / "films" / "1.txt").write_text("what is this, a list\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=said):
        find_inputs([] if given is None else tmp_path / given, "image")


def test_a_million_files_are_a_list_of_paths_and_an_array() -> None:
    """Memory for each file beside its path: 8 bytes of the list and 8 of the array, in workers nothing more."""
    inputs = Inputs(["x"] * 10_000, np.full(10_000, -1), "image")
    assert inputs.numbers.nbytes == 80_000 and not hasattr(inputs[0], "__dict__")


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save_network(tmp_path_factory.mktemp("images") / "a.pyth", IMAGES), device="cpu")


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("clips") / "a.pyth"
    return load_model(save_network(path, CLIPS, "MODEL.NUM_CLASSES", "3"), device="cpu")


@pytest.mark.slow
def test_images_are_those_of_a_test(image_model: Model, image_data: Path) -> None:
    cfg = load_config(IMAGES[0], [*IMAGES[1], *images(image_data)])
    expected = list(build_loader(cfg, "test"))
    inputs = find_inputs(image_data / "val", "image")
    batches = list(input_loader(image_model, inputs, batch_size=8, workers=2))
    assert torch.equal(torch.cat([b.clip for b in batches]), torch.cat([b.clip for b in expected]))
    assert torch.cat([b.index for b in batches]).tolist() == list(range(16))
    assert [item.label for item in inputs] == torch.cat([b.label for b in expected if b.label is not None]).tolist()


@pytest.mark.parametrize(("views", "given"), [((2, 1), 2), ((1, 3), (1, 3)), ((2, 3), (2, 3))])
def test_views_are_those_of_a_test(
    views: tuple[int, int], given: int | tuple[int, int], clip_model: Model, clip_data: Path
) -> None:
    opts = [*CLIPS[1], *clips(clip_data), "MODEL.NUM_CLASSES", "3", "TEST.NUM_SPATIAL_CROPS", str(views[1])]
    expected = list(build_loader(load_config(CLIPS[0], opts), "test", num_clips=views[0]))
    inputs = find_inputs(clip_data / "test.csv", "video")
    batches = list(input_loader(clip_model, inputs, given, batch_size=5, workers=0))
    assert torch.equal(torch.cat([b.clip for b in batches]), torch.cat([b.clip for b in expected]))
    number = views[0] * views[1]
    assert torch.cat([b.index for b in batches]).tolist() == [i for i in range(6) for _ in range(number)]
    assert torch.cat([b.view for b in batches]).tolist() == list(range(number)) * 6


@pytest.mark.parametrize("offset", ["True", "False"])
def test_a_single_view_of_a_test(offset: str, clip_data: Path, tmp_path: Path) -> None:
    """It begins with the video unless DATA.USE_OFFSET_SAMPLING says otherwise; the central view never does."""
    own = ["DATA.USE_OFFSET_SAMPLING", offset, "MODEL.NUM_CLASSES", "3", "DATA.SAMPLING_RATE", "1"]
    own += ["TEST.NUM_SPATIAL_CROPS", "1"]
    model = load_model(save_network(tmp_path / "clips.pyth", CLIPS, *own), device="cpu")
    loader = build_loader(load_config(CLIPS[0], [*CLIPS[1], *own, *clips(clip_data)]), "test", num_clips=1)
    inputs = find_inputs(clip_data / "test.csv", "video")
    expected = torch.cat([batch.clip for batch in loader])
    tested, central = (
        torch.cat([batch.clip for batch in input_loader(model, inputs, workers=0, as_test=as_test)])
        for as_test in (True, False)
    )
    assert torch.equal(tested, expected) and torch.equal(tested, central) == (offset == "True")


def test_clips_of_segments_would_be_one(clip_data: Path, tmp_path: Path) -> None:
    own = ["DATA.SEGMENT_SAMPLING", "True", "TEST.NUM_ENSEMBLE_VIEWS", "1"]
    model = load_model(save_network(tmp_path / "a.pyth", CLIPS, *own), device="cpu")
    assert split_views(model, (1, 3)) == (1, 3)
    with pytest.raises(UserError, match="DATA.SEGMENT_SAMPLING.* give 1 clip; given 5x3"):
        split_views(model, (5, 3))


def test_the_central_view_is_what_the_model_transforms(clip_model: Model, clip_data: Path) -> None:
    inputs = find_inputs(clip_data / "val.csv", "video")
    (batch,) = input_loader(clip_model, inputs, workers=0)
    assert torch.equal(batch.clip, clip_model.transform(inputs.paths))


def test_some_batches_alone_are_the_same(image_model: Model, image_data: Path) -> None:
    inputs = find_inputs(image_data / "val", "image")
    every = list(input_loader(image_model, inputs, batch_size=5, workers=0))
    some = list(input_loader(image_model, inputs, batch_size=5, workers=0, batches=[1, 3]))
    assert [b.index.tolist() for b in some] == [[5, 6, 7, 8, 9], [15]]
    assert all(torch.equal(a.clip, b.clip) for a, b in zip(some, (every[1], every[3]), strict=True))


def test_unreadable_files_are_named(image_model: Model, image_data: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted((image_data / "val").rglob("*.jpg"))[:3]):
        shutil.copy(path, tmp_path / f"{number}.jpg")
    (tmp_path / "1.jpg").write_bytes(b"no image")
    (batch,) = input_loader(image_model, find_inputs(tmp_path), workers=0)
    (bad,) = batch.unreadable
    assert (bad.index, bad.path) == (1, str(tmp_path / "1.jpg")) and "not a JPEG" in bad.cause
    assert not batch.clip[1].any() and batch.clip[0].any() and batch.clip[2].any()


def test_a_network_of_one_size_is_shown_that_size(image_data: Path, tmp_path: Path) -> None:
    path = save_network(tmp_path / "a.pyth", PRETRAINED, "DATA.TEST_CROP_SIZE", "48", "TRAIN.EVAL_PERIOD", "0")
    model, inputs = load_model(path, device="cpu"), find_inputs(image_data / "val")
    (batch,) = input_loader(model, inputs, workers=0)
    assert batch.clip.shape == (16, 3, 32, 32)
    torch.testing.assert_close(model.transform(list(inputs.paths)), batch.clip)


def test_views_that_cannot_be_had(image_model: Model, clip_model: Model, clip_data: Path, tmp_path: Path) -> None:
    assert split_views(image_model, 1) == (1, 1)
    with pytest.raises(UserError, match="takes images, which have one view; given 2x1"):
        split_views(image_model, (2, 1))
    with pytest.raises(UserError, match="1 or 3 crops; given 2x2"):
        split_views(clip_model, (2, 2))
    three = load_model(save_network(tmp_path / "3.pyth", CLIPS, "TEST.NUM_SPATIAL_CROPS", "3"), device="cpu")
    assert split_views(three, 6) == (2, 3)
    with pytest.raises(UserError, match="4 views are no multiple of the 3 crops .* such as 4x1"):
        split_views(three, 4)
    with pytest.raises(UserError, match="takes images, and the inputs are videos"):
        next(input_loader(image_model, find_inputs(clip_data / "val.csv", "video")))
