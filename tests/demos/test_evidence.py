"""The evidence at toy size: every run of a suite, once; figures that are those of the runs; controls that control."""

import io
import json
import math
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskfeat.analysis.probes.sweep import Plan
from maskfeat.build import build_objective
from maskfeat.checkpoint.files import find_checkpoints, open_checkpoint
from maskfeat.config import load_config
from maskfeat.data.datasets.lists import listed
from maskfeat.data.datasets.sample_list import read_sample_list
from maskfeat.demos.evidence import main, make_data
from maskfeat.demos.evidence.report import Report, Spread, gain, table
from maskfeat.demos.evidence.runs import Runs, tuning_run
from maskfeat.demos.evidence.suites import CONFIGS, CONTROLS, SUITES
from maskfeat.demos.shares import write_list_shares
from maskfeat.demos.synthetic import make_clips
from maskfeat.engine.metrics_log import read_json_stats
from maskfeat.engine.rng import seed_everything
from maskfeat.errors import UserError
from maskfeat.report.run_log import started
from tests.small import RECIPES

TOY = ["SOLVER.MAX_EPOCH", "2", "SOLVER.WARMUP_EPOCHS", "0", "TRAIN.EVAL_PERIOD", "1", "TRAIN.CHECKPOINT_PERIOD", "1",
       "TRAIN.BATCH_SIZE", "6", "TEST.BATCH_SIZE", "6", "DATA_LOADER.NUM_WORKERS", "0", "LOG_PERIOD", "2",
       "NUM_GPUS", "0", "TRAIN.COMPILE", "False", "TRAIN.MIXED_PRECISION", "off"]  # fmt: skip
IMAGES = ["DATA.TRAIN_CROP_SIZE", "32", "DATA.TEST_CROP_SIZE", "32", "MODEL.NUM_CLASSES", "3", "MVIT.EMBED_DIM", "24",
          "MVIT.DEPTH", "2", "MASK.PRETRAIN_DEPTH", "[1]"]  # fmt: skip
FEW = SUITES["caltech101"].budgets["cpu"].labels[0]


def photographs(path: Path, train: int = 15, val: int = 3) -> Path:
    """A tar of noise with a colour for each of three classes."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for split, number in (("train", train), ("val", val)):
            for label, name in enumerate(("ant", "bass", "cup")):
                for k in range(number):
                    pixels = rng.integers(0, 80, (40, 48, 3)) + 60 * label
                    content = io.BytesIO()
                    Image.fromarray(pixels.astype(np.uint8)).save(content, "JPEG")
                    info = tarfile.TarInfo(f"{split}/{name}/image_{k:04d}.jpg")
                    info.size = content.tell()
                    content.seek(0)
                    archive.addfile(info, content)
    return path


@pytest.fixture(scope="module", autouse=True)
def short_probes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "steps", lambda self, samples: 3)
        yield


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the whole suite with two seeds: its folder."""
    root = tmp_path_factory.mktemp("evidence")
    photographs(root / "caltech101.tar")
    assert main(command(root)) == 0
    return root


def command(root: Path) -> list[str]:
    places = ["--source", str(root / "caltech101.tar"), "--output", str(root / "runs"), "--docs", str(root / "docs")]
    return ["--suite", "caltech101", "--seeds", "2", *places, *TOY, *IMAGES]


def runs_of(root: Path) -> Runs:
    data = root / "runs" / "data" / "caltech101"
    return Runs(SUITES["caltech101"], "cpu", root / "runs", data, (*TOY, *IMAGES))


