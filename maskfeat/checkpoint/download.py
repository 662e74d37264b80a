"""Download files from http and https URLs into a cache below TORCH_HOME.

urllib's default opener also handles ftp, file and data URLs, and follows redirects to ftp. This one handles only http
and https, and follows no redirect from https to http.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError

from torch.hub import get_dir

from maskfeat.checkpoint.atomic import sha256
from maskfeat.errors import UserError, naming
from maskfeat.file_io import replace_text
from maskfeat.progress import Progress

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

SCHEMES = ("http://", "https://")
TIMEOUT = 60.0
"""Seconds without a response."""
MAX_BYTES = 64 << 30
"""Largest file that is downloaded: a server that never stops sending must not fill the disk."""
_BLOCK = 1 << 20
_POLL = 0.2  # seconds

Beat = Callable[[str], None]
"""Receives what is done, as often as there is progress, for a watchdog; see `HangWatchdog.beat`."""


def nobody(_: str) -> None:
    """Listen to no `Beat`."""


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        allowed = ("https://",) if req.full_url.lower().startswith("https://") else SCHEMES
        if not newurl.lower().startswith(allowed):
            raise URLError(f"the server redirects to {newurl[:200]!r}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _RedirectHandler(),
    ):
        opener.add_handler(handler)
    return opener


def is_url(name: str) -> bool:
    """Return whether a name is an http or https URL."""
    return name.startswith(SCHEMES)


def cached_path(url: str) -> Path:
    """Return the path in the cache of a URL's file. It contains a hash of the URL, so that every URL has its own."""
    name = re.sub(r"[^\w.-]", "_", url.split("?", 1)[0].split("#", 1)[0].rsplit("/", 1)[-1])[-80:]
    return Path(get_dir()) / "maskfeat" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{name}"


def download(url: str, beat: Beat = nobody) -> Path:
    """Return the path of a URL's file, downloading it unless it is in the cache, or another process downloads it.

    Args:
        beat: receives a word at every block, and while another process downloads.

    Raises:
        UserError: it cannot be fetched, is larger than MAX_BYTES, or the cache cannot be written.
    """
    path = cached_path(url)
    if path.is_file():
        return path
    with naming(f"{url} could not be fetched to {path.parent} (below TORCH_HOME)"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path.with_name(f".{path.name}.lock"), url, beat):
            if not path.is_file():
                _download(url, path, beat)
    return path


def _download(url: str, path: Path, beat: Beat) -> None:
    # Not named by the process: containers that share the folder may have equal numbers. Not by `tempfile` either, whose
    # files only their owner may read.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    logger.info("downloading %s to %s", url, path)
    try:
        with _opener().open(url, timeout=TIMEOUT) as response, temporary.open("xb") as file:
            declared = response.headers.get("Content-Length", "")
            size = int(declared) if declared.isdecimal() else None
            progress = None if size is None else Progress(f"MiB of {path.name}", -(-size // _BLOCK))
            left = MAX_BYTES
            while block := response.read(min(_BLOCK, left + 1)):
                left -= len(block)
                if left < 0:
                    raise UserError(f"{url} is larger than {MAX_BYTES >> 30} GiB and is not fetched")
                file.write(block)
                beat(f"downloading {url}")
                if progress is not None:
                    progress.step()
            if size not in (None, MAX_BYTES - left):
                raise URLError(f"only {MAX_BYTES - left} of {size} bytes were received")
        shutil.move(temporary, path)
    except HTTPError as error:
        raise UserError(f"{url} could not be fetched: the server answers {error.code} {error.reason}") from error
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        cause = getattr(error, "reason", None) or error
        raise UserError(f"{url} could not be fetched: {cause}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _one_at_a_time(lock: Path, url: str, beat: Beat) -> Iterator[None]:
    """Let one process at a time into the block, such as of the ranks of a run; others wait. The file `lock` is there
    meanwhile. Where the file system has no locks, all enter.
    """
    while True:
        with lock.open("ab") as file:
            held = _lock(file, url, beat)
            if held and not _is_at(file, lock):
                continue  # another process had it, and took the file away
            try:
                yield
            finally:
                if held:
                    lock.unlink(missing_ok=True)
            return


def _lock(file: IO[bytes], url: str, beat: Beat) -> bool:
    """Whether the file could be locked; it is until it is closed."""
    waits = False
    while fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            if not waits:
                logger.info("another process downloads %s: waiting for it", url)
            waits = True
            beat(f"waiting for another process that downloads {url}")
            time.sleep(_POLL)
        except OSError:
            break
    return False


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def fetch(url: str, size: int | None = None, digest: str = "", beat: Beat = nobody) -> Path:
    """Return the path of a URL's file as `download`, after comparing it with what is known of it.

    When a file is first fetched, its size and SHA-256 are recorded in NAME.json beside it, and compared later.

    Args:
        size: in bytes, where it is known.
        digest: SHA-256 in hexadecimal, or its first digits, where they are known.
        beat: see `download`.

    Raises:
        UserError: it cannot be fetched, or is another file than it should be.
    """
    path = download(url, beat)
    record = path.with_name(f"{path.name}.json")
    found = {"url": url, "size": path.stat().st_size, "sha256": sha256(path)}
    wrong = size not in (None, found["size"]) or not str(found["sha256"]).startswith(digest)
    if record.is_file():
        try:
            wrong |= json.loads(record.read_text(encoding="utf-8")) != found
        except ValueError:
            wrong = True
    if wrong:
        raise UserError(
            f"{path} is damaged or not the file that {url} gave before: it has {found['size']} bytes and the SHA-256 "
            f"{found['sha256']}. Delete it and {record.name} beside it to fetch it again"
        )
    if not record.is_file():
        with naming(f"{record} cannot be written"):
            replace_text(record, json.dumps(found, indent=1) + "\n")
    return path
