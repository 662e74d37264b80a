"""Weights files: what is read, what a stranger's is refused for, and addresses."""

import io
import threading
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from maskfeat.checkpoint import download
from maskfeat.checkpoint.reading import read_checkpoint, trained_model
from maskfeat.checkpoint.weight_scan import Refused, scan
from tests.reliability import malice


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
        ("numel", "storage 0 claims 34359738368 bytes and has 16"),
        ("size", "a tensor of 8589934592 claims more than the 16 bytes"),
        ("expanded", "claims more than the 16 bytes"),
        ("offset", "claims more than the 16 bytes"),
        ("tensor_of_size", "it asks for 'torch.Tensor'"),
        ("legacy_nothing_there", "names other storages"),
        ("deflated", "compressed"),
        ("member_twice_but_for_case", "has a member twice|data.pkl"),
        ("two_archives", "."),
        ("deep_list", "nested more than 64 deep"),
        ("laughs", "more than 1000000 values"),
        ("holds_itself", "a value holds itself"),
    ],
)
def test_causes(tmp_path: Path, name: str, cause: str) -> None:
    content = dict(malice.lies(malice.Place(tmp_path, 0)))[name]
    with pytest.raises(Refused, match=cause):
        scan(io.BytesIO(content))


def test_repacked_without_compression_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "a.pyth")
    with zipfile.ZipFile(tmp_path / "a.pyth") as old, zipfile.ZipFile(tmp_path / "b.pyth", "w") as new:
        for info in old.infolist():
            new.writestr(zipfile.ZipInfo(info.filename), old.read(info))
    assert torch.equal(read_checkpoint(tmp_path / "b.pyth")["a"], torch.arange(4.0))


# --- addresses ---


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """An http server on this machine: give it an answer, get the address."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    answers: dict[str, tuple[int, dict[str, str], bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answers[self.path]
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


@pytest.mark.parametrize("scheme", ["file", "ftp", "data", "gopher"])
def test_no_redirection_leaves_http(tmp_path: Path, server: Callable[..., str], scheme: str) -> None:
    secret = tmp_path / "secret.pyth"
    secret.write_bytes(saved(9.0))
    address = server("/a.pyth", status=302, Location=f"{scheme}://{secret}")
    with pytest.raises(ValueError, match="a.pyth could not be fetched: the server .* (not followed|not allowed)"):
        read_checkpoint(address)
    assert not any((tmp_path / "torch" / "hub" / "maskfeat").iterdir())


def test_https_is_not_sent_back_to_http(monkeypatch: pytest.MonkeyPatch) -> None:
    redirections = download._Redirections()
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
    with pytest.raises(ValueError, match="could not be fetched: 4 of 99 bytes came"):
        read_checkpoint(server("/cut.pyth", b"abcd", Content_Length="99"))
    monkeypatch.setattr(download, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="is larger than 0 GiB"):
        read_checkpoint(server("/large.pyth", bytes(1000)))
    with pytest.raises(ValueError, match="could not be fetched"):
        read_checkpoint("http://127.0.0.1:9/a.pyth")
    with pytest.raises(ValueError, match=r"ftp://127.0.0.1/a.pyth cannot be read: no handler is registered for ftp://"):
        read_checkpoint("ftp://127.0.0.1/a.pyth")
    assert not any((tmp_path / "torch" / "hub" / "maskfeat").iterdir()), "nothing half is kept"


def test_what_was_fetched_is_scanned(tmp_path: Path, server: Callable[..., str]) -> None:
    run = malice.called("os system", f"touch {tmp_path / 'ran'}")
    with pytest.raises(ValueError, match="it asks for 'os.system'"):
        read_checkpoint(server("/bad.pyth", malice.archive(malice.nested(run))))
    assert not (tmp_path / "ran").exists()
