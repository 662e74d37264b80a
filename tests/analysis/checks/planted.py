"""Data sets with faults that are known: two of each kind among files that have none."""

import shutil
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from maskfeat.analysis.checks.faults import Fault
from tests.data.media import write_video

Planted = set[tuple[str, str, str]]
"""(kind, path relative to the folder or what else is concerned, split)."""


def picture(path: Path, seed: int, side: int = 40, **options: object) -> Path:
    """A small image, another one for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def images(root: Path, number: int) -> Planted:
    """`number` images in train/ (four fifths) and val/, of ten classes; returns what is wrong with them."""
    held_out = number // 5
    for split, share, start in (("train", number - held_out, 0), ("val", held_out, number)):
        for place in range(share):
            picture(root / split / f"class{place % 10}" / f"{place:04d}.png", start + place, compress_level=1)
    train, val = root / "train", root / "val"
    planted: Planted = set()

    def note(kind: str, path: Path | str, split: str = "train") -> None:
        planted.add((kind, str(path.relative_to(root)) if isinstance(path, Path) else path, split))

    for n in range(2):
        folder = train / f"class{n}"
        cut = folder / f"cut{n}.jpg"
        picture(cut, 10**6 + n)
        cut.write_bytes(cut.read_bytes()[:700])
        (folder / f"none{n}.png").write_bytes(b"")
        for path in (cut, folder / f"none{n}.png"):
            note("unreadable", path)
        shutil.copy(train / "class2" / f"00{n + 1}2.png", train / "class2" / f"copy{n}.png")
        note("duplicate", train / "class2" / f"copy{n}.png")
        shutil.copy(train / "class3" / f"00{n + 1}3.png", train / "class4" / f"other{n}.png")
        note("two classes", train / "class4" / f"other{n}.png")
        shutil.copy(val / "class5" / f"00{n}5.png", train / "class5" / f"leak{n}.png")
        note("in two splits", train / "class5" / f"leak{n}.png")
        (train / f"hollow{n}").mkdir()
        note("empty class", f"hollow{n}")
        picture(val / f"hollow{n}" / "0.png", 2 * 10**6 + n)
        picture(val / f"new{n}" / "0.png", 3 * 10**6 + n)
        note("untrained class", f"new{n}", "val")
        picture(train / f"only{n}" / "0.png", 4 * 10**6 + n)
        note("class not tested", f"only{n}", "val")
        for split in ("train", "val"):
            picture(root / split / f"Big Cat{n}" / f"{split}.png", 5 * 10**6 + 2 * n + (split == "val"))
        picture(train / f"big_cat{n}" / "0.png", 6 * 10**6 + n)
        note("alike", f"Big Cat{n} and big_cat{n}", "")
        note("outside", picture(train / f"loose{n}.png", 7 * 10**6 + n))
        (folder / f"gone{n}.png").symlink_to(root / "nowhere")
        note("broken link", folder / f"gone{n}.png")
        (folder / f"phone{n}.heic").write_bytes(b"no matter what")
        note("not read", folder / f"phone{n}.heic")
        wrong = picture(folder / f"wrong{n}.png", 8 * 10**6 + n)
        wrong.rename(folder / f"wrong{n}.jpg")
        note("another format", folder / f"wrong{n}.jpg")
        grey = Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 40), dtype=np.uint8))
        grey.save(folder / f"grey{n}.png")
        note("grey", folder / f"grey{n}.png")
        note("tiny", picture(folder / f"tiny{n}.png", 9 * 10**6 + n, side=12))
    return planted


def videos(root: Path, number: int) -> Planted:
    """`number` short videos in train.csv and val.csv of five classes; returns what is wrong with them."""
    root.mkdir(parents=True)
    whole, brief = (write_video(root / f"{frames}.mp4", frames=frames, rate=25) for frames in (40, 5))
    lines: dict[str, list[str]] = {"train": [], "val": []}

    def film(name: str, source: Path, label: int, split: str = "train") -> None:
        """A copy with an empty box of its own name at its end, so that no two are the same."""
        title = name.encode().ljust(8, b"\0")
        content = source.read_bytes() + struct.pack(">I4s", 8 + len(title), b"free") + title
        (root / name).write_bytes(content)
        lines[split].append(f"{name} {label}")

    for place in range(number):
        film(f"{place:04d}.mp4", whole, place % 5, "val" if place % 5 == place // 5 % 5 else "train")
    planted: Planted = set()
    for n in range(2):
        film(f"brief{n}.mp4", brief, n)
        planted.add(("short", f"brief{n}.mp4", "train"))
        film(f"cut{n}.mp4", whole, n)
        (root / f"cut{n}.mp4").write_bytes((root / f"cut{n}.mp4").read_bytes()[:400])
        planted.add(("unreadable", f"cut{n}.mp4", "train"))
        lines["train"].append(f"gone{n}.mp4 {n}")
        planted.add(("missing", f"gone{n}.mp4", "train"))
        again = lines["train"][n]
        lines["train"].append(again)
        planted.add(("listed twice", again.split()[0], "train"))
        film(f"high{n}.mp4", whole, 7 + n)
        planted.add(("label too large", f"high{n}.mp4", "train"))
        planted.add(("label gap", f"label {5 + n}", "train"))
    whole.unlink()
    brief.unlink()
    for split, rows in lines.items():
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return planted


def reported(root: Path, faults: list[Fault]) -> list[tuple[str, str, str]]:
    """Faults as `Planted` names them."""
    start = f"{root}/"
    return [(fault.kind, fault.where.removeprefix(start), fault.split) for fault in faults]
