"""Whole runs: which classes are trained, and which numbers they have in a test, in whatever folders it finds."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from maskfeat.checkpoint.files import find_checkpoints, open_checkpoint
from maskfeat.engine.run import main
from tests.small import RECIPES, VIT_FT, VIT_PT, images

PT = str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")
FT = str(RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml")
TRAIN = [*VIT_FT, "SOLVER.MAX_EPOCH", "1", "TRAIN.EVAL_PERIOD", "0"]
TEST = [*VIT_FT, "TRAIN.ENABLE", "False", "TEST.ENABLE", "True"]

Printed = pytest.CaptureFixture[str]


def said(printed: Printed) -> str:
    found = printed.readouterr()
    return found.out + found.err


def start(recipe: str, opts: list[str], data: Path, output: Path) -> int:
    return main(["--cfg", recipe, *opts, *images(data), "OUTPUT_DIR", str(output)])


@pytest.fixture(scope="module")
def trained(image_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a classifier of the four classes."""
    output = tmp_path_factory.mktemp("trained")
    assert start(FT, TRAIN, image_data, output) == 0
    return find_checkpoints(output, "ssl_eval")[-1]


@pytest.fixture(scope="module")
def nameless(trained: Path) -> Path:
    """The same weights in a file that does not say which classes they were trained on."""
    path = trained.with_name("published.pyth")
    torch.save({"model_state": open_checkpoint(trained)["model_state"]}, path)
    return path


def classes_of(data: Path) -> list[str]:
    return sorted(path.name for path in (data / "train").iterdir())


def part(source: Path, target: Path, **splits: list[str]) -> Path:
    """A data set with some class folders of the validation set of another, under the names of splits."""
    for split, names in splits.items():
        for name in names:
            shutil.copytree(source / "val" / name, target / split / name)
    return target


def labels_in_test(checkpoint: Path, data: Path, output: Path, *opts: str) -> list[int]:
    assert start(FT, [*TEST, "TEST.CHECKPOINT_FILE_PATH", str(checkpoint), *opts], data, output) == 0
    rows = json.loads((output / "test_results_1x1.json").read_text())["samples"]
    return [row["label"] for row in rows]


@pytest.mark.parametrize("opts", [[], ["TRAIN.PARALLEL", "fsdp", "TRAIN.CHECKPOINT_FORMAT", "sharded"]])
def test_a_checkpoint_names_its_classes(opts: list[str], image_data: Path, tmp_path: Path) -> None:
    assert start(FT, [*TRAIN, *opts], image_data, tmp_path) == 0
    content = open_checkpoint(find_checkpoints(tmp_path, "ssl_eval")[-1])
    assert content["classes"] == classes_of(image_data)


def test_a_pretraining_checkpoint_names_none(image_data: Path, tmp_path: Path) -> None:
    assert start(PT, [*VIT_PT, "SOLVER.MAX_EPOCH", "1"], image_data, tmp_path) == 0
    assert "classes" not in open_checkpoint(find_checkpoints(tmp_path, "ssl")[-1])


@pytest.mark.slow
def test_the_names_in_the_checkpoint_number_the_classes(
    trained: Path, image_data: Path, tmp_path: Path, capsys: Printed
) -> None:
    names = classes_of(image_data)
    for number, splits in enumerate(
        (
            {"val": names[2:]},
            {"val": names[2:], "train": names[2:]},
            {"test": names[2:]},
            {"val": names, "test": names[2:]},
        )
    ):
        data = part(image_data, tmp_path / f"data{number}", **splits)
        assert labels_in_test(trained, data, tmp_path / "out") == [2] * 4 + [3] * 4, splits
        assert f"8 samples, 2 of 4 classes (no sample of {names[0]}, {names[1]})" in said(capsys)
    (tmp_path / "data0" / "val" / "zebra").mkdir()
    assert start(FT, [*TEST, "TEST.CHECKPOINT_FILE_PATH", str(trained)], tmp_path / "data0", tmp_path / "out") == 2
    assert "1 class folder that the checkpoint lacks (zebra)" in said(capsys)


