"""Keys that changed between a checkpoint and a run: which take effect, which do not, which are refused."""

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from yacs.config import CfgNode

from maskfeat.analysis.visualize import main as visualize
from maskfeat.build import build_objective
from maskfeat.checkpoint.files import checkpoint_path, find_checkpoints, open_checkpoint, save_checkpoint
from maskfeat.checkpoint.sharded import save_sharded, training_tensors
from maskfeat.config import dump_config, get_defaults, load_config
from maskfeat.config.ranges import lookup
from maskfeat.config.schema import full_keys
from maskfeat.engine.changes import NOW, REFUSED, Change, built_differently, effects, find_changes
from maskfeat.engine.resume import CheckpointSource
from maskfeat.engine.run import main
from maskfeat.engine.trainer import Trainer, build_trainer
from maskfeat.errors import UserError
from maskfeat.optim.optimizers import load_optimizer_state
from tests.engine.test_trainer import CPU, flat, make_steps
from tests.golden.golden import recipe as golden_recipe
from tests.small import MFM_PT, MFM_RECIPES, R50_FT, RECIPES, VIT_FT, VIT_PT, images

PT, FT = (str(RECIPES / f"in1k_VIT_B_MaskFeat_{name}.yaml") for name in ("PT", "FT"))
MFM = str(MFM_RECIPES / "in1k_R50_MFM_PT.yaml")
R50 = str(MFM_RECIPES / "in1k_R50_MFM_FT.yaml")
SGD = ["SOLVER.OPTIMIZING_METHOD", "sgd"]
HARD = ["MIXUP.ENABLE", "False", "MODEL.LOSS_FUNC", "cross_entropy"]
ONLY_TEST = ["TRAIN.ENABLE", "False", "TEST.ENABLE", "True", *HARD]

Said = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs the program (or `program`), expects its exit code and returns what it printed."""

    def run(code: int, recipe: str, *opts: object, program: Callable[[list[str]], int] = main) -> str:
        capsys.readouterr()
        handler = logging.StreamHandler(sys.stdout)  # a run replaces it, other programs bring none of their own
        logging.getLogger("maskfeat").addHandler(handler)
        try:
            assert program(["--cfg", recipe, *map(str, opts)]) == code
        finally:
            logging.getLogger("maskfeat").removeHandler(handler)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return printed.out + printed.err

    return run


@pytest.fixture(scope="module")
def runs(image_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epoch of pre-training in pt/, and one of fine-tuning in ft/."""
    root = tmp_path_factory.mktemp("runs")
    for name, recipe, opts in (("pt", PT, VIT_PT), ("ft", FT, [*VIT_FT, *HARD])):
        opts = [*opts, *images(image_data), "SOLVER.MAX_EPOCH", "1", "TRAIN.EVAL_PERIOD", "0"]
        assert main(["--cfg", recipe, *opts, "OUTPUT_DIR", str(root / name)]) == 0
    return root


def all_effects(cfg: CfgNode, plugins: tuple[str, ...] = ()) -> dict[str, str]:
    """What a change of each key would do; every key of the schema has an entry."""
    keys = [key for key in full_keys(get_defaults(plugins)) if key not in ("OUTPUT_DIR", "SHARD_ID")]
    found = effects([Change(key, None, lookup(cfg, key)) for key in keys], cfg)
    assert [change.key for change, _ in found] == keys and all(effect for _, effect in found)
    return {change.key: effect for change, effect in found}


