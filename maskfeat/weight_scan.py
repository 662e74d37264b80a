"""What a file of weights holds, found out without running, loading or allocating any of it.

`torch.load(weights_only=True)` runs nothing that is not on its list. That list is longer than weights need, though,
and the sizes that a file claims are allocated before they are compared with the bytes that are there. So the structure
is walked first, with a stack machine that knows the pickle opcodes of state dicts and calls nothing. It refuses

- every name that is not in `_CALLED`, `_STORAGES`, `_DTYPES` or among the options that training scripts save;
- tensors that reach outside of their storage or claim more bytes than it has, storages that claim more than the file;
- archives whose members are compressed, overlap, share a name, or lie otherwise than PyTorch writes them;
- nesting, repetition and cycles that would make small files large or endless for whoever walks the result.
"""

import io
import itertools
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

from maskfeat.weight_archive import Refused, demand, members

MAX_PICKLE = 16 << 20
"""Bytes of a pickle, which holds names and shapes; the numbers lie elsewhere."""
MAX_OPCODES = 4_000_000
MAX_VALUES = 4_000_000
"""Values, counted as often as they are referred to."""
MAX_DEPTH = 64

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of files before PyTorch 1.6
_SIZES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
    "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8,
}  # fmt: skip
_STORAGES = {f"torch {name}Storage": size for name, size in _SIZES.items()}
_STORAGES["torch.storage UntypedStorage"] = 1
_DTYPES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1, "complex64": 8, "complex128": 16, "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}  # fmt: skip
_DTYPES = {f"torch {name}": size for name, size in _DTYPES.items()}
_OPTIONS = ("argparse Namespace", "yacs.config CfgNode")
_SCALARS = (str, int, float, bytes, type(None))  # bool is an int


class _Name(str):
    """A global of the pickle: "module name"."""


class _Value:
    """A container or an object: what it is, what it holds, and how deep and large it is, all told.

    Attributes:
        kind: "tuple", "list", "dict", "set", "storage", "tensor", "options" or "other".
        items: of tuples, lists and dicts (keys alone).
        nbytes, unit: of storages, how many bytes they claim, and of one element.
        closed: part of something else already: it cannot grow any more, so that no value can hold itself.
    """

    __slots__ = ("kind", "items", "nbytes", "unit", "depth", "size", "closed")

    def __init__(self, kind: str, items: "list[Any] | None" = None, nbytes: int = 0, unit: int = 1) -> None:
        self.kind, self.nbytes, self.unit, self.closed = kind, nbytes, unit, False
        self.items: list[Any] = []
        self.depth, self.size = 1, 1
        self.add(items or [], keep=True)

    def add(self, parts: "list[Any]", keep: bool) -> None:
        """Takes parts in; `keep` says whether they are listed as items."""
        demand(not self.closed, "a value holds itself")
        for part in parts:
            if isinstance(part, _Value):
                part.closed = True
                self.depth = max(self.depth, part.depth + 1)
                self.size += part.size
            else:
                self.size += 1
        demand(self.depth <= MAX_DEPTH, f"values are nested more than {MAX_DEPTH} deep")
        demand(self.size <= MAX_VALUES, f"it has more than {MAX_VALUES} values")
        if keep:
            self.items += parts


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _Value) and value.kind == kind


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_plain_key(key: Any) -> bool:
    """A dict's key: hashing what is nested could take for ever."""
    return isinstance(key, _SCALARS) or (_is(key, "tuple") and all(isinstance(part, _SCALARS) for part in key.items))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, unit: int = 0) -> _Value:
    demand(_is(storage, "storage") and _is_count(offset), "a tensor without a storage")
    for numbers in (size, stride):
        demand(_is(numbers, "tuple") and all(map(_is_count, numbers.items)), "a tensor whose size is no size")
    demand(len(size.items) == len(stride.items) <= MAX_DEPTH, "a tensor whose size is no size")
    unit = unit or storage.unit
    count, last = 1, offset
    for length, step in zip(size.items, stride.items, strict=True):
        count *= length
        last += (length - 1) * step
    if count:
        demand(
            (last + 1) * unit <= storage.nbytes and count * unit <= storage.nbytes,
            f"a tensor of {'x'.join(map(str, size.items)) or 1} claims more than the {storage.nbytes} bytes it has",
        )
    return _Value("tensor")


def _none(*values: Any) -> bool:
    """Whether hooks and other attributes of a tensor are empty, as weights have them."""
    return all(value is None or (_is(value, "dict") and not value.items) for value in values)


_OTHER_TENSOR = "a tensor with other arguments than PyTorch's"


def _rebuild_tensor(*args: Any) -> _Value:
    demand(len(args) == 4, _OTHER_TENSOR)
    return _tensor(*args)


def _rebuild_tensor_v2(*args: Any) -> _Value:
    demand(len(args) in (6, 7) and isinstance(args[4], bool) and _none(*args[5:]), _OTHER_TENSOR)
    return _tensor(*args[:4])


def _rebuild_tensor_v3(*args: Any) -> _Value:
    demand(len(args) in (7, 8) and isinstance(args[4], bool) and _none(args[5], *args[7:]), _OTHER_TENSOR)
    demand(isinstance(args[6], _Name) and args[6] in _DTYPES, _OTHER_TENSOR)
    return _tensor(args[0], args[1], args[2], args[3], unit=_DTYPES[args[6]])


def _rebuild_parameter(*args: Any) -> _Value:
    demand(len(args) == 3 and _is(args[0], "tensor") and isinstance(args[1], bool) and _none(args[2]), _OTHER_TENSOR)
    return _Value("tensor")


