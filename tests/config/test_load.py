"""Loading: coercions, overrides, unknown keys, duplicates, saving."""

import logging

import numpy as np
import pytest
import yaml
from yacs.config import CfgNode

from maskfeat.config import dump_config, get_defaults, load_config, save_config
from maskfeat.config.recipes import CONFIG_ROOT
from maskfeat.config.schema import full_keys, is_inert, schema
from maskfeat.errors import UserError
from tests.config.helpers import MVIT_FT, VIT_FT, VIT_PT, load_text, value_of

ACCEPTED = [
    # key, value as given (text, as on a command line), value as resolved
    ("SOLVER.BASE_LR", "1e-4", 1e-4),
    ("SOLVER.BASE_LR", "1", 1.0),
    ("SOLVER.MAX_EPOCH", "40", 40),
    ("SOLVER.CLIP_GRAD_L2NORM", "None", None),
    ("SOLVER.CLIP_GRAD_L2NORM", "3", 3.0),
    ("SOLVER.CLIP_GRAD_VAL", "1e-2", 0.01),
    ("SOLVER.BETAS", "[0.9, 0.95]", (0.9, 0.95)),
    ("AUG.COLOR_JITTER", "None", None),
    ("AUG.COLOR_JITTER", "0", 0.0),
    ("AUG.AA_TYPE", "", ""),
    ("AUG.AA_TYPE", "None", ""),
    ("AUG.MAX_MASK_PATCHES_PER_BLOCK", "80", 80),
    ("AUG.MASK_WINDOW_SIZE", "(8, 14, 14)", [8, 14, 14]),
    ("MVIT.QKV_BIAS", "False", False),
    ("MVIT.QKV_BIAS", "false", False),
    ("TRAIN.MIXED_PRECISION", "False", False),
    ("TRAIN.MIXED_PRECISION", "off", False),
    ("TRAIN.MIXED_PRECISION", "True", True),
    ("TRAIN.MIXED_PRECISION", "bf16", "bf16"),
    ("TRAIN.MIXED_PRECISION", "fp16", "fp16"),
    ("TRAIN.CHECKPOINT_INFLATE", "True", True),
    ("TRAIN.CHECKPOINT_INFLATE", "average", "average"),
    ("MODEL.ACT_CHECKPOINT", "light", "light"),
    ("MODEL.ACT_CHECKPOINT", "True", True),
    ("TRAIN.CHECKPOINT_ALLOW", "['head.*', 'norm.*']", ["head.*", "norm.*"]),
    ("TRAIN.CHECKPOINT_ALLOW", "[head.*, norm.*]", ["head.*", "norm.*"]),
    ("TRAIN.CHECKPOINT_ALLOW", "head.*", ["head.*"]),
    ("TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN", '("backbone.",)', ("backbone.",)),
    ("TEST.NUM_TEMPORAL_CLIPS", "(5, 10)", [5, 10]),
    ("TEST.NUM_TEMPORAL_CLIPS", "[]", []),
    ("DATA.PATH_LABEL_SEPARATOR", ",", ","),
    ("DATA.PATH_LABEL_SEPARATOR", "=", "="),
    ("OUTPUT_DIR", "2024", "2024"),
    ("OUTPUT_DIR", "2024-01-01", "2024-01-01"),
    ("OUTPUT_DIR", "'quoted'", "quoted"),
    ("TASK", "1", "1"),
    ("TASK", "True", "True"),
    ("TASK", "010", "010"),
]