def test_every_key_has_an_effect_that_is_named() -> None:
    vit = all_effects(load_config(FT, VIT_FT))
    kept = {"DROPOUT_RATE", "DROPPATH_RATE", "HEAD_INIT_SCALE", "INIT", "REL_POS_ZERO_INIT"}
    refused = {f"MVIT.{name}" for name in get_defaults().MVIT if name not in kept}
    refused |= {"MODEL.ARCH", "MODEL.MODEL_NAME", "MODEL.NUM_CLASSES", "DATA.TRAIN_CROP_SIZE", "DATA.NUM_FRAMES"}
    refused |= {"SOLVER.OPTIMIZING_METHOD", "SOLVER.ZERO_WD_1D_PARAM"}
    assert {key for key, effect in vit.items() if effect == REFUSED} == refused
    for key in ("SOLVER.BETAS", "SOLVER.WEIGHT_DECAY", "SOLVER.BASE_LR", "SOLVER.MAX_EPOCH", "DATA.MEAN", "TRAIN.EMA"):
        assert vit[key].startswith(NOW), key
    for key in ("SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SOLVER.STEPS", "TRAIN.CHECKPOINT_FILE_PATH", "RESNET.DEPTH"):
        assert vit[key].startswith("no effect"), key
    assert (
        vit["MVIT.HEAD_INIT_SCALE"].startswith("no effect")
        and vit["MVIT.INIT"].startswith("no effect")
        and "MASK.HOG_BINS" in vit
    )
    assert vit["RNG_SEED"].startswith("from here on")
    resnet = all_effects(load_config(MFM, [*MFM_PT, *SGD]))
    assert resnet["SOLVER.MOMENTUM"] == NOW and resnet["SOLVER.BETAS"].startswith("no effect")
    assert resnet["RESNET.DEPTH"] == resnet["MFM.TARGET_CHANNELS"] == REFUSED
    assert resnet["MVIT.DEPTH"].startswith("no effect") and resnet["DATA.TRAIN_CROP_SIZE"] == NOW
    assert resnet["MODEL.NUM_CLASSES"] == NOW, "pre-training has no classes"


def test_what_only_training_reads_has_no_effect_on_a_finished_run() -> None:
    for cfg, keys in (
        (load_config(PT, VIT_PT), ("MASK.HOG_GAUSSIAN_WINDOW", "AUG.MASK_RATIO", "SOLVER.BASE_LR")),
        (load_config(MFM, [*MFM_PT, *SGD]), ("MFM.RADIUS", "TRAIN.BATCH_SIZE")),
        (load_config(FT, VIT_FT), ("MIXUP.ALPHA", "RNG_SEED")),
    ):
        for key in (*keys, "DATA.MEAN"):
            change = Change(key, None, lookup(cfg, key))
            expected = NOW if key == "DATA.MEAN" else "no effect: nothing is left to train"
            assert effects([change], cfg, finished=True) == [(change, expected)], key


def test_rate_decay_takes_effect_where_the_groups_stay() -> None:
    cfg = load_config(FT, VIT_FT)
    for was, effect in ((0.5, NOW), (1.0, REFUSED)):
        change = Change("SOLVER.LAYER_DECAY", was, cfg.SOLVER.LAYER_DECAY)
        assert effects([change], cfg) == [(change, effect)]


def test_nothing_differs_from_the_same_config() -> None:
    for path in (PT, FT, MFM, R50, RECIPES / "k400_MVITv2_S_16x4_FT.yaml"):
        cfg = load_config(path)
        assert find_changes({"cfg": dump_config(cfg)}, cfg) == [], path
    assert find_changes({"cfg": "MODEL:\n  ARCH: maskmvit\nTRAIN:\n  DATASET: ImageNet\n"}, load_config(FT)) == []
    assert find_changes({"cfg": "{"}, load_config(FT)) == find_changes({}, load_config(FT)) == []


@pytest.mark.parametrize("name", ["tiny_vit_pt", "tiny_mvit_pt", "tiny_vit_ft", "tiny_mvit_ft"])
def test_published_files_are_of_the_published_network(name: str, shared: Path) -> None:
    from tests.golden.test_trajectories import RUNS, published_file

    run = RUNS[name]
    assert built_differently(published_file(shared, name), golden_recipe(run["config"], run["opts"])) == []


