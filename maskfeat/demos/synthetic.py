"""Write synthetic labelled data sets: images in ImageNet's layout, clips in Kinetics' layout.

`maskfeat/demos/scenes.py` describes what they show and what distinguishes the classes.
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
from PIL import Image

from maskfeat.demos.scenes import MOTIONS, SHAPES, TEXTURES, Pixels, render_clip, render_image
from maskfeat.distributed.preemption import end_interrupted
from maskfeat.errors import UserError, naming
from maskfeat.file_io import replace_text
from maskfeat.progress import Progress, close_lines

logger = logging.getLogger(__name__)

STAMP = "dataset.json"
VERSION = 1  # of the rendering: a folder made by another version is refused
ENCODERS = ("libx264", "libopenh264", "mpeg4")


def write_video(path: Path, frames: Pixels, fps: int) -> str:
    """Write (T, H, W, 3) uint8 frames, H and W even, as an MP4 with the first of `ENCODERS` that is available.

    Returns:
        the name of the encoder.

    Raises:
        UserError: PyAV has none of them.
    """
    encoder = next((name for name in ENCODERS if name in av.codecs_available), None)
    if encoder is None:
        raise UserError(f"PyAV here can write none of {', '.join(ENCODERS)}: install the `av` wheel")
    # Slower presets look ahead, and then a rare clip depends on what the memory held before: not always the same bytes.
    quality = {"crf": "20", "preset": "ultrafast"} if encoder == "libx264" else {}
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=fps, options=quality)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if encoder != "libx264":
            stream.bit_rate = max(200_000, frames[0].size * fps // 12)
        stream.codec_context.thread_count = 1  # more threads do not speed up small frames
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return encoder


def make_images(
    root: str | os.PathLike[str],
    classes: Sequence[str] = SHAPES,
    train_per_class: int = 75,
    val_per_class: int = 25,
    size: tuple[int, int] = (96, 96),
    seed: int = 0,
    difficulty: float = 0.1,
    texture: str = "mixed",
) -> Path:
    """Write `root/{train,val}/<shape>/NNNN.jpg`, ImageNet's layout; labels are indices of the sorted class names.

    Args:
        root: a new or empty folder, or one that an earlier call with the same arguments made (then nothing is done,
            unless that call was interrupted).
        classes: some of `SHAPES`.
        train_per_class, val_per_class: images of each class, at least 1.
        size: (height, width) in pixels, at least 32.
        seed: the same seed gives the same pixels.
        difficulty: 0 to 1. It increases the contrast of textures, the amount of clutter, the range of rotation angles,
            and how often a shape is darker than its background.
        texture: one of `TEXTURES`.

    Returns:
        the folder.

    Raises:
        UserError: invalid arguments, or a folder that holds anything else.
    """
    counts = {"train": train_per_class, "val": val_per_class}
    root = Path(root)
    stamp = _stamp("images", SHAPES, classes, counts, size, seed, difficulty, texture)
    jobs = [(s, c, n) for s, count in counts.items() for c in stamp["classes"] for n in range(count)]
    with naming(f"{root} cannot be written"):
        if not _claim(root, stamp, [root / s / c / f"{n:04d}.jpg" for s, c, n in jobs]):
            return root
        for split, shape, number in _reported(jobs, f"images in {root}"):
            path = root / split / shape / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = render_image(shape, split, number, size, seed, difficulty, texture)
            Image.fromarray(pixels).save(path, quality=92)
        _write_stamp(root, stamp | {"complete": True})
    return root


def make_clips(
    root: str | os.PathLike[str],
    classes: Sequence[str] = MOTIONS,
    train_per_class: int = 40,
    val_per_class: int = 10,
    test_per_class: int = 10,
    num_frames: int = 32,
    fps: int = 30,
    size: tuple[int, int] = (96, 128),
    seed: int = 0,
    difficulty: float = 0.1,
    texture: str = "mixed",
) -> Path:
    """Write `root/videos/<split>/<motion>_NNNN.mp4` and `root/{train,val,test}.csv`, Kinetics' layout.

    A line of a CSV file is `path label`: the path is relative to `root` (`DATA.PATH_PREFIX`), the label is the index of
    the motion in the sorted `classes` (some of `MOTIONS`). A clip lasts num_frames / fps seconds, is encoded as H.264
    where PyAV supports it (see `ENCODERS`), and has an even height and width. See `make_images` for the other
    arguments, the return value and the errors.
    """
    counts = {"train": train_per_class, "val": val_per_class, "test": test_per_class}
    root = Path(root)
    stamp = _stamp("clips", MOTIONS, classes, counts, size, seed, difficulty, texture)
    if num_frames < 1 or fps < 1 or size[0] % 2 or size[1] % 2:
        raise UserError(
            f"num_frames {num_frames}, fps {fps} and size {tuple(size)} given: expected at least 1 frame and "
            "1 frame a second, and an even height and width (H.264 stores colour at half size)"
        )
    stamp |= {"num_frames": num_frames, "fps": fps}
    jobs = [(s, c, n) for s, count in counts.items() for c in stamp["classes"] for n in range(count)]
    names = [f"videos/{s}/{c}_{n:04d}.mp4" for s, c, n in jobs]
    with naming(f"{root} cannot be written"):
        if not _claim(root, stamp, [root / name for name in names] + [root / f"{s}.csv" for s in counts]):
            return root
        lines: dict[str, list[str]] = {split: [] for split in counts}
        for name, (split, motion, number) in _reported(list(zip(names, jobs, strict=True)), f"clips in {root}"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            frames = render_clip(motion, split, number, num_frames, fps, size, seed, difficulty, texture)
            write_video(root / name, frames, fps)
            lines[split].append(f"{name} {stamp['classes'].index(motion)}\n")
        for split, rows in lines.items():
            (root / f"{split}.csv").write_text("".join(rows), encoding="utf-8")
        _write_stamp(root, stamp | {"complete": True})
    return root


def _stamp(
    kind: str,
    known: Sequence[str],
    classes: Sequence[str],
    counts: dict[str, int],
    size: tuple[int, int],
    seed: int,
    difficulty: float,
    texture: str,
) -> dict[str, Any]:
    """Return the content of `dataset.json`: everything that the pixels depend on."""
    unknown = sorted(set(classes) - set(known))
    if unknown or not classes or len(set(classes)) != len(classes):
        raise UserError(f"classes {list(classes)} given: expected distinct names of {', '.join(known)}")
    if min(counts.values()) < 1:
        raise UserError(f"{counts} samples of a class given: expected at least 1 in each split")
    if len(size) != 2 or min(size) < 32:
        raise UserError(f"size {tuple(size)} given: expected (height, width) of at least 32 pixels")
    if not 0.0 <= difficulty <= 1.0:
        raise UserError(f"difficulty {difficulty} given: expected a number from 0 to 1")
    if texture not in TEXTURES:
        raise UserError(f"texture {texture!r} given: expected one of {', '.join(TEXTURES)}")
    return {
        "made_by": "maskfeat make-synthetic",
        "version": VERSION,
        "kind": kind,
        "classes": sorted(classes),
        "per_class": counts,
        "size": [int(v) for v in size],
        "seed": int(seed),
        "difficulty": float(difficulty),
        "texture": texture,
        "complete": False,
    }


def _claim(root: Path, stamp: dict[str, Any], files: Sequence[Path]) -> bool:
    """Return whether the files still have to be written; refuse a folder that holds anything but this data set."""
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file: give the name of a folder")
    if root.is_dir() and any(root.iterdir()):
        found = _read_stamp(root)
        if found is None:
            raise UserError(f"{root} is not empty and was not made here: give a new or an empty folder")
        differing = sorted(k for k in stamp if k != "complete" and found.get(k) != stamp[k])
        if differing:
            given = ", ".join(f"{k} {found.get(k)} (now {stamp[k]})" for k in differing)
            raise UserError(f"{root} holds a data set made with {given}: give another folder, or remove this one")
        if found.get("complete") and all(path.is_file() for path in files):
            logger.info("%s: %d files already there", root, len(files))
            return False
    _write_stamp(root, stamp)
    return True


def is_made_here(root: Path) -> bool:
    """Whether a folder holds a data set that was made here, be it complete or not."""
    return root.is_dir() and _read_stamp(root) is not None


def _read_stamp(root: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((root / STAMP).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and str(found.get("made_by")).startswith("maskfeat") else None


def _write_stamp(root: Path, stamp: dict[str, Any]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    replace_text(root / STAMP, json.dumps(stamp, indent=2) + "\n")


def _reported(jobs: Sequence[Any], what: str) -> Iterator[Any]:
    """Yield the jobs; say how far they are, and at the end how long they took."""
    began, progress = time.monotonic(), Progress(f"synthetic {what}", len(jobs), every=5.0)
    for job in jobs:
        yield job
        progress.step()
    logger.info("%d synthetic %s, %.1f s", len(jobs), what, time.monotonic() - began)


_EXAMPLES = """\
Small by default. At the size of ImageNet and Kinetics, to measure reading speed:

    %(prog)s --images DIR --size 400x500 --per-class 128
    %(prog)s --clips DIR --size 256x340 --frames 300 --per-class 10
