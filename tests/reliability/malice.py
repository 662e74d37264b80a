"""Malicious files, made by the tests themselves: small, the same every time, and none ever loaded by plain pickle.

Each is a Case: what reads it, and the file. `make_all` writes them into a folder that also holds a secret that nothing
may show (`secret.mp4`, `secret.png`, both of SECRET_COLOUR, and `secret.yaml`) and an empty folder `sentinel`, into
which every program that they carry would write. Addresses in them lead to a port of this machine.
"""

import io
import os
import pickle
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SECRET = "canary-7d1f"
SECRET_COLOUR = (255, 0, 255)


@dataclass(frozen=True)
class Case:
    """One malicious file.

    Attributes:
        name: of the case.
        reader: "checkpoint", "config", "list", "image" or "video".
        path: what is given to the reader.
        refused: False where reading it as something harmless is right as well.
        options: further arguments of the reader.
    """

    name: str
    reader: str
    path: str
    refused: bool = True
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where cases are written.

    Attributes:
        folder: theirs.
        port: of 127.0.0.1, where connections are counted.
    """

    folder: Path
    port: int

    @property
    def sentinel(self) -> Path:
        """The folder in which nothing may ever appear."""
        return self.folder / "sentinel"

    @property
    def url(self) -> str:
        """An address that must not be asked."""
        return f"http://127.0.0.1:{self.port}/stolen"

    def write(self, name: str, content: bytes | str) -> str:
        """Writes a file; returns its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)


# --- checkpoints ---

STOP, PROTO = b".", b"\x80\x02"
MAGIC = 0x1950A86A20F9469CFC6C


def value(thing: object) -> bytes:
    """The opcodes that push a plain value."""
    return pickle.dumps(thing, protocol=2)[2:-1]


def named(name: str) -> bytes:
    """The opcode that pushes a global: "module name"."""
    module, _, attribute = name.partition(" ")
    return f"c{module}\n{attribute}\n".encode()


def called(name: str, *args: object) -> bytes:
    """The opcodes that call a global with plain arguments."""
    return named(name) + value(args) + b"R"


def nested(opcodes: bytes) -> bytes:
    """A whole pickle {"model_state": {"weight": <opcodes>}}."""
    return PROTO + b"}" + value("model_state") + b"}" + value("weight") + opcodes + b"ss" + STOP


def storage(numel: int, kind: str = "torch FloatStorage", key: str = "0", legacy: bool = False) -> bytes:
    """The opcodes that push a storage."""
    view = b"N" if legacy else b""
    return b"(" + value("storage") + named(kind) + value(key) + value("cpu") + value(numel) + view + b"tQ"


def tensor(
    numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, key: str = "0", legacy: bool = False
) -> bytes:
    """The opcodes that push a tensor, with whatever sizes are claimed."""
    hooks = named("collections OrderedDict") + b")R"
    parts = storage(numel, key=key, legacy=legacy) + value(offset) + value(size) + value(stride) + b"\x89" + hooks
    return named("torch._utils _rebuild_tensor_v2") + b"(" + parts + b"tR"


