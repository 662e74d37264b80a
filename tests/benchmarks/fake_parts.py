"""A small table of parts for the tests of the runner: they pass, fail, hang, crash and take their time."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.parts import CORRECTNESS, LEARNING, SPEED, Context, Failed, Figures, Part


def passes(context: Context) -> Figures:
    context.needs_cuda("a kernel")
    (context.folder / "made").write_text("gone afterwards")
    return {"answer": 42, "toy": context.toy, "process": os.getpid()}


def fails(context: Context) -> Figures:
    context.note(before=1)
    raise Failed("7 found, 6 expected")


def breaks(context: Context) -> Figures:
    raise KeyError("bins")


def crashes(context: Context) -> Figures:
    context.note(before=2)
    print("the last words", flush=True)
    os._exit(9)


def hangs(context: Context) -> Figures:
    """With a child in a session of its own, which would survive the end of its process group."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    context.note(child=child.pid)
    time.sleep(1000)
    return {}


def grows(context: Context) -> Figures:
    """Finds something every twentieth of a second, without an end."""
    for number in itertools.count():
        context.note(found=number)
        time.sleep(0.05)
    return {}


def sees(context: Context) -> Figures:
    return {"variable": os.environ.get("FAKE", "")}


def never(context: Context) -> Figures:
    Path("/no/such/folder/file").read_text()
    return {}


PARTS = (
    Part("fails", CORRECTNESS, 60, fails),
    Part("breaks", CORRECTNESS, 60, breaks),
    Part("crashes", CORRECTNESS, 60, crashes),
    Part("on a gpu alone", CORRECTNESS, 60, never, cuda=True),
    Part("hangs", CORRECTNESS, 4, hangs),
    Part("passes", CORRECTNESS, 60, passes),
    Part("sees", SPEED, 60, sees, environment={"FAKE": "seen"}),
    Part("passes, too", SPEED, 60, passes),
    Part("takes long", LEARNING, 1000, grows),
)
