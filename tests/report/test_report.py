"""The page and the table on runs: what they say, that they hold, and that they are read from any folder of a run."""

import csv
import html.parser
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maskfeat.report.command import main, write_report
from maskfeat.report.page import BUCKETS, write_page
from maskfeat.report.run_log import RunLog
from maskfeat.report.runs import read_runs, summary, summary_csv
from tests.report.runs import Log, whole, write_run

REPO = Path(__file__).resolve().parents[2]
NASTY = "</script><img src=x onerror=alert(1)>&\"'"


class Page(html.parser.HTMLParser):
    """Collects what a page holds, and checks that its elements are closed in order."""

    VOID = ("meta", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.script = "", ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script += data
        else:
            self.text += data

    def data(self) -> dict[str, Any]:
        return json.JSONDecoder().raw_decode(self.script)[0]


def page_of(*folders: Path) -> Page:
    return Page(write_page(read_runs(folders)))


def test_the_summary_of_one_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", whole(), "SOLVER: {BASE_LR: 0.1}\n", [("SOLVER.BASE_LR", "0.1")])
    (folder / "bad_samples.jsonl").write_text("{}\n{}\n")
    rows = {name: values for name, (values,) in summary(read_runs([folder])).items()}
    assert rows["state"] == "complete: 4 of 4 epochs"
    assert rows["validation top1"] == "50.25 (best 60 after epoch 2)" and rows["validation loss"] == "0.125"
    assert rows["training loss"] == "0.125" and rows["steps"] == "40" and rows["time at work"] == "0:01:20"
    assert rows["samples/s (median)"] == "107.5" and rows["bad samples"] == "2" and rows["resumed"] == "0"
    assert rows["program"] == "commit 1234abc+" and rows["machine"].startswith("host7")
    assert rows["SOLVER.BASE_LR"] == "0.1" and rows["PyTorch"] == "2.14.0+cpu"


def test_several_runs_show_where_they_differ(tmp_path: Path) -> None:
    config = "SOLVER: {{BASE_LR: {}, MAX_EPOCH: 4}}\nOUTPUT_DIR: {}\nTASK: ''\n"
    folders = [write_run(tmp_path / name, whole(), config.format(rate, name)) for name, rate in (("a", 1), ("b", 2))]
    rows = summary(read_runs(folders))
    assert rows["SOLVER.BASE_LR"] == ["1", "2"] and not {"SOLVER.MAX_EPOCH", "OUTPUT_DIR", "TASK"} & set(rows)
    (head, *lines) = csv.reader(io.StringIO(summary_csv(read_runs(folders))))
    assert head[:2] == ["run", "state"] and [line[0] for line in lines] == [str(folder) for folder in folders]
    assert [line[head.index("SOLVER.BASE_LR")] for line in lines] == ["1", "2"]


@pytest.mark.parametrize(
    ("ending", "state"),
    [
        ("error: no space", "error: no space"),
        ("stopped on Ctrl-C; the same command resumes from here (exit code 130)", "stopped on Ctrl-C"),
        ("something", "goes on, or was killed: 0.50 of 4 epochs"),
        ("NOT SAVED, training continues: no space", "goes on, or was killed: 0.50 of 4 epochs"),
        ("HANG: no progress for 9 s", "HANG: no progress for 9 s"),
        (
            "a bug, of this program or of a module in PLUGINS, on rank 0:\nTraceback (most recent call last):\n  File\n"
            "ZeroDivisionError: by 0",
            "a bug, of this program or of a module in PLUGINS, on rank 0: ZeroDivisionError: by 0",
        ),
    ],
)
def test_what_ended_it(ending: str, state: str, tmp_path: Path) -> None:
    log = Log()
    log.train(1, 5, 10, 1.0)
    log.say(ending)
    assert summary(read_runs([write_run(tmp_path, log)]))["state"] == [state]


def test_the_page_holds_curves_pictures_weights_and_warnings(tmp_path: Path) -> None:
    log = whole()
    log.say("weights from pt.pyth\n  loaded    3")
    log.say("warning: beware")
    log.say("NOT SAVED, training continues: no space left")
    folder = write_run(tmp_path / "a", log, "TASK: ''\n")
    (folder / "pictures").mkdir()
    for epoch in (1, 5, 20):
        Image.new("RGB", (2000, 100)).save(folder / "pictures" / f"epoch_{epoch:05d}.png")
    found = page_of(folder)
    (run,) = found.data()["runs"]
    training = run["kinds"]["training"]
    assert training["of"] == 1 and training["step"] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert training["values"]["loss"]["mean"][:2] == [0.5, 0.5] and len(training["hour"]) == 8
    assert found.data()["charts"] == [["loss", "top1"], ["lr", "skipped", "samples_per_second"]]
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert [image["alt"][-15:] for image in images] == ["epoch_00001.png", "epoch_00020.png"]
    assert all(image["width"] == "1200" for image in images)
    assert "weights from pt.pyth\n  loaded    3" in found.text and "beware" in found.text
    assert "NOT SAVED, training continues: no space left" in found.text


def test_no_error_of_a_run_is_left_out() -> None:
    """Each text that is logged as an error, where rank 0 writes it into the log, is one that the report knows."""
    package = REPO / "maskfeat"
    files = [*(package / "checkpoint").glob("*.py"), package / "distributed" / "hang_watchdog.py"]
    files += [package / "engine" / name for name in ("evaluate.py", "saver.py", "session.py")]
    said = []
    for file in files:
        said += re.findall(r'logger\.error\(\s*f?"([^"]*)"', file.read_text())
    assert len(said) >= 11
    for text in said:
        log = RunLog()
        log.note("HANG: no progress for 9 s" if text == "%s" else text)  # the watchdog's report
        assert log.ending or log.warnings, text


def test_nothing_is_loaded(tmp_path: Path) -> None:
    for _, attributes in page_of(write_run(tmp_path, whole())).tags:
        for name in ("src", "href", "action", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    for name in ("page.css", "page.js"):
        text = (REPO / "maskfeat" / "report" / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//\w+\.|@import|\bfetch\b|innerHTML|\beval\b", text)


def test_names_and_texts_are_no_html(tmp_path: Path) -> None:
    """Whoever names a run, a metric, a key or a file writes nothing into the page but text."""
    log = whole()
    log.stats("train_iter", {"epoch": "4/4", "iter": "10/10", "loss": 1.0, NASTY: 2.0})
    log.stats("test_final", {"views": NASTY, NASTY: 2.0})
    for text in ("warning: {}", "error: {}", "weights from {}"):
        log.say(text.format(NASTY))
    config = f"TASK: {json.dumps(NASTY)}\n{json.dumps(NASTY)}: 1\n"
    folder = write_run(tmp_path / "run <i>&", log, config, [(NASTY, NASTY)])
    (folder / "pictures").mkdir()
    (folder / "pictures" / "<b>_epoch_00001.png").write_bytes(b"no picture")
    plain, found = page_of(write_run(tmp_path / "b", whole(), "TASK: ''\n")), page_of(folder)
    assert {tag for tag, _ in found.tags} - {tag for tag, _ in plain.tags} <= {"pre", "ul", "li", "h3", "p"}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert found.text.count(NASTY) >= 8 and "run <i>&" in found.text and "<b>_epoch_00001.png cannot" in found.text
    assert NASTY in found.data()["charts"][0]


@pytest.mark.parametrize("broken", ["config", "log", "empty", "binary", "bad"])
def test_broken_folders(broken: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, whole(), "TASK: ''\n")
    if broken == "config":
        (folder / "config.yaml").write_text("a: [\n")
    elif broken == "log":
        with (folder / "stdout.log").open("a") as file:
            file.write('[11/01 00:00:10] json_stats: {"_type": "train_it')
    elif broken == "empty":
        (folder / "stdout.log").write_text("")
        (folder / "config.yaml").unlink()
    elif broken == "binary":
        (folder / "stdout.log").write_bytes(bytes(range(256)) * 100)
    else:
        (folder / "bad_samples.jsonl").mkdir()
    found = page_of(folder)
    said = {"config": "config.yaml", "log": "1 lines of stdout.log are damaged", "empty": "nothing has been trained"}
    assert said.get(broken, "Summary") in found.text
    assert bool(found.data()["runs"][0]["kinds"]) == (broken in ("config", "log", "bad"))


def test_a_run_without_validation_and_one_that_only_tested(tmp_path: Path) -> None:
    trained, tested = Log(), Log()
    trained.train(4, 10, 10, "inf")
    tested.start()
    tested.stats("test_final", {"views": "1x1", "top1": 12.5})
    folders = [write_run(tmp_path / "trained", trained), write_run(tmp_path / "tested", tested)]
    rows = summary(read_runs(folders))
    assert rows["state"] == ["complete: 4 of 4 epochs", "tested"] and rows["test top1 (final 1x1)"] == ["", "12.5"]
    assert page_of(*folders).data()["runs"][0]["kinds"]["training"]["values"]["loss"]["mean"] == [None]


def test_two_tasks_in_a_folder_are_two_runs(tmp_path: Path) -> None:
    log = Log()
    for task in ("pt", "ft"):
        log.start(task)
        log.train(1, 10, 10, 1.0)
    folder = write_run(tmp_path / "both", log, "TASK: ft\n")
    (folder / "pictures").mkdir()
    for name in ("pt_epoch_00001.png", "ft_epoch_00001.png", "epoch_00001.png"):
        Image.new("RGB", (8, 8)).save(folder / "pictures" / name)
    first, second = read_runs([folder])
    assert (first.name, second.name) == (f"{folder} [pt]", f"{folder} [ft]")
    assert not first.config and second.config == {"TASK": "ft"}
    assert [[path.name for path in run.pictures] for run in (first, second)] == [
        ["pt_epoch_00001.png"],
        ["ft_epoch_00001.png"],
    ]


def long_run(folder: Path, entries: int) -> Path:
    """A run whose loss is its step, but for one outlier."""
    lines = ["[11/01 00:00:00] begun"]
    for step in range(1, entries + 1):
        loss = step if step != entries // 2 else 10 * entries
        values = {"epoch": "1/1", "iter": f"{step}/{entries}", "loss": loss, "lr": 0.1, "grad_norm": step / 3}
        lines.append(f"[11/01 00:00:00] json_stats: {json.dumps({'_type': 'train_iter', **values})}")
    return write_run(folder, "\n".join(lines) + "\n")


def test_long_curves_are_thinned_without_losing_an_outlier(tmp_path: Path) -> None:
    entries = 3 * BUCKETS + 1
    (run,) = page_of(long_run(tmp_path, entries)).data()["runs"]
    training = run["kinds"]["training"]
    loss = training["values"]["loss"]
    assert training["of"] == 4 and len(training["step"]) == len(loss["mean"]) == len(loss["high"]) <= BUCKETS
    assert max(loss["high"]) == 10 * entries and loss["low"][0] == 1 and training["step"][:2] == [4, 8]
    assert loss["mean"][0] == 2.5 and training["step"][-1] == entries


@pytest.mark.slow
def test_ten_long_runs_make_a_small_page(tmp_path: Path) -> None:
    folder = long_run(tmp_path, 100_000)
    began = time.process_time()
    page = write_page(read_runs([folder]) * 10)
    assert len(page) < 10e6 and time.process_time() - began < 60


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (write_run(tmp_path / name, whole()) for name in ("a", "b"))
    monkeypatch.chdir(tmp_path)
    assert main(["a"]) == 0 and (first / "report.html").exists()
    assert (
        main(["a", str(second / "stdout.log"), "a", "a/stdout.log", "--csv", "-"]) == 0
        and (tmp_path / "report.html").exists()
    )
    names = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["run", "a", str(second / "stdout.log")], "and a run is there once, however often it is given"
    assert main(["a", "--output", "new/x.html", "--csv", "newer/x.csv"]) == 0
    assert Page((tmp_path / "new/x.html").read_text()).tags
    assert len((tmp_path / "newer/x.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is not the OUTPUT_DIR of a run: it has no stdout.log"),
        (["a", "--output", "a/stdout.log/x"], "--output a/stdout.log/x cannot be written: Not a directory"),
        (["a", "--csv", "a/stdout.log/x"], "--csv a/stdout.log/x cannot be written: Not a directory"),
    ],
)
def test_bad_input(
    arguments: list[str], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a", whole())
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert f"error: {said}" in caplog.text


def test_files_are_those_of_the_task_that_wrote_last(tmp_path: Path) -> None:
    log = Log()
    for task in ("pt", "ft", "pt"):
        log.start(task)
        log.say("resumed from checkpoints/x.pyth, after epoch 1")
        log.train(1, 10, 10, 1.0)
    folder = write_run(tmp_path / "a", log, "TASK: pt\n", [("TASK", "pt")])
    (folder / "pictures").mkdir()
    for name in ("pt_epoch_00001.png", "epoch_00001.png"):
        (folder / "pictures" / name).touch()
    runs = {run.name.removeprefix(str(folder)): run for run in read_runs([folder])}
    assert list(runs) == [" [ft]", " [pt]"]
    assert runs[" [pt]"].config == {"TASK": "pt"} and runs[" [pt]"].overrides and runs[" [pt]"].bad_samples == 0
    assert not runs[" [ft]"].config and not runs[" [ft]"].overrides and runs[" [ft]"].bad_samples is None
    assert [path.name for path in runs[" [pt]"].pictures] == ["pt_epoch_00001.png"] and not runs[" [ft]"].pictures


def test_a_name_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / os.fsdecode(b"caf\xe9"), whole())
    assert main([str(folder), "--csv", "-"]) == 0 and "caf\\udce9,complete" in capsys.readouterr().out
    assert "caf\\udce9 - maskfeat report" in (folder / "report.html").read_text()


def test_the_script(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", whole())
    command = [sys.executable, str(REPO / "tools" / "report.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr == f"{folder / 'report.html'}: 1 run, 0.0 MB\n"


def test_the_page_of_a_run_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = write_run(tmp_path, whole())
    assert write_report(folder) == write_report(folder) == folder / "report.html"
    assert [path.name for path in folder.glob("*report*")] == ["report.html"] and not list(folder.glob(".*"))