@pytest.mark.slow
def test_the_report_tells_what_the_runs_have_left(suite: Path) -> None:
    runs, text = runs_of(suite), (suite / "docs" / "evidence.md").read_text()
    arms = ("ViT_scratch", "maskfeat")
    for seed in (0, 1):
        names = {path.parent.name for path in (runs.root / f"seed{seed}").glob("*/done.json")}
        wanted = {"maskfeat", "maskfeat_probe", "maskfeat_references", *(f"{arm}_few" for arm in arms)}
        if seed == 0:
            wanted |= {"maskfeat_shuffled", "maskfeat_shuffled_probe", "maskfeat_unmasked", "maskfeat_unmasked_probe"}
            wanted |= {"maskfeat_headless_few"}
            wanted |= {tuning_run(arm, FEW, number) for arm in arms for number in range(len(FEW.grid))}
        assert names == wanted
    for weights in ("random", "given"):
        for kind in ("linear", "attentive", "knn"):
            values = [runs.result(seed, "maskfeat_probe")["probe"]["few"][weights][kind] for seed in (0, 1)]
            assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in text
    tops = [float(runs.stats(seed, "maskfeat_few", "test_final")[-1]["top1"]) for seed in (0, 1)]
    assert f"| {np.mean(tops):.1f} ± {np.std(tops, ddof=1):.1f} (lr " in text
    for name in ("ridge", "mean_by_place", "model"):
        losses = [runs.result(seed, "maskfeat_references")["losses"][name] for seed in (0, 1)]
        assert f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}" in text
    pictures = re.findall(r"\]\((evidence/\S+\.png)\)", text)
    assert len(pictures) == 3
    for picture in pictures:
        pixels = np.asarray(Image.open(suite / "docs" / picture).convert("RGB"))
        assert pixels.std() > 10
    assert "--suite caltech101 --seeds 2" in text


@pytest.mark.slow
def test_settings_are_chosen_on_training_samples(suite: Path) -> None:
    """Each arm by its own grid, which the first seed tries; every seed is trained with the best."""
    runs = runs_of(suite)
    trained = {path.name for path in (runs.data / "all" / "train").rglob("*.jpg")}
    for arm in ("ViT_scratch", "maskfeat"):
        found = runs.tuned(arm, FEW)
        assert list(found) == list(FEW.grid) and runs.chosen(arm, FEW) in found
        assert found[runs.chosen(arm, FEW)] == max(found.values())
        for number, setting in enumerate(FEW.grid.values()):
            asked = json.loads((runs.folder(0, tuning_run(arm, FEW, number)) / "asked.json").read_text())
            assert str(runs.data / "few_tuning") in asked and setting[1] in asked
        for seed in (0, 1):
            asked = json.loads((runs.folder(seed, f"{arm}_few") / "asked.json").read_text())
            assert str(runs.data / "few") in asked and FEW.grid[runs.chosen(arm, FEW)][1] in asked
    for name in ("ant", "bass", "cup"):
        few, held = ({path.name for path in (runs.data / share / name).glob("*")}
                     for share in ("few/train", "few_tuning/val"))  # fmt: skip
        assert len(few) == 5 and len(held) == 3 and not few & held and few | held <= trained


@pytest.mark.slow
def test_a_second_call_trains_nothing(suite: Path) -> None:
    runs = runs_of(suite)
    before = {path: path.read_bytes() for path in runs.root.rglob("*.json*")}
    begin = (suite / "docs" / "evidence.md").read_text()
    (suite / "docs" / "evidence.md").write_text(begin.replace("# Evidence", "Mine stays.\n\n# Evidence"))
    assert main(command(suite)) == 0
    assert {path: path.read_bytes() for path in runs.root.rglob("*.json*")} == before
    after = (suite / "docs" / "evidence.md").read_text()
    assert after.startswith("Mine stays.") and after.count("<!-- begin: caltech101 cpu -->") == 1


