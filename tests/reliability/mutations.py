"""Media that was damaged at random, read in a process of its own: `python -m tests.reliability.mutations JOB OUT`.

A job is a list of inputs, each a number: together with the seed it says which file is taken and how it is damaged, so
that one input can be made again alone: `mutated(sources, seed, number)`.
"""

import json
import resource
import signal
import struct
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tests.reliability.guarded import TooSlow, alarm, peak, reset_peak

MEMORY = 3 << 30
"""Bytes of address space beyond what the process has at its start."""
SECONDS = 30
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def _flip(data: bytearray, rng: np.random.Generator, start: int, end: int) -> None:
    for place in rng.integers(start, max(end, start + 1), int(rng.integers(1, 40))):
        data[place] ^= 1 << int(rng.integers(8))


def _overwrite(data: bytearray, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 6))):
        place, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
        fill = [bytes(length), b"\xff" * length, rng.bytes(length)][int(rng.integers(3))]
        data[place : place + length] = fill[: len(data) - place]


def _splice(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """A piece is left out, doubled, moved or replaced by a piece of another file."""
    first, second = sorted(int(place) for place in rng.integers(0, len(data), 2))
    way = int(rng.integers(4))
    if way == 0:
        del data[first:second]
    elif way == 1:
        data[first:first] = data[first:second][: 1 << 16]
    else:
        piece = data if way == 2 else other
        start = int(rng.integers(len(piece)))
        data[first:second] = piece[start : start + min(second - first, 1 << 16)]


def _length(data: bytearray, rng: np.random.Generator) -> None:
    """A number that is likely a length or a size: 2, 4 or 8 bytes become something extreme."""
    kinds = [b"stsz", b"stts", b"stsc", b"stco", b"ctts", b"moov", b"trak", b"mdat", b"avcC", b"hvcC", b"tkhd", b"elst"]
    kinds += [
        b"IHDR",
        b"IDAT",
        b"PLTE",
        b"VP8 ",
        b"VP8X",
        b"\xff\xc0",
        b"\xff\xc2",
        b"\xff\xc4",
        b"\xff\xda",
        b"\xff\xdb",
    ]
    kinds += [b"idx1", b"strf", b"strh", b"movi", b"\x1f\x43\xb6\x75", b"\x16\x54\xae\x6b", b"\xe0", b"\xa3", b"\xec"]
    places = [place for kind in kinds if (place := data.find(kind)) >= 0]
    place = places[int(rng.integers(len(places)))] if places else int(rng.integers(len(data)))
    place = min(max(place + int(rng.integers(-8, 32)), 0), max(len(data) - 8, 0))
    number = [0, 1, 0x7F, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1][int(rng.integers(9))]
    form = ["<H", ">H", "<I", ">I", "<Q", ">Q"][int(rng.integers(6))]
    packed = struct.pack(form, number & ((1 << 8 * struct.calcsize(form)) - 1))
    data[place : place + len(packed)] = packed


def mutated(sources: list[Path], seed: int, number: int) -> tuple[Path, bytes]:
    """The file that input `number` comes from, and its damaged bytes."""
    rng = np.random.default_rng([seed, number])
    source = sources[number % len(sources)]
    data = bytearray(source.read_bytes())
    for _ in range(int(rng.integers(1, 4))):
        way = int(rng.integers(7))
        if not data:
            break
        if way == 0:
            _flip(data, rng, 0, len(data))
        elif way == 1:
            _flip(data, rng, 0, min(len(data), 600))  # headers
        elif way == 2:
            _flip(data, rng, max(len(data) - 2000, 0), len(data))  # an index at the end
        elif way == 3:
            del data[int(rng.integers(len(data))) :]
        elif way == 4:
            _overwrite(data, rng)
        elif way == 5:
            _splice(data, rng, sources[int(rng.integers(len(sources)))].read_bytes())
        else:
            _length(data, rng)
    return source, bytes(data)


def readers(path: Path) -> dict[str, Any]:
    """What reads a file, by name; each gives an array."""
    from maskfeat.data.image_reader import READERS
    from maskfeat.data.video import torchcodec_decoder
    from maskfeat.data.video.decoder import decode_frames

    if path.suffix.lower() in PICTURES:
        return {name: lambda path, read=read: np.asarray(read(path)) for name, read in READERS.items()}
    found = {"pyav": lambda path: decode_frames(path, lambda info: [0, info.frames // 2, info.frames - 1])[0]}
    try:
        torchcodec_decoder.load_decoder()
    except ValueError:
        return found
    wanted = lambda info: [0, info.frames // 2, info.frames - 1]  # noqa: E731
    return {**found, "torchcodec": lambda path: torchcodec_decoder.decode_frames(path, wanted)[0]}


def right(array: np.ndarray, is_picture: bool) -> bool:
    """Whether an array is what a reader promises."""
    size = array.shape[-3:-1]
    shape = array.ndim == 3 if is_picture else array.ndim == 4 and len(array) == 3
    return (
        shape
        and array.shape[-1] == 3
        and array.dtype == np.uint8
        and min(size) >= 1
        and size[0] * size[1] <= 80_000_000
    )


def one(path: Path, name: str, read: Any) -> dict[str, Any]:
    """Reads one file by one reader."""
    from maskfeat.data.bad_samples import UnreadableSample

    reset_peak()
    before, start = peak(), time.perf_counter()
    result: dict[str, Any] = {"reader": name, "outcome": "read"}
    signal.alarm(SECONDS)
    try:
        array = read(path)
        if not right(array, path.suffix.lower() in PICTURES):
            result["outcome"] = f"shape {array.shape} {array.dtype}"
    except UnreadableSample as error:
        result["outcome"] = "refused" if error.path == str(path) and error.cause else f"refused without words: {error}"
    except Exception as error:
        result["outcome"] = f"{type(error).__name__}: {error}"[:500]
    except TooSlow:
        result["outcome"] = f"more than {SECONDS} s"
    finally:
        signal.alarm(0)
    return {**result, "seconds": time.perf_counter() - start, "memory": peak() - before}


def main() -> None:
    """Reads every input of a job by every reader that takes such files."""
    given, results = map(Path, sys.argv[1:])
    job = json.loads(given.read_text())
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, alarm)
    sources = [Path(source) for source in job["sources"]]
    for source in {source.suffix: source for source in sources if not source.name.startswith("real_")}.values():
        for read in readers(source).values():
            read(source)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
    with results.open("w") as out:
        for number in job["numbers"]:
            source, data = mutated(sources, job["seed"], number)
            path = Path(job["folder"]) / f"input{source.suffix}"
            path.write_bytes(data)
            for name, read in readers(source).items():
                place = {"number": number, "source": source.name, "reader": name}
                out.write(json.dumps({"begun": place}) + "\n")
                out.flush()
                out.write(json.dumps({**place, **one(path, name, read)}) + "\n")
                out.flush()


if __name__ == "__main__":
    main()
