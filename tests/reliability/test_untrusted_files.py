"""Promise 10: files from strangers run nothing and reach nothing. `malice` makes the files, `guarded` keeps watch."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maskfeat.data.image_reader import FORMATS
from maskfeat.data.video import torchcodec_decoder
from tests.data.media import write_video
from tests.reliability import malice, malice_media
from tests.reliability.guarded import MEMORY, SECONDS
from tests.reliability.malice import SECRET, SECRET_COLOUR, Case, Place
from tests.reliability.scale import note
from tests.small import MVIT_PT, RECIPES, REPO, VIT_PT, clips, images

pytestmark = pytest.mark.slow

READERS = {"image": ("pil", "simplejpeg"), "video": ("pyav", "torchcodec")}


class Counter:
    """A TCP server on this machine that counts who connects."""

    def __init__(self) -> None:
        self.count = 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.server.getsockname()[1])
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self.count += 1
            connection.close()


@pytest.fixture(scope="module")
def counter() -> Iterator[Counter]:
    made = Counter()
    socket.create_connection(("127.0.0.1", made.port)).close()  # it does count
    while made.count < 1:
        pass
    yield made
    made.server.close()


def torchcodec_is_there() -> bool:
    try:
        torchcodec_decoder.load_decoder()
    except ValueError:
        return False
    return True


def by_reader(cases: list[Case]) -> Iterator[dict[str, Any]]:
    for case in cases:
        for reader in READERS.get(case.reader, (case.reader,)):
            if reader != "torchcodec" or torchcodec_is_there():
                yield {"name": case.name, "reader": reader, "path": case.path, "options": case.options}


def everything_in(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def watched(
    place: Place, cases: list[dict[str, Any]], warm_up: list[dict[str, Any]], work: Path
) -> list[dict[str, Any]]:
    """What became of each case, in a process of its own; the process itself must not end before its time."""
    given, out, empty = work / "cases.json", work / "out.jsonl", work / "empty"
    empty.mkdir()
    ours = [str(REPO / name) for name in ("maskfeat", "configs", "tools")]
    theirs = [str(place.folder / name) for name in ("ckpt", "cfg", "csv", "img", "vid")]
    writable = [str(place.folder / "runs")]
    given.write_text(json.dumps({"cases": cases, "warm_up": warm_up, "allowed": ours + theirs, "writable": writable}))
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"HOME": str(empty), "TORCH_HOME": str(empty / "torch")}
    command = [sys.executable, "-m", "tests.reliability.guarded", str(given), str(out)]
    done = subprocess.run(command, env=env, cwd=empty, capture_output=True, text=True, timeout=900)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    last = lines[-1].get("begun") if lines else None
    assert done.returncode == 0, f"exit code {done.returncode} at {last}\n{done.stderr[-3000:]}"
    assert not any(empty.iterdir()), "files appeared in the working folder"
    return [line for line in lines if "begun" not in line]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, counter: Counter) -> Place:
    return Place(tmp_path_factory.mktemp("strangers") / "files", counter.port)


@pytest.fixture(scope="module")
def results(place: Place, counter: Counter, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every case read once, all of them in one process."""
    makers = [malice_media.videos, malice_media.images, malice.checkpoints, malice.configs, malice.lists]
    cases = malice.make_all(place, makers)
    expected = {
        (case.name, reader): case.refused for case in cases for reader in READERS.get(case.reader, (case.reader,))
    }
    work = tmp_path_factory.mktemp("watch")
    before, connections = everything_in(place.folder), counter.count
    found = watched(place, list(by_reader(cases)), harmless(place, work), work)
    assert {result["name"] for result in found} == {case.name for case in cases}
    assert everything_in(place.folder) == before, "files appeared or vanished"
    assert not any(place.sentinel.iterdir())
    assert counter.count == connections, "somebody connected"
    for result in found:
        result["must_be_refused"] = expected[result["name"], result["reader"]]
        result["path"] = next(case.path for case in cases if case.name == result["name"])
    return found


def harmless(place: Place, work: Path) -> list[dict[str, Any]]:
    """A good file for every reader, so that what is loaded once is loaded."""
    files = work / "good"
    (files / "videos").mkdir(parents=True)
    video = write_video(files / "videos" / "good.mp4", frames=5)
    write_video(files / "videos" / "good.mkv", frames=5, codec="mpeg4")
    good = Place(files, 0)
    made = [
        ("checkpoint", good.write("good.pyth", malice.archive(malice.nested(malice.tensor(4, (4,), (1,))))), {}),
        (
            "checkpoint",
            good.write(
                "old.pyth",
                malice.legacy(
                    malice.nested(malice.tensor(4, (4,), (1,), legacy=True)),
                    ("0",),
                    (4).to_bytes(8, "little") + bytes(16),
                ),
            ),
            {},
        ),
        ("config", good.write("good.yaml", "TASK: good\n"), {}),
        ("list", good.write("good.csv", "good.mp4 0\ngood.mkv 1\n"), {"prefix": str(files / "videos")}),
    ]
    made += [("image", good.write(f"good.{form}", malice_media.picture(form)), {}) for form in FORMATS]
    made += [("video", str(video), {})]
    return list(by_reader([Case("good", reader, path, options=options) for reader, path, options in made]))


