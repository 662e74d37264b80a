"""Plugins: the objective, the backbone and the data set of CONTRIBUTING.md, and modules that cannot be used."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from maskfeat import registry
from maskfeat.batch import Batch
from maskfeat.build import build_objective
from maskfeat.config import dump_config, get_defaults, load_config
from maskfeat.engine.run import main
from tests.documents import fenced_blocks, marked_block, read
from tests.small import COMMON, REPO, VIT, images
from tests.worker import losses

EXAMPLES = {
    "pixel_prediction": VIT,
    "timm_encoder": ["TIMM.NAME", "test_vit", "DATA.TRAIN_CROP_SIZE", "32", "DATA.TEST_CROP_SIZE", "32"],
    "listed_images": VIT,
}
TWO_STEPS = [*COMMON, "SOLVER.MAX_EPOCH", "1", "TRAIN.BATCH_SIZE", "16", "TRAIN.CHECKPOINT_FILE_PATH", ""]

DECLARE = """
from yacs.config import CfgNode
from maskfeat.registry import ObjectiveSpec, BackboneSpec, DatasetSpec, register, AT_LEAST_1

def build(cfg, *_):
    raise AssertionError

def keys(cfg):
    cfg.OURS = CfgNode()
    cfg.OURS.SIZE = 4
    cfg.OURS.MODE = "soft"
    cfg.OURS.STEPS = []
"""
SPEC = """
register(ObjectiveSpec(name="Ours", build=build, losses=("ours",), keys=keys, kinds={"OURS.STEPS": "list[int]"},
    choices={"OURS.MODE": ("soft", "hard")}, ranges={"OURS.SIZE": AT_LEAST_1}, lengths={"OURS.STEPS": (0, 2)}))
"""
TAKEN = 'register(ObjectiveSpec(name="MFM", build=build, losses=("ours",)))\n'

Write = Callable[[str, str], str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a module that can be imported; afterwards it is forgotten."""
    registry.load()
    monkeypatch.setattr(registry, "_specs", dict(registry._specs))
    monkeypatch.setattr(registry, "_plugins", dict(registry._plugins))
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


def example(name: str, language: str) -> str:
    return marked_block(read("CONTRIBUTING.md"), name, language)


def recipe(name: str, folder: Path) -> Path:
    """The YAML of an example, as it would lie in configs/."""
    path = folder / f"{name}.yaml"
    path.write_text(example(name, "yaml").replace("masked_ssl/", f"{REPO}/configs/masked_ssl/"))
    return path


def data_for(name: str, root: Path, folder: Path) -> list[str]:
    if name != "listed_images":
        return images(root)
    classes = sorted(path.name for path in (root / "train").iterdir())
    for split in ("train", "val"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            for path in sorted((root / split).glob("*/*")):
                rows.writerow([path, classes.index(path.parent.name)])
    return images(folder)


def test_every_example_is_trained() -> None:
    text = read("CONTRIBUTING.md")
    for language in ("python", "yaml"):
        assert [mark for mark, _ in fenced_blocks(text, language)] == list(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_the_documents_train(name: str, module: Write, image_data: Path, tmp_path: Path) -> None:
    module(name, example(name, "python"))
    path, output = recipe(name, tmp_path), tmp_path / "out"
    opts = [*TWO_STEPS, *EXAMPLES[name], *data_for(name, image_data, tmp_path), "OUTPUT_DIR", str(output)]
    assert main(["--cfg", str(path), *opts]) == 0
    assert len(losses(output)) == 2
    saved = load_config(output / "config.yaml")  # which names the plugin, too
    assert list(saved.PLUGINS) == [name] and saved == load_config(path, opts)


@pytest.mark.slow
def test_every_process_of_a_run_imports_plugins(module: Write, image_data: Path, tmp_path: Path) -> None:
    """By the command, in two processes, with the folder of the plugin on PYTHONPATH."""
    name = module("pixel_prediction", example("pixel_prediction", "python"))
    opts = [*TWO_STEPS, *VIT, *images(image_data), "NUM_GPUS", "2", "DIST_BACKEND", "gloo"]
    command = [sys.executable, str(REPO / "tools" / "run_net.py"), "--cfg", str(recipe(name, tmp_path)), *opts]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPO}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "OUTPUT_DIR", str(tmp_path / "out")], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(tmp_path / "out")) == 2


