"""The documents agree with the program: commands parse, names exist, numbers and messages are the program's own."""

import argparse
import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from yacs.config import CfgNode

from maskfeat.config import get_defaults, load_config
from maskfeat.config.schema import full_keys, is_inert
from maskfeat.demos.evidence.suites import SUITES
from maskfeat.engine.run import parse_args
from tests.contracts.test_layout import ALLOWED
from tests.documents import DOCUMENTS, REPO, fenced_blocks, read, recorded_commands

KEYS = frozenset(full_keys(get_defaults()))
SECTIONS = frozenset(key.rsplit(".", 1)[0] for key in KEYS if "." in key)
RECIPES = REPO / "configs" / "masked_ssl"
MFM_RECIPES = REPO / "configs" / "mfm"
VIDEO_RECIPES = REPO / "configs" / "video_ft"
SMALL_RECIPES = tuple(REPO / "configs" / name for name in ("caltech101", "jhmdb", "cifar10", "shapes"))

VARIABLES: dict[str, str] = {}

# Blocks also call programs that a test must not run: they do nothing, and `srun` calls what it is given.
STUBS = (
    "cd() { :; }\nsource() { :; }\ncommand_not_found_handle() { :; }\n"
    'srun() { while [[ $1 == --* ]]; do shift 2; done; "$@"; }\n'
    'sbatch() { while [[ $1 == --* ]]; do shift; done; shift; python tools/run_net.py "$@"; }\n'
)


def commands_of(document: str) -> list[list[str]]:
    """Every call of python, torchrun or bash in the document's blocks; variables live on from block to block."""
    blocks = [text for _, text in fenced_blocks(read(document))]
    return recorded_commands(STUBS + "\n".join(blocks), VARIABLES)


def commands() -> list[list[str]]:
    """Every distinct command of all documents, torchrun's own arguments taken off."""
    found = []
    for document in DOCUMENTS:
        for program, *arguments in commands_of(document):
            start = next((i for i, a in enumerate(arguments) if a.startswith(("tools/", "docs/"))), None)
            if start is not None:
                found.append(arguments[start:])
            else:
                assert program == "python" and arguments[0] in ("-c", "-m"), (document, arguments)
    return [list(command) for command in dict.fromkeys(tuple(command) for command in found)]


COMMANDS = commands()


def test_there_are_commands() -> None:
    tools = {command[0] for command in COMMANDS}
    assert {
        *("docs/config_reference.py", "docs/figures.py"),
        *(f"tools/{name}" for name in TOOLS),
    } == tools
    assert sum(command[0] == "tools/run_net.py" for command in COMMANDS) >= 20


