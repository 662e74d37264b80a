"""What a file of weights holds, found out without running, loading or allocating any of it.

`torch.load(weights_only=True)` runs nothing that is not on its list. That list is longer than weights need, though,
and the sizes that a file claims are allocated before they are compared with the bytes that are there. So the structure
is walked first, with a stack machine that knows the pickle opcodes of state dicts and calls nothing. It refuses

- every name that is not in `CALLED`, `STORAGES`, `DTYPES` or among the `OPTIONS` that training scripts save;
- tensors that reach outside of their storage or claim more bytes than it has, storages that claim more than the file;
- archives whose members are compressed, overlap, share a name, or lie otherwise than PyTorch writes them;
- nesting, repetition and cycles that would make small files large or endless for whoever walks the result.
"""

import io
import itertools
import pickletools
import struct
from collections.abc import Callable
from typing import Any, BinaryIO
from zipfile import BadZipFile

from maskfeat.checkpoint.weight_archive import Refused, demand, members
from maskfeat.checkpoint.weight_values import (
    CALLED,
    DTYPES,
    OPTIONS,
    STORAGES,
    Name,
    Value,
    is_a,
    is_count,
    is_plain_key,
)

MAX_PICKLE = 16 << 20
"""Bytes of a pickle, which holds names and shapes; the numbers lie elsewhere."""
MAX_OPCODES = 1_000_000

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of files before PyTorch 1.6
_MARK = object()
_NAMES = {*CALLED, *STORAGES, *DTYPES, *OPTIONS}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
_EMPTY = {"EMPTY_TUPLE": "tuple", "EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Walk:
    """One pickle, walked to its end.

    Args:
        storage: told of every storage that the pickle names: key, bytes, bytes of an element.
        legacy: of a file before PyTorch 1.6.
    """

    def __init__(self, storage: Callable[[str, int, int], None], legacy: bool) -> None:
        self.storage, self.legacy = storage, legacy
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, text: io.BytesIO) -> Any:
        """What the pickle at this place holds: plain Python for single values, or else a Value."""
        for count, (opcode, arg, _) in enumerate(pickletools.genops(text)):
            demand(count < MAX_OPCODES, "its pickle is too large for weights")
            if opcode.name == "STOP":
                demand(len(self.stack) == 1, "its pickle is damaged")
                return self.pop()
            self.step(opcode.name, arg)
        raise Refused("its pickle is damaged")

    def pop(self) -> Any:
        demand(self.stack and self.stack[-1] is not _MARK, "its pickle is damaged")
        return self.stack.pop()

    def top(self) -> Any:
        demand(self.stack and self.stack[-1] is not _MARK, "its pickle is damaged")
        return self.stack[-1]

    def marked(self) -> list[Any]:
        """What lies above the last mark."""
        parts = list(itertools.takewhile(lambda part: part is not _MARK, reversed(self.stack)))[::-1]
        demand(len(parts) < len(self.stack), "its pickle is damaged")
        del self.stack[-len(parts) - 1 :]
        return parts

    def step(self, name: str, arg: Any) -> None:
        """One opcode."""
        push = self.stack.append
        if name in _LITERALS:
            push(arg)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _EMPTY:
            push(Value(_EMPTY[name]))
        elif name == "MARK":
            push(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[arg] = self.top()
        elif name in ("BINGET", "LONG_BINGET"):
            demand(arg in self.memo, "its pickle is damaged")
            value = self.memo[arg]
            if isinstance(value, Value):
                value.closed = True
            push(value)
        elif name == "TUPLE":
            push(Value("tuple", self.marked()))
        elif name in _TUPLES:
            push(Value("tuple", [self.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name == "GLOBAL":
            demand(arg in _NAMES, f"it asks for {str(arg)[:80].replace(' ', '.')!r}")
            push(Name(arg))
        elif name == "PROTO":
            demand(arg == 2, f"its pickle has protocol {arg}, PyTorch's has 2")
        else:
            self.combine(name)

    def combine(self, name: str) -> None:
        """An opcode that puts values together."""
        if name in ("APPEND", "APPENDS"):
            parts = self.marked() if name == "APPENDS" else [self.pop()]
            demand(is_a(self.top(), "list"), "its pickle is damaged")
            self.top().add(parts, keep=True)
        elif name in ("SETITEM", "SETITEMS"):
            parts = self.marked() if name == "SETITEMS" else [self.pop(), self.pop()][::-1]
            demand(is_a(self.top(), "dict") and len(parts) % 2 == 0, "its pickle is damaged")
            demand(all(map(is_plain_key, parts[::2])), "a dict with keys that are no plain values")
            self.top().add(parts[::2], keep=True)
            self.top().add(parts[1::2], keep=False)
        elif name == "BUILD":
            self.build(self.pop(), self.top())
        elif name == "REDUCE":
            args, called = self.pop(), self.pop()
            demand(
                isinstance(called, Name) and called in CALLED and is_a(args, "tuple"),
                "it calls what is not to be called",
            )
            self.stack.append(CALLED[called](*args.items))
        elif name == "NEWOBJ":
            args, made = self.pop(), self.pop()
            demand(isinstance(made, Name) and made in OPTIONS, "it makes an object that is no plain value")
            demand(is_a(args, "tuple") and not args.items, "it makes an object with arguments")
            self.stack.append(Value("options" if made == OPTIONS[0] else "dict"))
        elif name == "BINPERSID":
            self.stack.append(self.persistent(self.pop()))
        else:
            raise Refused(f"its pickle has {name}, which PyTorch's have not")

    def build(self, state: Any, target: Any) -> None:
        """Attributes: any of options, of dicts only those that hide no method."""
        demand(is_a(target, "options") or is_a(target, "dict"), "it sets attributes of something else than a dict")
        names = state.items if is_a(state, "dict") else [None]
        demand(all(isinstance(name, str) for name in names), "it sets attributes in another way than PyTorch")
        if target.kind == "dict":
            known = all(name == "_metadata" or str(name).startswith("__") for name in names)
            demand(known, "it sets attributes of a dict, which would hide its methods")
        target.add([state], keep=False)

    def persistent(self, pid: Any) -> Value:
        """A storage: ("storage", type, key, location, number of elements) and, in old files, None."""
        demand(is_a(pid, "tuple") and len(pid.items) == 5 + self.legacy, "it refers to something else than a storage")
        word, kind, key, location, numel = pid.items[:5]
        demand(
            word == "storage"
            and isinstance(kind, Name)
            and kind in STORAGES
            and isinstance(key, str)
            and isinstance(location, str)
            and is_count(numel)
            and pid.items[5:] in ([], [None]),
            "it refers to something else than a storage",
        )
        unit = STORAGES[kind]
        self.storage(key, numel * unit, unit)
        return Value("storage", nbytes=numel * unit, unit=unit)


def scan(file: BinaryIO) -> None:
    """Walks a file that `torch.save` is to have written, and leaves it at its beginning.

    Raises:
        Refused: it is damaged, or holds more than weights and plain values.
    """
    try:
        file.seek(0)
        if file.read(4) == b"PK\3\4":
            _scan_archive(file)
        else:
            file.seek(0)
            _scan_legacy(file)
    except Refused:
        raise
    # What zipfile, struct and pickletools raise on damage.
    except (
        ValueError,
        ArithmeticError,
        LookupError,
        OSError,
        EOFError,
        BadZipFile,
        RuntimeError,
        struct.error,
    ) as error:
        raise Refused(f"its structure is damaged ({str(error)[:120]})") from error
    finally:
        file.seek(0)


def _scan_legacy(file: BinaryIO) -> None:
    """Files before PyTorch 1.6: five pickles one after the other, then the storages, each with its length."""
    sizes: dict[str, tuple[int, int]] = {}

    def storage(key: str, nbytes: int, unit: int) -> None:
        demand(sizes.setdefault(key, (nbytes, unit)) == (nbytes, unit), "a storage has two sizes")

    end = file.seek(0, 2)
    file.seek(0)
    text = io.BytesIO(file.read(MAX_PICKLE))
    magic, protocol, _, _, keys = (_Walk(storage, legacy=True).run(text) for _ in range(5))
    demand(magic == _MAGIC and protocol == _PROTOCOL, "it is no file of PyTorch")
    demand(
        is_a(keys, "list") and all(isinstance(key, str) for key in keys.items) and sorted(keys.items) == sorted(sizes),
        "it names other storages than it has",
    )
    file.seek(text.tell())
    for key in keys.items:
        nbytes, unit = sizes[key]
        (numel,) = struct.unpack("<q", file.read(8))
        demand(numel * unit == nbytes, "a storage has two sizes")
        demand(file.seek(nbytes, 1) <= end, f"it claims {nbytes} bytes of numbers that are not there")


def _scan_archive(file: BinaryIO) -> None:
    """Files since PyTorch 1.6: an archive with data.pkl and one member for each storage, none of them compressed."""
    sizes = members(file)
    root = next(iter(sizes)).split("/", 1)[0]
    demand(f"{root}/data.pkl" in sizes, "it has no data.pkl")
    demand(f"{root}/constants.pkl" not in sizes, "it is a TorchScript archive, which holds a program")

    def storage(key: str, nbytes: int, unit: int) -> None:
        found = sizes.get(f"{root}/data/{key}", (0, -1))[1]
        demand(found == nbytes, f"storage {key[:40]} claims {nbytes} bytes and has {max(found, 0)}")

    for name, (_, size) in sizes.items():
        short = name.split("/", 1)[-1]
        demand(short.startswith("data/") or size <= MAX_PICKLE, "its pickle is too large for weights")
        demand(short.startswith("data") or size <= 1 << 16, f"its member {short[:40]} is too large")
    start, size = sizes[f"{root}/data.pkl"]
    file.seek(start)
    _Walk(storage, legacy=False).run(io.BytesIO(file.read(size)))
