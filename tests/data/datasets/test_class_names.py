"""Names of classes in a text file, for lists that number their classes."""

from pathlib import Path

import pytest

from maskfeat.build import build_loader
from maskfeat.config import load_config
from maskfeat.data.datasets.base import DatasetRequest
from maskfeat.data.datasets.classes import read_class_names
from maskfeat.data.datasets.kinetics import build_kinetics
from maskfeat.data.names import MAX_CLASS_NAME
from maskfeat.errors import UserError
from tests.small import MVIT_FT, MVIT_PT, RECIPES, VIT_FT, clips

FT = RECIPES / "k400_MVITv2_S_16x4_FT.yaml"
PT = RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml"


def names(folder: Path, text: str | bytes, name: str = "classes.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_one_name_a_line(tmp_path: Path) -> None:
    text = "\ufeffarm wrestling, 2\r\n  caf\u0065\u0301 \n3\n\n\n"
    assert read_class_names(names(tmp_path, text), 3) == ["arm wrestling, 2", "caf\u00e9", "3"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\nb\n", r"names 2 classes \(a, b\), and the classifier has 3: .* MODEL.NUM_CLASSES"),
        ("a\nb\nc\nd\n", "names 4 classes"),
        ("a\nb\na\n", "has the class 'a' twice, in lines 1 and 3"),
        ("caf\u00e9\nb\ncaf\u0065\u0301\n", "twice, in lines 1 and 3"),
        ("a\n\nb\nc\n", "line 2 is empty"),
        ("a\n" + MAX_CLASS_NAME * "b" + "\nc\n", f"line 2 has {MAX_CLASS_NAME} characters or more"),
        (b"a\n\xff\nc\n", "are not UTF-8 text"),
        ("", "the file is empty"),
        ("\n", "names 0 classes"),
    ],
)
def test_what_cannot_be_the_names(text: str | bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_class_names(names(tmp_path, text), 3)
    assert "DATA.CLASS_NAMES" in str(caught.value) and str(tmp_path / "classes.txt") in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.txt cannot be read \(no such file\): see --classes"):
        read_class_names(tmp_path / "none.txt", 3, "--classes")


def test_where_the_names_of_lists_come_from(tmp_path: Path) -> None:
    """The key before the file beside the lists, and that before the checkpoint."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 1\n")
    opts = [*MVIT_FT, *clips(tmp_path), "MODEL.NUM_CLASSES", "2"]
    plain, known = DatasetRequest("train", True), DatasetRequest("train", True, classes=["x", "y"])
    assert build_kinetics(load_config(FT, opts), plain).classes is None
    assert build_kinetics(load_config(FT, opts), known).classes == ["x", "y"]
    names(tmp_path, "cat\ndog\n")
    assert build_kinetics(load_config(FT, opts), known).classes == ["cat", "dog"]
    opts += ["DATA.CLASS_NAMES", str(names(tmp_path, "Katze\nHund\n", "german.txt"))]
    assert build_kinetics(load_config(FT, opts), known).classes == ["Katze", "Hund"]
    with pytest.raises(UserError, match="names 2 classes .* the classifier has 4"):
        build_kinetics(load_config(FT, [*opts, "MODEL.NUM_CLASSES", "4"]), plain)
    pretraining = load_config(PT, [*MVIT_PT, *clips(tmp_path), "MODEL.NUM_CLASSES", "400"])
    assert build_kinetics(pretraining, plain).classes is None, "nothing is classified"


def test_folders_name_their_classes_themselves(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="DATA.CLASS_NAMES is 'names.txt', and names the classes of lists"):
        build_loader(
            load_config(RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml", [*VIT_FT, "DATA.CLASS_NAMES", "names.txt"]), "train"
        )