HYPER = [
    (PT, VIT_PT, "SOLVER.BETAS", "(0.5, 0.6)", "betas"),
    (PT, VIT_PT, "SOLVER.WEIGHT_DECAY", "0.9", "weight_decay"),
    (MFM, [*MFM_PT, *SGD], "SOLVER.MOMENTUM", "0.2", "momentum"),
    (MFM, [*MFM_PT, *SGD], "SOLVER.NESTEROV", "False", "nesterov"),
    (MFM, [*MFM_PT, *SGD, "SOLVER.NESTEROV", "False"], "SOLVER.DAMPENING", "0.7", "dampening"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "opts", "key", "value", "name", "suffix"),
    [(*case, suffix) for case in HYPER for suffix in (".pyth", ".dcp") if "sgd" not in case[1] or suffix == ".pyth"],
)
def test_a_resumed_run_steps_with_the_values_of_its_config(
    recipe: str, opts: list[str], key: str, value: str, name: str, suffix: str, tmp_path: Path
) -> None:
    old, new = load_config(recipe, opts), load_config(recipe, [*opts, key, value])
    first = build_trainer(old, CPU)
    make_steps(first, 2)
    path = checkpoint_path(tmp_path, "", first.position, suffix)
    if suffix == ".dcp":
        tensors = training_tensors(first.objective, first.optimizer)
        save_sharded(path, tensors, first.plain_state({"cfg": dump_config(old)})).wait()
    else:
        save_checkpoint(path, first.state_dict({"cfg": dump_config(old)}))

    def resumed(cfg: CfgNode) -> Trainer:
        source = CheckpointSource(path, open_checkpoint(path), resumes=True)
        objective = build_objective(cfg)
        source.load_weights(cfg, objective)
        trainer = build_trainer(cfg, CPU, objective=objective)
        source.restore(trainer, 10, 4)
        make_steps(trainer, 0)
        return trainer

    def stepped(trainer: Trainer) -> dict[str, Any]:
        make_steps(trainer, 1)
        return flat(trainer.objective.released_state())

    by_hand, unchanged = resumed(old), stepped(resumed(old))
    for group, wanted in zip(by_hand.optimizer.param_groups, resumed(new).optimizer.param_groups, strict=True):
        assert wanted[name] == {"weight_decay": 0.9 * bool(group["weight_decay"])}.get(name, lookup(new, key))
        group[name] = wanted[name]
    expected, found = stepped(by_hand), stepped(resumed(new))
    assert all(torch.equal(found[parameter], value) for parameter, value in expected.items())
    assert any(not torch.equal(found[parameter], value) for parameter, value in unchanged.items())


def test_the_state_of_another_method_is_refused() -> None:
    """Also where the file carries no config."""
    adamw, sgd = (build_trainer(load_config(MFM, [*MFM_PT, *more]), CPU) for more in ([], SGD))
    for source, target, words in ((adamw, sgd, "adamw.*'sgd'"), (sgd, adamw, "sgd.*'adamw'")):
        make_steps(source, 1)
        with pytest.raises(ValueError, match=words):
            load_optimizer_state(target.optimizer, source.state_dict()["optimizer_state"])


def test_moments_of_another_shape_are_refused() -> None:
    """Fused kernels would read and write beyond their end."""
    trainer = build_trainer(load_config(MFM, MFM_PT), CPU)
    make_steps(trainer, 1)
    state = trainer.state_dict()["optimizer_state"]
    load_optimizer_state(trainer.optimizer, state)
    first, second = list(state["state"])[:2]
    state["state"][first], state["state"][second] = state["state"][second], state["state"][first]
    with pytest.raises(UserError, match=rf"exp_avg of parameter {first} has the shape .* the weights alone"):
        load_optimizer_state(trainer.optimizer, state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (SGD, ["SOLVER.OPTIMIZING_METHOD was 'adamw' and is 'sgd'"]),
        (["MODEL.NUM_CLASSES", "9"], ["MODEL.NUM_CLASSES was 4 and is 9"]),
        (["MVIT.NUM_HEADS", "4"], ["MVIT.NUM_HEADS was 2 and is 4"]),  # no shape differs
        (["SOLVER.ZERO_WD_1D_PARAM", "False"], ["SOLVER.ZERO_WD_1D_PARAM was True and is False"]),
        (["MVIT.DEPTH", "3", "MVIT.USE_MEAN_POOLING", "False"], ["MVIT.DEPTH", "MVIT.USE_MEAN_POOLING"]),
    ],
)
def test_what_cannot_change_is_refused(
    change: list[str], words: list[str], runs: Path, image_data: Path, tmp_path: Path, said: Said
) -> None:
    out = shutil.copytree(runs / "ft", tmp_path / "ft")
    given = (out / "config.yaml").read_text()
    opts = [*VIT_FT, *HARD, *images(image_data), "TRAIN.EVAL_PERIOD", "0"]
    text = said(2, FT, *opts, *change, "OUTPUT_DIR", out)
    for word in (*words, "ssl_eval_checkpoint_epoch_00001.pyth", f"another OUTPUT_DIR than {out}"):
        assert word in text
    assert "CHECKPOINT_EPOCH_RESET" not in text and (out / "config.yaml").read_text() == given


