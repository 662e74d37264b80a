"""The benchmark at toy sizes: what it measures, what it promises to write, and that it refuses sides that differ."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import reading, shards
from benchmarks.cases import MVIT_S, VIT_B, Options, random_batch
from benchmarks.cli import main
from benchmarks.compute import maskfeat_objective, uncertain_cells
from benchmarks.measure import Seconds, in_turn, peak_mib
from benchmarks.reference_step import reference_loss, reference_optimizer, reference_step, reference_target
from benchmarks.report import aligned
from maskfeat.batch import Batch
from maskfeat.build import build_optimizer
from maskfeat.config.ranges import CHOICES
from maskfeat.models import attention
from maskfeat.objectives.maskfeat import MaskFeat
from tests.small import MFM_PT, MFM_RECIPES, MVIT_PT, RECIPES, VIT_PT

CPU = torch.device("cpu")
ROW_KEYS = {
    "what", "reference_s", "ours_s", "reference_wall_s", "ours_wall_s", "ratio", "reference_mib", "ours_mib",
    "memory_ratio", "asked", "note",
}  # fmt: skip
MACHINE_KEYS = {"cpu", "cores", "gpu", "torch", "threads", "commit"}
VIT_FILE = str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")
MVIT_FILE = str(RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml")


@pytest.fixture(autouse=True)
def _no_handlers_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """main() sets up logging for a program of its own; here pytest's records are read."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    for name in ("maskfeat", "benchmarks"):
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(logging.INFO)


def measured(tmp_path: Path, what: str, cfg: str, *arguments: str) -> dict:
    """The JSON of one measurement at toy size."""
    small = MVIT_PT if cfg == MVIT_FILE else VIT_PT
    path = tmp_path / "found.json"
    options = ["--cfg", cfg, "--repeats", "1", "--batch", "2", "--device", "cpu", "--json", str(path), *arguments]
    assert main([what, *options, *small, "TRAIN.BATCH_SIZE", "2"]) == 0
    found = json.loads(path.read_text())
    assert found["machine"].keys() == MACHINE_KEYS
    for row in found["rows"]:
        assert row.keys() == ROW_KEYS
        assert row["reference_s"] > 0 and row["ours_s"] > 0
        assert row["ratio"] == pytest.approx(row["reference_s"] / row["ours_s"])
    return found


@pytest.mark.slow
def test_shards(tmp_path: Path, image_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_STARTED", 40)
    rows = measured(tmp_path, "shards", VIT_FILE, "--data", str(image_data))["rows"]
    assert [row["what"] for row in rows] == [
        "40 images in tar",
        "40 images in parquet",
        "start of 40 images, to the first batch",
    ]
    assert "same bits; opens" in rows[0]["note"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "cfg"),
    [
        ("hog", VIT_FILE),
        ("step", MVIT_FILE),
        pytest.param("hog", MVIT_FILE, marks=pytest.mark.slow),
        pytest.param("step", VIT_FILE, marks=pytest.mark.slow),
    ],
)
def test_computations(tmp_path: Path, what: str, cfg: str, caplog: pytest.LogCaptureFixture) -> None:
    (row,) = measured(tmp_path, what, cfg)["rows"]
    assert row["reference_mib"] > 0 and row["ours_mib"] > 0
    assert row["what"] in caplog.text and "checked before" in caplog.text


@pytest.mark.slow
def test_attention_has_a_row_for_each_shape(tmp_path: Path) -> None:
    rows = measured(tmp_path, "attention", MVIT_FILE)["rows"]
    assert [row["what"].split(":")[0] for row in rows] == ["attention block 0", "attention block 1"]


@pytest.mark.slow
def test_images(tmp_path: Path, image_data: Path) -> None:
    rows = measured(tmp_path, "images", VIT_FILE, "--data", str(image_data))["rows"]
    assert "same pixels" in rows[0]["note"] and len(rows) == len(CHOICES[reading.BACKEND])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["video", pytest.param("decode", marks=pytest.mark.slow)])
def test_clips(tmp_path: Path, what: str, clip_data: Path) -> None:
    (row,) = measured(tmp_path, what, MVIT_FILE, "--data", str(clip_data))["rows"]
    assert "clips/s" in row["note"]