def test_without_names_the_number_of_folders_must_be_that_of_the_classifier(
    nameless: Path, image_data: Path, tmp_path: Path, capsys: Printed
) -> None:
    names = classes_of(image_data)
    assert labels_in_test(nameless, part(image_data, tmp_path / "all", val=names), tmp_path / "out") == sorted(
        [0, 1, 2, 3] * 4
    )
    data = part(image_data, tmp_path / "some", val=names[2:])
    opts = [*TEST, "TEST.CHECKPOINT_FILE_PATH", str(nameless)]
    assert start(FT, opts, data, tmp_path / "out") == 2
    text = said(capsys)
    assert "does not name its classes, and 2 class folders" in text and "MODEL.NUM_CLASSES is 4" in text
    part(image_data, data, train=names[1:])
    assert start(FT, opts, data, tmp_path / "out") == 2, "train/ lacks one, too"
    for name in names:  # as the message advises
        (data / "train" / name).mkdir(exist_ok=True)
    assert labels_in_test(nameless, data, tmp_path / "out") == [2] * 4 + [3] * 4


@pytest.mark.slow
def test_a_run_that_trains_and_tests_a_file_announces_the_test_set_once(
    trained: Path, nameless: Path, image_data: Path, tmp_path: Path, capsys: Printed
) -> None:
    opts = [*TRAIN, "TEST.ENABLE", "True", "TEST.CHECKPOINT_FILE_PATH"]
    for number, path in enumerate((trained, nameless)):
        assert start(FT, [*opts, str(path)], image_data, tmp_path / f"out{number}") == 0
        text = said(capsys)
        assert text.count("] test: folder") == 1 and "top1" in text, path
    # The file numbers its classes by names that train/ has not: the same folder of images has other numbers after.
    data = part(image_data, tmp_path / "data", train=(names := classes_of(image_data))[2:], val=names[2:])
    assert start(FT, [*opts, str(trained)], data, tmp_path / "other") == 0
    assert said(capsys).count("] test: folder") == 2
    rows = json.loads((tmp_path / "other" / "test_results_1x1.json").read_text())["samples"]
    assert [row["label"] for row in rows] == [2] * 4 + [3] * 4


@pytest.mark.slow
def test_resuming_with_other_class_folders_is_refused(image_data: Path, tmp_path: Path, capsys: Printed) -> None:
    data = shutil.copytree(image_data, tmp_path / "data")
    assert start(FT, TRAIN, data, tmp_path / "out") == 0
    names = classes_of(data)
    (data / "train" / names[1]).rename(data / "train" / "other")
    longer = [*TRAIN, "SOLVER.MAX_EPOCH", "2", "TRAIN.EVAL_PERIOD", "1"]
    assert start(FT, longer, data, tmp_path / "out") == 2
    text = said(capsys)
    assert f"missing: {names[1]}, new: other" in text and "another OUTPUT_DIR" in text
    (data / "train" / "other").rename(data / "train" / names[1])
    assert start(FT, longer, data, tmp_path / "out") == 0


@pytest.mark.slow
def test_test_folder_or_val_folder(trained: Path, image_data: Path, tmp_path: Path, capsys: Printed) -> None:
    """test/ is tested where it has class folders of the classifier; the log says which folder it is."""
    names = classes_of(image_data)
    data = part(image_data, tmp_path / "data", val=names, test=names[:1])
    assert len(labels_in_test(trained, data, tmp_path / "out")) == 4
    assert f"test: folder {data / 'test'}, 4 samples" in said(capsys)
    shutil.rmtree(data / "test" / names[0])
    shutil.copy(next((data / "val" / names[0]).iterdir()), data / "test" / "unlabelled.jpg")
    part(image_data, data, **{"test/images": names[:1]})  # a folder, but not of a class
    assert len(labels_in_test(trained, data, tmp_path / "out")) == 16
    assert f"test: folder {data / 'val'} ({data / 'test'} has no image in a class folder), 16 samples" in said(capsys)


