"""Files from http and https addresses, kept in a folder of their own.

urllib's usual opener also knows ftp, file and data addresses, and follows redirections to the first of them. This one
knows http and https alone, and no redirection leads from https back to http.
"""

import hashlib
import logging
import os
import re
import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError

from torch.hub import get_dir

logger = logging.getLogger(__name__)

SCHEMES = ("http://", "https://")
TIMEOUT = 60.0
"""Seconds without an answer."""
MAX_BYTES = 64 << 30
"""Of one file: a server that never stops must not fill the disk."""
_BLOCK = 1 << 20


class _Redirections(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        allowed = ("https://",) if req.full_url.lower().startswith("https://") else SCHEMES
        if not newurl.lower().startswith(allowed):
            raise URLError(f"the server sends on to {newurl[:200]!r}, which is not followed")
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
        _Redirections(),
    ):
        opener.add_handler(handler)
    return opener


def is_url(name: str) -> bool:
    """Whether a name is an http or https address."""
    return name.startswith(SCHEMES)


def cached_path(url: str) -> Path:
    """Where the file of an address is kept, below TORCH_HOME: a name of its own for every address, whatever it says."""
    name = re.sub(r"[^\w.-]", "_", url.split("?", 1)[0].split("#", 1)[0].rsplit("/", 1)[-1])[-80:]
    return Path(get_dir()) / "maskfeat" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{name}"


def download(url: str) -> Path:
    """The file of an http or https address, fetched where it is not there yet.

    Raises:
        ValueError: it cannot be fetched, or is larger than MAX_BYTES.
        OSError: the folder cannot be written.
    """
    path = cached_path(url)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    logger.info("fetching %s into %s", url, path)
    try:
        with _opener().open(url, timeout=TIMEOUT) as answer, temporary.open("wb") as file:
            left = MAX_BYTES
            while block := answer.read(min(_BLOCK, left + 1)):
                left -= len(block)
                if left < 0:
                    raise ValueError(f"{url} is larger than {MAX_BYTES >> 30} GiB and is not fetched")
                file.write(block)
            promised = answer.headers.get("Content-Length", "")
            if promised.isdecimal() and int(promised) != MAX_BYTES - left:
                raise URLError(f"{MAX_BYTES - left} of {promised} bytes came")
        shutil.move(temporary, path)
    except HTTPError as error:
        raise ValueError(f"{url} could not be fetched: the server answers {error.code} {error.reason}") from error
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        cause = getattr(error, "reason", None) or error
        raise ValueError(f"{url} could not be fetched: {cause}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