@pytest.mark.slow
def test_the_table_of_changes(runs: Path, image_data: Path, tmp_path: Path, said: Said) -> None:
    out = shutil.copytree(runs / "ft", tmp_path / "ft")
    opts = [*VIT_FT, *HARD, *images(image_data), "TRAIN.EVAL_PERIOD", "0", "OUTPUT_DIR", out]
    first = [*opts, "SOLVER.MAX_EPOCH", "1"]
    text = said(0, FT, *first, "SOLVER.BASE_LR", "1e-5", "TRAIN.CHECKPOINT_FILE_PATH", runs / "pt")
    assert "TRAIN.CHECKPOINT_FILE_PATH" in text and "no effect: the run resumes from its own checkpoint" in text
    assert "no effect: nothing is left to train" in text and "SOLVER.MAX_EPOCH is 1" in text
    text = said(0, FT, *opts, "RNG_SEED", "7", "SOLVER.MOMENTUM", "0.5", "TRAIN.EMA", "0.9")
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ") and "  " in line.strip()}
    assert {"RNG_SEED", "SOLVER.MOMENTUM", "SOLVER.MAX_EPOCH", "TRAIN.EMA"} <= set(rows)
    assert "OUTPUT_DIR" not in rows, "where the checkpoint lies is said already"
    assert "from here on" in rows["RNG_SEED"] and "only with SOLVER.OPTIMIZING_METHOD sgd" in rows["SOLVER.MOMENTUM"]
    assert "config changed" not in said(0, FT, *opts, "RNG_SEED", "7", "SOLVER.MOMENTUM", "0.5", "TRAIN.EMA", "0.9")


@pytest.mark.parametrize("allow", ["[]", "['head.*', 'norm.*']", "['*']"])
def test_no_random_classifier_is_tested(allow: str, runs: Path, image_data: Path, tmp_path: Path, said: Said) -> None:
    opts = [*VIT_FT, *ONLY_TEST, *images(image_data), "OUTPUT_DIR", tmp_path, "TRAIN.CHECKPOINT_ALLOW", allow]
    pretrained, finetuned = (
        find_checkpoints(runs / name, task)[-1] for name, task in (("pt", "ssl"), ("ft", "ssl_eval"))
    )
    for key in ("TEST.CHECKPOINT_FILE_PATH", "TRAIN.CHECKPOINT_FILE_PATH"):  # the second: OUTPUT_DIR is mistyped
        text = said(2, FT, *opts, key, pretrained)
        assert "has no classifier" in text and str(pretrained) in text and "top1" not in text
        text = said(2, FT, *opts, key, finetuned, "MODEL.NUM_CLASSES", "5")
        assert "MODEL.NUM_CLASSES was 4 and is 5" in text and "top1" not in text
        assert "To load the rest" not in text, "nothing of a test may be allowed to be random"
    assert "top1" in said(0, FT, *opts, "TRAIN.CHECKPOINT_FILE_PATH", finetuned)


def test_what_is_left_over_may_be_allowed_in_a_test(runs: Path, image_data: Path, tmp_path: Path, said: Said) -> None:
    content = torch.load(find_checkpoints(runs / "ft", "ssl_eval")[-1], weights_only=True)
    content["model_state"]["teacher.weight"] = torch.zeros(3)
    torch.save(content, tmp_path / "more.pyth")
    opts = [*VIT_FT, *ONLY_TEST, *images(image_data), "OUTPUT_DIR", tmp_path]
    opts += ["TEST.CHECKPOINT_FILE_PATH", tmp_path / "more.pyth"]
    assert "teacher.weight is in the file but not in the model" in said(2, FT, *opts)
    assert "top1" in said(0, FT, *opts, "TRAIN.CHECKPOINT_ALLOW", "['teacher.*']")


