"""Weights files: what is read, why untrusted ones are refused, and URLs."""

import errno
import hashlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from maskfeat.checkpoint import download
from maskfeat.checkpoint.reading import prefetch, read_checkpoint, trained_model
from maskfeat.errors import UserError
from tests.reliability import malice
from tests.small import REPO


def everything() -> dict[str, Any]:
    """What training scripts save."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    shared = torch.rand(3)
    return {
        "model_state": model.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5]).state_dict(),
        "args": Namespace(lr=0.1, nested=Namespace(sizes=[1, 2])),
        "cfg": "MODEL:\n  MODEL_NAME: MViT\n",
        "config": CfgNode({"A": {"B": (1, 2)}}),
        "generator": torch.get_rng_state(),
        "plain": [None, True, -1, 10**30, 1.5, "text", b"bytes", {1, 2}, (1, (2,)), Counter("aab")],
        "kinds": [torch.float32, torch.Size([2, 3]), torch.device("cpu")],
        "tied": [shared, shared],
        "views": [torch.rand(10)[2:5], torch.rand(4, 5).t(), torch.empty(0, 3), torch.tensor(3.0)],
        "dtypes": [torch.zeros(3).to(kind) for kind in (torch.bfloat16, torch.float16, torch.int64, torch.bool)],
        "parameter": nn.Parameter(torch.rand(2)),
        "ordered": OrderedDict(a=OrderedDict()),
    }


@pytest.mark.parametrize("new", [True, False])
def test_what_training_scripts_save_is_read(tmp_path: Path, new: bool) -> None:
    content = everything()
    torch.save(content, tmp_path / "all.pyth", _use_new_zipfile_serialization=new)
    read = read_checkpoint(tmp_path / "all.pyth")
    assert read.keys() == content.keys() and trained_model(read) == "MViT"
    for name, value in content["model_state"].items():
        assert torch.equal(read["model_state"][name], value)
    assert read["args"] == content["args"] and read["plain"] == content["plain"] and read["kinds"] == content["kinds"]
    assert all(torch.equal(a, b) for a, b in zip(read["views"], content["views"], strict=True))
    assert read["tied"][0].data_ptr() == read["tied"][1].data_ptr()


def test_dtypes_of_newer_files(tmp_path: Path) -> None:
    content = {str(kind): torch.zeros(3).to(kind) for kind in (torch.float8_e4m3fn, torch.uint16, torch.uint32)}
    torch.save(content, tmp_path / "new.pyth")
    assert all(torch.equal(read_checkpoint(tmp_path / "new.pyth")[k].float(), v.float()) for k, v in content.items())


def test_tensors_alone(tmp_path: Path) -> None:
    save = pytest.importorskip("safetensors.torch").save_file
    save({"a": torch.arange(3.0)}, tmp_path / "a.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "a.safetensors")["a"], torch.arange(3.0))


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("numel", "is not a readable checkpoint: record size"),
        ("size", "is not a readable checkpoint: .*resize"),
        ("expanded_view", "is not loaded: a tensor of 8589934592 elements claims more than the [0-9]+ bytes it has"),
        ("meta", "is not loaded: a tensor of 8589934592 elements claims more"),
        ("tensor_without_contents", "is not loaded: a tensor of 1000x1000 elements claims more"),
        ("legacy_nothing_there", "is not loaded: a tensor of 4 elements claims more than the 0 bytes it has"),
        ("deflated", "is not loaded: its archive unpacks to [0-9]+ bytes and has [0-9]+"),
        ("member_twice_but_for_case", "is not loaded: two members of its archive have the same name"),
        ("two_names", "is not loaded: it is damaged"),
        ("two_archives", "is not loaded: its archive does not end with its directory"),
        ("deep_key", "is not loaded: its values are nested more than 64 deep"),
        ("laughs_as_key", "is not loaded: it has more than 1000000 values"),
        ("hex_of_hex", "is not loaded: it encodes a string as something other than latin1"),
        ("many_opcodes", "is not loaded: its pickle has more than 1000000 opcodes"),
        ("no_dict", "holds a list, expected a dict of parameters"),
    ],
)
def test_why_files_are_refused(tmp_path: Path, name: str, cause: str) -> None:
    path = tmp_path / "bad.pyth"
    path.write_bytes(dict(malice.lies(malice.Place(tmp_path, 0)))[name])
    with pytest.raises(ValueError, match=f"bad.pyth {cause}"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        (
            "zip_subprocess.Popen",
            "it holds a pickled object of type subprocess.Popen; only tensors and plain containers",
        ),
        ("legacy", r"it holds a pickled object of type os.system; .* save it again with torch.save\(model.state_dict"),
        ("torchscript", "it is a TorchScript archive, which holds a program"),
        ("tar", "it was not written by torch.save"),
        ("hidden_method", "it sets attributes that hide the methods of a dict"),
        ("stack_global", "Unsupported operand 149"),
    ],
)
def test_what_would_run_is_named_in_one_line(tmp_path: Path, name: str, cause: str) -> None:
    path = tmp_path / "bad.pyth"
    path.write_bytes(dict(malice.pickles(malice.Place(tmp_path, 0)))[name])
    with pytest.raises(ValueError, match=f"bad.pyth is not loaded: {cause}") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_limits_count_what_a_pickle_builds(tmp_path: Path) -> None:
    """Large, deep and often referenced values below the limits are read."""
    content: dict[str, Any] = {"many": list(range(200_000)), "shared": [("a", (1, 2))] * 20_000, "deep": []}
    for _ in range(50):
        content["deep"] = [content["deep"]]
    for new in (True, False):
        torch.save(content, tmp_path / "a.pyth", _use_new_zipfile_serialization=new)
        assert read_checkpoint(tmp_path / "a.pyth") == content


def test_files_without_checksums_of_their_members_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"a": torch.arange(4.0)}, tmp_path / "a.pyth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read_checkpoint(tmp_path / "a.pyth")["a"], torch.arange(4.0))


def test_repacked_without_compression_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "a.pyth")
    with zipfile.ZipFile(tmp_path / "a.pyth") as old, zipfile.ZipFile(tmp_path / "b.pyth", "w") as new:
        for info in old.infolist():
            new.writestr(zipfile.ZipInfo(info.filename), old.read(info))
    assert torch.equal(read_checkpoint(tmp_path / "b.pyth")["a"], torch.arange(4.0))


def parts(pickled: bytes) -> tuple[bytes, bytes]:
    """Return the members of an archive, and its directory."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(zipfile.ZipInfo(f"a/{name}"), content)
    content = written.getvalue()
    size, place = struct.unpack("<2L", content[-10:-2])
    return content[:place], content[place : place + size]


