"""The arithmetic of a run: what is suggested, when applied, is the recipe's step, rates and memory."""

import dataclasses
import functools
import itertools
import logging
import re
from pathlib import Path

import pytest
import torch
from yacs.config import CfgNode

from maskfeat.batch import Batch
from maskfeat.config import load_config
from maskfeat.engine.batch_arithmetic import (
    StepSize,
    batch_overrides,
    check_batch_norm,
    compare,
    describe,
    load_recipe,
    rate_overrides,
    step_size,
)
from maskfeat.engine.run import main
from maskfeat.errors import UserError
from maskfeat.optim.schedule import lr_at_epoch
from tests.small import MFM_RECIPES, RECIPES, REPO, VIT_PT, images

QUICK = REPO / "configs" / "quickstart"
EVERY = sorted([*RECIPES.glob("*.yaml"), *MFM_RECIPES.glob("*.yaml"), *QUICK.glob("*.yaml")])
PT = RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml"
CLIPS_FT = RECIPES / "k400_MVITv2_S_16x4_FT.yaml"
R50_FT = MFM_RECIPES / "in1k_R50_MFM_FT.yaml"


@functools.cache
def read(path: Path) -> CfgNode:
    return load_config(path)


def said(path: Path, *opts: object) -> list[str]:
    cfg = load_config(path, opts)
    recipe = load_recipe(path)
    assert recipe is not None
    return list(compare(cfg, step_size(cfg), recipe, path.name))


def suggested(line: str) -> list[str]:
    """The overrides that a line ends with."""
    last = line.split(": ")[-1]
    return last.split() if re.fullmatch(r"((TRAIN|SOLVER)\.[A-Z_]+ [0-9.e+-]+ ?)+", last) else []


def rates(cfg: CfgNode, samples: int = 1) -> list[float]:
    """Learning rates over a whole run, also between epochs and at the ends of warm-up and run, for each sample."""
    last, warmup = cfg.SOLVER.MAX_EPOCH, cfg.SOLVER.WARMUP_EPOCHS
    epochs = {0.0, 0.4, warmup / 2, warmup, warmup + 0.01, last / 2, last - 0.001, float(last)}
    return [lr_at_epoch(cfg, epoch) / samples for epoch in sorted(epochs)]


@pytest.mark.parametrize("path", EVERY, ids=lambda p: p.stem)
def test_silent_where_nothing_differs(path: Path) -> None:
    # What is the user's own business: length, precision, folders, a micro-batch that was chosen.
    longer = [
        "SOLVER.MAX_EPOCH",
        1600,
        "TRAIN.MIXED_PRECISION",
        "bf16",
        "OUTPUT_DIR",
        "runs",
        "TRAIN.MICRO_BATCH_SIZE",
        1,
    ]
    assert said(path, *longer) == []
    cfg = read(path)
    assert list(compare(cfg, step_size(cfg), cfg, path.name)) == []


def variants() -> list[tuple[Path, list[object]]]:
    """Recipes (also one that was published for several machines) on other machines, GPUs, batches and rates."""
    found = []
    grid = itertools.product((1, 2, 4), (1, 2, 8), (None, 16), (0, 8))
    for number, (shards, gpus, batch, micro) in enumerate(grid):
        opts: list[object] = ["NUM_SHARDS", shards, "NUM_GPUS", gpus, "TRAIN.MICRO_BATCH_SIZE", micro]
        opts += [] if batch is None else ["TRAIN.BATCH_SIZE", batch]
        opts += [] if number % 3 else ["SOLVER.BASE_LR", 1e-3]
        found.append(((PT, CLIPS_FT, R50_FT)[number % 3], opts))
        found.append(((R50_FT, PT, CLIPS_FT)[number % 3], opts))
    found += [(PT, ["AUG.NUM_SAMPLE", 2, "NUM_GPUS", gpus]) for gpus in (1, 2, 8)]
    found += [(CLIPS_FT, ["AUG.NUM_SAMPLE", 1, "NUM_GPUS", gpus]) for gpus in (1, 2, 8)]
    unscaled = ["SOLVER.BASE_LR_SCALE_NUM_SHARDS", False]
    found += [(PT, ["NUM_SHARDS", shards, "NUM_GPUS", 2, *unscaled]) for shards in (1, 2, 4)]
    steps = ["SOLVER.LR_POLICY", "steps_with_relative_lrs", "SOLVER.STEPS", "[0, 100]", "SOLVER.LRS", "[1.0, 0.1]"]
    return [*found, (PT, ["NUM_SHARDS", 2, *steps])]