REFUSED = [
    ("SOLVER.MAX_EPOCH", "40.0"),
    ("SOLVER.MAX_EPOCH", "1e2"),
    ("SOLVER.MAX_EPOCH", "True"),
    ("SOLVER.MAX_EPOCH", "None"),
    ("SOLVER.BASE_LR", "fast"),
    ("SOLVER.BASE_LR", "1e999"),
    ("SOLVER.BASE_LR", "False"),
    ("SOLVER.BASE_LR", "None"),
    ("SOLVER.BASE_LR", "[0.1]"),
    ("MVIT.QKV_BIAS", "1"),
    ("MVIT.QKV_BIAS", "0"),
    ("MVIT.QKV_BIAS", "None"),
    ("MVIT.DIM_MUL", "[1, 2.0]"),
    ("MVIT.POOL_Q_STRIDE", "[[0, 1, 1.5, 1]]"),
    ("MVIT.PATCH_STRIDE", "16"),
    ("TRAIN.MIXED_PRECISION", "fp8"),
    ("TRAIN.CHECKPOINT_INFLATE", "mean"),
    ("MODEL.ACT_CHECKPOINT", "heavy"),
    ("TRAIN.MIXED_PRECISION", "1"),
    ("TEST.NUM_TEMPORAL_CLIPS", "[1, 2.5]"),
    ("TEST.NUM_TEMPORAL_CLIPS", "5"),
    ("AUG.COLOR_JITTER", "strong"),
]


def same(a: object, b: object) -> bool:
    return a == b and type(a) is type(b)


@pytest.mark.parametrize(("key", "given", "resolved"), ACCEPTED)
def test_coercion_of_overrides(key, given, resolved):
    assert same(value_of(load_config(VIT_FT, [key, given]), key), resolved)


@pytest.mark.parametrize(("key", "given", "resolved"), ACCEPTED)
def test_coercion_of_yaml(key, given, resolved, tmp_path):
    """The same characters in a YAML, and as a quoted YAML string, mean the same."""
    bare = f"{key}: {given}\n" if given not in ("", ",") else f"{key}: '{given}'\n"
    for text in (bare, yaml.safe_dump({key: given})):
        cfg = load_text(tmp_path, text)
        assert same(value_of(cfg, key), resolved), text


@pytest.mark.parametrize(
    ("given", "patterns"),
    [
        ("*.rel_pos_[hw]", ["*.rel_pos_[hw]"]),
        ("[ab].w, blocks.1[0-1]", ["[ab].w", "blocks.1[0-1]"]),
        ("([*.rel_pos_[hw], 'head.*'])", ["*.rel_pos_[hw]", "head.*"]),
        ("(head.*,)", ["head.*"]),
    ],
)
def test_brackets_of_patterns_stay(given, patterns, tmp_path):
    """Those around the list go. In a YAML such a text has to be quoted."""
    key = "TRAIN.CHECKPOINT_ALLOW"
    assert value_of(load_config(VIT_FT, [key, given]), key) == patterns
    assert value_of(load_text(tmp_path, yaml.safe_dump({key: given})), key) == patterns


@pytest.mark.parametrize(("key", "given"), REFUSED)
def test_refused_values(key, given, tmp_path):
    with pytest.raises(ValueError, match=f"command line: {key} must be .*; given"):
        load_config(VIT_FT, [key, given])
    with pytest.raises(ValueError, match=f"given.yaml line 1: {key} must be .*; given"):
        load_text(tmp_path, f"{key}: {given}\n")


def test_python_values_as_overrides(tmp_path):
    opts = [
        "SOLVER.MAX_EPOCH",
        40,
        "SOLVER.WARMUP_EPOCHS",
        2,
        "SOLVER.BETAS",
        [0.9, 0.95],
        "AUG.COLOR_JITTER",
        None,
    ]
    cfg = load_config(VIT_FT, [*opts, "OUTPUT_DIR", tmp_path, "TASK", 2024, "AUG.ENABLE", True])
    assert (cfg.SOLVER.MAX_EPOCH, cfg.SOLVER.WARMUP_EPOCHS, cfg.SOLVER.BETAS) == (40, 2.0, (0.9, 0.95))
    assert cfg.AUG.COLOR_JITTER is None and cfg.AUG.ENABLE is True
    assert str(tmp_path) == cfg.OUTPUT_DIR and cfg.TASK == "2024"
    with pytest.raises(ValueError, match="SOLVER.MAX_EPOCH must be a whole number"):
        load_config(VIT_FT, ["SOLVER.MAX_EPOCH", 40.0])


