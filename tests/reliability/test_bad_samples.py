"""Damaged files at 1 % of a data set: each is named once, and every other sample comes as if they were whole."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import maskfeat.build
from maskfeat.build import build_loader
from maskfeat.config import load_config
from maskfeat.data.bad_samples import TooManyBadSamples
from maskfeat.engine.run import main
from tests.reliability.scale import note, size
from tests.small import MVIT_PT, RECIPES, VIT_PT, clips, images

IMAGES = RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml"
CLIPS = RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml"
WORKERS = (0, 2, 4)
# Of the shared samples, those that no reader can make a picture or a clip of.
SHARED_IMAGES = ("bomb_60000x60000.png", "empty.JPEG", "header_only.JPEG", "text.JPEG", "truncated.JPEG")
SHARED_CLIPS = ("audio_only.mp4", "empty.mp4", "text.mp4", "truncated.mp4")

Damage = Callable[[bytes], bytes]
OWN: dict[str, Damage] = {
    "empty": lambda whole: b"",
    "text": lambda whole: b"<html>404 Not Found</html>" * 20,
    "header only": lambda whole: whole[:64],
    "cut off": lambda whole: whole[: len(whole) // 3],
    "zeros": lambda whole: bytes(len(whole)),
    "another format": lambda whole: b"GIF89a" + whole[6:],
}


def many(kind: str, source: Path, target: Path, number: int) -> tuple[list[str], list[Path]]:
    """A data set of `number` training files, copies of those of `source`; its options, and the files in their order."""
    found: list[Path] = []
    if kind == "images":
        whole = sorted((source / "train").rglob("*.jpg"))
        for place in range(number):
            path = target / "train" / f"class_{place * 4 // number}" / f"{place:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            found.append(shutil.copy(whole[place % len(whole)], path))
        return [*VIT_PT, *images(target)], found
    lines = (source / "train.csv").read_text().splitlines()
    target.mkdir()
    listed = []
    for place in range(number):
        name, label = lines[place % len(lines)].rsplit(" ", 1)
        found.append(shutil.copy(source / name, target / f"{place:05d}.mp4"))
        listed.append(f"{place:05d}.mp4 {label}")
    (target / "train.csv").write_text("\n".join(listed) + "\n")
    return [*MVIT_PT, *clips(target)], found


def places(number: int) -> list[int]:
    """1 % of the places: the last one, two beside one another, and others."""
    chosen = [31, 32, number - 1, *range(57, number, 101)]
    return sorted(chosen[: number // 100])


def rows(opts: list[str], recipe: Path, output: Path, epochs: int) -> list[tuple[int, int, Tensor, Tensor]]:
    """(index, label, clip, hidden) of everything that the training loader hands out."""
    loader = build_loader(load_config(recipe, [*opts, "OUTPUT_DIR", str(output)]), "train")
    found = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            assert batch.index is not None and batch.label is not None and batch.hidden is not None
            found += list(zip(batch.index.tolist(), batch.label.tolist(), batch.clip, batch.hidden, strict=True))
    return found


def listed(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "bad_samples.jsonl").read_text().splitlines()]


def check(
    kind: str, source: Path, folder: Path, damage: list[bytes] | None, caplog: pytest.LogCaptureFixture
) -> tuple[int, int]:
    """One data set, damaged, read with 0, 2 and 4 workers; how many files were damaged, and samples compared."""
    number, epochs = (size(300, 4000), 2) if kind == "images" else (size(200, 1000), 1)
    opts, files = many(kind, source, folder / "data", number)
    recipe = IMAGES if kind == "images" else CLIPS
    opts = [*opts, "TRAIN.BATCH_SIZE", "20", "DATA.MAX_BAD_FRACTION", "0.01"]
    whole = rows(opts, recipe, folder / "whole", epochs)
    assert {index for index, *_ in whole} == set(range(number)) and not (folder / "whole").exists()
    damaged, compared, turn = places(number), 0, 0
    contents, ways = {place: files[place].read_bytes() for place in damaged}, list(OWN.values())
    for workers in WORKERS:
        for place, content in contents.items():  # in other ways each time
            files[place].write_bytes(ways[turn % len(ways)](content) if damage is None else damage[turn % len(damage)])
            turn += 1
        output = folder / f"out_{workers}"
        caplog.clear()
        with caplog.at_level(logging.WARNING, "maskfeat"):
            met = rows([*opts, "DATA_LOADER.NUM_WORKERS", str(workers)], recipe, output, epochs)
        # The list is the injected set, each once, and named once in the log.
        entries = listed(output)
        assert sorted((e["index"], e["path"], e["split"]) for e in entries) == [
            (place, str(files[place]), "train") for place in damaged
        ]
        assert all(e["cause"] for e in entries)
        assert all(caplog.text.count(f"{files[place]} (") == 1 for place in damaged)
        # Every other sample is in its place, to the bit; the damaged ones are replaced by the next that can be read.
        assert len(met) == len(whole)
        for before, after in zip(whole, met, strict=True):
            if before[0] in damaged:
                instead = next(p % number for p in range(before[0] + 1, 2 * number) if p % number not in damaged)
                assert after[0] == instead
                continue
            assert before[:2] == after[:2]
            assert torch.equal(before[2], after[2]) and torch.equal(before[3], after[3])
            compared += 1
    return len(damaged), compared


@pytest.fixture(autouse=True)
def _enough_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many workers as are asked for, whatever this machine has; records reach pytest."""
    monkeypatch.setattr(maskfeat.build, "available_cores", lambda: 8)
    monkeypatch.setattr(logging.getLogger("maskfeat"), "propagate", True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "clips"])