def check(path: Path, opts: list[object]) -> int:
    """Apply what is suggested; the number of lines that suggested something."""
    recipe, given = read(path), load_config(path, opts)
    if given.SOLVER.LR_POLICY != recipe.SOLVER.LR_POLICY:  # its form is the user's, its height the recipe's
        form = ["SOLVER.LR_POLICY", given.SOLVER.LR_POLICY, "SOLVER.STEPS", given.SOLVER.STEPS]
        recipe = load_config(path, [*form, "SOLVER.LRS", given.SOLVER.LRS])
    theirs = step_size(recipe)
    lines = list(compare(given, step_size(given), recipe, path.name))
    applied = 0
    for line in lines:
        overrides = suggested(line)
        if not overrides:
            assert "cannot be shared evenly" in line or "in proportion to" in line
            continue
        cfg = load_config(path, [*opts, *overrides])
        step = step_size(cfg)
        if "The same step" in line:
            assert step.samples == theirs.samples
            assert rates(cfg) == pytest.approx(rates(recipe), rel=1e-8)
            assert step.forward <= theirs.forward
            if step.share % theirs.forward == 0:
                assert step.forward == theirs.forward
            # And then nothing is left to say.
            assert list(compare(cfg, step, recipe, path.name)) == []
        else:
            assert step.samples == step_size(given).samples
            assert rates(cfg, step.samples) == pytest.approx(rates(recipe, theirs.samples), rel=1e-8)
            (again,) = [text for text in compare(cfg, step, recipe, path.name) if "Goyal" in text]
            assert "in proportion to" in again
        applied += 1
    if step_size(given).samples != theirs.samples or rates(given) != pytest.approx(rates(recipe), rel=1e-8):
        assert lines, "something differs, and nothing was said"
    return applied


@pytest.mark.slow
def test_what_is_suggested_is_the_recipe() -> None:
    applied = sum(check(path, opts) for path, opts in variants())
    assert applied > 90, "the combinations differ from their recipes"


def test_a_recipe_for_several_machines(tmp_path: Path) -> None:
    """A YAML of four machines, on one: its batch and its rates go with the machines."""
    path = tmp_path / "four.yaml"
    path.write_text(f"_BASE_: {MFM_RECIPES}/in1k_R50_MFM_PT.yaml\nNUM_SHARDS: 4\nTRAIN:\n  BATCH_SIZE: 512\n")
    keep, scaled = said(path, "NUM_SHARDS", 1)
    assert suggested(keep) == [
        "TRAIN.BATCH_SIZE", "2048", "TRAIN.MICRO_BATCH_SIZE", "64",
        "SOLVER.BASE_LR", "0.0048", "SOLVER.WARMUP_START_LR", "4.8e-05",
    ]  # fmt: skip
    assert "2048 samples a step at learning rate 0.0048, " not in keep, "no more at once than in the recipe"
    assert "in proportion to 512 samples" in scaled
    for shards, gpus in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        check(path, ["NUM_SHARDS", shards, "NUM_GPUS", gpus])


def test_lines_by_hand() -> None:
    cfg = load_config(PT, ["NUM_SHARDS", 2, "TRAIN.MICRO_BATCH_SIZE", 16])
    assert describe(cfg, step_size(cfg), 2502) == (
        "8 GPUs x 32 x 2 machines = 512 samples a step (accumulated over 2 micro-batches of 16); learning rate 0.0002 "
        "x 2 machines (SOLVER.BASE_LR_SCALE_NUM_SHARDS) = 0.0004, warm-up from 2e-06 over 30 epochs; 300 epochs of "
        "2502 steps"
    )
    cfg = load_config(CLIPS_FT, ["NUM_GPUS", 0])
    assert describe(cfg, step_size(cfg), 1).startswith(
        "1 process x 16 x 2 views = 32 samples a step; learning rate 0.0006"
    )
    (line,) = said(PT, "NUM_GPUS", 1)
    assert line == (
        "in1k_VIT_B_MaskFeat_PT.yaml as it stands: 256 samples a step at learning rate 0.0002, 32 at once in a "
        "process; this run: 256 at 0.0002, 256. The same step as the recipe's: TRAIN.MICRO_BATCH_SIZE 32"
    )
    keep, scaled = said(PT, "NUM_GPUS", 1, "TRAIN.BATCH_SIZE", 64)
    assert suggested(keep) == ["TRAIN.BATCH_SIZE", "256", "TRAIN.MICRO_BATCH_SIZE", "32"]
    assert suggested(scaled) == [
        "SOLVER.BASE_LR", "5e-05", "SOLVER.WARMUP_START_LR", "2.5e-07", "SOLVER.COSINE_END_LR", "2.5e-07",
    ]  # fmt: skip
    assert (
        "256 samples cannot be shared evenly by 1 x 3 processes" in said(PT, "NUM_GPUS", 3, "TRAIN.BATCH_SIZE", 96)[0]
    )