def two_directories(shown: bytes, read: bytes, wide: bool) -> bytes:
    """Return an archive of which Python's reader sees one pickle, PyTorch's another one; `wide`: by 64-bit records."""
    (members, directory), (others, plain) = parts(read), parts(shown)
    start = len(members) + len(directory)
    first = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, len(directory), len(members)) if wide else b""
    # Python takes the places of members relative to the start of the archive that it believes to see.
    before = 0 if wide else start + len(others) - len(members)
    moved = bytearray(plain)
    for place in [hit.start() for hit in re.finditer(b"PK\1\2", plain)]:
        (offset,) = struct.unpack_from("<L", plain, place + 42)
        struct.pack_into("<L", moved, place + 42, start + len(first) + offset - before)
    content = members + directory + first + others + bytes(moved)
    if not wide:
        return content + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(directory), len(members), 0)
    at = start + len(first) + len(others)
    content += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, len(moved), at)
    content += struct.pack("<4sLQL", b"PK\6\7", 0, start, 1)
    return content + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, 0xFFFFFFFF, 0xFFFFFFFF, 0)


@pytest.mark.parametrize(
    ("wide", "cause"), [(False, "does not end with its directory"), (True, "another place of its directory")]
)
def test_an_archive_that_shows_readers_different_files(wide: bool, cause: str, tmp_path: Path) -> None:
    shown, read = (b"\x80\x02}X\x01\x00\x00\x00" + key + b"K\x01s." for key in (b"a", b"b"))
    path = tmp_path / "two.pyth"
    path.write_bytes(two_directories(shown, read, wide))
    with zipfile.ZipFile(path) as archive:
        assert archive.read("a/data.pkl") == shown
    assert torch.load(path, weights_only=True) == {"b": 1}, "PyTorch reads what the checks have not seen"
    with pytest.raises(ValueError, match=cause):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda content: content + b"\0", "it is damaged .* no directory at its end"),
        (lambda content: content[:-50], "it is damaged .*, or an incomplete copy or download: fetch it again"),
        (lambda content: content[:20], "it is damaged"),
        (lambda content: b"PK\3\4" + content, "its archive names another place"),
    ],
    ids=["behind", "cut", "begun", "before"],
)
def test_bytes_around_an_archive(change: Callable[[bytes], bytes], cause: str, tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "a.pyth")
    (tmp_path / "b.pyth").write_bytes(change((tmp_path / "a.pyth").read_bytes()))
    with pytest.raises(ValueError, match=rf"b\.pyth is not loaded: {cause}"):
        read_checkpoint(tmp_path / "b.pyth")