def _ordered_dict(*args: Any) -> _Value:
    result = _Value("dict")
    if args:  # Python 2 wrote lists of pairs
        demand(len(args) == 1 and _is(args[0], "list"), "a dict made of something else than pairs")
        for pair in args[0].items:
            demand(
                (_is(pair, "list") or _is(pair, "tuple")) and len(pair.items) == 2 and _is_plain_key(pair.items[0]),
                "a dict made of something else than pairs",
            )
        result.add(args[0].items, keep=False)
    return result


def _counter(*args: Any) -> _Value:
    demand(len(args) == 1 and _is(args[0], "dict"), "a counter made of something else than a dict")
    return _Value("dict", list(args))


def _set(*args: Any) -> _Value:
    demand(
        len(args) == 1 and _is(args[0], "list") and all(map(_is_plain_key, args[0].items)),
        "a set made of something else than plain values",
    )
    return _Value("set", list(args))


def _encode(*args: Any) -> bytes:
    demand(
        len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1"),
        "bytes made otherwise than Python's",
    )
    return b""


def _size(*args: Any) -> _Value:
    demand(len(args) == 1 and _is(args[0], "tuple") and all(map(_is_count, args[0].items)), "a size that is none")
    return _Value("tuple", args[0].items)


def _device(*args: Any) -> _Value:
    demand(1 <= len(args) <= 2 and isinstance(args[0], str) and len(args[0]) < 32, "a device that is none")
    demand(all(map(_is_count, args[1:])), "a device that is none")
    return _Value("other")


_CALLED: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils _rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "torch Size": _size,
    "torch device": _device,
    "collections OrderedDict": _ordered_dict,
    "collections Counter": _counter,
    "__builtin__ set": _set,
    "builtins set": _set,
    "_codecs encode": _encode,
}
_MARK = object()
_NAMES = {*_CALLED, *_STORAGES, *_DTYPES, *_OPTIONS}
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
        """What the pickle at this place holds: plain Python for single values, or else a _Value."""
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
            push(_Value(_EMPTY[name]))
        elif name == "MARK":
            push(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[arg] = self.top()
        elif name in ("BINGET", "LONG_BINGET"):
            demand(arg in self.memo, "its pickle is damaged")
            value = self.memo[arg]
            if isinstance(value, _Value):
                value.closed = True
            push(value)
        elif name == "TUPLE":
            push(_Value("tuple", self.marked()))
        elif name in _TUPLES:
            push(_Value("tuple", [self.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name == "GLOBAL":
            demand(arg in _NAMES, f"it asks for {str(arg)[:80].replace(' ', '.')!r}")
            push(_Name(arg))
        elif name == "PROTO":
            demand(arg == 2, f"its pickle has protocol {arg}, PyTorch's has 2")
        else:
            self.combine(name)

    def combine(self, name: str) -> None:
        """An opcode that puts values together."""
        if name in ("APPEND", "APPENDS"):
            parts = self.marked() if name == "APPENDS" else [self.pop()]
            demand(_is(self.top(), "list"), "its pickle is damaged")
            self.top().add(parts, keep=True)
        elif name in ("SETITEM", "SETITEMS"):
            parts = self.marked() if name == "SETITEMS" else [self.pop(), self.pop()][::-1]
            demand(_is(self.top(), "dict") and len(parts) % 2 == 0, "its pickle is damaged")
            demand(all(map(_is_plain_key, parts[::2])), "a dict with keys that are no plain values")
            self.top().add(parts[::2], keep=True)
            self.top().add(parts[1::2], keep=False)
        elif name == "BUILD":
            self.build(self.pop(), self.top())
        elif name == "REDUCE":
            args, called = self.pop(), self.pop()
            demand(
                isinstance(called, _Name) and called in _CALLED and _is(args, "tuple"),
                "it calls what is not to be called",
            )
            self.stack.append(_CALLED[called](*args.items))
        elif name == "NEWOBJ":
            args, made = self.pop(), self.pop()
            demand(isinstance(made, _Name) and made in _OPTIONS, "it makes an object that is no plain value")
            demand(_is(args, "tuple") and not args.items, "it makes an object with arguments")
            self.stack.append(_Value("options" if made == _OPTIONS[0] else "dict"))
        elif name == "BINPERSID":
            self.stack.append(self.persistent(self.pop()))
        else:
            raise Refused(f"its pickle has {name}, which PyTorch's have not")

    def build(self, state: Any, target: Any) -> None:
        """Attributes: any of options, of dicts only those that hide no method."""
        demand(_is(target, "options") or _is(target, "dict"), "it sets attributes of something else than a dict")
        names = state.items if _is(state, "dict") else [None]
        demand(all(isinstance(name, str) for name in names), "it sets attributes in another way than PyTorch")
        if target.kind == "dict":
            known = all(name == "_metadata" or str(name).startswith("__") for name in names)
            demand(known, "it sets attributes of a dict, which would hide its methods")
        target.add([state], keep=False)

    def persistent(self, pid: Any) -> _Value:
        """A storage: ("storage", type, key, location, number of elements) and, in old files, None."""
        demand(_is(pid, "tuple") and len(pid.items) == 5 + self.legacy, "it refers to something else than a storage")
        word, kind, key, location, numel = pid.items[:5]
        demand(
            word == "storage"
            and isinstance(kind, _Name)
            and kind in _STORAGES
            and isinstance(key, str)
            and isinstance(location, str)
            and _is_count(numel)
            and pid.items[5:] in ([], [None]),
            "it refers to something else than a storage",
        )
        unit = _STORAGES[kind]
        self.storage(key, numel * unit, unit)
        return _Value("storage", nbytes=numel * unit, unit=unit)


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
    except (ValueError, LookupError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError, struct.error) as error:
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
        _is(keys, "list") and all(isinstance(key, str) for key in keys.items) and sorted(keys.items) == sorted(sizes),
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
