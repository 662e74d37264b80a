"""Whole runs: killed and resumed, in several processes, from pre-training to testing, with broken data."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from maskfeat.batch import Batch
from maskfeat.build import build_loader
from maskfeat.checkpoint.files import find_checkpoints
from maskfeat.checkpoint.reading import read_checkpoint
from maskfeat.config import load_config
from maskfeat.distributed.launch import launch
from maskfeat.engine.run import main
from maskfeat.models.base import Tokens
from maskfeat.models.vit import ViT
from maskfeat.objectives.maskfeat import MaskFeat
from tests.small import MFM_RECIPES, MVIT_FT, MVIT_PT, R50_FT, RECIPES, REPO, VIT_FT, VIT_PT, clips, images
from tests.worker import json_stats, losses, run_in_processes

PT = str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")
FT = str(RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml")
MFM_VIT = str(MFM_RECIPES / "in1k_VIT_B_MFM_PT.yaml")
R50 = str(MFM_RECIPES / "in1k_R50_MFM_FT.yaml")
NO_DRAWS = ["MIXUP.ENABLE", "False", "MODEL.LOSS_FUNC", "cross_entropy", "MVIT.DROPPATH_RATE", "0.0"]


def run(recipe: str, opts: list[str], output_dir: Path) -> Path:
    assert main(["--cfg", recipe, *opts, "OUTPUT_DIR", str(output_dir)]) == 0
    return output_dir


def final_state(output_dir: Path, task: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(find_checkpoints(output_dir, task)[-1])["model_state"]


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "opts", "task"), [(PT, VIT_PT, "ssl"), (FT, VIT_FT, "ssl_eval")])
def test_killed_and_resumed_is_bit_identical(
    recipe: str, opts: list[str], task: str, image_data: Path, tmp_path: Path
) -> None:
    """SIGKILL as soon as a checkpoint of the first or second epoch is there, then the same command again."""
    opts = [*opts, *images(image_data), "SOLVER.MAX_EPOCH", "3", "DATA_LOADER.NUM_WORKERS", "1"]
    whole = run(recipe, opts, tmp_path / "whole")
    command = [sys.executable, str(REPO / "tools" / "run_net.py"), "--cfg", recipe, *opts]
    killed = tmp_path / "killed"
    # On as many threads as the runs in this process: sums on another number of threads round differently.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "OUTPUT_DIR", str(killed)], stdout=subprocess.DEVNULL, env=env)
    deadline = time.monotonic() + 120
    while not find_checkpoints(killed, task):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(find_checkpoints(killed, task)) < 3, "it was killed too late to show anything"
    run(recipe, opts, killed)
    assert "resumed from" in (killed / "stdout.log").read_text()
    assert_same_bits(final_state(whole, task), final_state(killed, task))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "opts"),
    [(PT, VIT_PT), (FT, [*VIT_FT, *NO_DRAWS]), (MFM_VIT, VIT_FT)],
    ids=["pretraining", "finetuning", "frequencies"],
)
def test_two_processes_equal_one(recipe: str, opts: list[str], image_data: Path, tmp_path: Path) -> None:
    """The same global batch, in one process, in two, and in micro-batches: the same losses."""
    opts = [*opts, *images(image_data)]
    one = losses(run(recipe, opts, tmp_path / "one"))
    pieces = losses(run(recipe, [*opts, "TRAIN.MICRO_BATCH_SIZE", "3"], tmp_path / "pieces"))
    gpus = [*opts, "NUM_GPUS", "2", "DIST_BACKEND", "gloo", "OUTPUT_DIR", str(tmp_path / "two")]
    run_in_processes(load_config(recipe, gpus), processes=2)
    two = losses(tmp_path / "two")
    assert len(one) == len(two) == len(pieces) == 10
    assert one[0] != one[-1]
    # Six digits are logged.
    assert two == pytest.approx(one, rel=1e-5)
    assert pieces == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_torchrun(image_data: Path, tmp_path: Path) -> None:
    opts = [*VIT_PT, *images(image_data), "SOLVER.MAX_EPOCH", "1"]
    one = losses(run(PT, opts, tmp_path / "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(REPO / "tools" / "run_net.py"), "--cfg", PT, *opts, "OUTPUT_DIR", str(tmp_path / "two")]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert losses(tmp_path / "two") == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_pretrain_finetune_test_in_one_folder(image_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(PT, [*VIT_PT, *images(image_data), "TRAIN.EVAL_PERIOD", "2"], out)
    (validation,) = json_stats(out, "val_epoch")
    assert "top1" not in validation and float(validation["loss"]) > 0
    pretrained = find_checkpoints(out, "ssl")[-1]
    opts = [*VIT_FT, *images(image_data), "TRAIN.EVAL_PERIOD", "1", "TEST.ENABLE", "True"]
    run(FT, [*opts, "TRAIN.CHECKPOINT_FILE_PATH", str(pretrained)], out)
    log = (out / "stdout.log").read_text()
    assert "resumed" not in log and "fresh       4" in log
    assert [p.name[:9] for p in find_checkpoints(out, "ssl_eval")] == ["ssl_eval_"] * 2
    (tested,) = json_stats(out, "test_final")
    assert float(tested["top1"]) == pytest.approx(float(json_stats(out, "val_epoch")[-1]["top1"]))
    # Testing alone finds the checkpoint by itself and says the same.
    run(FT, [*opts, "TRAIN.ENABLE", "False"], out)
    assert json_stats(out, "test_final")[-1]["top1"] == tested["top1"]
    results = json.loads((out / "test_results_1x1.json").read_text())
    right = [row["predicted"][0] == row["label"] for row in results["samples"]]
    assert 100 * sum(right) / len(right) == pytest.approx(results["top1"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(precision: str, image_data: Path, tmp_path: Path) -> None:
    opts = [*VIT_PT, *images(image_data)]
    full = losses(run(PT, opts, tmp_path / "full"))
    opts += ["TRAIN.MIXED_PRECISION", precision]
    mixed = losses(run(PT, opts, tmp_path / "mixed"))
    assert mixed == pytest.approx(full, rel=0.02)
    assert mixed != full
    content = read_checkpoint(find_checkpoints(tmp_path / "mixed", "ssl")[0])
    assert ("scaler_state" in content) == (precision == "fp16")
    assert all(value.dtype == torch.float32 for value in content["model_state"].values())
    # Resumed after the first epoch, it ends on the same bits.
    find_checkpoints(tmp_path / "mixed", "ssl")[1].rename(tmp_path / "kept.pyth")
    run(PT, opts, tmp_path / "mixed")
    assert_same_bits(final_state(tmp_path / "mixed", "ssl"), read_checkpoint(tmp_path / "kept.pyth")["model_state"])


@pytest.mark.parametrize(
    ("training", "evaluation", "dtype"),
    [("bf16", None, None), ("fp16", "off", None), ("bf16", "bf16", torch.bfloat16), ("off", "fp16", torch.float16)],
)
@pytest.mark.parametrize("recipe", [PT, FT])
def test_evaluation_is_in_float32_unless_asked(
    recipe: str,
    training: str,
    evaluation: str | None,
    dtype: torch.dtype | None,
    image_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRAIN.MIXED_PRECISION is of training alone: validation and test have a key of their own."""
    seen: dict[bool, set[torch.dtype | None]] = {True: set(), False: set()}
    forward = ViT.forward_tokens

    def noted(self: ViT, clip: torch.Tensor, hidden: torch.Tensor | None = None) -> Tokens:
        lower = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen[self.training].add(lower)
        return forward(self, clip, hidden)

    monkeypatch.setattr(ViT, "forward_tokens", noted)
    opts = [*(VIT_PT if recipe == PT else VIT_FT), *images(image_data), "SOLVER.MAX_EPOCH", "1"]
    opts += ["LOG_MODEL_INFO", "False", "TRAIN.EVAL_PERIOD", "1", "TRAIN.MIXED_PRECISION", training]
    opts += [] if evaluation is None else ["TEST.MIXED_PRECISION", evaluation]
    tested = recipe == FT
    out = run(recipe, [*opts, "TEST.ENABLE", str(tested)], tmp_path)
    assert json_stats(out, "val_epoch") and bool(json_stats(out, "test_final")) == tested
    train_dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[training]
    assert seen == {True: {train_dtype}, False: {dtype}}


