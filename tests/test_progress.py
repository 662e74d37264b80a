"""On a terminal a line says how far work is, and breaks no line of the log; elsewhere there is none."""

import fcntl
import json
import logging
import os
import re
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from maskfeat import progress
from maskfeat.analysis.command import exit_code
from maskfeat.demos.synthetic import make_images
from maskfeat.distributed.world import World
from maskfeat.engine.metrics_log import setup_logging
from maskfeat.engine.run import main
from maskfeat.errors import UserError
from maskfeat.progress import LiveLine, Progress, close_lines
from tests.small import VIT_PT, images

COLUMNS = 200
logger = logging.getLogger("maskfeat.test")


def rows(text: str) -> list[str]:
    """What a terminal shows after this text: of what tqdm writes, it knows CR, LF and cursor up."""
    found, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]+", text):
        if part == "\x1b[A":
            row -= 1
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            found += [""] * (row + 1 - len(found))
        else:
            line = found[row].ljust(column)
            found[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in found]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """A terminal for `begin`; called, it ends and returns what was written."""
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    stream = os.fdopen(follower, "w")
    parts: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(leader, 4096):
                parts.append(part)
        except OSError:  # the other side was closed
            pass

    thread = threading.Thread(target=read)
    thread.start()

    def end() -> str:
        close_lines()
        if not stream.closed:
            stream.close()
        thread.join()
        return b"".join(parts).decode()

    end.stream = stream  # type: ignore[attr-defined]
    yield end
    end()
    os.close(leader)


def begin(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output and error are this terminal from now on; called in tests, since pytest sets both before them."""
    monkeypatch.setattr(sys, "stdout", terminal.stream)
    monkeypatch.setattr(sys, "stderr", terminal.stream)


def test_training(
    image_data: Path, tmp_path: Path, terminal: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log on the terminal is that of the file without json_stats, each of its lines whole."""
    begin(terminal, monkeypatch)
    opts = ["--cfg", "masked_ssl/in1k_VIT_B_MaskFeat_PT", *VIT_PT, *images(image_data), "OUTPUT_DIR", str(tmp_path)]
    assert main([*opts, "LOG_MODEL_INFO", "False", "TRAIN.EVAL_PERIOD", "1", "SOLVER.BASE_LR", "1e-4"]) == 0
    written = terminal()
    log = [line.rstrip() for line in (tmp_path / "stdout.log").read_text().splitlines() if "json_stats" not in line]
    shown = [line for line in rows(written) if line]
    assert [line[:COLUMNS] for line in shown] == [line[:COLUMNS] for line in log]
    live = r"training: +\d+ %\|.{16}\| epoch 2/2  step 3/5  eta 0:00:\d\d  loss [\d.]+ .*  \d+% waiting for data"
    assert re.search(live, written)
    assert re.search(r"steps of validation: +50 %\|.{16}\| 1 of 2, [\d.]+/s, eta 0:00:\d\d", written)


def test_lines_of_other_threads(terminal: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    begin(terminal, monkeypatch)
    setup_logging(World())
    line = LiveLine("counting", 300)
    threads = [threading.Thread(target=lambda n=n: [logger.info("%d.%d", n, k) for k in range(100)]) for n in range(3)]
    for thread in threads:
        thread.start()
    for done in range(300):
        line.show(done, lambda: "more to come")
    for thread in threads:
        thread.join()
    written = terminal()
    assert "counting:  50 %|" in written
    assert sorted(row.split("] ")[1] for row in rows(written) if row) == sorted(
        f"{n}.{k}" for n in range(3) for k in range(100)
    )


def test_a_tool(terminal: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line replaces the lines of the log, and is gone when it fails."""
    begin(terminal, monkeypatch)
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(logging.getLogger("maskfeat"), "propagate", True)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def work() -> int:
        images = Progress("images", 4)
        images.step()
        logger.info("one is strange")
        images.step()
        raise UserError("the third is broken")

    assert exit_code(work) == 2
    written = terminal()
    assert re.search(r"images:  50 %\|.{16}\| 2 of 4, [\d.]+/s, eta 0:00:00", written)
    assert [row for row in rows(written) if row] == ["one is strange", "error: the third is broken"]


def test_making_data(terminal: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(terminal, monkeypatch)
    setup_logging(World())
    make_images(tmp_path / "set", ["disc"], train_per_class=3, val_per_class=1, size=(32, 32))
    written = terminal()
    assert "images in" in written and " 75 %|" in written
    (row,) = [row for row in rows(written) if row]
    assert "4 synthetic images in" in row


@pytest.mark.parametrize("why", ["no terminal", "rank 1", "quiet", "nothing to do"])
def test_there_is_none(why: str, terminal: Callable[[], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begin(terminal, monkeypatch)
    setup_logging(World(1, 2, 1, 2) if why == "rank 1" else World())
    if why == "quiet":
        logging.getLogger("maskfeat").setLevel(logging.WARNING)
    if why == "no terminal":
        monkeypatch.setattr(sys, "stderr", (tmp_path / "errors").open("w"))
    line = LiveLine("counting", 0 if why == "nothing to do" else 3)
    line.show(1, lambda: "never made" if line.is_shown else json.dumps(object()))
    line.close()
    assert terminal() == "" and not line.is_shown


def test_it_is_drawn_a_few_times_a_second(terminal: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    begin(terminal, monkeypatch)
    monkeypatch.setattr(progress, "_SECONDS", 0.25)
    setup_logging(World())
    line, began = LiveLine("counting", 10**9), time.monotonic()
    for done in range(1000):
        line.show(done, lambda: "drawn")
        time.sleep(0.0005)
    spent = time.monotonic() - began
    assert 2 <= terminal().count("drawn") <= spent / 0.25 + 1
