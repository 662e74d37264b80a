"""Samples of several classes: lists, targets, average precision, and a run from training to its test."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from maskfeat import load_model
from maskfeat.analysis.checks.collect import collect
from maskfeat.analysis.checks.command import write_lists
from maskfeat.analysis.checks.faults import find_faults, recipe_of
from maskfeat.analysis.checks.reading import Facts
from maskfeat.analysis.checks.report import split_rows
from maskfeat.batch import BadSample, Batch
from maskfeat.build import build_loader
from maskfeat.checkpoint.files import find_checkpoints
from maskfeat.config import load_config
from maskfeat.data.datasets.classes import describe_split
from maskfeat.data.datasets.sample_list import read_multi_label_list
from maskfeat.engine import evaluate
from maskfeat.engine.evaluate import validate
from maskfeat.engine.multi_label import average_precision, results, write_class_precision
from maskfeat.engine.run import main
from maskfeat.errors import UserError
from tests.small import RECIPES, VIT_FT
from tests.worker import json_stats

CPU = torch.device("cpu")
FT = str(RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml")
OPTS = [
    *VIT_FT, "DATA.MULTI_LABEL", "True", "MODEL.LOSS_FUNC", "bce_logit", "MIXUP.ENABLE", "False",
    "MODEL.NUM_CLASSES", "5", "SOLVER.MAX_EPOCH", "1", "TRAIN.EVAL_PERIOD", "1", "TEST.ENABLE", "True",
]  # fmt: skip


def of_sklearn(scores: torch.Tensor, truth: torch.Tensor) -> list[float]:
    columns = zip(truth.T.numpy(), scores.T.numpy(), strict=True)
    return [float(average_precision_score(has, score)) if has.any() else np.nan for has, score in columns]


@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_average_precision_is_that_of_scikit_learn(levels: int) -> None:
    """With many samples of one score, with few and with none."""
    rng = np.random.default_rng(levels)
    scores = torch.from_numpy(rng.integers(levels, size=(200, 12)) / levels).float()
    truth = torch.from_numpy(rng.random((200, 12)) < np.linspace(0, 0.9, 12)).float()
    truth[:, 3] = 1.0
    found = average_precision(scores, truth)
    assert found[0].isnan() and found[3] == 1.0
    np.testing.assert_allclose(found.numpy(), of_sklearn(scores, truth), rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.mp4 3,17\nb.mp4 4\n", [("a.mp4", (3, 17)), ("b.mp4", (4,))]),
        ("a.mp4 40 17,3,3\nb.mp4 41 0\n", [("a.mp4", (3, 17)), ("b.mp4", (0,))]),
        ('"a, b.mp4" 3,4\n"c.mp4" 1\n', [("a, b.mp4", (3, 4)), ("c.mp4", (1,))]),
        ("path labels\na b.mp4 3,17\n", [("a b.mp4", (3, 17))]),
        ('path labels\n"a.mp4" "3, 17"\n', [("a.mp4", (3, 17))]),
    ],
)
def test_lists(tmp_path: Path, text: str, expected: list[tuple[str, tuple[int, ...]]]) -> None:
    path = tmp_path / "train.csv"
    path.write_text(text)
    assert read_multi_label_list(path, " ", "/d") == [(f"/d/{name}", labels) for name, labels in expected]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.mp4 3,\n", "is not 'path label,label' with labels of 0 or more"),
        ("a.mp4 3,-1\n", "is not 'path label,label'"),
        ("a.mp4;3,17\n", "';' would fit this line"),
        ("a.mp4,3,17\n", "is not 'path label,label'"),
        (f"a.mp4 3,{'9' * 19}\n", "a label of 19 digits"),
        ("path labels\na.mp4 x\n", "has the label 'x', which is not a number of 0 or more"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        read_multi_label_list(path, " ", "/d")
    assert "',' would fit" not in str(error.value), "a comma separates labels"


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["MODEL.LOSS_FUNC", "soft_cross_entropy"], "MODEL.LOSS_FUNC must be 'bce_logit' where DATA.MULTI_LABEL"),
        (["MIXUP.ENABLE", "True"], "MIXUP.ENABLE must be False where DATA.MULTI_LABEL is True; given True"),
        (["DATA.PATH_LABEL_SEPARATOR", ","], "DATA.PATH_LABEL_SEPARATOR must not be ','"),
        (["DATA_LOADER.RESIDENT", "True"], "DATA_LOADER.RESIDENT must be False where DATA.MULTI_LABEL is True"),
    ],
)  # fmt: skip
def test_keys_that_contradict(opts: list[str], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        load_config(FT, [*OPTS, *opts])


def test_class_folders_are_refused(image_data: Path) -> None:
    cfg = load_config(FT, [*OPTS, "DATA.PATH_TO_DATA_DIR", str(image_data)])
    with pytest.raises(UserError, match=r"DATA.MULTI_LABEL reads lists, and DATA.PATH_TO_DATA_DIR .* train.csv"):
        build_loader(cfg, "train")


class Knows:
    """Gives each sample the scores that its target holds, halved; some are not finite."""

    classifies, num_classes = True, 3

    def eval(self) -> None: ...

    def predict(self, batch: Batch) -> torch.Tensor:
        assert batch.label is not None and batch.index is not None
        return torch.where(batch.index[:, None] == 4, torch.nan, batch.label / 2)


def batches(bad: tuple[BadSample, ...] = ()) -> list[Batch]:
    label = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 0]])
    clip = torch.zeros(4, 3, 2, 2)
    return [
        Batch(clip, label, index=torch.arange(4), bad=bad),
        Batch(clip[:1], label[:1], index=torch.tensor([4])),
    ]


class Shown(list[Batch]):
    """A loader of given batches, of a data set whose samples may have several classes."""

    labels, dataset = ((0,),) * 5, SimpleNamespace(path=str)


def test_unreadable_and_broken_samples_come_last_in_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert validate(Knows(), Shown(batches()[:1]), CPU, "off") == {"mAP": pytest.approx(100.0)}
    loader = Shown(batches((BadSample(1, "one.mp4", "damaged"),)))
    found = validate(Knows(), loader, CPU, "off")
    # Class 0 has 0 at rank 1 of 5, and 1 and 4 among the others; class 1 has 2 and 3 before all, 1 among the others.
    truth = torch.cat([batch.label for batch in loader])
    scores = truth / 2
    scores[[1, 4]] = 0.0
    assert found == {"mAP": pytest.approx(100 * np.nanmean(of_sklearn(scores, truth)))} and found["mAP"] < 90
    # Of two ranks, one of which has shown nothing.
    nothing = {tuple: ([], False), list: []}
    monkeypatch.setattr(evaluate, "all_gather_object", lambda mine: [nothing[type(mine)], mine])
    assert validate(Knows(), loader, CPU, "off") == {"mAP": pytest.approx(found["mAP"])}


def test_what_a_test_writes_of_each_class(tmp_path: Path) -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.7, 0.5], [0.1, 0.9, 0.5]])
    found, details = results([(0,), (0, 1), (0,)], scores, torch.tensor([True, True, False]))
    assert found == {"mAP": pytest.approx(100 * (1 + 0.5) / 2), "unreadable": 1}
    rows = json.loads(details)["samples"]
    assert rows[1] == {"index": 1, "label": [0, 1], "predicted": [0, 1, 2], "read": True} and not rows[2]["read"]
    assert "test_classes_1x1.csv" in write_class_precision(str(tmp_path), "1x1", details, ["a, b", "c"])
    lines = [*csv.DictReader((tmp_path / "test_classes_1x1.csv").read_text().splitlines())]
    assert [(line["class"], line["samples"], line["average_precision"]) for line in lines] == [
        ("a, b", "3", "100.00"), ("c", "1", "50.00"), ("2", "0", ""),
    ]  # fmt: skip


@pytest.fixture
def listed(image_data: Path, tmp_path: Path) -> Path:
    """Lists of images of four classes, most of which are of the next class, too."""
    names = sorted(path.name for path in (image_data / "train").iterdir())
    for split in ("train", "val"):
        rows = []
        for number, name in enumerate(names):
            for place, path in enumerate(sorted((image_data / split / name).iterdir())):
                labels = [number] if place % 3 == 0 else [number, (number + 1) % 4]
                rows.append(f"{path.relative_to(image_data)} {','.join(map(str, labels))}\n")
        (tmp_path / f"{split}.csv").write_text("".join(rows))
    (tmp_path / "test.csv").write_text((tmp_path / "val.csv").read_text())
    return tmp_path


@pytest.mark.slow
def test_a_run_from_training_to_its_test(image_data: Path, listed: Path) -> None:
    out = listed / "out"
    opts = [*OPTS, "DATA.PATH_TO_DATA_DIR", str(listed), "DATA.PATH_PREFIX", str(image_data), "OUTPUT_DIR", str(out)]
    cfg = load_config(FT, opts)
    loader = build_loader(cfg, "train")
    batch = next(iter(loader))
    assert batch.label is not None and batch.label.shape == (8, 5) and batch.label.dtype == torch.float32
    for row, index in zip(batch.label, batch.index.tolist(), strict=True):
        assert tuple(row.nonzero().flatten().tolist()) == loader.labels[index] and row.sum() == len(
            loader.labels[index]
        )
    assert "40 samples, 4 classes (labels 0 to 3), MODEL.NUM_CLASSES is 5" in describe_split("t", loader.dataset, 5)

    assert main(["--cfg", FT, "--dry-run", "--dry-steps", "1", *opts]) == 0
    assert main(["--cfg", FT, *opts]) == 0
    assert "nothing is learned of the other 1 (4)" in (out / "stdout.log").read_text()
    (validated,), (tested,) = json_stats(out, "val_epoch"), json_stats(out, "test_final")
    assert "top1" not in tested and tested["unreadable"] == 0
    val = build_loader(cfg, "val")
    model = load_model(find_checkpoints(out, cfg.TASK)[-1], device="cpu")
    shown = [*val]
    with torch.no_grad():
        scores = torch.cat([model.objective.predict(batch) for batch in shown])
    truth = torch.cat([batch.label for batch in shown])
    assert (scores.sum(dim=1) > 1.5).all(), "each class by itself"
    expected = 100 * np.nanmean(of_sklearn(scores, truth))
    assert float(validated["mAP"]) == pytest.approx(expected, rel=1e-4) == float(tested["mAP"])
    (line,) = [line for line in (out / "stdout.log").read_text().splitlines() if "] test: mAP" in line]
    assert f"test: mAP {expected:.2f} % of 16 (1x1 views), 0 unreadable" in line
    assert len((out / "test_classes_1x1.csv").read_text().splitlines()) == 6
    assert not (out / "test_confusion_1x1.csv").exists()

    (listed / "val.csv").write_text((listed / "val.csv").read_text().replace(" 3\n", " 3,5\n"))
    with pytest.raises(UserError, match="labels of val go up to 5, but MODEL.NUM_CLASSES is 5"):
        build_loader(cfg, "val")


def test_check_data_reads_several_labels(listed: Path, image_data: Path, tmp_path: Path) -> None:
    (listed / "val.csv").write_text((listed / "val.csv").read_text().replace(" 3\n", " 3,7\n"))
    opts = [*OPTS, "DATA.PATH_TO_DATA_DIR", str(listed), "DATA.PATH_PREFIX", str(image_data)]
    cfg = load_config(FT, opts)
    found = collect(str(listed), cfg)
    faults = find_faults(found, {sample.path: Facts(sample.path, 1) for sample in found.samples}, recipe_of(cfg))
    assert {fault.detail for fault in faults if fault.kind == "label too large"} == {"label 7 of 5 classes"}
    assert [fault.where for fault in faults if fault.kind == "label gap"] == ["label 4"]
    assert {row["split"]: row["classes"] for row in split_rows(found)} == {"train": 4, "val": 5, "test": 4}
    out = tmp_path / "clean"
    out.mkdir()
    write_lists(out, found, {"train": found.of("train")})
    assert [labels for _, labels in read_multi_label_list(out / "train.csv")] == [s.label for s in found.of("train")]