@pytest.mark.slow
def test_no_random_prediction_is_drawn(runs: Path, image_data: Path, tmp_path: Path, said: Said) -> None:
    """A classifier has no decoder: MFM may be trained from one, and not shown."""
    opts = [*R50_FT, *images(image_data), "SOLVER.MAX_EPOCH", "1", "TRAIN.EVAL_PERIOD", "0", "TEST.ENABLE", "False"]
    said(0, R50, *opts, "OUTPUT_DIR", tmp_path)
    classifier = find_checkpoints(tmp_path, "ssl_eval")[-1]
    drawn = [*MFM_PT, *images(image_data), "TEST.CHECKPOINT_FILE_PATH", classifier, "TRAIN.CHECKPOINT_ALLOW", "['*']"]
    text = said(2, MFM, *drawn, program=visualize)
    assert "no prediction head of this model" in text and "decoder" in text
    finetuned = find_checkpoints(runs / "ft", "ssl_eval")[-1]
    drawn = [*VIT_PT, *images(image_data), "TEST.CHECKPOINT_FILE_PATH", finetuned]
    drawn += ["DATA.TRAIN_CROP_SIZE", "48", "DATA.TEST_CROP_SIZE", "48"]  # it would be resized, and is no reason
    text = said(2, PT, *drawn, program=visualize)
    assert "MODEL.MODEL_NAME was 'MViT' and is 'MaskMViT'" in text and "pred_head" in text
    assert "another network" not in text and "CHECKPOINT_ALLOW" not in text


@pytest.mark.slow
def test_forgotten_overrides_are_named(runs: Path, image_data: Path, tmp_path: Path, said: Said) -> None:
    """In testing, drawing and fine-tuning; the run's own config needs no overrides."""
    data = images(image_data)
    forgot = [*VIT_FT, "MVIT.EMBED_DIM", "48", "MVIT.DEPTH", "1"]
    finetuned = ["OUTPUT_DIR", runs / "ft"]
    text = said(2, FT, *forgot, *ONLY_TEST, *data, *finetuned)
    for word in ("MVIT.DEPTH was 2 and is 1", "MVIT.EMBED_DIM was 24 and is 48", f"--cfg {runs}/ft/config.yaml"):
        assert word in text
    assert "CHECKPOINT_ALLOW" not in text
    # The weights fit, and compute something else.
    assert "MVIT.NUM_HEADS was 2 and is 4" in said(2, FT, *VIT_FT, *ONLY_TEST, "MVIT.NUM_HEADS", "4", *data, *finetuned)
    pretrained = find_checkpoints(runs / "pt", "ssl")[-1]
    start = ["TRAIN.CHECKPOINT_FILE_PATH", pretrained, "OUTPUT_DIR", tmp_path]
    text = said(2, FT, *forgot, *HARD, *data, *start)
    assert "MVIT.DEPTH was 2 and is 1" in text and str(pretrained) in text and "CHECKPOINT_ALLOW" not in text
    assert "NUM_CLASSES was" not in text, "pre-training has no classes"
    wrong = [*VIT_PT, "MVIT.EMBED_DIM", "48", *data, "OUTPUT_DIR", runs / "pt"]
    text = said(2, PT, *wrong, program=visualize)
    assert "MVIT.EMBED_DIM was 24 and is 48" in text and f"--cfg {runs}/pt/config.yaml" in text
    picture = tmp_path / "drawn.png"
    assert visualize(["--cfg", str(runs / "pt" / "config.yaml"), "--num", "1", "--output", str(picture)]) == 0
    assert picture.exists()
    own = str(runs / "ft" / "config.yaml")
    assert "top1" in said(0, own, "TRAIN.ENABLE", "False", "TEST.ENABLE", "True")


