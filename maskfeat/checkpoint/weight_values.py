"""What the pickle of a state dict is made of, without any of it being made: sizes are compared, nothing is called."""

from collections.abc import Callable
from typing import Any

from maskfeat.checkpoint.weight_archive import demand

MAX_VALUES = 1_000_000
"""Values, counted as often as they are referred to."""
MAX_DEPTH = 64

_SIZES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
    "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8,
}  # fmt: skip
STORAGES = {f"torch {name}Storage": size for name, size in _SIZES.items()}
STORAGES["torch.storage UntypedStorage"] = 1
_WIDTHS = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1, "complex64": 8, "complex128": 16, "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}  # fmt: skip
DTYPES = {f"torch {name}": size for name, size in _WIDTHS.items()}
OPTIONS = ("argparse Namespace", "yacs.config CfgNode")
_SCALARS = (str, int, float, bytes, type(None))  # bool is an int


class Name(str):
    """A global of the pickle: "module name"."""


class Value:
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
            if isinstance(part, Value):
                part.closed = True
                self.depth = max(self.depth, part.depth + 1)
                self.size += part.size
            else:
                self.size += 1
        demand(self.depth <= MAX_DEPTH, f"values are nested more than {MAX_DEPTH} deep")
        demand(self.size <= MAX_VALUES, f"it has more than {MAX_VALUES} values")
        if keep:
            self.items += parts


def is_a(value: Any, kind: str) -> bool:
    return isinstance(value, Value) and value.kind == kind


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def is_plain_key(key: Any) -> bool:
    """A dict's key: hashing what is nested could take for ever."""
    return isinstance(key, _SCALARS) or (is_a(key, "tuple") and all(isinstance(part, _SCALARS) for part in key.items))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, unit: int = 0) -> Value:
    demand(is_a(storage, "storage") and is_count(offset), "a tensor without a storage")
    for numbers in (size, stride):
        demand(is_a(numbers, "tuple") and all(map(is_count, numbers.items)), "a tensor whose size is no size")
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
    return Value("tensor")


def _none(*values: Any) -> bool:
    """Whether hooks and other attributes of a tensor are empty, as weights have them."""
    return all(value is None or (is_a(value, "dict") and not value.items) for value in values)


_OTHER_TENSOR = "a tensor with other arguments than PyTorch's"


def _rebuild_tensor(*args: Any) -> Value:
    demand(len(args) == 4, _OTHER_TENSOR)
    return _tensor(*args)


def _rebuild_tensor_v2(*args: Any) -> Value:
    demand(len(args) in (6, 7) and isinstance(args[4], bool) and _none(*args[5:]), _OTHER_TENSOR)
    return _tensor(*args[:4])


def _rebuild_tensor_v3(*args: Any) -> Value:
    demand(len(args) in (7, 8) and args[6] in DTYPES and _none(args[5], *args[7:]), _OTHER_TENSOR)
    return _tensor(args[0], args[1], args[2], args[3], unit=DTYPES[args[6]])


def _rebuild_parameter(*args: Any) -> Value:
    demand(len(args) == 3 and is_a(args[0], "tensor") and isinstance(args[1], bool) and _none(args[2]), _OTHER_TENSOR)
    return Value("tensor")


def _ordered_dict(*args: Any) -> Value:
    result = Value("dict")
    if args:  # Python 2 wrote lists of pairs
        demand(len(args) == 1 and is_a(args[0], "list"), "a dict made of something else than pairs")
        for pair in args[0].items:
            demand(
                (is_a(pair, "list") or is_a(pair, "tuple")) and len(pair.items) == 2 and is_plain_key(pair.items[0]),
                "a dict made of something else than pairs",
            )
        result.add(args[0].items, keep=False)
    return result


def _counter(*args: Any) -> Value:
    demand(len(args) == 1 and is_a(args[0], "dict"), "a counter made of something else than a dict")
    return Value("dict", list(args))


def _set(*args: Any) -> Value:
    demand(
        len(args) == 1 and is_a(args[0], "list") and all(map(is_plain_key, args[0].items)),
        "a set made of something else than plain values",
    )
    return Value("set", list(args))


def _encode(*args: Any) -> bytes:
    demand(
        len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1"),
        "bytes made otherwise than Python's",
    )
    return b""


def _size(*args: Any) -> Value:
    demand(len(args) == 1 and is_a(args[0], "tuple") and all(map(is_count, args[0].items)), "a size that is none")
    return Value("tuple", args[0].items)


def _device(*args: Any) -> Value:
    named = 1 <= len(args) <= 2 and isinstance(args[0], str) and len(args[0]) < 32
    demand(named and all(map(is_count, args[1:])), "a device that is none")
    return Value("other")


CALLED: dict[str, Callable[..., Any]] = {
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