def test_unequal_shares_take_no_more_than_the_recipe() -> None:
    recipe = step_size(load_config(R50_FT))  # 2048 over 8
    cfg = load_config(R50_FT, ["NUM_SHARDS", 1, "NUM_GPUS", 1, "TRAIN.BATCH_SIZE", 100, "TRAIN.MICRO_BATCH_SIZE", 300])
    assert batch_overrides(step_size(cfg), recipe) == ["TRAIN.BATCH_SIZE", "2048", "TRAIN.MICRO_BATCH_SIZE", "256"]
    assert rate_overrides(cfg, load_config(R50_FT)) == []


def test_a_second_reading_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "foreign.yaml"
    path.write_text(f"_BASE_: {PT}\nBN:\n  NUM_SPLITS: 2\n")
    with caplog.at_level(logging.INFO):
        assert load_recipe(path) is not None and load_recipe("") is None
    assert caplog.text == ""
    path.write_text(f"_BASE_: {PT}\nNUM_GPUS: 7\n")
    assert load_recipe(path) is None, "it needs its overrides"


def test_said_once_in_a_run(image_data: Path, tmp_path: Path) -> None:
    opts = [*VIT_PT, *images(image_data), "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_EPOCH", "1"]
    assert main(["--cfg", str(PT), *opts]) == 0
    log = (tmp_path / "stdout.log").read_text()
    assert log.count("1 process x 8 = 8 samples a step; learning rate 0.0002; 1 epoch of 5 steps") == 1
    assert log.count("this run: 8 at 0.0002. An epoch has 40 samples here, too few for steps of 256") == 1
    assert "The same step" not in log and "Goyal" not in log
    assert "SOLVER.BASE_LR 6.25e-06" not in log


@pytest.mark.parametrize(
    ("step", "positions", "mend"),
    [
        (StepSize(1, 1, 4, 1, 3), 1, "TRAIN.MICRO_BATCH_SIZE 2,"),
        (StepSize(1, 2, 14, 1, 2), 1, "TRAIN.MICRO_BATCH_SIZE 4,"),
        (StepSize(1, 1, 2, 1, 1), 1, "TRAIN.MICRO_BATCH_SIZE 0,"),
        (StepSize(1, 1, 6, 1, 1), 1, "TRAIN.MICRO_BATCH_SIZE 2,"),
        (StepSize(2, 4, 4, 1, 0), 1, "TRAIN.BATCH_SIZE 8 or more"),
        (StepSize(1, 1, 1, 1, 8), 1, "TRAIN.BATCH_SIZE 2 or more"),
        (StepSize(1, 1, 1, 2, 1), 1, "TRAIN.MICRO_BATCH_SIZE 0,"),
        (StepSize(1, 1, 4, 1, 3), 4, None),
        (StepSize(1, 1, 1, 2, 0), 1, None),
        (StepSize(1, 1, 4, 1, 2), 1, None),
        (StepSize(1, 1, 5, 1, 3), 1, None),
    ],
)
def test_batch_norm_over_one_value(step: StepSize, positions: int, mend: str | None) -> None:
    """The sizes that are refused are those that split() and a batch norm refuse, and the advice is not refused."""
    batch = Batch(torch.randn(step.share, 3, 1, positions))
    norm = torch.nn.BatchNorm2d(3)
    if mend is None:
        check_batch_norm(step, positions)
        for part in batch.split(step.micro):
            norm(part.clip)
        return
    with pytest.raises(UserError, match=f"DATA.TRAIN_CROP_SIZE|set {mend}") as caught:
        check_batch_norm(step, positions)
    assert f"set {mend}" in str(caught.value)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        for part in batch.split(step.micro):
            norm(part.clip)
    if "MICRO" in mend:
        check_batch_norm(dataclasses.replace(step, micro=int(mend.split()[-1].strip(","))), positions)


@pytest.mark.parametrize(("samples", "advised"), [(160, False), (2559, False), (2560, True), (1_281_167, True)])
def test_no_advice_from_a_recipe_of_larger_sets(samples: int, advised: bool) -> None:
    cfg, recipe = load_config(PT, ["TRAIN.BATCH_SIZE", 8]), read(PT)
    lines = list(compare(cfg, step_size(cfg), recipe, PT.name, samples // 8))
    assert ("Goyal" in " ".join(lines)) == advised == bool(suggested(lines[0]))
    if not advised:
        (line,) = lines
        assert f"An epoch has {samples // 8 * 8} samples here, too few for steps of 256" in line