def problems(result: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the outcome of a case."""
    error, message = result.get("error"), result.get("message", "")
    if result["events"]:
        yield f"did {result['events'][:3]}"
    if result["memory"] > MEMORY // 2:
        yield f"took {result['memory'] / 1e6:.0f} MB"
    if error is None:
        if result["must_be_refused"]:
            yield f"was read: {str(result['read'])[:200]}"
    elif error not in ("UserError", "UserFileError", "UnreadableSample"):
        yield f"raised {error}: {message[:300]}"
    else:
        if "\n" in message or len(message) > 20_000:
            yield f"said more than a line: {message[:300]!r}"
        # What a list names is named itself, and first.
        name = repr(Path(result["path"]).name)[1:-1]
        if name not in repr(message) and not (
            result["reader"] == "list" and error == "UnreadableSample" and ": " in message
        ):
            yield f"did not name the file: {message[:300]!r}"
    said = f"{message} {result.get('read')} {result['heard']}"
    if SECRET in said:
        yield "told the secret"
    if any(all(abs(a - b) < 60 for a, b in zip(c, SECRET_COLOUR, strict=True)) for c in shown(result)):
        yield "showed the secret"


def shown(result: dict[str, Any]) -> list[list[float]]:
    """The colours of what was read."""
    if "read" not in result or result["reader"] in ("checkpoint", "config", "run"):
        return []
    return [colour for _, colour in result["read"]] if result["reader"] == "list" else [result["read"]]


@pytest.mark.parametrize(
    "readers", [("checkpoint",), ("config",), ("list",), ("pil", "simplejpeg"), ("pyav", "torchcodec")]
)
def test_files_run_nothing_and_reach_nothing(readers: tuple[str, ...], results: list[dict[str, Any]]) -> None:
    mine = [result for result in results if result["reader"] in readers]
    wrong = [f"{r['name']} by {r['reader']}: {problem}" for r in mine for problem in problems(r)]
    assert not wrong, "\n".join(wrong)
    largest, slowest = max(mine, key=lambda r: r["memory"]), max(mine, key=lambda r: r["seconds"])
    note(
        10,
        f"{' and '.join(readers)}: {len({r['name'] for r in mine})} malicious files, {sum('error' in r for r in mine)} "
        f"of {len(mine)} readings refused, nothing run, opened or connected; at most {largest['memory'] / 1e6:.0f} MB "
        f"({largest['name']}) and {slowest['seconds']:.1f} s ({slowest['name']})",
    )
    assert slowest["seconds"] < SECONDS


def test_there_are_enough_of_them(results: list[dict[str, Any]]) -> None:
    assert len({result["path"] for result in results}) >= 350, "as SECURITY.md says"


def test_whole_runs(place: Place, counter: Counter, image_data: Path, tmp_path: Path) -> None:
    """tools/run_net.py with a malicious checkpoint, list and config: exit code 2, one line, and nothing else."""
    place.folder.mkdir(parents=True, exist_ok=True)
    place.sentinel.mkdir(exist_ok=True)
    run = called_by_a_run(place)
    weights = place.write("ckpt/run.pyth", malice.archive(malice.nested(run)))
    config = place.write("cfg/run.yaml", f'TASK: !!python/object/apply:os.system ["touch {place.sentinel}/ran"]\n')
    base = place.write("cfg/run_base.yaml", "_BASE_: ../secret.yaml\n")
    for split in ("train", "val", "test"):
        place.write(f"csv/{split}.csv", f"{place.url} 0\n" * 20)
    vit, mvit = str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml"), str(RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml")
    argvs = {
        "run_of_a_checkpoint": ["--cfg", vit, *VIT_PT, *images(image_data), "TRAIN.CHECKPOINT_FILE_PATH", weights],
        "run_of_a_list": ["--cfg", mvit, *MVIT_PT, *clips(place.folder / "csv")],
        "run_of_a_config": ["--cfg", config, *VIT_PT],
        "run_of_a_base": ["--cfg", base, *VIT_PT],
    }
    named = {"run_of_a_checkpoint": weights, "run_of_a_list": "train.csv, line 1", "run_of_a_config": config}
    cases = [
        {
            "name": name,
            "reader": "run",
            "path": "",
            "options": {"argv": [*argv, "OUTPUT_DIR", f"{place.folder}/runs/{name}"]},
        }
        for name, argv in argvs.items()
    ]
    warm_up = [
        {"name": "help", "reader": "run", "path": "", "options": {"argv": ["--help"]}},
        {"name": "git", "reader": "provenance", "path": "", "options": {}},  # asked once in a process
    ]
    # The first config loads the objectives, backbones and data sets of the package.
    warm_up += [case for case in harmless(place, tmp_path) if case["reader"] in ("checkpoint", "config")]
    for result in watched(place, cases, warm_up, tmp_path):
        assert result.get("read") == 2, result
        assert not result["events"], result["events"]
        said = result["heard"][-1]
        assert said.startswith("error: ") and "\n" not in said and named.get(result["name"], base) in said, said
    assert not any(place.sentinel.iterdir())
    assert not any(path.suffix == ".pyth" for path in everything_in_runs(place))


def called_by_a_run(place: Place) -> bytes:
    return malice.called("os system", f"touch {place.sentinel / 'ran'}")


def everything_in_runs(place: Place) -> list[Path]:
    return list((place.folder / "runs").rglob("*"))


def test_the_watch_sees_what_it_is_for(place: Place, counter: Counter, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("outside")
    before = counter.count
    options = {"port": counter.port}
    case = {"name": "bad", "reader": "misbehave", "path": str(outside), "options": options}
    (result,) = watched(place, [case], [], tmp_path)
    seen = " ".join(result["events"])
    for word in ("open", "outside.txt", "outside.written", "subprocess.Popen", "socket.connect", "import antigravity"):
        assert word in seen, seen
    assert counter.count == before + 1
