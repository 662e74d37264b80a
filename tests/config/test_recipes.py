"""The published recipes: ours resolve to the published values, and the published files load unchanged."""

import gzip
import json
import logging
from ast import literal_eval
from pathlib import Path

import pytest
import torch
import yaml

from maskfeat.config import load_config
from maskfeat.config.recipes import CONFIG_ROOT
from maskfeat.config.schema import schema
from tests.config.helpers import MASKED_SSL, value_of

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PUBLISHED = json.loads((GOLDEN / "published_configs.json").read_text())
TRAJECTORIES = json.loads(gzip.decompress((GOLDEN / "training_trajectories.json.gz").read_bytes()))
ALIASES = {
    "in1k_VIT_B_FT": "in1k_VIT_B_MaskFeat_FT",
    "in1k_VIT_L_FT": "in1k_VIT_L_MaskFeat_FT",
    "k400_MVITv2_S_16x4_MaskFeat_FT": "k400_MVITv2_S_16x4_FT",
    "k400_MVITv2_L_16x4_MaskFeat_FT": "k400_MVITv2_L_16x4_FT",
}


def flat(section, prefix=""):
    for key, value in section.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def decoded(value):
    if isinstance(value, str) and (value == "None" or value[:1] in "(0123456789") and value:
        value = literal_eval(value)
    return list(value) if isinstance(value, tuple) else value


def test_there_are_eight():
    assert len(PUBLISHED) == 8
    assert sum(len(list(flat(recipe))) for recipe in PUBLISHED.values()) > 500


def test_the_copy_is_the_golden(shared):
    assert json.loads((shared / "goldens" / "published_configs.json").read_text()) == PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_value(name, caplog):
    with caplog.at_level(logging.WARNING):
        cfg = load_config(MASKED_SSL / name)
    assert not caplog.records  # our own recipes carry the published inert keys without a warning
    for key, value in flat(PUBLISHED[name]):
        resolved = value_of(cfg, key)
        assert resolved == decoded(value), key
        assert isinstance(resolved, bool) == isinstance(value, bool), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_pyslowfast_yaml_loads_unchanged(name, tmp_path, caplog):
    path = tmp_path / name
    path.write_text(yaml.safe_dump(PUBLISHED[name]))
    with caplog.at_level(logging.WARNING):
        cfg = load_config(path)
    # Keys that the published file does not give have their defaults in ours, too: both are equal as a whole.
    assert cfg == load_config(MASKED_SSL / name)
    messages = [r.getMessage() for r in caplog.records if r.name == "maskfeat.config"]
    assert len(messages) == 1
    inert = {"BN.USE_PRECISE_STATS", "BN.NUM_BATCHES_PRECISE", "DATA.DECODING_SHORT_SIZE"}
    for key in inert:
        assert (key in messages[0]) == (key in dict(flat(PUBLISHED[name])))


@pytest.mark.parametrize("name", PUBLISHED)
def test_ours_are_short(name):
    lines = (MASKED_SSL / name).read_text().splitlines()
    assert lines[0].startswith("# ") and any("Published" in line for line in lines[:3])
    assert len(lines) < 45


@pytest.mark.parametrize(("alias", "recipe"), ALIASES.items())
def test_other_names(alias, recipe):
    assert load_config(MASKED_SSL / f"{alias}.yaml") == load_config(MASKED_SSL / f"{recipe}.yaml")


RECIPES = [p for p in sorted(CONFIG_ROOT.rglob("*.yaml")) if p.parent.name != "_base_"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(CONFIG_ROOT)))
def test_every_yaml_of_the_project_loads(path, caplog):
    with caplog.at_level(logging.WARNING):
        load_config(path)
    assert not caplog.records


@pytest.mark.parametrize("run", TRAJECTORIES, ids=lambda run: run["name"])
def test_the_overrides_of_the_goldens(run):
    cfg = load_config(MASKED_SSL / f"{run['config']}.yaml", run["opts"])
    assert cfg.DATA.TRAIN_CROP_SIZE == 64
    if "mvit" in run["name"]:
        assert cfg.MVIT.DIM_MUL == [[1, 2.0], [3, 2.0]] and cfg.MVIT.DEPTH == 4
    if "pt" in run["name"]:
        assert cfg.MASK.PRETRAIN_DEPTH == [cfg.MVIT.DEPTH - 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_mvit_ft", "tiny_mvit_pt", "tiny_vit_ft", "tiny_vit_pt"])
def test_the_config_in_a_published_checkpoint_loads(name, shared, tmp_path, caplog):
    """It holds every key of the published program, most of them at their defaults."""
    (file,) = (shared / "goldens" / name / "checkpoints").iterdir()
    path = tmp_path / "theirs.yaml"
    path.write_text(torch.load(file, weights_only=True, map_location="cpu")["cfg"])
    with caplog.at_level(logging.WARNING):
        cfg = load_config(path)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "without effect here: AVA" in message and len(message) < 200
    for key, value in flat(yaml.safe_load(path.read_text())):
        if key in schema().known and not isinstance(value, dict):
            assert value_of(cfg, key) == decoded(value) or list(value_of(cfg, key)) == value, key