@pytest.mark.slow
def test_published_seeds_are_added_to(suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --add and the folder of one seed alone, the report is that of both; with none as well."""
    shutil.copytree(suite / "docs", tmp_path / "docs")
    section, record = (tmp_path / "docs" / name for name in ("evidence.md", "evidence/caltech101_cpu.json"))
    before, kept = section.read_text(), record.read_bytes()
    add = [*command(suite), "--docs", str(tmp_path / "docs"), "--add"]
    seeds = [runs_of(suite).root / f"seed{seed}" for seed in (0, 1)]
    moved = [tmp_path / seed.name for seed in seeds]
    seeds[0].rename(moved[0])
    assert main(add) == 0
    assert record.read_bytes() == kept
    tables = [re.sub("`python.*`", "", text) for text in (before, section.read_text())]
    assert tables[0] == tables[1]
    seeds[1].rename(moved[1])
    assert main(add) == 0
    assert record.read_bytes() == kept and not any(seed.exists() for seed in seeds)
    assert main([*add, "--seeds", "1"]) == 0
    assert record.read_bytes() == kept, "a seed that was published stays"
    # What was published with other settings, or is damaged, is refused.
    capsys.readouterr()
    assert main([*add, "SOLVER.BASE_LR", "1e-4"]) == 2
    assert "was published with other settings" in capsys.readouterr().out
    record.write_text("[]")
    assert main(add) == 2
    assert "is no record of runs" in capsys.readouterr().out
    for folder, seed in zip(moved, seeds, strict=True):
        folder.rename(seed)


@pytest.mark.slow
def test_the_report_of_a_suite_that_is_not_finished(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows are of the seeds that have their runs, and those that nobody has are left out; nothing is run."""
    monkeypatch.setattr("maskfeat.demos.evidence.runs.run_net", lambda argv: 75)
    shutil.copytree(suite / "runs" / "caltech101_cpu", tmp_path / "runs" / "caltech101_cpu")
    data = ["--data", str(suite / "runs" / "data" / "caltech101")]
    places = ["--output", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs"), "--so-far"]
    options = [*command(suite)[: -len(TOY + IMAGES)], *data, *places, *TOY, *IMAGES]

    def report(*gone: str) -> str:
        for pattern in gone:
            for done in (tmp_path / "runs").rglob(f"{pattern}/done.json"):
                done.unlink()
        assert main(options) == 0
        return (tmp_path / "docs" / "evidence.md").read_text()

    whole = (suite / "docs" / "evidence.md").read_text()
    sections = [re.sub("`python.*`", "", text[text.index("<!-- begin") :]) for text in (whole, report())]
    assert sections[0] == sections[1]
    of_both = [line for line in whole.splitlines() if line.startswith("| MaskFeat, ViT | 5 of each class | linear")]
    tested = [
        line for line in whole.splitlines() if line.startswith("| MaskFeat, ViT | 5 of each class |") and "lr" in line
    ]
    now = report("seed1/maskfeat_few", "maskfeat_shuffled*").splitlines()
    assert of_both[0] in now and tested[0] not in now and not any("another image" in line for line in now)
    assert sum(line.startswith("| MaskFeat, ViT | 5 of each class |") and "lr" in line for line in now) == 1
    text = report("*few", "*tuning*", "*unmasked*", "*references")
    assert of_both[0] in text and "fine-tuning" not in text and "ridge" not in text and "without controls" not in text
    capsys.readouterr()
    (tmp_path / "runs" / "caltech101_cpu").rename(tmp_path / "gone")
    assert main(options) == 2
    assert "--so-far: no run of" in capsys.readouterr().out


@pytest.mark.slow
def test_what_was_broken_off_goes_on(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that ends with an exit code ends the suite with it, and is the next one the time after."""
    runs = runs_of(suite)
    done = runs.folder(1, "maskfeat_few") / "done.json"
    kept = json.loads(done.read_text())
    done.unlink()
    monkeypatch.setattr("maskfeat.demos.evidence.runs.run_net", lambda argv: 75)
    assert main(command(suite)) == 75
    assert not done.exists()
    monkeypatch.undo()
    assert main(command(suite)) == 0
    assert json.loads(done.read_text())["seconds"] > kept["seconds"], "earlier attempts count"


@pytest.mark.slow
def test_other_settings_are_not_mixed_in(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither into what is done nor into what was begun."""
    assert main([*command(suite), "SOLVER.BASE_LR", "1e-4"]) == 2
    assert "was made with other settings" in capsys.readouterr().out
    done = runs_of(suite).folder(0, "maskfeat") / "done.json"
    kept = done.read_bytes()
    done.unlink()
    assert main([*command(suite), "SOLVER.BASE_LR", "1e-4"]) == 2
    assert "was made with other settings" in capsys.readouterr().out
    done.write_bytes(kept)


@pytest.mark.slow
def test_controls(suite: Path) -> None:
    runs = runs_of(suite)
    # With all but the backbone loaded, fine-tuning is training from scratch, to the bit.
    states = [
        open_checkpoint(find_checkpoints(runs.folder(0, name), "ft")[-1])["model_state"]
        for name in ("maskfeat_headless_few", "ViT_scratch_few", "maskfeat_few")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert not all(torch.equal(states[2][name], states[1][name]) for name in states[1])
    # Where nothing is hidden nothing is learned: matrices shrink by weight decay, the rest stays.
    method = runs.methods[0]
    state = open_checkpoint(runs.checkpoint(0, "maskfeat_unmasked"))["model_state"]
    cfg = load_config(CONFIGS / method.pretraining, runs.pretraining(method, 0, "x", CONTROLS[1]))
    seed_everything(cfg.RNG_SEED)
    fresh = build_objective(cfg).released_state()
    for name, value in fresh.items():
        if value.ndim <= 1:
            assert torch.equal(state[name], value), name
        else:
            torch.testing.assert_close(state[name], value, rtol=0.02, atol=0)
    assert {entry["skipped"] for entry in runs.stats(0, "maskfeat_unmasked", "train_iter")} == {0}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mfm_vit", "mfm_resnet"])
def test_methods_of_larger_budgets(suite: Path, name: str) -> None:
    """Pre-training, references and fine-tuning of the methods that the smallest budget leaves out."""
    data = suite / "runs" / "data" / "caltech101"
    runs = Runs(SUITES["caltech101"], "night", suite / "others", data, (*TOY, *IMAGES, "TRAIN.BATCH_SIZE", "4"))
    (method,) = [method for method in runs.methods if method.name == name]
    opts = runs.pretraining(method, 0, method.name)
    runs.train(0, method.name, method.pretraining, opts)
    runs.references(0, f"{name}_references", method, opts)
    assert set(runs.result(0, f"{name}_references")["losses"]) == {"zero", "mean_by_place", "ridge", "model"}
    tuned = runs.fine_tuning(method, 0, f"{name}_tuned", FEW, runs.checkpoint(0, method.name), ())
    runs.train(0, f"{name}_tuned", method.family.fine_tuning, tuned)
    assert "weights from" in (runs.folder(0, f"{name}_tuned") / "stdout.log").read_text()
    assert 0 <= float(runs.stats(0, f"{name}_tuned", "test_final")[-1]["top1"]) <= 100


@pytest.mark.slow
def test_clips(tmp_path: Path) -> None:
    """The suite of clips with one seed, on generated ones in the place of JHMDB's."""
    made = make_clips(tmp_path / "made", ("bob", "fall", "sway"), 10, 1, 2, num_frames=16, size=(80, 80))
    for split, source in (("train", "train"), ("val", "test")):
        lines = []
        for line in (made / f"{source}.csv").read_text().splitlines():
            path, label = line.split()
            recording, number = divmod(int(path[-8:-4]), 2)  # two clips of each recording
            renamed = f"{path[7:-8]}{recording}_jump_f_nm_np1_fr_med_{number}.mp4"
            (made / path).rename(made / "videos" / renamed)
            lines.append(f"{renamed} {label}\n")
        (made / f"{split}.csv").write_text("".join(lines))
    places = ["--source", str(made), "--output", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")]
    toy = [*TOY, "MODEL.NUM_CLASSES", "3", "DATA.SAMPLING_RATE", "2", "MVIT.EMBED_DIM", "16", "MASK.HOG_BINS", "2"]
    assert main(["--suite", "jhmdb", *places, "--only-data"]) == 0
    assert (tmp_path / "runs/data/jhmdb/few/train.csv").is_file() and not (tmp_path / "runs/jhmdb_cpu").exists()
    assert main(["--suite", "jhmdb", "--seeds", "1", *places, *toy]) == 0
    for share in ("all_tuning", "few_tuning"):  # no recording is on both sides
        sides = [(tmp_path / "runs/data/jhmdb" / share / f"{split}.csv").read_text() for split in ("train", "val")]
        recordings = [{line.rsplit("_", 1)[0] for line in side.splitlines()} for side in sides]
        assert all(recordings) and not recordings[0] & recordings[1]
    text = (tmp_path / "docs" / "evidence.md").read_text()
    assert "| linear, in grey |" in text
    assert "JHMDB-21, budget cpu" in text and "mask ratio 0" in text
    tested = read_json_stats(tmp_path / "runs/jhmdb_cpu/seed0/maskfeat_all/stdout.log", "test_final")
    assert int(tested[-1]["samples"]) == 6


@pytest.mark.slow
def test_synthetic_clips(tmp_path: Path) -> None:
    make_data("shapes", tmp_path / "data", clips=(10, 2, 3))
    assert (tmp_path / "data" / "tenth" / "train.csv").read_text().count("\n") == 6


def test_lists_of_a_share_are_read_and_written_as_lists(tmp_path: Path) -> None:
    names = [f'a/it\'s {number} [x], "y".avi' for number in range(12)] + [f"b/{number}.avi" for number in range(12)]
    for split in ("train", "val"):
        lines = [f"{listed(name)} {'ab'.index(name[0])}\n" for name in names]
        (tmp_path / f"{split}.csv").write_text("".join(lines), encoding="utf-8")
    write_list_shares(tmp_path, tmp_path / "my videos", tmp_path / "out", lambda path: path)
    expected = [(str(tmp_path / "my videos" / name), "ab".index(name[0])) for name in names]
    assert read_sample_list(tmp_path / "out" / "all" / "train.csv") == expected
    fitted, held = (read_sample_list(tmp_path / "out" / "all_tuning" / f"{split}.csv") for split in ("train", "val"))
    assert sorted([*fitted, *held]) == sorted(expected) and len(held) == 4
    few = read_sample_list(tmp_path / "out" / "few" / "train.csv")
    assert set(few) < set(fitted) and sum(label for _, label in few) == len(few) - 5 == 5


def test_a_spread_tells_its_figures() -> None:
    spread = Spread([1.0, 2.0, 6.0])
    assert spread.mean == 3.0 and spread.deviation == pytest.approx(math.sqrt(7)) and spread.shown() == "3.0 ± 2.6"
    assert Spread([2.0]).shown(sign="+") == "+2.0"
    assert (spread - Spread([0.0, 2.0, 4.0])).values == [1.0, 0.0, 2.0]
    assert gain(Spread([1.0, 2.0, 3.0])) == "+2.0 ± 1.0 (+3.5 standard errors)"
    assert gain(Spread([-1.0, -1.0])) == "-1.0 ± 0.0" and gain(Spread([0.0, 0.0])) == "+0.0 ± 0.0"


def test_a_table() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.parametrize(("name", "budget"), [("cifar10", "gpu"), ("caltech101", "cpu"), ("jhmdb", "cpu")])
def test_real_data_has_to_come_from_somewhere(
    name: str, budget: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--suite", name, "--budget", budget, "--output", str(tmp_path)]) == 2
    assert "--source" in capsys.readouterr().out


def test_a_budget_that_a_suite_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "cifar10", "--budget", "night", "--output", str(tmp_path)]) == 2
    assert "has the budgets gpu; given night" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "budget"), [(name, budget) for name in SUITES for budget in SUITES[name].budgets])
def test_every_run_of_every_budget_is_a_valid_config(name: str, budget: str, tmp_path: Path) -> None:
    """Pre-training, fine-tuning and scratch of one family are of one model; the same fine-tuning with and without."""
    runs = Runs(SUITES[name], budget, tmp_path, tmp_path)
    for method in runs.methods:
        pretraining = load_config(CONFIGS / method.pretraining, runs.pretraining(method, 0, "pt"))
        for control in CONTROLS:
            load_config(CONFIGS / method.pretraining, runs.pretraining(method, 0, "pt", control))
        for labels in runs.budget.labels:
            for setting in labels.grid.values() or [()]:
                tuned, scratch = (
                    load_config(
                        CONFIGS / method.family.fine_tuning,
                        runs.fine_tuning(method, 0, "run", labels, weights, setting),
                    )
                    for weights in (tmp_path / "weights.pyth", None)
                )
                assert pretraining.MVIT.DEPTH == tuned.MVIT.DEPTH and pretraining.RESNET.DEPTH == tuned.RESNET.DEPTH
                assert pretraining.MVIT.PATCH_STRIDE == tuned.MVIT.PATCH_STRIDE
                assert pretraining.MVIT.INIT == tuned.MVIT.INIT
                tuned.defrost()
                tuned.TRAIN.CHECKPOINT_FILE_PATH = ""
                assert tuned == scratch


def test_the_page_is_replaced_and_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second name of the file still has the old text: nothing was written into it."""
    monkeypatch.setattr(Report, "section", lambda self: "new")
    before = "# Evidence\n\n<!-- begin: jhmdb cpu -->\nold\n<!-- end: jhmdb cpu -->\nmore\n"
    page = tmp_path / "evidence.md"
    page.write_text(before)
    (tmp_path / "second").hardlink_to(page)
    report = Report(Runs(SUITES["jhmdb"], "cpu", tmp_path, tmp_path), "cpu", [], tmp_path, "command")
    assert report.write() == "new" and page.read_text() == before.replace("old", "new")
    assert (tmp_path / "second").read_text() == before
    page.unlink()
    page.mkdir()
    with pytest.raises(UserError, match=r"evidence\.md cannot be written"):
        report.write()


def test_folders_may_have_a_dollar_in_their_paths(tmp_path: Path) -> None:
    root, data = tmp_path / "5$ $HOME", tmp_path / "$data"
    runs = Runs(SUITES["shapes"], "gpu", root, data)
    method, labels = runs.methods[0], runs.budget.labels[0]
    weights = runs.folder(0, method.name) / "last.pyth"
    opts = runs.fine_tuning(method, 0, "run", labels, weights, ())
    cfg = load_config(CONFIGS / method.family.fine_tuning, opts)
    assert str(runs.folder(0, "run")) == cfg.OUTPUT_DIR and str(weights) == cfg.TRAIN.CHECKPOINT_FILE_PATH
    assert str(data / labels.folder) == cfg.DATA.PATH_TO_DATA_DIR
    assert str(data / SUITES["shapes"].unlabelled) == cfg.DATA.PATH_PREFIX
    asked = runs.portable([*opts, str(weights)])
    plain = Runs(SUITES["shapes"], "gpu", tmp_path / "runs", tmp_path / "data")
    other = plain.folder(0, method.name) / "last.pyth"
    assert asked == plain.portable([*plain.fine_tuning(method, 0, "run", labels, other, ()), str(other)])


def test_only_whole_paths_are_made_portable() -> None:
    runs = Runs(SUITES["shapes"], "gpu", Path("runs"), Path("."))
    asked = ["a.yaml", "DATA.PATH_TO_DATA_DIR", "train", "X", ".", "./few", "runs/shapes_gpu/seed0", "runs/shapes_gpus"]
    assert runs.portable(asked)[4:] == ["DATA", "DATA/few", "RUNS/seed0", "runs/shapes_gpus"]
    assert runs.portable(asked)[:3] == asked[:3]


def test_a_run_says_itself_where_it_was_made(tmp_path: Path) -> None:
    runs = Runs(SUITES["shapes"], "gpu", tmp_path, tmp_path)
    folder = runs.folder(0, "maskfeat")
    folder.mkdir(parents=True)
    line = started("commit 12ab+", "2.11.0", "its_name (Some (R) CPU, 9 cores)", "pt")
    (folder / "stdout.log").write_text(f"[11/01 10:00:00] {line}\n")
    (folder / "done.json").write_text("{}")
    report = Report(runs, "gpu", [0], tmp_path, "command")
    assert report.made_on == {"0": "Some (R) CPU, 9 cores; torch 2.11.0; commit 12ab+"}


def test_the_published_augmentation_of_clips() -> None:
    """Settings of the grid that carry its name augment as the published recipe of Kinetics does."""
    published = load_config(RECIPES / "_base_" / "k400_ft.yaml")
    found = 0
    for budget in SUITES["jhmdb"].budgets.values():
        for labels in budget.labels:
            for name, setting in labels.grid.items():
                cfg = load_config(CONFIGS / "jhmdb" / "jhmdb_MVITv2_FT.yaml", setting)
                cfg.defrost()
                cfg.AUG.COLOR_JITTER = published.AUG.COLOR_JITTER  # only used where AA_TYPE is ""
                named = "published augmentation" in name
                found += named
                assert (published.AUG == cfg.AUG, published.MIXUP == cfg.MIXUP) == (named, named)
                assert (cfg.MODEL.LOSS_FUNC == published.MODEL.LOSS_FUNC) == named
                assert (cfg.SOLVER.CLIP_GRAD_L2NORM == published.SOLVER.CLIP_GRAD_L2NORM) == named
    assert found == 8


def test_ctrl_c_is_one_line_and_130(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("maskfeat.demos.evidence.make_data", stop)
    assert main(["--suite", "shapes", "--budget", "gpu", "--output", str(tmp_path)]) == 130
    assert caplog.records[-1].getMessage() == "interrupted: the same command goes on where it stopped"
