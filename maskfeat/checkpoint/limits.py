"""Limits on files of weights, checked before `torch.load(weights_only=True)` sees them.

PyTorch's restricted unpickler calls nothing but functions on its own list and compares the sizes of tensors with the
file. It has no limit on memory and time, though: hashing a dict key of nested tuples overflows the C stack or never
ends, `codecs.encode` can double a string again and again, and a compressed archive unpacks to any size. These checks
read the archive's directory and the opcodes of its pickles, and construct nothing.
"""

import io
import pickletools
import struct
import zipfile
import zlib
from typing import Any, BinaryIO, NamedTuple

from maskfeat.errors import UserError

MAX_PICKLE = 16 << 20
"""Bytes of a pickle. It holds names and shapes; the numbers are stored outside of it."""
MAX_VALUES = 1_000_000
"""Values in a pickle, counted each time they are referenced, and its opcodes."""
MAX_DEPTH = 64

# The records that end a zip archive: of 64 bits, where that one is, and of 16 and 32 bits.
_END_64, _LOCATOR, _END = (struct.Struct(form) for form in ("<4sQ2H2L4Q", "<4sLQL", "<4s4H2LH"))
# Opcodes that change their first operand in place.
_UPDATES = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
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
    _check_end(file, size)
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


def _check_end(file: BinaryIO, size: int) -> None:
    """Check that an archive ends with its directory, and that all its records say so.

    Readers look for the directory in different ways. Where they would find different ones, what Python's reader shows
    to these checks is not what PyTorch's reads.
    """
    length = min(size, _END_64.size + _LOCATOR.size + _END.size)
    file.seek(size - length)
    tail = file.read(length)
    file.seek(0)
    start = length - _END.size
    if start < 0 or tail[start : start + 4] != b"PK\5\6":
        raise ValueError("its archive has no directory at its end")
    *_, directory, offset, comment = _END.unpack_from(tail, start)
    end, start = size - _END.size, start - _LOCATOR.size
    if start >= 0 and tail[start : start + 4] == b"PK\6\7":
        _, _, place, _ = _LOCATOR.unpack_from(tail, start)
        end, start = end - _LOCATOR.size - _END_64.size, start - _END_64.size
        if place != end or start < 0 or tail[start : start + 4] != b"PK\6\6":
            raise RefusedFile("its archive names another place of its directory than its end")
        *_, wide, far = _END_64.unpack_from(tail, start)
        if directory not in (wide, 0xFFFFFFFF) or offset not in (far, 0xFFFFFFFF):
            raise RefusedFile("its archive names two places of its directory")
        directory, offset = wide, far
    if offset + directory != end or comment:
        raise RefusedFile("its archive does not end with its directory: there are bytes before or behind it")


def check_pickle(content: bytes) -> None:
    """Check a pickle of any length, which may hold the more values the longer it is.

    Raises:
        RefusedFile: it is damaged, or exceeds a limit.
    """
    try:
        _check_pickle(io.BytesIO(content), max(MAX_VALUES, len(content)))
    except RefusedFile:
        raise
    except (ValueError, LookupError, OverflowError, MemoryError) as error:
        raise RefusedFile(f"its pickle is damaged ({str(error)[:120]})") from error


def _check_pickle(stream: BinaryIO, most: int = MAX_VALUES) -> None:
    """Check one pickle and leave the stream behind it: how many values, how deeply nested, and what is encoded.

    Args:
        most: values, and opcodes.
    """
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[Any, _Value] = {}
    for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if count >= most:
            raise RefusedFile(f"its pickle has more than {most} opcodes")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if name == "MEMOIZE" else int(arg or 0)
            if place > most:  # an unpickler makes room for all before it
                raise RefusedFile(f"its pickle names its value {place}, and may have {most}")
            memo[place] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "DUP":
            stack.append(stack[-1])
        elif not opcode.stack_before:
            if opcode.stack_after:
                stack.append(_Value(text=arg) if isinstance(arg, str) else _PLAIN)
        else:
            operands = _pop(stack, marks, opcode)
            if opcode.stack_after:
                stack.append(_combine(name, operands, most))


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


def _combine(name: str, operands: list[_Value], most: int) -> _Value:
    """Return what an opcode makes of its operands, of `most` values at most."""
    if name == "REDUCE" and operands[0].text == "_codecs encode" and operands[1].text not in ("latin1", "latin-1"):
        raise RefusedFile("it encodes a string as something other than latin1")
    parts = operands[1:] if name in _UPDATES else operands
    depth = 1 + max((part.depth for part in parts), default=0)
    if name in _UPDATES:
        depth = max(depth, operands[0].depth)
    size = 1 + sum(value.size for value in operands)
    if depth > MAX_DEPTH:
        raise RefusedFile(f"its values are nested more than {MAX_DEPTH} deep")
    if size > most:
        raise RefusedFile(f"it has more than {most} values")
    text = operands[-1].text if name == "TUPLE2" else None
    if name == "STACK_GLOBAL":
        text = f"{operands[0].text} {operands[1].text}"
    return _Value(depth, size, text)