@pytest.mark.slow
def test_each_split_is_described_once_at_the_start(image_data: Path, tmp_path: Path, capsys: Printed) -> None:
    data = shutil.copytree(image_data, tmp_path / "data")
    name = classes_of(data)[0]
    for number in range(3):
        (data / "train" / name / f"{number}.txt").touch()
    shutil.move(next((data / "val" / name).iterdir()), data / "val" / "loose.jpg")
    opts = [*TRAIN, "TRAIN.EVAL_PERIOD", "1", "TEST.ENABLE", "True", "MODEL.NUM_CLASSES", "1000"]
    assert start(FT, opts, data, tmp_path / "out") == 0
    log = (tmp_path / "out" / "stdout.log").read_text()
    count = ", 4 classes, MODEL.NUM_CLASSES is 1000"
    loose = "; left out: 1 image directly in val/, outside of a class folder"
    for line in (
        f"train: folder {data / 'train'}, 40 samples{count}; left out: 3 .txt files",
        f"val: folder {data / 'val'}, 15 samples{count}{loose}",
        f"test: folder {data / 'val'} (there is no {data / 'test'}), 15 samples{count}{loose}",
        "train has samples of 4 classes and MODEL.NUM_CLASSES is 1000: nothing is learned of the other 996",
    ):
        assert log.count(line) == 1, line
    assert log.index("train: folder") < log.index("epoch 1/1")


def test_most_images_outside_of_class_folders(image_data: Path, tmp_path: Path, capsys: Printed) -> None:
    """Fine-tuning does not train on the few that happen to lie in a folder, and pre-training reads all."""
    files = sorted((image_data / "train").rglob("*.jpg"))
    for number, path in enumerate(files):
        target = tmp_path / "data" / "train" / ("a/more" if number < 12 else ".") / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    assert start(FT, TRAIN, tmp_path / "data", tmp_path / "out") == 2
    text = said(capsys)
    assert "12 images in 1 class folder," in text and "28 images directly in train/" in text
    assert "DATA.PATH_TO_DATA_DIR" in text
    assert start(PT, [*VIT_PT, "SOLVER.MAX_EPOCH", "1"], tmp_path / "data", tmp_path / "pt") == 0
    assert "at any depth (40 .jpg in 2 folders), 40 samples, no labels" in said(capsys)


def test_classes_that_lie_one_folder_deeper(image_data: Path, tmp_path: Path, capsys: Printed) -> None:
    shutil.copytree(image_data / "train", tmp_path / "data" / "train" / "images")
    assert start(FT, TRAIN, tmp_path / "data", tmp_path / "out") == 2
    assert "has 1 class folder and MODEL.NUM_CLASSES is 4, which is the number of the folders" in said(capsys)
    assert start(FT, [*TRAIN, "MODEL.NUM_CLASSES", "10"], tmp_path / "data", tmp_path / "out") == 2
    assert "all 40 samples of train have the class 'images'" in said(capsys)
    # Pre-training needs no classes.
    assert start(PT, [*VIT_PT, "SOLVER.MAX_EPOCH", "1"], tmp_path / "data", tmp_path / "pt") == 0
    assert "40 samples, 1 class" in said(capsys)


def test_training_and_testing_another_checkpoint(
    trained: Path, image_data: Path, tmp_path: Path, capsys: Printed
) -> None:
    """TEST.CHECKPOINT_FILE_PATH names what is tested after training, so its classes number the test."""
    names = classes_of(image_data)
    data = part(image_data, tmp_path / "data", train=names[1:], val=names[2:])
    opts = [*TRAIN, "TEST.ENABLE", "True", "TEST.CHECKPOINT_FILE_PATH", str(trained)]
    assert start(FT, opts, data, tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / "test_results_1x1.json").read_text())["samples"]
    assert [row["label"] for row in rows] == [2] * 4 + [3] * 4