def archive(pickled: bytes, data: bytes = b"\0" * 16, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """A file as torch.save writes them, around a pickle; `more` are further members, "__" standing for "/"."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as made:
        members = {"data.pkl": pickled, "byteorder": b"little", "data/0": data, "version": b"3\n"}
        members |= {name.replace("__", "/").replace("_pkl", ".pkl"): content for name, content in more.items()}
        for name, content in members.items():
            made.writestr(zipfile.ZipInfo(f"model/{name}"), content, compression)
    return out.getvalue()


def legacy(pickled: bytes, keys: tuple[str, ...] = (), data: bytes = b"") -> bytes:
    """A file of PyTorch before 1.6 around a pickle."""
    heads = [pickle.dumps(part, protocol=2) for part in (MAGIC, 1001, {"little_endian": True})]
    return b"".join([*heads, pickled, pickle.dumps(list(keys), protocol=2), data])


def tar(pickled: bytes) -> bytes:
    """A file of PyTorch before 0.1.10 around a pickle, its members leading out of the folder."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        for name in ("storages", "tensors", "pickle", "../../sentinel/tar"):
            info = tarfile.TarInfo(name)
            info.size = len(pickled)
            made.addfile(info, io.BytesIO(pickled))
    return out.getvalue()


def programs(place: Place) -> dict[str, bytes]:
    """Opcodes that would run something, by the name of what they call."""
    mark = str(place.sentinel / "ran")
    touch = f"touch {mark}"
    code = f"open({mark!r}, 'w').close()"
    calls: list[tuple[str, tuple[object, ...]]] = [
        ("os system", (touch,)),
        ("posix system", (touch,)),
        ("nt system", (touch,)),
        ("os popen", (touch,)),
        ("os execvp", ("touch", ["touch", mark])),
        ("pty spawn", (["touch", mark],)),
        ("subprocess Popen", (["touch", mark],)),
        ("subprocess check_output", (["touch", mark],)),
        ("builtins eval", (code,)),
        ("builtins exec", (code,)),
        ("__builtin__ eval", (code,)),
        ("builtins open", (mark, "w")),
        ("builtins getattr", ("x", "join")),
        ("builtins __import__", ("os",)),
        ("shutil rmtree", (str(place.sentinel),)),
        ("shutil copy", (str(place.folder / "secret.yaml"), mark)),
        ("webbrowser open", (place.url,)),
        ("importlib import_module", ("antigravity",)),
        ("runpy run_path", (mark,)),
        ("timeit timeit", (code,)),
        ("urllib.request urlopen", (place.url,)),
        ("socket create_connection", (("127.0.0.1", place.port),)),
        ("ctypes CDLL", ("libc.so.6",)),
        ("torch load", (place.url,)),
        ("torch.hub load", ("a/b", "c")),
        ("torch.hub load_state_dict_from_url", (place.url,)),
        ("torch.utils.cpp_extension load_inline", ("a", code)),
        ("torch.serialization load", (mark,)),
        ("torch._utils _rebuild_device_tensor_from_numpy", (1, 2, 3, 4)),
        ("torch._tensor _rebuild_from_type_v2", (code, 1, (), {})),
        ("numpy load", (mark,)),
        ("numpy.core.multiarray _reconstruct", (1, 2, 3)),
        ("numpy.testing._private.utils runstring", (code, {})),
        ("maskfeat.engine.run main", (["--cfg", mark],)),
        ("_codecs encode", ("x", "zlib_codec")),
    ]
    return {name: called(name, *args) for name, args in calls}


def pickles(place: Place) -> Iterator[tuple[str, bytes]]:
    """Whole files that would run something, by the way they are packed."""
    for name, opcodes in programs(place).items():
        yield f"zip_{name.replace(' ', '.')}", archive(nested(opcodes))
    run = called("os system", f"touch {place.sentinel / 'ran'}")
    yield "legacy", legacy(nested(run))
    yield "legacy_before_the_magic_number", PROTO + run + STOP
    yield "legacy_after_the_weights", legacy(nested(value(1))) + PROTO + run + STOP
    yield "legacy_in_the_list_of_storages", legacy(nested(value(1)))[: -len(pickle.dumps([], 2))] + PROTO + run + STOP
    yield "tar", tar(nested(run))
    yield "bare", nested(run)
    yield "torchscript", archive(nested(run), constants_pkl=nested(run), code____torch__="import os")
    yield "second_pickle", archive(nested(value(1)), constants_pkl=PROTO + run + STOP)
    yield "protocol_0", f"cos\nsystem\n(S'touch {place.sentinel / 'ran'}'\ntR.".encode()
    yield "inst", archive(PROTO + b"(" + value("touch x") + b"ios\nsystem\n" + STOP)
    yield "obj", archive(PROTO + b"(" + named("os system") + value("touch x") + b"o" + STOP)
    stacked = pickle.dumps("os", 4)[2:-1] + pickle.dumps("system", 4)[2:-1] + b"\x93"
    yield "stack_global", archive(b"\x80\x04" + stacked + value(("touch x",)) + b"R.")
    yield "persistent_module", legacy(PROTO + b"(" + value("module") + named("os system") + value("a") * 2 + b"tQ.")
    yield "persistent_text", archive(PROTO + b"Pos.system\n.")
    yield "extension", archive(PROTO + b"\x82\x01.")
    empty = named("collections OrderedDict") + b")R"
    yield "hidden_method", archive(PROTO + empty + b"}" + value("items") + named("torch Size") + b"sb.")
    yield "hidden_class", archive(PROTO + named("argparse Namespace") + b"}" + value("__init__") + b"Nsb.")
    state = b"}" + value("hooks") + run + b"s"
    yield "state_of_options", archive(nested(named("argparse Namespace") + b")\x81" + state + b"b"))
    yield "hooks", archive(nested(tensor(4, (4,), (1,))[:-5] + b"}" + value("a") + run + b"stR"))


def lies(place: Place) -> Iterator[tuple[str, bytes]]:
    """Files that claim what they do not have, or that grow when they are read."""
    big = 1 << 33
    yield "numel", archive(nested(tensor(big, (big,), (1,))))
    yield "numel_negative", archive(nested(tensor(-4, (4,), (1,))))
    yield "size", archive(nested(tensor(4, (big,), (1,))))
    yield "size_negative", archive(nested(tensor(4, (-4,), (1,))))
    yield "expanded", archive(nested(tensor(4, (big, big), (0, 0))))
    yield "offset", archive(nested(tensor(4, (4,), (1,), offset=1 << 40)))
    yield "offset_negative", archive(nested(tensor(4, (4,), (1,), offset=-4)))
    yield "stride", archive(nested(tensor(4, (2, 2), (1 << 61, 1 << 61))))
    yield "dimensions", archive(nested(tensor(4, (1,) * 10_000, (0,) * 10_000)))
    yield "missing_storage", archive(nested(tensor(4, (4,), (1,), key="9")))
    yield "path_as_storage", archive(nested(tensor(4, (4,), (1,), key="../../secret.yaml")))
    for name, call in {
        "tensor_of_size": called("torch Tensor", big * 8),
        "bytearray_of_size": called("builtins bytearray", big * 8),
        "storage_of_size": called("torch.storage UntypedStorage", big * 8),
        "meta": named("torch._utils _rebuild_meta_tensor_no_storage")
        + (b"(" + named("torch float32") + value((big,)) + value((1,)) + b"\x89tR"),
        "sparse": called("torch._utils _rebuild_sparse_tensor", 1, 2),
        "quantized": called("torch._utils _rebuild_qtensor", 1, 2),
    }.items():
        yield name, archive(nested(call))
    yield "expanded_view", archive(nested(tensor(4, (big,), (0,))))
    made = named("torch Tensor") * 2 + value((1000, 1000)) + b"}"
    yield "tensor_without_contents", archive(nested(named("torch._tensor _rebuild_from_type_v2") + b"(" + made + b"tR"))
    encoded = called("_codecs encode", "aa" * 500, "latin1")
    for _ in range(40):
        encoded = named("_codecs encode") + b"(" + encoded + value("hex_codec") + b"tR"
    yield "hex_of_hex", archive(nested(encoded))
    yield (
        "legacy_numel",
        legacy(nested(tensor(big, (4,), (1,), legacy=True)), ("0",), struct.pack("<q", big) + b"\0" * 16),
    )
    yield (
        "legacy_two_lengths",
        legacy(nested(tensor(4, (4,), (1,), legacy=True)), ("0",), struct.pack("<q", big) + b"\0" * 16),
    )
    yield "legacy_nothing_there", legacy(nested(tensor(4, (4,), (1,), legacy=True)))
    yield "deflated", archive(nested(value("a" * 20_000_000)), compression=zipfile.ZIP_DEFLATED)
    yield "deflated_storage", archive(nested(value(1)), bytes(20_000_000), zipfile.ZIP_DEFLATED)
    yield "lzma", archive(nested(value(1)), bytes(1000), zipfile.ZIP_LZMA)
    good = archive(nested(tensor(4, (4,), (1,))))
    yield "claims_terabytes", good.replace(struct.pack("<II", 16, 16), struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0))
    run = called("os system", f"touch {place.sentinel / 'ran'}")
    harmless, gadget = nested(value(1)), nested(run)
    yield "member_twice", _renamed(archive(harmless, data_pkx=gadget), b"data_pkx", b"data.pkl")
    yield "member_twice_but_for_case", _renamed(archive(harmless, DATA_pkl=gadget), b"", b"")
    yield "member_with_nul", _renamed(archive(harmless, data_pklx=gadget), b"data.pklx", b"data.pkl\0")
    yield "two_archives", archive(gadget) + archive(harmless)
    yield "two_archives_reversed", archive(harmless) + archive(gadget)
    yield "overlapping", _overlapping(good)
    yield "two_names", _last_replaced(archive(harmless, other_pkl=gadget), b"other.pkl", b"third.pkl")
    yield "ends_early", good[: len(good) // 2]
    yield "memo_of_4_billion", archive(PROTO + b"}r\xff\xff\xff\xff.")
    yield "text_of_4_gigabytes", archive(PROTO + b"X\xff\xff\xff\xffabc.")
    yield "legacy_text_of_4_gigabytes", PROTO + b"X\xff\xff\xff\xffabc."
    yield "deep_key", archive(PROTO + b"}" + b")" + b"\x85" * 200_000 + b"Ns.")
    yield "deep_list", archive(PROTO + b"]" * 20_000 + b"a" * 19_999 + b".")
    laughs = value("lol") + b"\x85q\x01" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(1, 60))
    yield "laughs", archive(nested(laughs))
    yield "laughs_as_key", archive(PROTO + b"}" + laughs + b"Ns.")
    yield "holds_itself", archive(PROTO + b"}q\x01" + value("model_state") + b"h\x01s.")
    yield "list_holds_itself", archive(nested(b"]q\x01h\x01a"))
    yield "many_opcodes", archive(PROTO + b"N" * 1_100_000 + b".")
    yield "big_int", archive(nested(b"\x8b" + struct.pack("<i", 1 << 30)))
    yield "no_end", archive(PROTO + b"}")
    yield "no_dict", archive(PROTO + b"].")