@pytest.mark.slow
def test_extracting(tmp_path: Path, image_data: Path) -> None:
    found = measured(tmp_path, "extract", VIT_FILE, "--data", str(image_data), "--files", "8")
    assert ["of 8 images" in found["rows"][0]["what"], "of 1 images" in found["rows"][1]["what"]] == [True, True]
    assert all("extracting" in row["note"] and row["reference_wall_s"] > 0 for row in found["rows"])


@pytest.mark.slow
def test_training(tmp_path: Path, image_data: Path) -> None:
    alone, fed = measured(tmp_path, "train", VIT_FILE, "--steps", "2", "--data", str(image_data))["training"]
    assert (alone["input"], fed["input"]) == ("random", "files")
    assert alone["samples_per_second"] > 0 and alone["target_share"] > 0 and 0 <= fed["waiting_for_data"] < 1
    assert alone["utilisation"] is None, "nobody knows the peak of a CPU"


def test_training_of_another_method(tmp_path: Path, image_data: Path) -> None:
    path = tmp_path / "found.json"
    cfg = str(MFM_RECIPES / "in1k_R50_MFM_PT.yaml")
    options = ["--cfg", cfg, "--steps", "2", "--batch", "2", "--data", str(image_data), "--json", str(path)]
    assert main(["train", *options, "--device", "cpu", *MFM_PT, "TRAIN.BATCH_SIZE", "2"]) == 0
    assert json.loads(path.read_text())["training"][0]["target_share"] is None


@pytest.mark.slow
def test_files_are_made_where_none_are_given(tmp_path: Path) -> None:
    (row,) = measured(tmp_path, "images", VIT_FILE, "--files", "4")["rows"][:1]
    assert "reading 4 images" in row["what"]


# Sides that differ: each check must be able to fail.


def refused(what: str, cfg: str, *arguments: str) -> bool:
    small = MVIT_PT if cfg == MVIT_FILE else VIT_PT
    return main([what, "--cfg", cfg, "--repeats", "1", "--device", "cpu", *arguments, *small]) == 1


def test_wrong_targets_are_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    right = MaskFeat.hidden_target
    monkeypatch.setattr(MaskFeat, "hidden_target", lambda *given: right(*given) + 2e-6)
    assert refused("hog", VIT_FILE)
    assert "not the same: HOG of noise" in caplog.text


def test_one_wrong_bin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MaskFeat.hidden_target

    def wrong(objective: MaskFeat, batch: Batch) -> Tensor:
        target = right(objective, batch).clone()
        target[0, :2] = target[0, [1, 0]]
        return target

    monkeypatch.setattr(MaskFeat, "hidden_target", wrong)
    assert refused("hog", VIT_FILE)


@pytest.mark.parametrize("what", ["attention", "step"])
def test_wrong_attention_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.wide_queries  # the fast form alone calls it
    monkeypatch.setattr(
        attention, "wide_queries", lambda q, tables, *given: right(q, [table * 1.01 for table in tables], *given)
    )
    assert refused(what, MVIT_FILE)


def test_wrong_pixels_are_refused(monkeypatch: pytest.MonkeyPatch, image_data: Path) -> None:
    right = reading.reference_image
    monkeypatch.setattr(reading, "reference_image", lambda *given: right(*given) + 0.01)
    assert refused("images", VIT_FILE, "--data", str(image_data))


@pytest.mark.parametrize("what", ["video", "decode"])
def test_wrong_frames_are_refused(what: str, monkeypatch: pytest.MonkeyPatch, clip_data: Path) -> None:
    right = reading._indices
    monkeypatch.setattr(reading, "_indices", lambda *given: [max(i - 1, 0) for i in right(*given)])
    if what == "decode":  # both sides take their frames from there
        monkeypatch.setattr(reading, "decode_all", lambda path: np.zeros((20, 48, 64, 3), np.uint8))
    assert refused(what, MVIT_FILE, "--data", str(clip_data))