def test_overrides_come_last_and_the_last_wins():
    assert load_config(VIT_FT, ["RNG_SEED", "3", "RNG_SEED", "4"]).RNG_SEED == 4
    assert load_config(VIT_FT, ["RNG_SEED=3", "RNG_SEED", "4", "TASK=a=b", "RNG_SEED=5"]).RNG_SEED == 5
    given = ["TASK=a=b", "DATA.PATH_LABEL_SEPARATOR==", "DATA.PATH_PREFIX=", "SOLVER.BETAS=(0.9, 0.95)"]
    cfg = load_config(VIT_FT, given)
    assert (cfg.TASK, cfg.DATA.PATH_LABEL_SEPARATOR, cfg.DATA.PATH_PREFIX) == ("a=b", "=", "")
    assert cfg.SOLVER.BETAS == (0.9, 0.95)


@pytest.mark.parametrize("text", ["010", "0010", "-010", "1:30", "00_1", "08"])
def test_numbers_that_yaml_reads_to_another_base(text, tmp_path):
    with pytest.raises(ValueError, match="NUM_CLASSES must be a whole number; given"):
        load_text(tmp_path, f"MODEL: {{NUM_CLASSES: {text}}}\n")
    with pytest.raises(ValueError, match="SCALES must be a list of whole numbers; given"):
        load_text(tmp_path, f"DATA: {{TRAIN_JITTER_SCALES: [256, {text}]}}\n")
    assert text == load_text(tmp_path, f"TASK: {text}\nBN: {{X: {text}}}\n").TASK


def test_a_leading_zero_is_named_and_other_numbers_are_read(tmp_path):
    for where in (
        lambda text: load_text(tmp_path, f"RNG_SEED: {text}\n"),
        lambda text: load_config(None, ["RNG_SEED", text]),
    ):
        with pytest.raises(ValueError, match="given '010' \\(a leading 0 means octal in YAML: leave it out\\)"):
            where("010")
        assert [where(text).RNG_SEED for text in ("0", "1_000", "0o10", "0x10")] == [0, 1000, 8, 16]
    assert load_text(tmp_path, "SOLVER: {BASE_LR: 0.5, WEIGHT_DECAY: 00.5}\n").SOLVER.WEIGHT_DECAY == 0.5


# --- paths ---

WRITTEN = ("OUTPUT_DIR", "TENSORBOARD.LOG_DIR", "TEST.SAVE_RESULTS_PATH")
PATHS = [key for key, kind in schema().rules.kinds.items() if kind == "path"]


def test_paths_are_marked():
    words = ("PATH", "DIR", "FILE")
    named = {k for k, kind in schema().rules.kinds.items() if kind in ("str", "path") and any(w in k for w in words)}
    assert (named - {"DATA.PATH_LABEL_SEPARATOR"}) | {"DATA.CLASS_NAMES"} == set(PATHS)


