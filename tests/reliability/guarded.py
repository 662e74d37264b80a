"""Reads malicious files in a process of its own, under watch: `python -m tests.reliability.guarded CASES OUT`.

The watch knows nothing of the code that it watches: an audit hook notes whatever Python opens, starts, connects or
imports, the address space is limited, and every case has an alarm. What is noted goes to OUT, a line a case: first its
name, and when it is done what became of it, so that a case that ends the process is known as well.
"""

import json
import logging
import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

MEMORY = 2 << 30
"""Bytes of address space beyond what the process had before the first case."""
SECONDS = 20

STARTED = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
)
REACHED = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.sendto",
    "urllib.Request",
    "ftplib.connect",
    "webbrowser.open",
)
LOADED = ("ctypes.dlopen", "pickle.find_class", "os.putenv")
CHANGED = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
    "shutil.",
)
HARMLESS = (sys.prefix, sys.base_prefix, "/proc/self", "/sys/", "/dev/null", "/usr/lib", "/usr/share", "/etc/ld")


class Watch:
    """What Python does while it is armed."""

    def __init__(self, allowed: list[str], writable: list[str]) -> None:
        self.armed = False
        self.allowed, self.writable = (*HARMLESS, *allowed, *writable), tuple(writable)
        self.events: list[str] = []
        self.known: set[str] = set()
        sys.addaudithook(self.note)

    def note(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event.startswith(CHANGED):
            if not os.path.realpath(str(args[0])).startswith(self.writable or ("\0",)):
                self.events.append(f"{event} {args!r}"[:200])
        elif event == "ctypes.dlopen" and args[0] == "libnvidia-ml.so.1":
            pass  # PyTorch counts the GPUs
        elif event.startswith((*STARTED, *REACHED, *LOADED)):
            self.events.append(f"{event} {args!r}"[:200])
        elif event == "import" and args[0].partition(".")[0] not in self.known:
            self.events.append(f"import {args[0]}")
        elif event == "exec" and not getattr(args[0], "co_filename", "").startswith((*self.allowed, "<frozen", "/")):
            self.events.append(f"exec {args[0]!r}"[:200])
        elif event == "open":
            path, mode, flags = args
            path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else False
            real = os.path.realpath(path)
            if not real.startswith(self.allowed) or (writes and not real.startswith((*self.writable, "/dev/null"))):
                self.events.append(f"open {path} {mode}"[:200])


class TooSlow(BaseException):
    """The alarm of a case."""


def alarm(number: int, frame: Any) -> None:
    raise TooSlow


def peak() -> int:
    """The largest resident memory since it was last asked to start anew, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def colours(array: Any) -> list[float]:
    """The mean colour of (..., 3)."""
    return [float(part) for part in array.reshape(-1, 3).mean(axis=0)]


def misbehave(case: dict[str, Any]) -> None:
    """What no reader may do: shows that the watch sees it."""
    import contextlib
    import socket
    import subprocess

    Path(case["path"]).read_text()
    Path(case["path"]).with_suffix(".written").touch()
    subprocess.run(["true"], check=True)
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", case["options"]["port"])).close()
    import antigravity  # noqa: F401


def read(case: dict[str, Any]) -> Any:
    """Gives a case to its reader; what comes out, in short."""
    if case["reader"] == "misbehave":
        return misbehave(case)
    import numpy as np

    from maskfeat.checkpoint.reading import read_checkpoint, trained_model
    from maskfeat.config import dump_config, load_config
    from maskfeat.data.datasets.sample_list import read_sample_list
    from maskfeat.data.image_reader import READERS
    from maskfeat.data.video.decoder import decode_frames
    from maskfeat.engine.provenance import machine, revision

    reader, path = case["reader"], case["path"]
    if reader == "provenance":
        return [machine(), revision()]
    if reader == "checkpoint":
        content = read_checkpoint(path)
        return [str(trained_model(content)), sorted(map(str, content))]
    if reader == "config":
        return dump_config(load_config(path))[:100_000]
    if reader == "list":
        videos = read_sample_list(path, " ", case["options"]["prefix"])
        return [[place, colours(decode_frames(place, [0, 2])[0])] for place, _ in videos]
    if reader in ("pil", "simplejpeg"):
        return colours(np.asarray(READERS[reader](path)))
    if reader == "pyav":
        return colours(decode_frames(path, [0, 2, 5])[0])
    if reader == "torchcodec":
        from maskfeat.data.video import torchcodec_decoder

        return colours(torchcodec_decoder.decode_frames(path, [0, 2, 5])[0])
    assert reader == "run"
    from maskfeat.engine.run import main as run_net  # what tools/run_net.py calls

    try:
        return run_net(case["options"]["argv"])
    except SystemExit as end:  # --help
        return end.code


def outcome(case: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """Reads one case under watch."""
    watch.events = []
    reset_peak()
    before, start = peak(), time.perf_counter()
    result: dict[str, Any] = {"name": case["name"], "reader": case["reader"]}
    signal.alarm(SECONDS)
    watch.armed = True
    try:
        result["read"] = read(case)
    except Exception as error:
        result["error"], result["message"] = type(error).__name__, str(error)[:100_000]
    except TooSlow:
        result["error"] = "TooSlow"
    finally:
        watch.armed = False
        signal.alarm(0)
    return {**result, "seconds": time.perf_counter() - start, "memory": peak() - before, "events": watch.events}


def main() -> None:
    """Reads every case of a list, those that are warming up first."""
    given, results = map(Path, sys.argv[1:])
    cases = json.loads(given.read_text())
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, alarm)
    watch = Watch(cases["allowed"], cases["writable"])
    heard: list[str] = []
    plain = logging.getLogRecordFactory()

    def noting(*args: Any, **named: Any) -> logging.LogRecord:
        record = plain(*args, **named)
        heard.append(record.getMessage())
        return record

    logging.setLogRecordFactory(noting)  # whatever handlers a run may set up
    for case in cases["warm_up"]:
        read(case)
    watch.known = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names) - {
        "antigravity",
        "this",
    }
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    with results.open("w") as out:
        for case in cases["cases"]:
            heard.clear()
            out.write(json.dumps({"begun": [case["name"], case["reader"]]}) + "\n")
            out.flush()
            out.write(json.dumps({**outcome(case, watch), "heard": heard[-20:]}) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