# --- addresses ---


@pytest.fixture
def requests() -> list[str]:
    """The paths that were asked of `server`."""
    return []


@pytest.fixture
def server(tmp_path: Path, requests: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """An http server on this machine: give it an answer, get the address."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    answers: dict[str, tuple[int, dict[str, str], bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answers[self.path]
            requests.append(self.path)
            time.sleep(float(headers.get("Delay", 0)))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()

    def answering(path: str, body: bytes = b"", status: int = 200, **headers: str) -> str:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answers[path] = status, named, body
        return f"http://127.0.0.1:{made.server_port}{path}"

    yield answering
    made.shutdown()
    made.server_close()


def saved(value: float) -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.tensor(value)}, out)
    return out.getvalue()


def test_an_address_is_fetched_once_and_kept_in_its_own_place(tmp_path: Path, server: Callable[..., str]) -> None:
    address = server("/a/model.pyth?x=1", saved(1.0))
    assert read_checkpoint(address)["a"] == 1.0
    server("/a/model.pyth?x=1", saved(2.0))
    assert read_checkpoint(address)["a"] == 1.0, "from the cache"
    assert read_checkpoint(server("/b/model.pyth", saved(3.0)))["a"] == 3.0, "another address, another file"
    up = server("/../../../../escaped.pyth", saved(4.0))
    assert read_checkpoint(up)["a"] == 4.0
    cache = tmp_path / "torch" / "hub" / "maskfeat"
    found = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert len(found) == 3 and all(path.parent == cache for path in found)


def test_processes_of_the_same_number_fetch_into_files_of_their_own(
    tmp_path: Path, server: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers that share TORCH_HOME often have equal process ids."""
    address = server("/a.pyth", saved(1.0))
    others = download.cached_path(address).with_name(f".{download.cached_path(address).name}.7")
    others.parent.mkdir(parents=True)
    others.write_bytes(b"half of what another container fetches")
    monkeypatch.setattr(os, "getpid", lambda: 7)
    umask = os.umask(0o022)
    try:
        path = download.download(address)
    finally:
        os.umask(umask)
    assert path.read_bytes() == saved(1.0) and others.read_bytes().startswith(b"half")
    assert sorted(path.parent.iterdir()) == sorted([path, others])
    assert path.stat().st_mode & 0o777 == 0o644, "others who share the folder may read it"


@pytest.mark.slow
def test_processes_fetch_one_address_once(tmp_path: Path, requests: list[str], server: Callable[..., str]) -> None:
    """Ranks of a run: one downloads, the others wait for it, and nothing but the file is left."""
    address = server("/a.pyth", saved(1.0), Delay="3")
    code = "import logging, sys, torch; from maskfeat.checkpoint.download import download\n"
    code += "logging.basicConfig(level=logging.INFO, stream=sys.stdout, format='%(message)s'); download(sys.argv[1])"
    command = [sys.executable, "-c", code, address]
    ranks = [subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0] and requests == ["/a.pyth"]
    assert sum("downloading " in words for words in said) == 1
    assert [path.name for path in (tmp_path / "torch" / "hub" / "maskfeat").iterdir()] == [
        download.cached_path(address).name
    ]


def test_file_systems_without_locks(server: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(download.fcntl, "lockf", refused)
    assert download.download(server("/a.pyth", saved(1.0))).read_bytes() == saved(1.0)


def test_a_lock_whose_file_was_taken_away_is_none(server: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening and the locking another process may have finished."""
    address, lock = server("/a.pyth", saved(1.0)), download.fcntl.lockf
    taken = []

    def late(file: IO[bytes], how: int) -> None:
        lock(file, how)
        if not taken:
            taken.append(os.unlink(file.name))

    monkeypatch.setattr(download.fcntl, "lockf", late)
    assert download.download(address).is_file() and len(taken) == 1
    assert len(list(download.cached_path(address).parent.iterdir())) == 1


def test_progress_of_a_download(
    server: Callable[..., str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("maskfeat.progress._LOG_SECONDS", 0.0)
    beats: list[str] = []
    with caplog.at_level("INFO", "maskfeat"):
        prefetch(server("/a.pyth", bytes(5 << 19), Content_Length=str(5 << 19)), beats.append)
    assert len(beats) == 3 and all(word.startswith("downloading http") for word in beats), "a watchdog hears of it"
    name = download.cached_path(server("/a.pyth")).name
    assert [f"{n} of 3 MiB of {name}" in caplog.text for n in (1, 2, 3)] == [True] * 3
    assert "MiB" not in caplog.text.split("3 of 3")[1].split("\n", 1)[1]


@pytest.mark.parametrize("scheme", ["file", "ftp", "data", "gopher"])
def test_no_redirection_leaves_http(tmp_path: Path, server: Callable[..., str], scheme: str) -> None:
    secret = tmp_path / "secret.pyth"
    secret.write_bytes(saved(9.0))
    address = server("/a.pyth", status=302, Location=f"{scheme}://{secret}")
    with pytest.raises(ValueError, match="a.pyth could not be fetched: the server .* (not followed|not allowed)"):
        read_checkpoint(address)
    assert not any((tmp_path / "torch" / "hub" / "maskfeat").iterdir())


def test_https_is_not_sent_back_to_http(monkeypatch: pytest.MonkeyPatch) -> None:
    redirections = download._RedirectHandler()
    request = download.urllib.request.Request("https://example.org/a")
    with pytest.raises(download.URLError, match="not followed"):
        redirections.redirect_request(request, io.BytesIO(), 302, "Found", {}, "http://example.org/a")
    assert redirections.redirect_request(request, io.BytesIO(), 302, "Found", {}, "https://example.org/b") is not None


def test_redirections_within_http_are_followed(server: Callable[..., str]) -> None:
    there = server("/there.pyth", saved(5.0))
    assert read_checkpoint(server("/here.pyth", status=302, Location=there))["a"] == 5.0
    loop = server("/loop.pyth", status=302, Location="/loop.pyth")
    with pytest.raises(ValueError, match="loop.pyth could not be fetched"):
        read_checkpoint(loop)


def test_what_cannot_be_fetched(tmp_path: Path, server: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="could not be fetched: the server answers 404"):
        read_checkpoint(server("/none.pyth", status=404))
    with pytest.raises(ValueError, match="could not be fetched: only 4 of 99 bytes were received"):
        read_checkpoint(server("/cut.pyth", b"abcd", Content_Length="99"))
    monkeypatch.setattr(download, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="is larger than 0 GiB"):
        read_checkpoint(server("/large.pyth", bytes(1000)))
    with pytest.raises(ValueError, match="could not be fetched"):
        read_checkpoint("http://127.0.0.1:9/a.pyth")
    with pytest.raises(ValueError, match=r"ftp://127.0.0.1/a.pyth cannot be read: no handler is registered for ftp://"):
        read_checkpoint("ftp://127.0.0.1/a.pyth")
    assert not any((tmp_path / "torch" / "hub" / "maskfeat").iterdir()), "nothing half is kept"


def test_downloads_are_not_trusted(tmp_path: Path, server: Callable[..., str]) -> None:
    run = malice.called("os system", f"touch {tmp_path / 'ran'}")
    with pytest.raises(ValueError, match="it holds a pickled object of type os.system"):
        read_checkpoint(server("/bad.pyth", malice.archive(malice.nested(run))))
    page = server("/login.pyth", b"<html>log in first")
    kept = re.escape(str(download.cached_path(page)))
    with pytest.raises(ValueError, match=rf"was not written by torch.save \(it was kept as {kept}: delete that to"):
        read_checkpoint(page)
    assert not (tmp_path / "ran").exists()


def test_fetched_files_are_compared_later(server: Callable[..., str]) -> None:
    """By size and hash where they are known, and by what was recorded when the file came."""
    url = server("/w.pth", saved(1.0))
    digest = hashlib.sha256(saved(1.0)).hexdigest()
    path = download.fetch(url, len(saved(1.0)), digest[:8])
    record = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert record == {"url": url, "size": len(saved(1.0)), "sha256": digest}
    assert download.fetch(url) == path
    for known in ((len(saved(1.0)) + 1, ""), (None, "0" * 8)):
        with pytest.raises(UserError, match="is damaged or not the file that"):
            download.fetch(url, *known)
    path.write_bytes(saved(2.0))
    with pytest.raises(UserError, match=r"Delete it and .*w.pth.json beside it to fetch it again"):
        download.fetch(url)
    path.unlink()
    path.with_name(f"{path.name}.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        download.fetch(url)