@pytest.mark.slow
@pytest.mark.parametrize("key", PATHS)
def test_paths_are_expanded(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOT_SET", raising=False)
    expected = {
        "~": "/home/someone",
        "~/runs": "/home/someone/runs",
        "$SCRATCH/a": "/scratch/me/a",
        "x/${SCRATCH}b": "x//scratch/meb",
        "a~b/~": "a~b/~",
        "$$a": "$a",
        "https://host/$SCRATCH": "https://host/$SCRATCH",  # what the environment holds is not sent to a server
    }
    if key in WRITTEN:
        with pytest.raises(UserError, match=f"{key} must be a path in a file system"):
            load_config(None, [key, expected.popitem()[0]])
    for given, path in expected.items():
        for cfg in (load_config(None, [key, given]), load_text(tmp_path, f"{key}: '{given}'\n")):
            assert value_of(cfg, key) == path
            again = tmp_path / "again.yaml"
            again.write_text(dump_config(cfg))
            assert load_config(again) == cfg
    for given, words in (
        ("$NOT_SET/a", "the environment variable NOT_SET is not set"),
        ("${NOT_SET}", "NOT_SET is not set"),
        ("~no_such_user/a", "no home folder of ~no_such_user"),
        ("a$", r"a \$ must be followed by"),
        ("$1", r"\$\$ is a dollar sign"),
    ):
        with pytest.raises(ValueError, match=f"given.yaml line 2: {key} .*{words}"):
            load_text(tmp_path, f"\n{key}: '{given}'\n")
        assert value_of(load_text(tmp_path, f"{key}: '{given}'\n", key, "b"), key) == "b"  # overridden: not looked at


def test_paths_of_configs_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("RNG_SEED: 7\n")
    (tmp_path / "top.yaml").write_text("_BASE_: ~/base.yaml\n")
    (tmp_path / "wrong.yaml").write_text("_BASE_: $NOT_SET/base.yaml\n")
    for name in ("~/top.yaml", "$HOME/top.yaml"):
        assert load_config(name).RNG_SEED == 7
    with pytest.raises(ValueError, match=r"wrong.yaml line 1: _BASE_ '\$NOT_SET/base.yaml': the environment variable"):
        load_config("~/wrong.yaml")
    with pytest.raises(ValueError, match="config file .NOT_SET/top.yaml: the environment variable NOT_SET is not set"):
        load_config("$NOT_SET/top.yaml")


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["RNG_SEED"], "RNG_SEED has no value$"),
        (["NUM_GPUS", "2", "RNG_SEED"], "RNG_SEED has no value$"),
        (["RNG_SEED", "SOLVER.MAX_EPOCH", "3"], "RNG_SEED has no value: the next word is the key SOLVER.MAX_EPOCH"),
        (["TASK", "my", "run", "RNG_SEED", "3"], r"run has no value: the next word is the key RNG_SEED"),
        (
            ["DATA.PATH_TO_DATA_DIR", "/a", "b/c"],
            r"'b/c' \(after DATA.PATH_TO_DATA_DIR /a\) is not a key; a value with",
        ),
        (["RNG_SEED", "=", "3"], r"'3' \(after RNG_SEED =\) is not a key"),
        (["=3"], "'=3' is not a key"),
        ("RNG_SEED 3", "must be a list"),
        ([3, "RNG_SEED"], "3 is not a key"),
        (["RNG_SED=3"], "unknown config key RNG_SED; did you mean RNG_SEED"),
        (["TRAIN", "3"], "TRAIN is a section"),
        (["BN", "3"], "BN is a section"),
        (["_BASE_", "x.yaml"], "unknown config key _BASE_"),
    ],
)
def test_malformed_overrides(opts, words):
    with pytest.raises(ValueError, match=words):
        load_config(VIT_FT, opts)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("TRAIN.BATCHSIZE", "TRAIN.BATCH_SIZE"),
        ("TRIAN.ENABLE", "TRAIN.ENABLE"),
        ("train.batch_size", "TRAIN.BATCH_SIZE"),
        ("DATA.BASE_LR", "SOLVER.BASE_LR"),
        ("NUM_GPU", "NUM_GPUS"),
        ("SOLVER.WARM_UP_EPOCHS", "SOLVER.WARMUP_EPOCHS"),
        ("DATA.DECODE_SHORT_SIZE", "DATA.DECODING_SHORT_SIZE"),
        ("TRAIN.BATCH_SIZE.X", "TRAIN.BATCH_SIZE"),
    ],
)
def test_unknown_keys_name_the_nearest(typo, meant, tmp_path):
    with pytest.raises(ValueError, match=f"command line: unknown config key {typo}; did you mean {meant}\\?"):
        load_config(None, [typo, "1"])
    with pytest.raises(ValueError, match=f"given.yaml line 3: unknown config key {typo}; did you mean {meant}\\?"):
        load_text(tmp_path, f"TASK: a\n\n{typo}: 1\n")