def test_the_loss_of_the_pixel_example_is_that_of_hidden_patches(module: Write, tmp_path: Path) -> None:
    """What the plugin computes, said again slowly: its class is the one that the config builds."""
    module("pixel_prediction", example("pixel_prediction", "python"))
    objective = build_objective(load_config(recipe("pixel_prediction", tmp_path), [*TWO_STEPS, *VIT])).eval()
    batch = Batch(clip=torch.randn(2, 3, 32, 32), hidden=torch.tensor([[[1, 0], [0, 0]], [[0, 1], [1, 0]]]).bool())
    with torch.no_grad():
        tokens = objective.decoder(objective.norm(objective.backbone.forward_tokens(batch.clip, batch.hidden).patches))
        wanted = []
        for image, row, column in batch.hidden.nonzero().tolist():
            patch = batch.clip[image, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].flatten()
            error = (tokens[image, 2 * row + column] - patch).abs()
            wanted.append(torch.where(error < 0.5, error**2, error - 0.25).mean())
        torch.testing.assert_close(objective(batch).loss, torch.stack(wanted).mean())
    assert objective.weight(batch) == 3


def test_a_plugin_adds_its_keys_and_names(module: Write) -> None:
    module("ours_adds", DECLARE + SPEC)
    cfg = load_config(None, ["PLUGINS", "[ours_adds]", "OURS.SIZE", "8", "OURS.STEPS", "[1, 2]"])
    assert (cfg.OURS.SIZE, cfg.OURS.STEPS, cfg.OURS.MODE) == (8, [1, 2], "soft")
    assert "OURS" in dump_config(cfg)
    # A config that does not name it has none of its keys, although the process has imported it.
    assert "OURS" not in get_defaults() and "OURS" not in load_config(None)
    with pytest.raises(ValueError, match="unknown config key OURS.SIZE"):
        load_config(None, ["OURS.SIZE", "8"])
    with pytest.raises(ValueError, match="MODEL.MODEL_NAME must be one of .*'MFM'; given 'Ours'"):
        load_config(None, ["MODEL.MODEL_NAME", "Ours"])


def test_a_yaml_may_name_plugins_and_an_override_replaces_them(module: Write, tmp_path: Path) -> None:
    module("ours_yaml", DECLARE + SPEC)
    path = tmp_path / "given.yaml"
    path.write_text("PLUGINS: [ours_yaml]\nOURS:\n  SIZE: 2\n")
    assert load_config(path).OURS.SIZE == 2
    with pytest.raises(ValueError, match="line 3: unknown config key OURS.SIZE"):
        load_config(path, ["PLUGINS", "[]"])


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["OURS.SIZE", "0"], "OURS.SIZE must be at least 1; given 0"),
        (["OURS.MODE", "loud"], "OURS.MODE must be one of 'soft', 'hard'; given 'loud'"),
        (["OURS.STEPS", "[1]"], "OURS.STEPS must have 0 or 2 numbers; given \\[1\\]"),
        (["OURS.STEPS", "[1, 2.5]"], "OURS.STEPS must be a list of whole numbers; given"),
        (["OURS.SIZE", "large"], "OURS.SIZE must be a whole number; given 'large'"),
        (["OURS.SISE", "1"], "unknown config key OURS.SISE; did you mean OURS.SIZE\\?"),
        (["MODEL.MODEL_NAME", "Ours"], "MODEL.LOSS_FUNC must be 'ours' for MODEL.MODEL_NAME 'Ours'"),
        (["MODEL.MODEL_NAME", "Ours", "AUG.GEN_MASK_LOADER", "True"], "AUG.GEN_MASK_LOADER must be False"),
        (["MODEL.MODEL_NAME", "Ours", "TEST.ENABLE", "True"], "TEST.ENABLE must be False"),
    ],
)
def test_rules_of_a_plugin_are_checked(module: Write, opts: list[str], words: str) -> None:
    module("ours_rules", DECLARE + SPEC)
    with pytest.raises(ValueError, match=words):
        load_config(None, ["PLUGINS", "[ours_rules]", *opts])


