"""Features as files: the right rows, the same bytes however often the command was killed, and clear refusals."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from maskfeat.analysis import command as command_module
from maskfeat.analysis import extract_features, extraction, feature_files
from maskfeat.analysis.extract_features import main, parse_args
from maskfeat.analysis.inputs import find_inputs, input_loader
from maskfeat.analysis.model import load_model
from tests.analysis.saved import CLIPS, IMAGES, PRETRAINED, said_in, save_network

REPO = Path(__file__).resolve().parents[2]
Logged = pytest.LogCaptureFixture
Printed = pytest.CaptureFixture[str]
_LOAD = functools.cache(load_model)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("network") / "a.pyth", PRETRAINED)


@pytest.fixture(scope="module")
def clips_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("network") / "c.pyth", CLIPS)


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module, "load_model", _LOAD)


def command(checkpoint: Path, data: Path, output: Path, *more: str) -> list[str]:
    opts = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(output), "--device", "cpu"]
    return [*opts, "--workers", "0", "--batch-size", "3", *more]


def run(checkpoint: Path, data: Path, output: Path, *more: str) -> int:
    return main(command(checkpoint, data, output, *more))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------------ what is in it


@pytest.mark.slow
def test_rows_in_all_formats(checkpoint: Path, image_data: Path, tmp_path: Path) -> None:
    data = image_data / "val"
    for kind in feature_files.WRITERS:
        assert run(checkpoint, data, tmp_path / f"a{kind}") == 0
        first = (tmp_path / f"a{kind}").read_bytes()
        (tmp_path / f"a{kind}").unlink()
        assert run(checkpoint, data, tmp_path / f"a{kind}") == 0
        assert (tmp_path / f"a{kind}").read_bytes() == first, "the same bytes, whenever it is written"
    model, inputs = load_model(checkpoint, device="cpu"), find_inputs(data)
    expected = torch.cat([model.features(batch.clip) for batch in input_loader(model, inputs, batch_size=3, workers=0)])
    plain = np.load(tmp_path / "a.npz", allow_pickle=False)
    assert sorted(plain) == ["classes", "features", "labels", "paths"]
    assert np.array_equal(plain["features"], expected.numpy()) and plain["features"].dtype == np.float32
    assert plain["paths"].tolist() == inputs.paths and plain["classes"].tolist() == inputs.classes
    assert plain["labels"].tolist() == inputs.numbers.tolist()
    tensors = load_file(tmp_path / "a.safetensors")
    assert np.array_equal(tensors["features"], plain["features"])
    assert np.array_equal(tensors["labels"], plain["labels"])
    assert list(map(os.fsdecode, tensors["paths"].tobytes().split(b"\0"))) == inputs.paths
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert json.loads(file.metadata()["classes"]) == inputs.classes
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert np.array_equal(np.asarray(table["features"].to_pylist(), dtype=np.float32), plain["features"])
    assert table["path"].to_pylist() == inputs.paths and table["label"].to_pylist() == plain["labels"].tolist()
    assert json.loads(table.schema.metadata[b"classes"]) == inputs.classes
    assert left(tmp_path) == sorted(f"a{kind}{more}" for kind in feature_files.WRITERS for more in ("", ".json"))


@pytest.mark.parametrize("pool", ["mean", "cls", "tokens"])
def test_pools_and_blocks(pool: str, checkpoint: Path, image_data: Path, tmp_path: Path) -> None:
    data = next((image_data / "val").iterdir())  # four images, without labels
    assert run(checkpoint, data, tmp_path / "a.npz", "--pool", pool) == 0
    assert run(checkpoint, data, tmp_path / "b.npz", "--pool", pool, "--blocks=-2,1") == 0
    model, inputs = load_model(checkpoint, device="cpu"), find_inputs(data)
    clip = model.transform(inputs.paths)
    out, blocks = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    name = "tokens" if pool == "tokens" else "features"
    assert sorted(out) == sorted([name, "paths"]) and sorted(blocks) == ["block_0", "block_1", "paths"]
    pooled: dict[str, Callable[[Any], torch.Tensor]] = {
        "mean": lambda tokens: tokens.patches.mean(dim=1),
        "cls": lambda tokens: tokens.x[:, 0],
        "tokens": lambda tokens: tokens.x,
    }
    for found, tokens in (
        (out[name], model.tokens(clip)),
        *((blocks[f"block_{number}"], model.blocks(clip, [number])[0]) for number in (0, 1)),
    ):
        np.testing.assert_allclose(found, pooled[pool](tokens).numpy(), atol=1e-6)


@pytest.mark.slow
def test_views_are_averaged(clips_checkpoint: Path, clip_data: Path, tmp_path: Path) -> None:
    """In the order of the views, whatever batches they are in."""
    data = clip_data / "test.csv"
    assert run(clips_checkpoint, data, tmp_path / "a.npz", "--views", "2x3") == 0
    model, inputs = load_model(clips_checkpoint, device="cpu"), find_inputs(data, "video")
    views = torch.cat([model.features(b.clip) for b in input_loader(model, inputs, (2, 3), 6, 0)])
    found = np.load(tmp_path / "a.npz")
    np.testing.assert_allclose(found["features"], views.reshape(6, 6, -1).mean(dim=1).numpy(), atol=1e-6)
    assert found["labels"].tolist() == [0, 0, 1, 1, 2, 2]


def test_unreadable_files_are_listed_and_left_out(
    checkpoint: Path, image_data: Path, tmp_path: Path, caplog: Logged
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number, path in enumerate(sorted((image_data / "val").rglob("*.jpg"))[:5]):
        shutil.copy(path, data / f"{number}.jpg")
    assert run(checkpoint, data, tmp_path / "whole.npz") == 0
    for number in (1, 3):
        (data / f"{number}.jpg").write_bytes(b"broken")
    assert run(checkpoint, data, tmp_path / "a.npz") == 0
    found = np.load(tmp_path / "a.npz")
    assert found["paths"].tolist() == [str(data / f"{number}.jpg") for number in (0, 2, 4)]
    np.testing.assert_allclose(found["features"], np.load(tmp_path / "whole.npz")["features"][[0, 2, 4]], atol=1e-6)
    listed = json.loads((tmp_path / "a.npz.json").read_text())["unreadable"]
    assert [entry["path"] for entry in listed] == [str(data / f"{n}.jpg") for n in (1, 3)]
    assert all("not a JPEG" in entry["cause"] for entry in listed)
    assert "2 images could not be read, listed in" in said_in(caplog)
    for path in data.iterdir():
        path.write_bytes(b"broken")
    assert run(checkpoint, data, tmp_path / "none.npz") == 2
    assert "error: none of 5 images can be read, such as" in said_in(caplog)
    assert not any(name.startswith("none") for name in left(tmp_path))


# ------------------------------------------------------------------------------------------------ killed and continued


class Killed(BaseException):
    """Ends a run as a signal that cannot be caught would: nothing of it is handled."""


@pytest.mark.slow
def test_the_same_bytes_wherever_it_was_killed(
    checkpoint: Path, image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "PART_ROWS", 4)
    data, output = image_data / "val", tmp_path / "killed" / "a.npz"
    assert run(checkpoint, data, tmp_path / "whole.npz") == 0
    whole = (tmp_path / "whole.npz").read_bytes()
    places = [(extraction, "write_part", n) for n in range(0, 6, 2)] + [
        (extract_features, name, 0) for name in ("write_features", "replace_text", "_record")
    ]
    places += [(feature_files, "fsync_file", 0), (shutil, "rmtree", 0)]
    written = 0
    for module, name, calls in places:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        before, left_calls = getattr(module, name), calls

        def dies(*args: Any, before: Any = before, **named: Any) -> Any:
            nonlocal left_calls
            if not left_calls:
                raise Killed
            left_calls -= 1
            return before(*args, **named)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, dies)
            run(checkpoint, data, output)
        written += len(list((tmp_path / "killed").rglob("0*.safetensors")))
        assert run(checkpoint, data, output) == 0, name
        assert output.read_bytes() == whole, name
        assert left(tmp_path / "killed") == ["a.npz", "a.npz.json"], name
    assert written > 5, "parts of the killed runs were there"


def test_parts_are_not_computed_twice(
    checkpoint: Path, image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Logged
) -> None:
    monkeypatch.setattr(extraction, "PART_ROWS", 3)
    calls: list[int] = []
    before = extraction.outputs

    def counted(model: Any, clip: torch.Tensor, *given: Any) -> dict[str, torch.Tensor]:
        calls.append(len(clip))
        if sum(calls) > 8:
            raise Killed
        return before(model, clip, *given)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(extraction, "outputs", counted)
        run(checkpoint, image_data / "val", tmp_path / "a.npz")
    assert calls == [1, 3, 3, 3], "one of zeros, and three batches, the last of which is killed"
    calls.clear()
    monkeypatch.setattr(extraction, "outputs", lambda *given: (calls.append(len(given[1])), before(*given))[1])
    assert run(checkpoint, image_data / "val", tmp_path / "a.npz") == 0
    assert calls == [1, 3, 3, 3, 3, 1] and "1 of 6 parts are there already" in said_in(caplog)
    calls.clear()
    assert run(checkpoint, image_data / "val", tmp_path / "a.npz") == 0
    assert calls == [1] and "is complete already" in said_in(caplog)


@pytest.mark.slow
def test_parts_of_another_command_are_refused(
    checkpoint: Path, image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Logged
) -> None:
    monkeypatch.setattr(extraction, "PART_ROWS", 4)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(extract_features, "write_features", lambda *_: (_ for _ in ()).throw(Killed()))
        run(checkpoint, image_data / "val", tmp_path / "a.npz")
    other = save_network(tmp_path / "b.pyth", PRETRAINED, "DATA.MEAN", "[0.4, 0.4, 0.4]")
    for path, data, more, said in (
        (checkpoint, "val", ["--pool", "cls"], "pool 'mean' and now 'cls'"),
        (checkpoint, "val", ["--batch-size", "4"], "batch size 3 and now 4"),
        (checkpoint, "val", ["--precision", "bf16"], "precision 'off' and now 'bf16'"),
        (checkpoint, "train", [], "number of inputs 16 and now 40"),
        (other, "val", [], "network"),
    ):
        assert run(path, image_data / data, tmp_path / "a.npz", *more) == 2
        text = said_in(caplog)
        assert "holds parts of another command" in text and said in text, text
    assert run(checkpoint, image_data / "val", tmp_path / "a.npz") == 0
    assert run(checkpoint, image_data / "val", tmp_path / "a.npz", "--pool", "cls") == 2
    assert "a.npz exists, and is not of this command: delete it" in said_in(caplog)


def test_a_damaged_part_is_named(
    checkpoint: Path, image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Logged
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(extract_features, "write_features", lambda *_: (_ for _ in ()).throw(Killed()))
        run(checkpoint, image_data / "val", tmp_path / "a.npz")
    part = tmp_path / "a.npz.parts" / extraction.part_name(0)
    part.write_bytes(part.read_bytes()[:-8])
    assert run(checkpoint, image_data / "val", tmp_path / "a.npz") == 2
    assert f"error: {part} is damaged" in said_in(caplog)
    part.unlink()
    assert run(checkpoint, image_data / "val", tmp_path / "a.npz") == 0


# ---------------------------------------------------------------------------------------------------- several processes

SMALL_PARTS = "import sys; from maskfeat.analysis import extraction, extract_features; extraction.PART_ROWS = 4; "
RUN = "sys.exit(extract_features.main(sys.argv[1:]))"


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(checkpoint: Path, image_data: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SMALL_PARTS + RUN)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    for name, launcher in (
        ("one.npz", [sys.executable]),
        ("two.npz", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
    ):
        opts = command(checkpoint, image_data / "train", tmp_path / name)
        done = subprocess.run([*launcher, str(script), *opts], env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


@pytest.mark.slow
def test_a_real_sigkill(checkpoint: Path, image_data: Path, tmp_path: Path) -> None:
    """With worker processes, at a moment that the test does not choose; a second run takes over at once."""
    script = tmp_path / "run.py"
    slow = "import time; before = extraction.outputs; "
    slow += "extraction.outputs = lambda *given: (time.sleep(0.3), before(*given))[1]; "
    script.write_text(SMALL_PARTS + slow + RUN)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    opts = [*command(checkpoint, image_data / "train", tmp_path / "a.npz"), "--workers", "2"]
    folder = tmp_path / "a.npz.parts"
    with subprocess.Popen([sys.executable, str(script), *opts], env=env, stderr=subprocess.DEVNULL) as process:
        while len(list(folder.glob("0*.safetensors"))) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert 2 <= len(list(folder.glob("0*.safetensors"))) < 10
    done = subprocess.run([sys.executable, str(script), *opts], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "parts are there already" in done.stderr, done.stderr
    script.write_text(SMALL_PARTS + RUN)
    opts[opts.index(str(tmp_path / "a.npz"))] = str(tmp_path / "b.npz")
    assert subprocess.run([sys.executable, str(script), *opts], env=env, timeout=900).returncode == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--checkpoint": "none.pyth"}, "none.pyth"),
        ({"--data": "none"}, "there is no file or folder none"),
        ({"--data": "empty"}, "no image in empty"),
        ({"--output": "a.txt"}, "a.txt ends with '.txt': one of .npz, .safetensors, .parquet is expected"),
        ({"--output": "folder.npz"}, "--output folder.npz is a folder"),
        ({"--output": "file/a.npz"}, "--output file/a.npz cannot be written"),
        ({"--output": "/proc/a.npz"}, "--output /proc/a.npz.parts cannot be written"),
        ({"--blocks": "0,7"}, "blocks are numbers from -2 to 1; given [0, 7]"),
        ({"--views": "2x1"}, "takes images, which have one view; given 2x1"),
        ({"--device": "teapot"}, "teapot"),
    ],
)
def test_bad_input_is_one_line_and_2(
    changes: dict[str, str],
    said: str,
    checkpoint: Path,
    image_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Logged,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "folder.npz"):
        Path(name).mkdir()
    Path("file").touch()
    options = {"--checkpoint": str(checkpoint), "--data": str(image_data), "--output": "a.npz", "--device": "cpu"}
    assert main([word for pair in {**options, **changes}.items() for word in pair]) == 2
    (line,) = [line for line in said_in(caplog).splitlines() if "error" in line]
    assert line.startswith("error: ") and said in line


def test_negative_numbers_of_blocks_may_follow_their_option() -> None:
    given = ["--checkpoint", "a", "--data", "b", "--output", "c.npz"]
    for words in (["--blocks", "-3,-1"], ["--blocks=-3,-1"]):
        assert parse_args([*given, *words]).blocks == [-3, -1]
    assert parse_args([*given, "--blocks", "-1", "--pool", "cls"]).blocks == [-1]


def test_features_that_are_not_finite(image_data: Path, tmp_path: Path, caplog: Logged) -> None:
    path = save_network(tmp_path / "big.pyth", PRETRAINED)
    content = torch.load(path, weights_only=True)
    content["model_state"]["patch_embed.proj.weight"].fill_(3e38)  # finite, but their sums are not
    torch.save(content, path)
    output = tmp_path / "a.npz"
    assert run(path, image_data / "val", output) == 2
    said = said_in(caplog)
    assert "features of " in said and "not finite" in said and not output.exists()


def test_a_network_without_a_class_token(clips_checkpoint: Path, tmp_path: Path, caplog: Logged) -> None:
    path = save_network(tmp_path / "a.pyth", IMAGES, "MVIT.CLS_EMBED_ON", "False")
    Path(tmp_path / "1.jpg").touch()
    for more in ([], ["--blocks", "1"]):
        assert run(path, tmp_path / "1.jpg", tmp_path / "a.npz", "--pool", "cls", *more) == 2
        assert "has no class token" in said_in(caplog)
    Path(tmp_path / "1.mp4").touch()
    assert run(clips_checkpoint, tmp_path / "1.mp4", tmp_path / "a.npz", "--pool", "tokens", "--views", "2x1") == 2
    assert "--pool tokens takes one view" in said_in(caplog)


@pytest.mark.parametrize("text", ["x", "0", "2x", "3x2x1", "-1"])
def test_views_are_a_number_or_a_product(text: str, capsys: Printed) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--checkpoint", "a", "--data", "b", "--output", "c.npz", f"--views={text}"])
    assert caught.value.code == 2 and "neither a number of views nor CLIPSxCROPS" in capsys.readouterr().err