def test_one_per_cent_of_own_damage(
    kind: str, image_data: Path, clip_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = image_data if kind == "images" else clip_data
    damaged, compared = check(kind, source, tmp_path, None, caplog)
    note(
        4,
        f"{kind}: {damaged} damaged files listed exactly, {compared} other samples equal to the bit (0, 2, 4 workers)",
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "clips"])
def test_one_per_cent_of_real_damage(
    kind: str, image_data: Path, clip_data: Path, shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shared / "data" / "damaged" / ("images" if kind == "images" else "videos")
    names = SHARED_IMAGES if kind == "images" else SHARED_CLIPS
    source = image_data if kind == "images" else clip_data
    damaged, compared = check(kind, source, tmp_path, [(folder / name).read_bytes() for name in names], caplog)
    note(4, f"{kind}: {damaged} real damaged files listed exactly, {compared} other samples equal to the bit")


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", ["images", "clips"])
def test_above_the_limit_the_run_stops_with_the_list(
    kind: str, workers: int, image_data: Path, clip_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """5 of 100 are damaged and 4 % allowed: the run ends at the fifth, and says all of them."""
    opts, files = many(kind, image_data if kind == "images" else clip_data, tmp_path / "data", 100)
    damaged = [3, 4, 50, 77, 99]
    for place, way in zip(damaged, OWN.values(), strict=False):
        files[place].write_bytes(way(files[place].read_bytes()))
    recipe = IMAGES if kind == "images" else CLIPS
    opts += ["TRAIN.BATCH_SIZE", "20", "DATA_LOADER.NUM_WORKERS", str(workers), "DATA.MAX_BAD_FRACTION"]
    with pytest.raises(TooManyBadSamples) as caught:
        rows([*opts, "0.04"], recipe, tmp_path / "strict", 1)
    for place in damaged:
        assert str(files[place]) in str(caught.value)
    assert sorted(entry["index"] for entry in listed(tmp_path / "strict")) == damaged
    assert len(rows([*opts, "0.05"], recipe, tmp_path / "allowed", 1)) == 100, "as many as are allowed"
    if workers == 2 and kind == "images":
        assert main(["--cfg", str(recipe), *opts, "0.04", "OUTPUT_DIR", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().out
        assert "5 of 100 samples of train cannot be read, more than DATA.MAX_BAD_FRACTION = 0.04" in said
        assert all(said.count(f": {files[place]}: ") == 1 for place in damaged)