def test_a_check_of_a_plugin_is_asked_where_it_is_used(module: Write, tmp_path: Path) -> None:
    module("listed_images", example("listed_images", "python"))
    wrong = ["LISTED.DELIMITER", "::"]
    with pytest.raises(ValueError, match="LISTED.DELIMITER must be one character; given '::'"):
        load_config(recipe("listed_images", tmp_path), wrong)
    load_config(recipe("listed_images", tmp_path), [*wrong, "TRAIN.DATASET", "imagenet", "TEST.DATASET", "imagenet"])
    module("timm_encoder", example("timm_encoder", "python"))
    with pytest.raises(ValueError, match="'MViT' supports MODEL.ARCH 'mvit' or 'maskmvit'; given 'timm'.*Classif"):
        load_config(recipe("timm_encoder", tmp_path), ["MODEL.MODEL_NAME", "MViT"])
    with pytest.raises(ValueError, match=r"\(timm\) supports images, TRAIN.DATASET imagenet; given kinetics"):
        load_config(recipe("timm_encoder", tmp_path), ["TRAIN.DATASET", "kinetics"])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("no_such_module_anywhere", None, "cannot be imported: No module named .*PYTHONPATH"),
        ("ours_broken", "x = 1\nraise KeyError('y')\n", "cannot be imported: KeyError: 'y' .*ours_broken.py, line 2"),
        ("ours_nothing", "x = 1\n", "registers no objective, backbone or data set"),
        ("ours_taken", DECLARE + SPEC + TAKEN, "objective 'MFM' is already registered by maskfeat.objectives.mfm"),
        ("ours_upper", DECLARE + 'register(DatasetSpec(name="X", build=build, media="image"))', "lower case.*'X'"),
    ],
)
def test_modules_that_are_no_plugins(module: Write, name: str, text: str | None, words: str) -> None:
    if text is not None:
        module(name, text)
    before = dict(registry._specs)
    for _ in range(2):  # the second time as the first
        with pytest.raises(ValueError, match=f"command line: PLUGINS: the module {name} .*{words}") as caught:
            load_config(None, ["PLUGINS", f"[{name}]"])
        assert "\n" not in str(caught.value) and registry._specs == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cfg.MFM = CfgNode()", "sets MFM.RADIUS, .*other code has declared"),
        ("cfg.TASK = 'x'", "sets TASK, which other code has declared"),
        ("cfg.OURS = CfgNode()\n    cfg.OURS.LIMIT = None", "default None of OURS.LIMIT does not show its type"),
        ("pass", "`ranges` of 'theirs' has rules for OURS.SIZE, which is no key"),
    ],
)
def test_a_plugin_only_adds_keys(module: Write, text: str, words: str) -> None:
    spec = (
        'register(DatasetSpec(name="theirs", build=build, media="clip", keys=theirs, ranges={"OURS.SIZE": AT_LEAST_1}))'
    )
    name = module("ours_changes", f"{DECLARE}\ndef theirs(cfg):\n    {text}\n{spec}\n")
    with pytest.raises(ValueError, match=f"PLUGINS: {name}.*{words}"):
        load_config(None, ["PLUGINS", f"[{name}]"])


@pytest.mark.parametrize(
    "name",
    [
        "/tmp/evil.py",
        "../evil",
        "evil.py/",
        "http://127.0.0.1/evil",
        "a b",
        "a;b",
        ".evil",
        "evil.",
        "os\0",
        "",
        "1a",
        "é",
    ],
)
def test_only_dotted_names_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match="PLUGINS must hold dotted names of modules"):
        load_config(None, ["PLUGINS", [name]])


def test_a_cell_that_is_run_again_replaces_what_it_registered(module: Write) -> None:
    """As `importlib.reload` and the cells of a notebook do; what a later cell adds is found, too."""
    name = module("ours_again", DECLARE + SPEC)
    (first,) = [spec for spec in registry.load([name]).specs if spec.module == name]
    loaded = sys.modules[name]
    exec(DECLARE + SPEC.replace("(0, 2)", "(0, 3)"), loaded.__dict__)
    (second,) = [spec for spec in registry.load([name]).specs if spec.module == name]
    assert second is not first and load_config(None, ["PLUGINS", f"[{name}]", "OURS.STEPS", "[1, 2, 3]"])
    exec('register(BackboneSpec(name="later", title="it", media=("image",), build=build))', loaded.__dict__)
    assert "later" in registry.load([name]).backbones and "later" not in registry.load().backbones
    with pytest.raises(ValueError, match=f"MODEL.ARCH must be one of .*given 'later'; PLUGINS must name {name}, which"):
        load_config(None, ["MODEL.ARCH", "later"])


def test_two_plugins_of_one_name_exclude_each_other(module: Write) -> None:
    module("ours_first", DECLARE + SPEC)
    module("ours_second", DECLARE + SPEC)
    with pytest.raises(ValueError, match="ours_second .*'Ours' is already registered by ours_first"):
        load_config(None, ["PLUGINS", "[ours_first, ours_second]"])