"""


def _height_by_width(text: str) -> tuple[int, int]:
    """'96x128' -> (96, 128)."""
    height, _, width = text.partition("x")
    try:
        return int(height), int(width)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 96x128") from error


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Make the data sets and return the exit code; `prog` is the name of the command in its help."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Make the synthetic data sets: images of shapes, and clips of motions.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--images", metavar="DIR", help="write images here: 8 shapes, train/ and val/")
    parser.add_argument("--clips", metavar="DIR", help="write clips here: 6 motions, train, val and test.csv")
    parser.add_argument("--size", metavar="HxW", type=_height_by_width, help="96x96 images, 96x128 clips")
    parser.add_argument("--per-class", type=int, help="training samples of a class: 75 images, 40 clips")
    parser.add_argument("--val-per-class", type=int, help="held-out ones a split: 25 images, 10 clips")
    parser.add_argument("--frames", type=int, default=32, help="frames of a clip (default %(default)s)")
    parser.add_argument("--fps", type=int, default=30, help="frames a second (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same pixels (default %(default)s)")
    parser.add_argument("--difficulty", type=float, default=0.1, help="0 to 1 (default %(default)s)")
    parser.add_argument("--texture", choices=TEXTURES, default="mixed", help="(default %(default)s)")
    args = parser.parse_args(argv)
    if not (args.images or args.clips):
        parser.error("give --images DIR, --clips DIR or both")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    common: dict[str, Any] = {"seed": args.seed, "difficulty": args.difficulty, "texture": args.texture}
    if args.size:
        common["size"] = args.size
    counts = {"train_per_class": args.per_class, "val_per_class": args.val_per_class}
    tests = {"test_per_class": args.val_per_class}
    try:
        if args.images:
            make_images(args.images, **common, **_given(counts))
        if args.clips:
            make_clips(args.clips, num_frames=args.frames, fps=args.fps, **common, **_given(counts | tests))
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt as error:
        return end_interrupted(error)
    finally:
        close_lines()
    return 0


def _given(values: dict[str, int | None]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