def _renamed(data: bytes, old: bytes, new: bytes) -> bytes:
    return data.replace(old, new) if old else data


def _last_replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    """The name in the archive's directory alone."""
    head, _, tail = data.rpartition(old)
    return head + new + tail


def _overlapping(data: bytes) -> bytes:
    """Every entry of the directory leads to the first member."""
    out = bytearray(data)
    place = out.find(b"PK\1\2")
    while place >= 0:
        out[place + 42 : place + 46] = b"\0" * 4
        place = out.find(b"PK\1\2", place + 4)
    return bytes(out)


def tensors_files(place: Place) -> Iterator[tuple[str, bytes]]:
    """safetensors files with headers that lie."""
    for name, header in {
        "beyond": '{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}',
        "overflow": '{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}',
        "negative": '{"a":{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}}',
        "deep": '{"a":' + "[" * 100_000,
    }.items():
        yield name, struct.pack("<Q", len(header)) + header.encode() + bytes(16)
    yield "header_of_terabytes", struct.pack("<Q", 1 << 60) + b"{}"


def checkpoints(place: Place) -> Iterator[Case]:
    """What `read_checkpoint` must not fall for."""
    for name, content in [*pickles(place), *lies(place)]:
        # What follows the weights in an old file is never looked at; a memo is a dict, however large its numbers; a
        # cycle ends where parameters are looked for.
        refused = name not in ("legacy_after_the_weights", "memo_of_4_billion", "holds_itself", "list_holds_itself")
        yield Case(f"checkpoint_{name}", "checkpoint", place.write(f"ckpt/{name}.pyth", content), refused)
    for name, content in tensors_files(place):
        path = place.write(f"ckpt/{name}.safetensors", content)
        yield Case(f"checkpoint_tensors_{name}", "checkpoint", path)
    laughs = "a:\n  a: &a [x,x,x,x,x,x,x,x,x]\n" + _chain("abcdefghi", "[{}]")
    merges = "a:\n  a: &a {x: 1}\n" + _chain("abcdefghi", "{{<<: [{}]}}")
    for name, text in {
        "laughs": laughs,
        "merges": merges,
        "tag": "MODEL: !!python/object/apply:os.system [touch x]",
        "deep": "[" * 100_000,
        "sexagesimal": "MODEL:\n  MODEL_NAME: 1" + ":1" * 400_000,
    }.items():
        content = archive(PROTO + b"}" + value("cfg") + value(text) + b"s.")
        yield Case(f"checkpoint_cfg_{name}", "checkpoint", place.write(f"ckpt/cfg_{name}.pyth", content), refused=False)
    os.mkfifo(place.folder / "ckpt" / "fifo.pyth")
    (place.folder / "ckpt" / "zero.pyth").symlink_to("/dev/zero")
    (place.folder / "ckpt" / "tty.pyth").symlink_to("/dev/tty")
    (place.folder / "ckpt" / "folder.pyth").mkdir()
    for name in ("fifo", "zero", "tty", "folder", "missing"):
        yield Case(f"checkpoint_{name}", "checkpoint", str(place.folder / "ckpt" / f"{name}.pyth"))
    for name, address in {
        "ftp": f"ftp://127.0.0.1:{place.port}/a.pyth",
        "file": f"file://{place.folder / 'secret.yaml'}",
        "smb": f"smb://127.0.0.1:{place.port}/a",
        "nul": "a\0b",
    }.items():
        yield Case(f"checkpoint_address_{name}", "checkpoint", address)


