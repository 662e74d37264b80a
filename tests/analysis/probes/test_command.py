"""The command: whole probes of a small network on generated files, its tables, and bad input."""

import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskfeat.analysis.inputs import Inputs
from maskfeat.analysis.model import load_model
from maskfeat.analysis.probes import probe
from maskfeat.analysis.probes.command import block_numbers, main, randomised
from maskfeat.analysis.probes.data import Splits, find_splits
from maskfeat.analysis.probes.probe import Probing
from maskfeat.analysis.probes.sweep import Plan
from maskfeat.config import load_config
from tests.analysis.saved import CLIPS, PRETRAINED, save_network
from tests.data.media import write_video

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("network") / "pt.pyth", PRETRAINED)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three classes that differ in their colour: 10 of each to train, 4 to validate."""
    root, rng = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    for split, number in (("train", 10), ("val", 4)):
        for label, name in enumerate(("blue", "green", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for one in range(number):
                pixels = rng.integers(0, 120, size=(40, 40, 3), dtype=np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / f"{one}.png")
    return root


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three classes that nothing tells apart: 10 of each to train, 10 to validate."""
    root, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(1)
    for split in ("train", "val"):
        for name in ("a", "b", "c"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for one in range(10):
                Image.fromarray(rng.integers(0, 256, size=(40, 40, 3), dtype=np.uint8)).save(folder / f"{one}.png")
    return root


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of few steps."""
    for name, kind in (("linear_probe", "sgd"), ("attentive_probe", "adamw")):
        plan = Plan(epochs=1, least_steps=25, batch=16, optimizer=kind)
        monkeypatch.setattr(probe, name, functools.partial(getattr(probe, name), plan=plan, lrs=(0.01, 0.05)))


def command(network: Path, data: Path, *more: str) -> list[str]:
    return ["--checkpoint", str(network), "--data", str(data), "--workers", "0", "--device", "cpu", *more]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_three_probes_beside_random_weights(
    network: Path, coloured: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "new" / "probe.json"
    kinds = ["--kind", "knn", "linear", "attentive"]
    with caplog.at_level("INFO"):
        assert main(command(network, coloured, *kinds, "--random", "--json", str(out))) == 0
    found = json.loads(out.read_text())
    assert (found["train"], found["val"], found["classes"]) == (30, 12, ["blue", "green", "red"])
    assert found["unreadable"] == {"train": [], "val": []} and found["views"] == [1, 1]
    rows = found["results"]
    pairs = [(kind, weights) for kind in ("knn", "linear", "attentive") for weights in ("given", "random")]
    assert [(row["kind"], row["weights"]) for row in rows] == pairs
    for row in rows:
        assert row["top1"] > 80 and row["top5"] == 100.0, "colours are seen by any network"
        assert row["held_out"] == max(one["held_out"] for one in row["tried"])
        assert row["error"] == pytest.approx((row["top1"] * (100 - row["top1"]) / 12) ** 0.5)
        assert row["setting"].items() <= next(o for o in row["tried"] if row["setting"].items() <= o.items()).items()
    by_k = [one for one in rows[0]["tried"] if "top1" in one]
    assert [one["k"] for one in by_k] == [1, 5, 10, 20, 50, 100, 200]
    assert rows[0]["top1"] == next(one["top1"] for one in by_k if one["k"] == rows[0]["setting"]["k"])
    table = caplog.records[-1].getMessage().strip().splitlines()
    assert len(table) == 1 + 6 + 1 + 3 and table[0].split("  ")[0] == "probe"
    assert re.search(rf"linear +given .*lr 0\.\d+, weight decay .* {rows[2]['top1']:.1f} ± ", table[3])


@pytest.mark.usefixtures("quick")
def test_in_grey_no_network_sees_colour(network: Path, coloured: Path, tmp_path: Path) -> None:
    """Features of both kinds stay beside those in colour; what tells the classes apart is gone."""
    for more in ([], ["--gray"]):
        out = tmp_path / "probe.json"
        options = ["--kind", "linear", "attentive", "--features", str(tmp_path / "kept"), "--json", str(out), *more]
        assert main(command(network, coloured, *options)) == 0
        found = json.loads(out.read_text())
        assert found["gray"] == bool(more)
        assert all((row["top1"] < 60) == bool(more) for row in found["results"]), found["results"]
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == {"given-pooled", "given-pooled-gray", "given-tokens", "given-tokens-gray"}
    x = torch.rand(2, 3, 32, 32)
    model = load_model(network)
    colour, gray = (Probing(model, "given", None, tmp_path, [0], gray=seen) for seen in (False, True))
    assert torch.equal(gray.pool(x), colour.pool(x.mean(1, keepdim=True).repeat(1, 3, 1, 1)))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_same_seed_gives_the_same_file(network: Path, coloured: Path, tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        out = tmp_path / name
        assert main(command(network, coloured, "--kind", "knn", "--few", "4", "--seed", seed, "--json", str(out))) == 0
        texts.append(out.read_text())
    assert texts[0] == texts[1] != texts[2]
    assert json.loads(texts[0])["train"] == 12


def test_kept_features_are_not_computed_again(
    network: Path, coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = command(network, coloured, "--kind", "knn", "--features", str(tmp_path / "features"))
    assert main(again) == 0
    file = tmp_path / "features" / "given-pooled" / "train.npy"
    before = np.load(file)
    monkeypatch.setattr(Probing, "pool", lambda self, clip: torch.zeros(len(clip), before.shape[2]))
    assert main(again) == 0
    np.testing.assert_array_equal(np.load(file), before)
    assert before.any()


@pytest.mark.parametrize("what", ["weights", "precision", "transform", "heads"])
def test_kept_features_of_another_network_or_config_are_refused(
    what: str, network: Path, coloured: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = ["--kind", "knn", "--features", str(tmp_path / "features")]
    if what == "heads":  # which neither the weights nor their shapes tell
        content = torch.load(network, weights_only=True)
        network = tmp_path / "bare.pyth"
        torch.save({"model_state": content["model_state"]}, network)
        recipes = [tmp_path / f"{heads}.yaml" for heads in (1, 2)]
        for heads, recipe in enumerate(recipes, start=1):
            recipe.write_text(load_config(PRETRAINED[0], [*PRETRAINED[1], "MVIT.NUM_HEADS", str(heads)]).dump())
        kept += ["--cfg", str(recipes[0])]
    assert main(command(network, coloured, *kept)) == 0
    more, given = [], network
    if what == "precision":
        more = ["--precision", "bf16"]
    elif what == "weights":
        content = torch.load(network, weights_only=True)
        content["model_state"]["blocks.0.mlp.fc1.bias"] += 1.0
        given = tmp_path / "other.pyth"
        torch.save(content, given)
    elif what == "heads":
        more = ["--cfg", str(recipes[1])]
    else:
        given = save_network(tmp_path / "other.pyth", PRETRAINED, "DATA.MEAN", "[0.1, 0.2, 0.3]")
    caplog.clear()
    assert main(command(given, coloured, *kept, *more)) == 2
    assert f"({'precision' if what == 'precision' else 'network'} changed)" in caplog.text


def test_held_out_samples_do_not_find_themselves(network: Path, noise: Path, tmp_path: Path) -> None:
    """Of noise, the nearest neighbour among the other samples is right for a third of them; of itself, for all."""
    out = tmp_path / "out.json"
    assert main(command(network, noise, "--kind", "knn", "--json", str(out))) == 0
    (row,) = json.loads(out.read_text())["results"]
    assert max(one["held_out"] for one in row["tried"] if one["k"] == 1) < 70
    by_k = {one["k"]: one["top1"] for one in row["tried"] if "top1" in one}
    assert len(set(by_k.values())) > 1 and row["top1"] == by_k[row["setting"]["k"]]


def test_the_error_is_that_of_the_samples_that_could_be_read(network: Path, noise: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out.json"
    shutil.copytree(noise, data)
    for number in range(6):
        (data / "val" / "a" / f"{number}.png").write_bytes(b"no picture")
    assert main(command(network, data, "--kind", "knn", "--json", str(out))) == 0
    (row,) = json.loads(out.read_text())["results"]
    assert 0 < row["top1"] < 100
    assert row["error"] == pytest.approx((row["top1"] * (100 - row["top1"]) / 24) ** 0.5)


def test_labels_of_validation_samples_choose_nothing(network: Path, coloured: Path, tmp_path: Path) -> None:
    """With the folders of val named in turn, each sample has another label."""
    turned = tmp_path / "turned"
    (turned / "val").mkdir(parents=True)
    (turned / "train").symlink_to(coloured / "train")
    for name, other in (("blue", "green"), ("green", "red"), ("red", "blue")):
        (turned / "val" / other).symlink_to(coloured / "val" / name)
    found = []
    for number, data in enumerate((coloured, turned)):
        out = tmp_path / f"{number}.json"
        assert main(command(network, data, "--kind", "knn", "--json", str(out))) == 0
        found.append(json.loads(out.read_text())["results"][0])
    assert found[0]["setting"] == found[1]["setting"] and found[0]["held_out"] == found[1]["held_out"]
    assert found[0]["top1"] > 80 and found[1]["top1"] < 20


def test_unreadable_files_are_left_out_and_said(
    network: Path, coloured: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, out = tmp_path / "data", tmp_path / "out.json"
    for split in ("train", "val"):
        for folder in (coloured / split).iterdir():
            (data / split / folder.name).mkdir(parents=True)
            for file in folder.iterdir():
                (data / split / folder.name / file.name).write_bytes(file.read_bytes())
    (data / "train" / "red" / "0.png").write_bytes(b"no picture")
    (data / "val" / "blue" / "0.png").write_bytes(b"no picture")
    assert main(command(network, data, "--kind", "knn", "--json", str(out))) == 0
    unreadable = json.loads(out.read_text())["unreadable"]
    assert [len(unreadable[split]) for split in ("train", "val")] == [1, 1] and "0.png" in unreadable["train"][0]
    assert "left out of val" in caplog.text
    top1 = json.loads(out.read_text())["results"][0]["top1"]
    assert top1 * 11 / 100 == pytest.approx(round(top1 * 11 / 100)), "11 samples are counted"


def test_names_of_files_may_be_other_than_utf_8(network: Path, coloured: Path, tmp_path: Path) -> None:
    shutil.copytree(coloured, tmp_path / "data")
    (tmp_path / "data" / "train" / "red" / "0.png").rename(tmp_path / "data" / "train" / "red" / "na\udcefve.png")
    out = tmp_path / "out.json"
    assert main(command(network, tmp_path / "data", "--kind", "knn", "--json", str(out))) == 0
    found = json.loads(out.read_text())
    assert found["train"] == 30 and found["unreadable"] == {"train": [], "val": []}


def test_clips_from_lists_by_several_views(tmp_path: Path) -> None:
    network = save_network(tmp_path / "clips.pyth", CLIPS)
    (tmp_path / "videos").mkdir()
    for split, number in (("train", 6), ("val", 2)):
        lines = []
        for one in range(number):
            write_video(tmp_path / "videos" / f"{split}{one}.mp4", frames=60)
            lines.append(f"{split}{one}.mp4 {3 + 4 * (one % 2)}")
        (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
    out, prefix = tmp_path / "out.json", str(tmp_path / "videos")
    arguments = ["--kind", "knn", "--prefix", prefix, "--views", "2x1", "--features", str(tmp_path / "features")]
    assert main(command(network, tmp_path, *arguments, "--json", str(out))) == 0
    found = json.loads(out.read_text())
    assert found["classes"] == ["3", "7"] and found["views"] == [2, 1]
    stored = {split: np.load(tmp_path / "features" / "given-pooled" / f"{split}.npy") for split in ("train", "val")}
    assert stored["train"].shape[:2] == (6, 1) and stored["val"].shape[:2] == (2, 2)
    assert not np.allclose(stored["val"][:, 0], stored["val"][:, 1])


# ------------------------------------------------------------------ what is read


def test_columns_name_the_parts_of_pooled_features(network: Path, tmp_path: Path) -> None:
    model = load_model(network, device="cpu")
    depth = len(model.backbone.repeated_blocks())
    probing = Probing(model, "given", Splits(*(Inputs([], np.zeros(0), "image"),) * 2, []), tmp_path, range(depth))
    clip = torch.randn(2, 3, *model.backbone.clip_size)
    pooled, columns = probing.pool(clip), probing.columns()
    assert len(columns) == 4 and depth > 1
    every = ", ".join(map(str, range(depth)))
    for number, tokens in enumerate(model.blocks(clip, range(depth))):
        width = tokens.x.shape[2]
        mean = pooled[:, columns[f"mean of blocks {every}"]][:, number * width : (number + 1) * width]
        cls = pooled[:, columns[f"class token of blocks {every}"]][:, number * width : (number + 1) * width]
        torch.testing.assert_close(mean, tokens.x[:, 1:].mean(dim=1))
        torch.testing.assert_close(cls, tokens.x[:, 0])
    torch.testing.assert_close(pooled[:, columns[f"mean of block {depth - 1}"]], mean)
    torch.testing.assert_close(pooled[:, columns[f"class token of block {depth - 1}"]], cls)


def test_random_weights_are_of_the_seed(network: Path) -> None:
    model = load_model(network, device="cpu")
    first, again, other = (randomised(model, seed).state_dict() for seed in (0, 0, 1))
    name = next(name for name in first if name.endswith("attn.qkv.weight"))
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], model.state_dict()[name]) and first.keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("given", "numbers"),
    [("1", [5]), ("4", [2, 3, 4, 5]), ("9", [0, 1, 2, 3, 4, 5]), ("3,", [3]), ("5,0,-1", [0, 5]), ("-2,", [4])],
)
def test_blocks(given: str, numbers: list[int]) -> None:
    assert block_numbers(given, 6) == numbers


@pytest.mark.parametrize("given", ["0", "-1", "x", "1,x", "6,", "-7,", ",", "1.5", ""])
def test_blocks_that_are_none(given: str) -> None:
    with pytest.raises(ValueError, match="--blocks .*expected how many of the last blocks, or numbers from 0 to 5"):
        block_numbers(given, 6)


# ------------------------------------------------------------------ bad input


def tree(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"") if path.suffix != ".csv" else path.write_text("a.png 0\nb.png 1\n")
    return root


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has neither train/ nor train.csv"),
        (["train/a/1.png", "train/b/1.png"], "has neither val/ nor val.csv"),
        (["train/1.png", "val/a/1.png", "val/b/1.png"], "does not say the class of every sample"),
        (["train/a/1.png", "val/a/1.png"], "in one class folder alone"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png"], r"1 class folder that train lacks \(c\)"),
        (["train/a/1.png", "train/b/1.png", "train/c/x.txt", "val/a/1.png", "val/c/1.png"], r"\(c\) of which train"),
        (["train/a/readme.txt", "val/a/1.png"], "no image in"),
    ],
)
def test_splits_that_cannot_be_used(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_splits(str(tree(tmp_path, *files)), "image")


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ("a.png 0\nb.png 0\n", "a.png 0\n", "train of --data .* has one class"),
        ("a.png 0\nb.png 1\n", "a.png 0\nb.png 5\n", r"1 class \(5\) of which train has none"),
        ("a.png\nb.png\n", "a.png 0\n", r"train\.csv does not say the class"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, train: str, val: str, message: str) -> None:
    tree(tmp_path, "a.png", "b.png")
    (tmp_path / "train.csv").write_text(train)
    (tmp_path / "val.csv").write_text(val)
    with pytest.raises(ValueError, match=message):
        find_splits(str(tmp_path), "image")


def test_folders_beside_a_list(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.png", "train/b/1.png", "val.csv", "a.png", "b.png")
    with pytest.raises(ValueError, match="one split is of class folders and the other a list"):
        find_splits(str(tmp_path), "image")


def test_lists_of_videos_go_before_folders(tmp_path: Path) -> None:
    """As in training: the folders may be parts of an archive. Images are of folders, where there are any."""
    files = [f"{split}/part_{part}/{n}.mp4" for split in ("train", "val") for part in "01" for n in "ab"]
    tree(tmp_path, *files, *(name.replace("mp4", "png") for name in files))
    for split in ("train", "val"):
        names = [name for name in files if name.startswith(split)]
        (tmp_path / f"{split}.csv").write_text("".join(f"{name} {n % 2}\n" for n, name in enumerate(names)))
    videos, images = find_splits(str(tmp_path), "video"), find_splits(str(tmp_path), "image")
    assert videos.classes == ["0", "1"] and videos.val.numbers.tolist() == [0, 1, 0, 1]
    assert images.classes == ["part_0", "part_1"] and images.val.numbers.tolist() == [0, 0, 1, 1]


def test_classes_are_numbered_by_the_training_samples(tmp_path: Path) -> None:
    """An empty folder takes no number, and val may lack a class."""
    files = ["train/b/1.png", "train/c/1.png", "train/d/1.png", "train/d/2.png", "val/c/1.png", "val/d/1.png"]
    (tree(tmp_path, *files) / "train" / "a").mkdir()
    found = find_splits(str(tmp_path), "image")
    assert found.classes == ["b", "c", "d"]
    assert found.train.numbers.tolist() == [0, 1, 2, 2] and found.val.numbers.tolist() == [1, 2]
    assert [item.path.split("/")[-2] for item in found.val] == ["c", "d"]
    few = find_splits(str(tmp_path), "image", few=1)
    assert few.train.numbers.tolist() == [0, 1, 2] and len(few.train.paths) == 3 and len(few.val) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "there is no folder --data nowhere"),
        (["--checkpoint", "nowhere.pyth"], "nowhere.pyth"),
        (["--blocks", "99,"], "--blocks 99,: expected"),
        (["--blocks", "-99,-1"], "--blocks -99,-1: expected"),
        (["--views", "2x1"], "takes images, which have one view"),
        (["--json", "{tmp}"], "is a folder, a file is expected"),
        (["--json", "{tmp}/file/x.json"], "--json .* cannot be written"),
        (["--device", "gpu"], "there is no device 'gpu'"),
        (["--few", "2"], "no class has 3 training samples"),
    ],
)
def test_bad_input_is_one_line(
    network: Path, coloured: Path, tmp_path: Path, more: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    asked = [word.replace("{tmp}", str(tmp_path)) for word in more]
    assert main([*command(network, coloured, "--kind", "knn"), *asked]) == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith("error: ") and "\n" not in line and re.search(message, line)


@pytest.mark.parametrize("more", [["--kind", "svm"], ["--seed", "-1"], ["--few", "0"], ["--views", "0"]])
def test_options_that_do_not_exist(
    network: Path, coloured: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command(network, coloured, "--kind", "knn"), *more])
    assert ended.value.code == 2 and f"error: argument {more[0]}" in capsys.readouterr().err