TOOLS = (
    "run_net.py",
    "make_synthetic.py",
    "visualize.py",
    "benchmark.py",
    "gpu_check.py",
    "evidence.py",
    "probe.py",
    "export.py",
    "prepare_caltech101.py",
    "prepare_cifar10.py",
    "quickstart.sh",
    "soak.sh",
    "submit.py",
    "test.sh",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", COMMANDS, ids=lambda c: f"{Path(c[0]).name}-{Path(c[2]).stem if len(c) > 2 else c[-1]}"
)
def test_commands_parse(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    tool, *arguments = command
    assert (REPO / tool).is_file()
    if tool.startswith("docs/"):
        assert not arguments, "it takes none"
    elif "--help" in arguments:
        done = subprocess.run([sys.executable, tool, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "usage" in done.stdout
    elif tool == "tools/test.sh":
        assert all(f"  {option})" in (REPO / tool).read_text() for option in arguments)
    elif tool == "tools/soak.sh":
        assert not arguments, "they are pytest's"
    elif tool == "tools/quickstart.sh":
        parser_of("tools/quickstart.py").parse_args(arguments)
    elif tool == "tools/run_net.py":
        args = parse_args(arguments)
        for path in args.cfg:
            load_config(path, args.opts)
    elif "--cfg" in arguments:  # tools that take their own options first and overrides of a config after them
        parser = parser_of(tool)
        args = parser.parse_args(arguments)
        load_config(args.cfg, args.opts)
    elif tool == "tools/evidence.py":
        args = parser_of(tool).parse_args(arguments)
        assert args.budget in SUITES[args.suite].budgets
        for method in SUITES[args.suite].methods:
            load_config(REPO / "configs" / method.pretraining, args.opts)
    else:
        parser_of(tool).parse_args(arguments)


class _Parsed(Exception):
    """Carries the parser of a tool out of its main()."""


def module_of(script: str) -> ModuleType:
    """A script of the repository as a module, not run as a program."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, REPO / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def parser_of(tool: str) -> argparse.ArgumentParser:
    """The argument parser that a tool builds, had by stopping it where it would parse."""
    caught: list[argparse.ArgumentParser] = []

    def stop(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        caught.append(self)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        module = module_of(tool)
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(_Parsed):
            module.main()
    return caught[0]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_are_valid_bash(document: str) -> None:
    for _, text in fenced_blocks(read(document)):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stderr}"
    for _, text in fenced_blocks(read(document), "python"):
        ast.parse(text)


def test_yaml_of_the_guide_loads(tmp_path: Path) -> None:
    """The own config of the guide, put where the guide says that it lies."""
    (_, sources), (_, text) = fenced_blocks(read("docs/data.md"), "yaml")
    (tmp_path / "mix.yaml").write_text(f"_BASE_: {RECIPES}/in1k_VIT_B_MaskFeat_PT.yaml\n{sources}")
    assert [weight for _, weight in load_config(tmp_path / "mix.yaml").DATA.SOURCES] == [3, 1, 1]
    path = tmp_path / "flowers_ft.yaml"
    path.write_text(text.replace("masked_ssl/", f"{RECIPES}/"))
    cfg = load_config(path)
    assert (cfg.MODEL.NUM_CLASSES, cfg.TASK, cfg.SOLVER.LAYER_DECAY) == (102, "flowers", 0.65)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_keys_exist(document: str) -> None:
    text = read(document)
    named = set(re.findall(r"(?<![\w./$<])[A-Z][A-Z0-9_]+(?:\.[A-Z][A-Za-z0-9_]+)+\b", text))
    wrong = {key for key in named if key not in KEYS and key not in SECTIONS and not is_inert(key)}
    examples = {
        "PIXELS.BETA",
        "TIMM.NAME",
        "TIMM.DROP_PATH",
        "LISTED.DELIMITER",
    }  # keys of the plugins in CONTRIBUTING.md
    assert not wrong - {"NCCL_DEBUG"} - (examples if document in ("CONTRIBUTING.md", "docs/design.md") else set())
    single = set(re.findall(r"`([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)\b", text))
    top = {key for key in KEYS if "." not in key} | SECTIONS
    known = {
        *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_DIR", "TRACKIO_PROJECT", "TRACKIO_SPACE_ID"),
        *("WANDB_MODE", "WANDB_PROJECT"),
        "GLOO_SOCKET_IFNAME",
        "OMP_NUM_THREADS",
        "MASKFEAT_SHARED",
        "MASTER_ADDR",
        "MASTER_PORT",
        "MAX_RESTARTS",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "PET_NODE_RANK",
        "PET_NNODES",
        "MASKFEAT_TRITON",
        "MASKFEAT_VENV",
        "NCCL_DEBUG",
        "BUILT_IN",
        "TORCH_HOME",
        "_BASE_",
    }
    assert single <= top | known


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    text = read(document)
    # Files of the repository by their first folder, and config files by their name alone.
    for path in re.findall(r"(?<![\w/.])((?:maskfeat|tools|tests|configs|benchmarks|docs|\.ci)/[\w./*-]*\w)", text):
        if path != "configs/flowers_ft.yaml":  # the reader's own
            assert any(REPO.glob(path)), path
    for name in re.findall(r"`(\w+\.yaml)`", text):
        recipe = any((folder / name).is_file() for folder in (RECIPES, MFM_RECIPES, VIDEO_RECIPES, *SMALL_RECIPES))
        assert recipe or name in ("config.yaml", "config_given.yaml"), name


def test_the_layout_is_there() -> None:
    (tree,) = [text for _, text in fenced_blocks(read("docs/design.md"), "text") if text.startswith("maskfeat/")]
    for name in re.findall(r"\b(\w+\.py|\w+/)(?=[\s,])", tree):
        assert any(next(REPO.glob(f"{folder}{name}"), None) for folder in ("", "maskfeat/", "tools/", "*/")), name


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_resolve(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        other = (REPO / document).parent / path if path else REPO / document
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(read(str(other.resolve().relative_to(REPO)))), target


FOREIGN = re.compile(
    r"/work/|/opt/|/tmp/|/root/|/home/|pypi|index-url|download\.pytorch|artifactory|\bsession|\bhelper|\bissue\b", re.I
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_nothing_of_this_machine(document: str) -> None:
    assert not FOREIGN.search(read(document))
    assert "@@" not in read(document), "a number is still to be filled in"


def table_rows(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_recipe_table_is_that_of_the_configs() -> None:
    rows = [row for row in table_rows(read("README.md")) if (RECIPES / row[0].strip("`")).is_file()]
    assert len({row[0] for row in rows}) == 8
    for name, backbone, data, epochs, batch, lr, share, _ in rows:
        cfg = load_config(RECIPES / name.strip("`"))
        assert epochs == f"{cfg.SOLVER.MAX_EPOCH} ({cfg.SOLVER.WARMUP_EPOCHS:g})", name
        assert int(batch) == cfg.TRAIN.BATCH_SIZE, name
        assert float(lr) == cfg.SOLVER.BASE_LR, name
        assert float(share) == (cfg.AUG.MASK_RATIO if cfg.MASK.ENABLE else cfg.SOLVER.LAYER_DECAY), name
        assert data == {"imagenet": "ImageNet-1K", "kinetics": "Kinetics-400"}[cfg.TRAIN.DATASET], name
        depth = {"ViT-B/16": 12, "ViT-L/16": 24, "MViTv2-S": 16, "MViTv2-L": 48}[backbone]
        assert depth == cfg.MVIT.DEPTH, name
        assert cfg.NUM_GPUS == 8


def test_mfm_table_is_that_of_the_configs() -> None:
    rows = [row for row in table_rows(read("README.md")) if (MFM_RECIPES / row[0].strip("`")).is_file()]
    assert {row[0].strip("`") for row in rows} == {path.name for path in MFM_RECIPES.glob("*.yaml")}
    for name, backbone, epochs, batch, lr, loss, published in rows:
        path = MFM_RECIPES / name.strip("`")
        cfg = load_config(path)
        assert epochs == f"{cfg.SOLVER.MAX_EPOCH} ({cfg.SOLVER.WARMUP_EPOCHS:g})", name
        assert (int(batch), float(lr), loss) == (cfg.TRAIN.BATCH_SIZE, cfg.SOLVER.BASE_LR, cfg.MODEL.LOSS_FUNC), name
        assert backbone == ("ResNet-50" if cfg.MODEL.ARCH == "resnet" else "ViT-B/16"), name
        assert cfg.RESNET.DEPTH == 50 and cfg.TRAIN.DATASET == "imagenet"
        for number in re.findall(r"\d\d\.\d+", published):
            assert number in path.read_text().split("_BASE_")[0], name


def test_small_recipes_are_all_listed() -> None:
    listed = [name for row in table_rows(read("docs/small-data.md")) for name in re.findall(r"`(\w+\.yaml)`", row[0])]
    assert sorted(listed) == sorted(path.name for folder in SMALL_RECIPES for path in folder.glob("*.yaml"))


def test_video_recipes_are_all_listed() -> None:
    rows = {row[0].strip("`"): row for row in table_rows(read("docs/video.md")) if row[0].endswith(".yaml`")}
    assert sorted(rows) == sorted(path.name for path in VIDEO_RECIPES.glob("*.yaml"))
    for name, (_, data, _, published) in rows.items():
        head = (VIDEO_RECIPES / name).read_text().split("_BASE_")[0]
        assert "Published: " in head and "Ours: " in head, f"{name} says what is published and what is our choice"
        for number in re.findall(r"\d\d\.\d", published):
            assert number in head, name
        if classes := re.search(r"(\d+) classes", data):
            assert int(classes[1]) == load_config(VIDEO_RECIPES / name).MODEL.NUM_CLASSES, name


def test_mfm_variants_differ_as_the_guide_says() -> None:
    """The table's two columns of values are those of the recipes; the probability differs among the paper's two."""
    ours, resnet, vit = (
        load_config(MFM_RECIPES / f"in1k_{name}_PT.yaml").MFM for name in ("R50_MFM", "R50_MFM_paper", "VIT_B_MFM")
    )
    assert (ours.pop("LOW_PASS_PROB"), resnet.pop("LOW_PASS_PROB"), vit.pop("LOW_PASS_PROB")) == (0.5, 0.3, 0.5)
    assert resnet == vit
    listed: dict[str, tuple[object, object]] = {}
    for names, *columns, _ in (
        row for row in table_rows(read("docs/mfm.md")) if len(row) == 4 and row[0].startswith("`MFM.")
    ):
        keys = re.findall(r"MFM\.(\w+)", names)
        values = [[value.strip("` ") for value in column.split(",")] for column in columns]
        listed.update(zip(keys, zip(*values, strict=False), strict=False))
    assert listed.pop("LOW_PASS_PROB")[0] == "0.5"
    assert listed.keys() == ours.keys()
    for key, texts in listed.items():
        for cfg, text in zip((ours, resnet), texts, strict=True):
            assert cfg[key] == (text if isinstance(cfg[key], str) else ast.literal_eval(text)), key


def test_scaling_table_is_right() -> None:
    """Every `a × b / c = KEY d` of the guide."""
    sums = re.findall(r"(\d\S*) × (\d+) / (\d+) = `SOLVER\.BASE_LR (\S+)`", read("docs/many-gpus.md"))
    assert len(sums) == 3
    for rate, batch, recipe, scaled in sums:
        assert float(rate) * int(batch) / int(recipe) == pytest.approx(float(scaled))


# Messages: what the page quotes must exist in the code.

HOLE = "\0"


# Parts of messages that stand in variables.
NAMED = {
    "BASE_KEY": "_BASE_",
    "rule": "_BASE_ must be a path, relative to this file",
    "layout": "DATA.PATH_TO_DATA_DIR must hold train/ and val/",
}


def part(node: ast.expr) -> str:
    """One piece of an f-string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    inside = node.value if isinstance(node, ast.FormattedValue) else None
    return NAMED.get(inside.id, HOLE) if isinstance(inside, ast.Name) else HOLE


def template(node: ast.expr | None) -> str | None:
    """A string expression with holes for what is filled in; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]", HOLE, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left) or HOLE) + (template(node.right) or HOLE)
    return None


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted([*(REPO / "maskfeat").rglob("*.py"), *(REPO / "benchmarks").glob("*.py")]):
        yield path, ast.parse(path.read_text())


def all_strings() -> set[str]:
    found = {template(node) for _, tree in modules() for node in ast.walk(tree) if isinstance(node, ast.expr)}
    return {text for text in found if text}


def documented_messages() -> list[str]:
    """The code spans in the first column of the tables of messages and causes in docs/troubleshooting.md."""
    found: list[str] = []
    ours = False
    for row in table_rows(read("docs/troubleshooting.md")):
        if row[0] and not row[0].startswith("`") and "..." not in row[0]:  # the head of a table, or its rule
            ours = row[0] in ("message", "cause") or (ours and set(row[0]) == {"-"})
        elif ours:
            found += re.findall(r"`([^`]+)`", row[0])
    return found


def as_pattern(message: str) -> re.Pattern[str]:
    """A message of the guide, `...` and `<name>` standing for anything."""
    pieces = re.split(r"\.\.\.|<\w+>", message)
    return re.compile(".*".join(re.escape(piece) for piece in pieces), re.S)


def says(message: str, text: str) -> bool:
    """Whether a message of the guide is (part of) what a template of the code prints."""
    return bool(as_pattern(message).search(text))


DOCUMENTED = documented_messages()


@pytest.mark.slow
@pytest.mark.parametrize("message", DOCUMENTED)
def test_documented_messages_are_the_programs(message: str) -> None:
    assert len(re.sub(r"\.\.\.|<\w+>", "", message)) >= 8, "says too little to be found"
    assert any(says(message, text) for text in STRINGS), f"nothing in maskfeat/ says {message!r}"


STRINGS = all_strings()


def test_there_are_messages() -> None:
    assert len(DOCUMENTED) >= 25


# What is generated: the config reference and the figures.


def test_the_config_reference_is_that_of_the_code() -> None:
    script = module_of("docs/config_reference.py")
    page = read("docs/config.md")
    assert page == script.page(), "run python docs/config_reference.py and commit docs/config.md"
    rows = {row[0].strip("`† "): row for row in table_rows(page) if row[0].startswith("`")}
    assert rows.keys() == KEYS
    assert not [key for key, row in rows.items() if not row[3]], "without a line that says what the key does"
    assert rows["TRAIN.EMA"][0].endswith("†") and not rows["TRAIN.BATCH_SIZE"][0].endswith("†")
    assert rows["TRAIN.PARALLEL"][1:3] == ["`ddp`", "str; `ddp`, `fsdp`"]
    assert rows["MFM.RADIUS"][0].endswith("†"), "its whole section is not in PySlowFast"


def test_the_config_reference_reads_declarations() -> None:
    script = module_of("docs/config_reference.py")

    def first(cfg: CfgNode) -> None:
        """About this section. All ours."""
        cfg.TOY = CfgNode()
        cfg.TOY.SIZE = 8  # pixels

    def second(cfg: CfgNode) -> None:
        # ours: of several
        # lines
        cfg.TOY.NAMES = ["a | b"]
        cfg.TOP = "x"  # in brackets

    page = script.render([first, second], {"TOY.NAMES": "list[str]"}, {"TOP": ("x", "")}, {}, {"TOY.NAMES": (1, 2)})
    assert "About this section.\n" in page and "All ours" not in page
    for line in (
        "| `TOY.SIZE` † | `8` | int | pixels |",
        "| `TOY.NAMES` † | `[a \\| b]` | list[str]; 1 or 2 numbers | of several lines |",
        '| `TOP` | `x` | str; `x`, `""` | in brackets |',
    ):
        assert line in page.splitlines(), line


def test_figures_are_those_of_the_code() -> None:
    for name, svg in module_of("docs/figures.py").figures().items():
        assert (REPO / "docs" / "figures" / name).read_text() == svg, (
            "run python docs/figures.py and commit docs/figures"
        )


def test_the_figure_of_imports_is_the_table_that_is_enforced() -> None:
    """Read from the committed file alone: every dot, and that all dots lie on one side of the diagonal."""
    svg = (REPO / "docs" / "figures" / "imports.svg").read_text()
    drawn = set(re.findall(r"<title>(\w+) imports (\w+)</title>", svg))
    assert drawn == {(part, other) for part, others in ALLOWED.items() for other in others}
    dots = re.findall(r'<circle class="dot" cx="(\d+)" cy="(\d+)"', svg)
    assert len(dots) == len(drawn) and all(int(x) > int(y) for x, y in dots)


def test_short_documents_stay_short() -> None:
    assert read("GETTING_STARTED.md").count("\n") <= 200
    assert read("README.md").count("\n") <= 150