# --- configs and lists ---


def _chain(names: str, line: str) -> str:
    return "".join(
        f"  {c}: &{c} {line.format(','.join(['*' + p] * 9))}\n" for p, c in zip(names, names[1:], strict=False)
    )


def config_texts(place: Place) -> Iterator[tuple[str, str | bytes]]:
    """YAML that must be refused."""
    ran = f"touch {place.sentinel / 'ran'}"
    for tag in (
        f'!!python/object/apply:os.system ["{ran}"]',
        f'!!python/object/new:os.system ["{ran}"]',
        "!!python/name:os.system",
        "!!python/module:antigravity",
        f'!!python/object/apply:subprocess.Popen [["touch", "{place.sentinel / "ran"}"]]',
        f"!!python/object/apply:builtins.eval [\"open({str(place.sentinel / 'ran')!r},'w')\"]",
        "!!python/object:yaml.YAMLObject {}",
        "!!python/tuple [1, 2]",
    ):
        yield f"tag_{''.join(filter(str.isalnum, tag))[:40]}", f"TASK: {tag}\n"
    yield "tag_directive", f'%TAG ! tag:yaml.org,2002:python/object/apply:\n---\nTASK: !os.system ["{ran}"]\n'
    yield "tag_key", f'? !!python/object/apply:os.system ["{ran}"]\n: 1\n'
    for name, base in {
        "up": "../secret.yaml",
        "up_and_down": "x/../../secret.yaml",
        "absolute": str(place.folder / "secret.yaml"),
        "link": "link.yaml",
        "folder_link": "linked/secret.yaml",
        "url": place.url,
        "file_url": f"file://{place.folder / 'secret.yaml'}",
        "home": "~/secret.yaml",
        "fifo": "fifo.yaml",
        "device": "/dev/zero",
        "proc": "/proc/self/environ",
        "nul": '"a\\0b.yaml"',
        "cycle": "base_cycle.yaml",
        "list": "[a.yaml]",
        "long": "a/" * 3000 + "a.yaml",
    }.items():
        yield f"base_{name}", f"_BASE_: {base}\n"
    for name, plugin in {
        "path": str(place.folder / "cfg" / "plugin.py"),
        "relative": "../cfg/plugin",
        "beside": "plugin",  # the folder of the YAML is not searched
        "url": place.url,
        "nul": '"os\\0"',
        "dots": "..os",
        "call": f"os.system('{ran}')",
        "missing": "no_such_module_anywhere",
        "nothing": "json",
        "package": "maskfeat.config",
        "main": "[json, [os]]",
        "long": "a." * 2000 + "a",
    }.items():
        yield f"plugin_{name}", f"PLUGINS: {plugin if plugin.startswith('[') else f'[{plugin}]'}\n"
    yield "laughs", "BN:\n  a: &a [x,x,x,x,x,x,x,x,x]\n" + _chain("abcdefghi", "[{}]")
    yield "merges", "BN:\n  a: &a {x: 1}\n" + _chain("abcdefghi", "{{<<: [{}]}}")
    yield "cycle", "BN: &a [*a]\n"
    yield "deep", "BN: " + "[" * 100_000
    yield "deep_block", "BN:\n" + "".join(" " * i + "- \n" for i in range(1, 1200))
    yield "deep_maps", "{a: " * 50_000
    yield "large", "TASK: " + "a" * 1_100_000
    yield "long_value", "TASK: " + "a" * 900_000
    yield "wide", "BN: [" + "1," * 400_000 + "]"
    yield "anchors", "BN: [" + ",".join(f"&a{i} x" for i in range(60_000)) + "]"
    yield "sexagesimal", "RNG_SEED: 1" + ":1" * 400_000
    yield "sexagesimal_float", "SOLVER.BASE_LR: 1" + ":1" * 400_000 + ".5"
    yield "digits", "RNG_SEED: " + "9" * 5_000
    yield "hex_digits", "RNG_SEED: 0x" + "f" * 9_000
    yield "brackets", "SOLVER.BETAS: '" + "(" * 9_000 + "'"
    yield "minuses", "SOLVER.BASE_LR: '" + "-" * 9_000 + "1'"
    yield "sums", "SOLVER.BETAS: '" + "1+" * 4_900 + "1'"
    yield "power", "RNG_SEED: '9**9**9'"
    yield "nul_byte", "TASK: a\0b\n"
    yield "utf16", "TASK: a\n".encode("utf-16")
    yield "binary", bytes(range(256)) * 40


