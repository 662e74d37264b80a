"""Limits on files of weights, checked before `torch.load(weights_only=True)` sees them.

PyTorch's restricted unpickler calls nothing but functions on its own list and compares the sizes of tensors with the
file. It has no limit on memory and time, though: hashing a dict key of nested tuples overflows the C stack or never
ends, `codecs.encode` can double a string again and again, and a compressed archive unpacks to any size. These checks
read the archive's directory and the opcodes of its pickles, and construct nothing.
"""

import io
import pickletools
import zipfile
import zlib
from typing import Any, BinaryIO, NamedTuple

from maskfeat.errors import UserError

MAX_PICKLE = 16 << 20
"""Bytes of a pickle. It holds names and shapes; the numbers are stored outside of it."""
MAX_OPCODES = 1_000_000
MAX_VALUES = 1_000_000
"""Values in a pickle, counted each time they are referenced."""
MAX_DEPTH = 64

_UPDATES = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")  # opcodes that change their first operand in place
_LEGACY_PICKLES = 5  # magic number, protocol, system, object, storage keys


class RefusedFile(UserError):
    """A file that is damaged, exceeds a limit, or holds more than weights; the message is the cause alone."""


class _Value(NamedTuple):
    """What is known of a value on the unpickler's stack: its nesting, its number of values, and, of strings, globals
    and pairs that end in one, the text.
    """

    depth: int = 1
    size: int = 1
    text: str | None = None


_PLAIN = _Value()


def check_file(file: BinaryIO) -> int:
    """Check a file that `torch.save` is expected to have written, and rewind it.

    Returns:
        how many of its bytes can belong to tensors.

    Raises:
        RefusedFile: if it is not such a file, is damaged, or exceeds a limit.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    try:
        if start == b"PK\3\4":
            _check_archive(file, size)
            return size
        if start[:2] != b"\x80\x02":
            raise RefusedFile("it was not written by torch.save")
        pickles = io.BytesIO(file.read(MAX_PICKLE))
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(pickles)
        return size - pickles.tell()
    except RefusedFile:
        raise
    # What zipfile and pickletools raise on damaged files.
    except (ValueError, LookupError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise RefusedFile(
            f"it is damaged ({str(error)[:120]}), or an incomplete copy or download: fetch it again"
        ) from error
    finally:
        file.seek(0)


def _check_archive(file: BinaryIO, size: int) -> None:
    """Check the directory of a zip archive of `size` bytes, and the pickles in it."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename.lower() for member in members]  # PyTorch's reader ignores case
        if len(set(names)) < len(names):
            raise RefusedFile("two members of its archive have the same name")
        if any(name.endswith("/constants.pkl") for name in names):
            raise RefusedFile("it is a TorchScript archive, which holds a program")
        unpacked = sum(member.file_size for member in members)
        if unpacked > size:
            raise RefusedFile(f"its archive unpacks to {unpacked} bytes and has {size}: torch.save compresses nothing")
        for member, name in zip(members, names, strict=True):
            if not name.endswith(".pkl"):
                continue
            if member.file_size > MAX_PICKLE:
                raise RefusedFile(f"its pickle has {member.file_size} bytes, more than {MAX_PICKLE}")
            member.CRC = None  # type: ignore[assignment]  # torch.save may be told not to write it
            _check_pickle(io.BytesIO(archive.read(member)))


def _check_pickle(stream: BinaryIO) -> None:
    """Check one pickle and leave the stream behind it: how many values, how deeply nested, and what is encoded."""
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[Any, _Value] = {}
    for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if count >= MAX_OPCODES:
            raise RefusedFile(f"its pickle has more than {MAX_OPCODES} opcodes")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif not opcode.stack_before:
            if opcode.stack_after:
                stack.append(_Value(text=arg) if isinstance(arg, str) else _PLAIN)
        else:
            operands = _pop(stack, marks, opcode)
            if opcode.stack_after:
                stack.append(_combine(name, operands))


def _pop(stack: list[_Value], marks: list[int], opcode: pickletools.OpcodeInfo) -> list[_Value]:
    """Remove an opcode's operands from the stack, those above the last mark included."""
    operands = opcode.stack_before
    if pickletools.markobject in operands:
        start = marks.pop() - operands.index(pickletools.markobject)
    else:
        start = len(stack) - len(operands)
    if start < 0:
        raise RefusedFile("its pickle is damaged")
    popped = stack[start:]
    del stack[start:]
    return popped


def _combine(name: str, operands: list[_Value]) -> _Value:
    """Return what an opcode makes of its operands."""
    if name == "REDUCE" and operands[0].text == "_codecs encode" and operands[1].text not in ("latin1", "latin-1"):
        raise RefusedFile("it encodes a string as something other than latin1")
    parts = operands[1:] if name in _UPDATES else operands
    depth = 1 + max((part.depth for part in parts), default=0)
    if name in _UPDATES:
        depth = max(depth, operands[0].depth)
    size = 1 + sum(value.size for value in operands)
    if depth > MAX_DEPTH:
        raise RefusedFile(f"its values are nested more than {MAX_DEPTH} deep")
    if size > MAX_VALUES:
        raise RefusedFile(f"it has more than {MAX_VALUES} values")
    return _Value(depth, size, operands[-1].text if name == "TUPLE2" else None)