def test_other_inputs_than_in_training_are_named(runs: Path, image_data: Path, said: Said) -> None:
    opts = [*VIT_FT, *ONLY_TEST, *images(image_data), "OUTPUT_DIR", runs / "ft"]
    crop = ["DATA.TRAIN_CROP_SIZE", "48", "DATA.TEST_CROP_SIZE", "48"]
    text = said(0, FT, *opts, *crop, "DATA.MEAN", "[0.1, 0.1, 0.1]")
    assert "DATA.TRAIN_CROP_SIZE was 32 and is 48" in text and "DATA.MEAN was" in text and "top1" in text
    assert "other inputs" not in said(0, FT, *opts)


def test_another_set_of_classes_starts_the_classifier_anew(
    runs: Path, image_data: Path, tmp_path: Path, said: Said
) -> None:
    opts = [*VIT_FT, *HARD, *images(image_data), "MODEL.NUM_CLASSES", "5", "OUTPUT_DIR", tmp_path]
    opts += ["TRAIN.CHECKPOINT_FILE_PATH", find_checkpoints(runs / "ft", "ssl_eval")[-1], "SOLVER.MAX_EPOCH", "1"]
    text = said(2, FT, *opts)
    assert "MODEL.NUM_CLASSES was 4 and is 5" in text and "TRAIN.CHECKPOINT_ALLOW" in text
    assert "fresh       2" in said(0, FT, *opts, "TRAIN.CHECKPOINT_ALLOW", "['head.projection.*']")


@pytest.mark.slow
def test_finetuning_starts_from_the_pretraining_in_its_folder(
    runs: Path, image_data: Path, tmp_path: Path, said: Said
) -> None:
    out = shutil.copytree(runs / "pt", tmp_path / "out")
    pretrained = find_checkpoints(out, "ssl")[-1]
    opts = [*VIT_FT, *HARD, *images(image_data), "SOLVER.MAX_EPOCH", "1", "TRAIN.EVAL_PERIOD", "0", "OUTPUT_DIR"]
    given = said(0, FT, *opts, tmp_path / "given", "TRAIN.CHECKPOINT_FILE_PATH", pretrained)
    found = said(0, FT, *opts, out)
    line = f"training starts from {pretrained}"
    assert line in found and line not in given and "resumed" not in found
    first, second = (
        open_checkpoint(find_checkpoints(folder, "ssl_eval")[-1])["model_state"] for folder in (tmp_path / "given", out)
    )
    assert all(torch.equal(second[name], value) for name, value in first.items())
    again = said(0, FT, *opts, out, "SOLVER.MAX_EPOCH", "2")
    assert line not in again and "resumed from" in again, "its own checkpoint comes first"


def test_what_counts_as_pretraining(runs: Path, image_data: Path, tmp_path: Path, said: Said) -> None:
    """The checkpoint's own config says it, not its name; several are not guessed from."""
    opts = [*VIT_FT, *HARD, *images(image_data), "SOLVER.MAX_EPOCH", "1", "TRAIN.EVAL_PERIOD", "0", "OUTPUT_DIR"]
    folder = tmp_path / "named" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(find_checkpoints(runs / "ft", "ssl_eval")[-1], folder / "ssl_checkpoint_epoch_00001.pyth")
    assert "training starts from random weights" in said(0, FT, *opts, tmp_path / "named")
    both = shutil.copytree(runs / "pt", tmp_path / "both") / "checkpoints"
    shutil.copy(both / "ssl_checkpoint_epoch_00001.pyth", both / "checkpoint_epoch_00003.pyth")
    text = said(2, FT, *opts, tmp_path / "both")
    assert "TRAIN.CHECKPOINT_FILE_PATH" in text and "checkpoint_epoch_00003.pyth" in text
    # A network that does not fit is named, and never passed over for random weights.
    alone = shutil.copytree(runs / "pt", tmp_path / "alone")
    text = said(2, FT, *opts, alone, "MVIT.EMBED_DIM", "48")
    assert "MVIT.EMBED_DIM was 24 and is 48" in text and str(alone) in text