def test_inert_keys_are_kept_and_named_once(tmp_path, caplog):
    text = """
BN: {USE_PRECISE_STATS: True, ANYTHING: [1, 2]}
CONTRASTIVE: {DELTA_CLIPS_MIN: -.inf}
DETECTION: {ENABLE: False}
DATA: {SSL_COLOR_HUE: 0.2, DECODING_SHORT_SIZE: "320", TRAIN_PCA_EIGVEC: [[1.0, 2.0]]}
MVIT: {REV: {ENABLE: False, BUFFER_LAYERS: "(1, 2)"}}
TENSORBOARD: {MODEL_VIS: {GRAD_CAM: {ENABLE: True}}}
"""
    with caplog.at_level(logging.DEBUG):
        cfg = load_text(tmp_path, text, "SOLVER.LARS_ON", "False", "DETECTION.ALIGNED", "True")
    assert cfg.BN.USE_PRECISE_STATS is True and cfg.BN.ANYTHING == [1, 2]
    assert cfg.DATA.DECODING_SHORT_SIZE == 320 and cfg.MVIT.REV.BUFFER_LAYERS == [1, 2]
    assert cfg.TENSORBOARD.MODEL_VIS.GRAD_CAM.ENABLE is True and cfg.DETECTION.ALIGNED is True
    said, listed = (record.getMessage() for record in caplog.records if record.name == "maskfeat.config")
    assert said == (
        "12 keys of PySlowFast's other models and tools, without effect here: BN.USE_PRECISE_STATS, BN.ANYTHING, "
        "CONTRASTIVE.DELTA_CLIPS_MIN and 9 more"
    )
    assert caplog.records[0].levelno == logging.WARNING
    for key in ("BN.ANYTHING", "DATA.SSL_COLOR_HUE", "MVIT.REV.ENABLE", "SOLVER.LARS_ON", "DETECTION.ALIGNED"):
        assert listed.count(key) == 1


def test_a_config_that_a_run_wrote_names_no_key_without_effect(tmp_path, caplog):
    cfg = load_config(VIT_FT, ["BN.NUM_SPLITS", "2", "CONTRASTIVE.T", "0.1"])
    caplog.clear()
    save_config(VIT_FT, [], cfg, tmp_path)
    (tmp_path / "more.yaml").write_text("_BASE_: config.yaml\nAVA: {BGR: True}\n")
    with caplog.at_level(logging.DEBUG):
        assert load_config(tmp_path / "config.yaml") == cfg
        assert not caplog.records
        load_config(tmp_path / "more.yaml")
    assert (
        caplog.records[0]
        .getMessage()
        .startswith("1 key of PySlowFast's other models and tools, without effect here: AVA")
    )


def test_no_effective_key_is_inert_and_kinds_name_keys():
    keys = set(full_keys(get_defaults()))
    assert len(keys) > 120 and not [key for key in keys if is_inert(key)]
    kinds = schema().rules.kinds
    assert set(kinds) == keys
    unclear = {k for k in keys if isinstance(value_of(get_defaults(), k), list | tuple | type(None))}
    assert all(kinds[key].startswith("list[") or kinds[key].endswith(" or None") for key in unclear)


def test_the_defaults_alone_load():
    assert load_config(None) == get_defaults()


def test_duplicates_name_both_lines_and_the_winner(tmp_path, caplog):
    text = "TASK: a\nTRAIN:\n  EVAL_PERIOD: 1\n  EVAL_PERIOD: 2\nTASK: b\n"
    text += "SOLVER.BASE_LR: 1.0\nSOLVER: {BASE_LR: 2.0}\n"
    with caplog.at_level(logging.WARNING):
        cfg = load_text(tmp_path, text)
    assert (cfg.TASK, cfg.TRAIN.EVAL_PERIOD, cfg.SOLVER.BASE_LR) == ("b", 2, 2.0)
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 3 and all("the last one wins" in m for m in messages)
    assert any("key TRAIN.EVAL_PERIOD is written twice, on lines 3 and 4" in m for m in messages)
    assert any("key TASK is written twice, on lines 1 and 5" in m for m in messages)
    assert any("SOLVER.BASE_LR is written twice" in m and "line 6" in m and "line 7" in m for m in messages)