@pytest.mark.slow
def test_clips_multi_view(clip_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(str(RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml"), [*MVIT_PT, *clips(clip_data)], out)
    pretrained = find_checkpoints(out, "ssl")[-1]
    opts = [
        *MVIT_FT,
        *clips(clip_data),
        "TRAIN.CHECKPOINT_FILE_PATH",
        str(pretrained),
        "TEST.NUM_SPATIAL_CROPS",
        "3",
    ]
    run(str(RECIPES / "k400_MVITv2_S_16x4_FT.yaml"), [*opts, "TEST.NUM_TEMPORAL_CLIPS", "[1, 2]"], out)
    assert [stats["views"] for stats in json_stats(out, "test_final")] == ["1x3", "2x3"]
    # Repeated augmentation: two clips of each of eight videos a step.
    assert "16 samples a step" in (out / "stdout.log").read_text()
    assert sorted(path.name for path in out.glob("*.json")) == ["test_results_1x3.json", "test_results_2x3.json"]


@pytest.mark.slow
def test_processes_share_running_statistics(image_data: Path, tmp_path: Path) -> None:
    """Batch norms see another half of each batch in each process; what is tested is what was saved, in all of them."""
    opts = [*R50_FT, *images(image_data), "TRAIN.EMA", "0.5", "OUTPUT_DIR", str(tmp_path)]
    run_in_processes(load_config(R50, [*opts, "NUM_GPUS", "2", "DIST_BACKEND", "gloo"]), processes=2)
    results = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("test_results*.json")}
    assert set(results) == {"test_results_1x1.json", "test_results_1x1_ema.json"}
    run(R50, [*opts, "TRAIN.ENABLE", "False"], tmp_path)
    for name, before in results.items():
        assert json.loads((tmp_path / name).read_text()) == before


@pytest.mark.slow
def test_several_processes_test_like_one(clip_data: Path, tmp_path: Path) -> None:
    recipe = str(RECIPES / "k400_MVITv2_S_16x4_FT.yaml")
    opts = [*MVIT_FT, *clips(clip_data), "TEST.BATCH_SIZE", "4"]
    out = run(recipe, opts, tmp_path / "out")
    rerun = [*opts, "TRAIN.ENABLE", "False", "NUM_GPUS", "2", "DIST_BACKEND", "gloo", "OUTPUT_DIR", str(out)]
    before = json.loads((out / "test_results_2x1.json").read_text())
    run_in_processes(load_config(recipe, rerun), processes=2)
    assert json.loads((out / "test_results_2x1.json").read_text()) == before


def test_resuming_with_another_model_is_refused(
    image_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opts = [*VIT_FT, *images(image_data), "SOLVER.MAX_EPOCH", "1"]
    run(FT, opts, tmp_path)
    given = (tmp_path / "config_given.yaml").read_text()
    for change, word in (
        (["DATA.TRAIN_CROP_SIZE", "64", "DATA.TEST_CROP_SIZE", "64"], "DATA.TRAIN_CROP_SIZE was 32 and is 64"),
        (["SOLVER.LAYER_DECAY", "1.0"], "SOLVER.LAYER_DECAY"),
    ):
        capsys.readouterr()
        assert main(["--cfg", FT, *opts, "SOLVER.MAX_EPOCH", "3", *change, "OUTPUT_DIR", str(tmp_path)]) == 2
        said = capsys.readouterr().out
        assert word in said and "OUTPUT_DIR" in said
    assert (tmp_path / "config_given.yaml").read_text() == given, "a refused run changes nothing"


def test_test_data_is_looked_for_before_training(
    clip_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(clip_data, tmp_path / "data")
    (data / "test.csv").unlink()
    recipe = str(RECIPES / "k400_MVITv2_S_16x4_FT.yaml")
    assert main(["--cfg", recipe, *MVIT_FT, *clips(data), "OUTPUT_DIR", str(tmp_path / "out")]) == 2
    assert "test.csv" in capsys.readouterr().out
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_videos_are_looked_for_before_training(
    split: str, workers: str, clip_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list whose paths lead nowhere stops the run in one line, whichever split it is of."""
    data = shutil.copytree(clip_data, tmp_path / "data")
    lines = (data / f"{split}.csv").read_text().splitlines()
    (data / f"{split}.csv").write_text("".join(f"elsewhere/{line}\n" for line in lines))
    opts = [*MVIT_FT, *clips(data), "DATA_LOADER.NUM_WORKERS", workers, "TEST.ENABLE", "True"]
    recipe = str(RECIPES / "k400_MVITv2_S_16x4_FT.yaml")
    assert main(["--cfg", recipe, *opts, "OUTPUT_DIR", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().out
    (error,) = [line for line in said.splitlines() if "error" in line]
    assert f"no file of {data}/{split}.csv was found" in error and f"DATA.PATH_PREFIX {str(data)!r}" not in error
    assert f"{data}/elsewhere/" in error and "DATA.PATH_PREFIX" in error and "no such file" in error
    assert "Caught" not in said and "Traceback" not in said and "step 1/" not in said


@pytest.mark.slow
def test_files_that_are_away_for_a_while(image_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command goes on once they are back."""
    broken = break_some(image_data, tmp_path / "data", "train", 6)
    away = {path: Path(path).read_bytes() for path in broken}
    opts = [*VIT_PT, *images(tmp_path / "data"), "DATA_LOADER.NUM_WORKERS", "2"]
    assert main(["--cfg", PT, *opts, "OUTPUT_DIR", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().out
    assert "of 40 samples of train cannot be read" in said and "further ones may follow" in said
    for path in list(away)[1:]:
        shutil.copy(image_data / Path(path).relative_to(tmp_path / "data"), path)
    run(PT, opts, tmp_path / "out")
    assert "can be read again" in capsys.readouterr().out
    listed = [json.loads(line)["path"] for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert listed == [broken[0]]


@pytest.mark.parametrize("separator", ["\\t", "\t"])
def test_a_tab_from_a_shell(separator: str, clip_data: Path, tmp_path: Path) -> None:
    data = shutil.copytree(clip_data, tmp_path / "data")
    for path in data.glob("*.csv"):
        path.write_text("".join("\t".join(line.rsplit(" ", 1)) + "\n" for line in path.read_text().splitlines()))
    recipe = str(RECIPES / "k400_MVITv2_S_16x4_FT.yaml")
    cfg = load_config(recipe, [*MVIT_FT, *clips(data), "DATA.PATH_LABEL_SEPARATOR", separator])
    assert set(build_loader(cfg, "val").labels) == {0, 1, 2}


def test_machines_that_the_config_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning rates scale by NUM_SHARDS, so that torchrun's machines must be those of the config."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="set NUM_SHARDS 2"):
        launch(lambda *_: 0, (), processes=2)


def test_hidden_folders_are_no_classes(image_data: Path, tmp_path: Path) -> None:
    data = shutil.copytree(image_data, tmp_path / "data")
    (data / "train" / ".ipynb_checkpoints").mkdir()
    cfg = load_config(FT, [*VIT_FT, *images(data)])
    expected = {name: number for number, name in enumerate(sorted(p.name for p in (data / "val").iterdir()))}
    for split in ("train", "val"):
        dataset = build_loader(cfg, split).dataset
        assert {Path(path).parent.name: label for path, label in dataset.samples} == expected  # type: ignore[attr-defined]


def break_some(source: Path, target: Path, split: str, number: int) -> list[str]:
    """A copy of an image set with `number` files of a split cut short; their paths."""
    shutil.copytree(source, target)
    broken = sorted((target / split).rglob("*.jpg"))[::5][:number]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    return [str(path) for path in broken]


def test_bad_samples_in_training(image_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = break_some(image_data, tmp_path / "data", "train", 2)
    opts = [*VIT_PT, *images(tmp_path / "data"), "DATA.MAX_BAD_FRACTION"]
    out = run(PT, [*opts, "0.1"], tmp_path / "out")
    listed = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(row["path"] for row in listed) == broken, "each once, although there are two epochs"
    assert all(row["cause"] for row in listed)
    log = (out / "stdout.log").read_text()
    assert all(log.count(path) == 1 for path in broken)
    for _ in range(3):  # running again does not get past the limit
        capsys.readouterr()
        assert main(["--cfg", PT, *opts, "0", "OUTPUT_DIR", str(tmp_path / "strict")]) == 2
        said = capsys.readouterr()
        assert "DATA.MAX_BAD_FRACTION" in said.out + said.err
        assert any(path in said.out + said.err for path in broken)


def test_bad_samples_in_testing_are_wrong(image_data: Path, tmp_path: Path) -> None:
    break_some(image_data, tmp_path / "data", "val", 3)
    opts = [*VIT_FT, *images(tmp_path / "data"), "DATA.MAX_BAD_FRACTION", "0.5", "TEST.ENABLE", "True"]
    out = run(FT, opts, tmp_path / "out")
    results = json.loads((out / "test_results_1x1.json").read_text())
    assert results["unreadable"] == 3
    rows = results["samples"]
    right = sum(row["predicted"][0] == row["label"] and row["read"] for row in rows)
    assert results["top1"] == pytest.approx(100 * right / 16)
    assert (out / "bad_samples.jsonl").read_text().count('"test"') == 3


def test_errors_are_one_line_with_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for opts, key in (
        (["DATA.PATH_TO_DATA_DIR", str(tmp_path / "none")], "DATA.PATH_TO_DATA_DIR"),
        (["NUM_GPUS", "64", "TRAIN.BATCH_SIZE", "64", "TEST.BATCH_SIZE", "64"], "NUM_GPUS"),
        (["TRAIN.BATCH_SIZ", "4"], "TRAIN.BATCH_SIZE"),
        (["TRAIN.ENABLE", "False"], "TEST.ENABLE"),
    ):
        assert main(["--cfg", PT, *VIT_PT, *opts, "OUTPUT_DIR", str(tmp_path)]) == 2
        said = capsys.readouterr()
        assert key in said.out + said.err and "Traceback" not in said.out + said.err


def test_one_bad_gradient_is_skipped(image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose gradient is not finite leaves weights and moments as they were; the others go on."""
    calls = 0
    forward = MaskFeat.forward

    def poisoned(self: MaskFeat, batch: Batch) -> object:
        nonlocal calls
        calls += 1
        out = forward(self, batch)
        if calls == 5:  # the loss itself stays finite
            out.loss.register_hook(lambda gradient: gradient * float("nan"))
        return out

    monkeypatch.setattr(MaskFeat, "forward", poisoned)
    run(PT, [*VIT_PT, *images(image_data), "LOG_PERIOD", "5"], tmp_path)
    stats = json_stats(tmp_path, "train_iter")
    assert [entry["skipped"] for entry in stats] == [1, 0]
    assert all(float(entry["loss"]) > 0 and float(entry["grad_norm"]) > 0 for entry in stats)
    content = read_checkpoint(find_checkpoints(tmp_path, "ssl")[0])
    assert all(value.isfinite().all() for value in content["model_state"].values())
    steps = {int(moments["step"]) for moments in content["optimizer_state"]["state"].values()}
    assert steps == {4}, "five steps, one of them skipped"


def test_nan_stops_the_run(
    image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = MaskFeat.forward

    def poisoned(self: MaskFeat, batch: Batch) -> object:
        out = forward(self, batch)
        out.loss = out.loss * float("nan")
        return out

    monkeypatch.setattr(MaskFeat, "forward", poisoned)
    limit = ["TRAIN.MAX_SKIPPED_STEPS", "3"]
    assert main(["--cfg", PT, *VIT_PT, *images(image_data), *limit, "OUTPUT_DIR", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "3 steps in a row, from epoch 1, step 1 on, had a loss or gradients that are not finite" in said
    assert find_checkpoints(tmp_path, "ssl") == []
