"""The command line of the programs: options, files and overrides in any order."""

from pathlib import Path

import pytest

from maskfeat.config.arguments import ConfigParser
from maskfeat.config.merge import override_entries


def parser(several=True):
    found = ConfigParser()
    found.add_cfg("", several=several)
    found.add_argument("--num_shards", type=int)
    found.add_argument("--name")
    found.add_overrides("")
    return found


@pytest.mark.parametrize(
    ("line", "cfg", "opts"),
    [
        ("--cfg a.yaml", ["a.yaml"], []),
        ("--cfg a.yaml TASK x", ["a.yaml"], ["TASK", "x"]),
        ("--cfg a.yaml --opts TASK x", ["a.yaml"], ["TASK", "x"]),
        ("--opts TASK x --cfg a.yaml", ["a.yaml"], ["TASK", "x"]),
        ("TASK x --cfg a.yaml RNG_SEED 3", ["a.yaml"], ["TASK", "x", "RNG_SEED", "3"]),
        ("--cfg a.yaml TASK x --num_shards 2", ["a.yaml"], ["TASK", "x"]),
        ("--cfg a.yaml TASK x --num_shards 2 RNG_SEED=3 --name A100", ["a.yaml"], ["TASK", "x", "RNG_SEED=3"]),
        ("--cfg a.yaml b/c RNG_SEED 3", ["a.yaml", "b/c"], ["RNG_SEED", "3"]),
        ("--cfg a b.yml --opts RNG_SEED=3", ["a", "b.yml"], ["RNG_SEED=3"]),
        (
            "--cfg quickstart/images_pt quickstart/images_ft TASK x",
            ["quickstart/images_pt", "quickstart/images_ft"],
            None,
        ),
        ("--cfg_files a.yaml b.yaml", ["a.yaml", "b.yaml"], []),
        ("--cfg=a.yaml b.yaml TASK x", ["a.yaml", "b.yaml"], ["TASK", "x"]),
        ("--cfg a.yaml --cfg b.yaml", ["a.yaml", "b.yaml"], []),
        ("--cfg a.yaml OUTPUT_DIR=/x/y.yaml b/c", ["a.yaml"], ["OUTPUT_DIR=/x/y.yaml", "b/c"]),
        ("--cfg a.yaml SOLVER.BASE_LR -1 RNG_SEED -1e-3 TASK x", ["a.yaml"], None),
    ],
)
def test_every_order_is_understood(line, cfg, opts):
    words = line.split()
    args = parser().parse_args(words)
    assert args.cfg == cfg and set(vars(args)) == {"cfg", "num_shards", "name", "opts"}
    assert args.opts == (["TASK", "x"] if "quickstart" in line else words[2:] if opts is None else opts)
    if opts != ["OUTPUT_DIR=/x/y.yaml", "b/c"]:
        override_entries(args.opts)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("TASK x", "the following arguments are required: --cfg"),
        ("--cfg a.yaml TASK x --foo 3", "unrecognized arguments: --foo"),
        ("--cfg a.yaml -x 3", "unrecognized arguments: -x"),
        ("--cfg", "expected one argument"),
    ],
)
def test_what_is_refused(line, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(line.split())
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_one_file(capsys):
    assert parser(several=False).parse_args(["--cfg", "a.yaml", "TASK", "x"]).cfg == "a.yaml"
    with pytest.raises(SystemExit):
        parser(several=False).parse_args(["--cfg", "a.yaml", "b.yaml"])
    assert "--cfg takes one file here; given a.yaml, b.yaml" in capsys.readouterr().err


def test_words_from_python_may_be_paths_and_numbers():
    found, unknown = parser().parse_known_args(["--cfg", Path("a.yaml"), "RNG_SEED", 3])
    assert (found.cfg, found.opts, unknown) == (["a.yaml"], ["RNG_SEED", "3"], [])