def test_a_section_written_twice_is_the_last(tmp_path, caplog):
    """As every YAML loader has it, the first section is gone as a whole; the warning says so."""
    with caplog.at_level(logging.WARNING):
        cfg = load_text(tmp_path, "SOLVER: {BASE_LR: 1.0}\nSOLVER: {MAX_EPOCH: 7}\n")
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_EPOCH) == (get_defaults().SOLVER.BASE_LR, 7)
    assert "key SOLVER is written twice, on lines 1 and 2" in caplog.text


def test_dotted_keys_merge_keys_and_empty_sections(tmp_path, caplog):
    text = "x: &x {MAX_EPOCH: 9, BASE_LR: 3.0}\n"
    with pytest.raises(ValueError, match="unknown config key x.MAX_EPOCH"):
        load_text(tmp_path, text)
    text = "SOLVER: &s {MAX_EPOCH: 9}\nBN:\n  <<: *s\nTRAIN:\nMVIT.DEPTH: 4\n"
    cfg = load_text(tmp_path, text)
    assert cfg.MVIT.DEPTH == 4 and cfg.BN.MAX_EPOCH == 9 and cfg.SOLVER.MAX_EPOCH == 9
    assert load_text(tmp_path, "") == get_defaults()
    caplog.clear()
    cfg = load_text(tmp_path, "SSL: &s {A: 1, B: 1}\nBN: {A: 2, <<: *s}\n")
    assert (cfg.BN.A, cfg.BN.B) == (2, 1) and "twice" not in caplog.text


def test_frozen():
    cfg = load_config(VIT_FT)
    with pytest.raises(AttributeError):
        cfg.RNG_SEED = 5
    with pytest.raises(AttributeError):
        cfg.TRAIN.BATCH_SIZE = 5


HARD = ["OUTPUT_DIR", "2024", "TASK", "no", "DATA.PATH_LABEL_SEPARATOR", ",", "SOLVER.COSINE_END_LR", "1e-7"]


@pytest.mark.parametrize("path", [None, VIT_PT, MVIT_FT], ids=str)
def test_saved_configs_load_back(path, tmp_path):
    opts = [*HARD, "TRAIN.MIXED_PRECISION", "bf16", "BN.X", "(1, None)", "DATA.PATH_PREFIX", "a\nTASK: b"]
    cfg = load_config(path, opts)
    save_config(path, opts, cfg, tmp_path / "new" / "out")
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == [
        "config.yaml",
        "config_given.yaml",
    ]
    resolved = load_config(tmp_path / "new" / "out" / "config.yaml")
    assert resolved == cfg and type(resolved.SOLVER.BETAS) is tuple and resolved.OUTPUT_DIR == "2024"
    given = (tmp_path / "new" / "out" / "config_given.yaml").read_text()
    assert '# override: ["OUTPUT_DIR", "2024"]' in given
    if path is not None:
        assert given.startswith(path.read_text())
    inside = {} if path is None else yaml.safe_load(path.read_text())
    assert (yaml.safe_load(given) or {}) == inside  # no override leaks out of its comment


def test_yacs_reads_what_we_dump():
    cfg = load_config(MVIT_FT)
    theirs = get_defaults()
    theirs.set_new_allowed(True)
    theirs.merge_from_other_cfg(CfgNode.load_cfg(dump_config(cfg)))
    assert theirs == cfg


def test_config_root_is_the_projects(repo):
    assert repo / "configs" == CONFIG_ROOT


def test_values_of_numpy_are_numbers_and_lists() -> None:
    opts = ["TRAIN.BATCH_SIZE", np.int64(8), "SOLVER.BASE_LR", np.float32(0.5), "SOLVER.NESTEROV", np.True_]
    cfg = load_config(None, [*opts, "DATA.MEAN", np.array([0.5, 0.5, 0.25])])
    assert (cfg.TRAIN.BATCH_SIZE, cfg.SOLVER.BASE_LR, cfg.SOLVER.NESTEROV) == (8, 0.5, True)
    assert cfg.DATA.MEAN == [0.5, 0.5, 0.25] and type(cfg.TRAIN.BATCH_SIZE) is int
