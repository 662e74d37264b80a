"""Read every file of a data set once, by several processes, and remember what was found, so that a check goes on."""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from maskfeat.data.bad_samples import UnreadableSample, open_regular_file
from maskfeat.data.image_reader import read_image
from maskfeat.data.shards.files import is_parquet, stamp_of
from maskfeat.data.shards.members import Member
from maskfeat.data.video.decoder import open_video
from maskfeat.distributed.processes import leave_signals_to_parent
from maskfeat.errors import UserError, naming
from maskfeat.progress import Progress

logger = logging.getLogger(__name__)

R = TypeVar("R")

_CHUNK = 16
_BLOCK = 1 << 20
_MAGIC = {b"\xff\xd8": "JPEG", b"\x89P": "PNG", b"GI": "GIF", b"BM": "BMP", b"RI": "WEBP", b"II": "TIFF", b"MM": "TIFF"}


class Facts(NamedTuple):
    """What a file is.

    Attributes:
        size, changed: in bytes, and when it was last changed, in ns; -1 where there is no such file.
        cause: why it cannot be read; "" = it can.
        digest: of its content, in hexadecimal; "" = not computed.
        kind: format of an image, codec of a video.
        width, height: in pixels.
        grey: whether the colours of all pixels of an image are grey.
        frames, fps: of a video.
        seconds: that reading took.
    """

    path: str
    size: int = -1
    changed: int = -1
    cause: str = ""
    digest: str = ""
    kind: str = ""
    width: int = 0
    height: int = 0
    grey: bool = False
    frames: int = 0
    fps: float = 0.0
    seconds: float = 0.0


def digest_of(path: str) -> str:
    """Return the BLAKE2b digest (128 bits) of a file's content."""
    found = hashlib.blake2b(digest_size=16)
    with open_regular_file(path) as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def read_facts(path: str, noun: str, known: Facts | None = None) -> Facts:
    """Read a file as training does; a video's first, central and last frame.

    Args:
        path: of the file.
        noun: "image" or "video".
        known: what an earlier check found, which is returned if the file has not changed since.
    """
    try:
        size, changed = path.stamp if isinstance(path, Member) else stamp_of(path)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        return Facts(path, cause="no such file" if missing else f"cannot be opened: {error}")
    if isinstance(path, Member) and not is_parquet(path.shard):
        size = path.place[1]
    facts = Facts(path, size, changed)
    if known is not None and known[:3] == facts[:3]:
        return known._replace(path=path)  # which may be more than its text
    started = time.perf_counter()
    try:
        facts = _image(facts) if noun == "image" else _video(facts)
    except UnreadableSample as error:
        facts = facts._replace(cause=error.cause)
    except OSError as error:
        facts = facts._replace(cause=f"cannot be read: {error.strerror or error}")
    return facts._replace(seconds=time.perf_counter() - started)


def _image(facts: Facts) -> Facts:
    try:
        facts = facts._replace(digest=digest_of(facts.path))
        pixels = np.asarray(read_image(facts.path))
    except UnreadableSample as error:
        return facts._replace(cause=error.cause)
    with open_regular_file(facts.path) as file:
        kind = _MAGIC.get(file.read(2), "")
    grey = bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all())
    return facts._replace(kind=kind, width=pixels.shape[1], height=pixels.shape[0], grey=grey)


def _video(facts: Facts) -> Facts:
    with open_video(facts.path) as video:
        info = video.info
        video.frames([0, info.frames // 2, info.frames - 1])
    return facts._replace(kind=info.codec, width=info.width, height=info.height, frames=info.frames, fps=info.fps)


def read_all(paths: Sequence[str], noun: str, journal: Path, workers: int) -> dict[str, Facts]:
    """Read files, each once, and return what each is; files that share their size get a digest.

    Args:
        paths: of the files.
        noun: "image" or "video".
        journal: a file to which what was found is added, and from which an interrupted check goes on.
        workers: number of processes.

    Raises:
        UserError: the journal cannot be written, or a process that read a file ended.
    """
    known = _known(journal)
    paths = list(dict.fromkeys(paths))
    facts: dict[str, Facts] = {}
    with naming(f"{journal} cannot be written"), journal.open("a", encoding="utf-8") as file:

        def note(one: Facts) -> None:
            facts[one.path] = one
            if known.get(one.path) != one:
                file.write(json.dumps(one) + "\n")

        jobs = [(path, noun, known.get(path)) for path in paths]
        for one in in_parallel(_read_one, jobs, workers, f"{noun}s"):
            note(one)
        sizes = Counter(one.size for one in facts.values() if one.size > 0)
        undigested = [one.path for one in facts.values() if not one.digest and sizes[one.size] > 1]
        for path, digest in in_parallel(_digest_one, undigested, workers, f"{noun}s of equal size"):
            note(facts[path]._replace(digest=digest))
    return {path: facts[path] for path in paths}


def _read_one(job: tuple[str, str, Facts | None]) -> Facts:
    return read_facts(*job)


def _digest_one(path: str) -> tuple[str, str]:
    try:
        return path, digest_of(path)
    except (OSError, UnreadableSample):
        return path, ""


def _known(journal: Path) -> dict[str, Facts]:
    """Return what an earlier check wrote; a line that is not whole is left out."""
    known = {}
    if journal.is_file():
        with journal.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    values = json.loads(line)
                    known[values[0]] = Facts(*values)
                except (ValueError, TypeError, IndexError, KeyError):
                    continue
    if known:
        logger.info("%d files were checked before", len(known))
    return known


def in_parallel(
    work: Callable[..., R], jobs: Sequence[object], workers: int, what: str, chunk: int = _CHUNK
) -> Iterator[R]:
    """Yield the results of `work` in any order, with lines of progress.

    Args:
        chunk: jobs that a process takes at once.

    Raises:
        UserError: a process ended without an error. What `work` raises is raised, too.
    """
    progress = Progress(what, len(jobs))
    if workers < 2 or len(jobs) < 2:
        for job in jobs:
            yield work(job)
            progress.step(1)
        return
    chunks = iter([jobs[start : start + chunk] for start in range(0, len(jobs), chunk)])
    pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("fork"), leave_signals_to_parent)
    try:
        waiting = {pool.submit(partial(_each, work), some) for some in islice(chunks, 4 * workers)}
        while waiting:
            done: Future[list[R]] = next(as_completed(waiting))
            waiting.remove(done)
            waiting.update(pool.submit(partial(_each, work), some) for some in islice(chunks, 1))
            yield from done.result()
            progress.step(len(done.result()))
    except BrokenProcessPool as error:
        raise UserError(
            "a process that read files ended without an error: too little memory, or a file that breaks a decoder. Run "
            "the same command with --workers 0, which names the file before it ends"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _each(work: Callable[..., R], jobs: Sequence[object]) -> list[R]:
    return [work(job) for job in jobs]