def test_what_a_user_can_mend(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["hog", "--repeats", "0"]) == 2
    assert main(["step", "--cfg", str(MFM_RECIPES / "in1k_R50_MFM_PT.yaml"), "--device", "cpu", *MFM_PT]) == 2
    assert main(["attention", "--cfg", VIT_FILE, "--device", "cpu", *VIT_PT]) == 2
    for text in ("--repeats must be at least 1", "--cfg must be a recipe of MaskFeat", "a recipe of an MViTv2"):
        assert text in caplog.text


def test_help_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(what in said for what in ("hog", "attention", "step", "images", "video", "decode", "all", "examples"))


# The reference forms themselves.


@pytest.mark.parametrize(("default", "small"), [(VIT_B, VIT_PT), (MVIT_S, MVIT_PT)])
def test_reference_targets_are_those_of_the_hidden_tokens(default: str, small: list[str]) -> None:
    cfg = Options(CPU, opts=(*small, "TRAIN.BATCH_SIZE", "2")).recipe(default, 2)
    objective, batch = maskfeat_objective(cfg), random_batch(cfg, CPU)
    assert batch.hidden is not None and not batch.hidden.all()
    target = reference_target(objective, batch)
    assert len(target) == int(objective.hidden_tokens(batch).sum())
    torch.testing.assert_close(target, objective.hidden_target(batch), rtol=0, atol=1e-6)


def test_uncertain_cells_are_those_of_ties() -> None:
    """A gradient along an axis whose sum rounds lies on the edge of a bin; noise nowhere near one."""
    flat = torch.full((1, 3, 16, 16), 0.3)
    assert uncertain_cells(flat, 9, 8).all()
    assert not uncertain_cells(torch.randn(1, 3, 16, 16), 9, 8).any()


@pytest.mark.parametrize(("default", "small"), [(VIT_B, VIT_PT), (MVIT_S, MVIT_PT)])
def test_reference_step_learns_the_same(default: str, small: list[str]) -> None:
    """Loss of three steps in a row: groups, rates and clipping of the plain optimizer are those of ours."""
    cfg = Options(CPU, opts=(*small, "TRAIN.BATCH_SIZE", "2")).recipe(default, 2)
    objective, plain = maskfeat_objective(cfg), maskfeat_objective(cfg)
    plain.load_state_dict(objective.state_dict())
    batch = random_batch(cfg, CPU)
    optimizer = build_optimizer(cfg, objective)
    theirs = reference_optimizer(optimizer, plain, objective)
    assert [len(group["params"]) for group in theirs.param_groups] == [
        len(group["params"]) for group in optimizer.param_groups
    ]
    for _ in range(3):
        optimizer.zero_grad()
        loss = objective(batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 0.02)
        optimizer.step()
        assert reference_step(plain, theirs, batch, 0.02).item() == pytest.approx(loss.item(), rel=1e-5)
    assert reference_loss(plain, batch).item() < loss.item()


def test_hidden_target_is_what_the_objective_compares_with() -> None:
    cfg = Options(CPU, opts=tuple(MVIT_PT)).recipe(MVIT_S, 2)
    objective, batch = maskfeat_objective(cfg), random_batch(cfg, CPU)
    torch.testing.assert_close(objective.hidden_target(batch), objective.predict_hidden(batch)[1], rtol=0, atol=0)


# Measuring.


@pytest.mark.slow
def test_peak_counts_what_lives_at_once() -> None:
    x = torch.ones(2**18, requires_grad=True)  # 1 MiB

    def squares() -> None:
        y = x * 2.0  # + 1 MiB, saved below
        (y * y).sum().backward()  # + 1 for the product, released by and by; gradients of y and x

    assert peak_mib(squares, CPU) == peak_mib(squares, CPU)
    x.grad = None
    assert 3.0 <= peak_mib(squares, CPU) <= 5.1
    assert peak_mib(lambda: torch.ones(2**18), CPU) == pytest.approx(1.0, abs=0.01)


@pytest.mark.slow
def test_sides_take_turns() -> None:
    calls: list[str] = []
    found = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, CPU)
    assert calls == ["a", "b"] * 3, "one round that does not count, then two"
    assert isinstance(found["a"], Seconds) and found["a"].wall >= 0


def test_columns_line_up() -> None:
    assert aligned([("a", "bb", "c"), ("long", "1", "note")]) == "a     bb  c\nlong   1  note"