def configs(place: Place) -> Iterator[Case]:
    """What `load_config` must not fall for."""
    folder = place.folder / "cfg"
    folder.mkdir()
    (folder / "link.yaml").symlink_to(place.folder / "secret.yaml")
    (folder / "linked").symlink_to(place.folder)
    os.mkfifo(folder / "fifo.yaml")
    place.write("cfg/plugin.py", f"import pathlib\npathlib.Path({str(place.sentinel / 'ran')!r}).touch()\n")
    for name, content in config_texts(place):
        yield Case(f"config_{name}", "config", place.write(f"cfg/{name}.yaml", content))
    yield Case("config_fifo", "config", str(folder / "fifo.yaml"))
    yield Case("config_device", "config", "/dev/zero")
    yield Case("config_url", "config", place.url)


def lists(place: Place) -> Iterator[Case]:
    """What `read_sample_list`, and reading the videos that it names, must not fall for."""
    folder = place.folder / "csv"
    (folder / "videos").mkdir(parents=True)
    os.mkfifo(folder / "videos" / "fifo.mp4")
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(folder / "videos")  # the name of a socket may not be long
        bound.bind("socket.mp4")
        os.chdir(here)
    (folder / "videos" / "zero.mp4").symlink_to("/dev/zero")
    (folder / "videos" / "linked").symlink_to(place.folder / "ckpt")
    (folder / "videos" / "loop.mp4").symlink_to("loop.mp4")
    secret = place.folder / "secret.mp4"
    for name, line in {
        "absolute": f"{secret} 0",
        "up": "../../secret.mp4 0",
        "up_later": "a/../../../secret.mp4 0",
        "up_behind_a_link": "linked/../secret.mp4 0",
        "http": f"{place.url} 0",
        "rtsp": f"rtsp://127.0.0.1:{place.port}/a 0",
        "tcp": f"tcp:127.0.0.1:{place.port} 0",
        "concat": f"concat:{secret}|{secret} 0",
        "subfile": f"subfile,,start,0,end,9999,,:{secret} 0",
        "file": f"file:{secret} 0",
        "data": "data:video/mp4;base64,AAAA 0",
        "pipe": "pipe:0 0",
        "device": "/dev/zero 0",
        "nul": "a\0b.mp4 0",
        "fifo": "fifo.mp4 0",
        "socket": "socket.mp4 0",
        "linked_device": "zero.mp4 0",
        "loop": "loop.mp4 0",
        "folder": ". 0",
        "proc": "/proc/self/mem 0",
        "long_name": "a" * 5000 + ".mp4 0",
        "long_line": "a" * 20_000_000,
        "digits": "a.mp4 " + "9" * 10_000,
        "no_label": "a.mp4",
        "not_text": "\udcff 0",
    }.items():
        content = line.encode("utf-8", "surrogateescape")
        options = {"prefix": str(folder / "videos")}
        yield Case(f"list_{name}", "list", place.write(f"csv/{name}.csv", content), options=options)
    for name in ("device", "proc", "http", "concat", "pipe"):
        yield Case(f"list_{name}_without_prefix", "list", str(folder / f"{name}.csv"), options={"prefix": ""})
    os.mkfifo(folder / "fifo.csv.fifo")
    yield Case("list_is_fifo", "list", str(folder / "fifo.csv.fifo"), options={"prefix": ""})
    yield Case("list_is_device", "list", "/dev/zero", options={"prefix": ""})


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def make_all(place: Place, makers: "list[Callable[[Place], Iterator[Case]]]") -> list[Case]:
    """Writes all cases, and the secrets."""
    place.folder.mkdir(parents=True, exist_ok=True)
    place.sentinel.mkdir()
    place.write("secret.yaml", f"TASK: {SECRET}\n")
    return [case for maker in makers for case in maker(place)]
