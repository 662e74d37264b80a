"""Tar archives that the tests write."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

Files = Iterable[tuple[str, bytes]]


def write_tar(path: Path, files: Files) -> Path:
    """Write an archive of files, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_samples(root: Path, split: str, samples: list[tuple[str, bytes, int | None]], per_shard: int) -> None:
    """Write `root/SPLIT-000000.tar` and so on, as WebDataset does: each sample with its class beside it."""
    for number, start in enumerate(range(0, len(samples), per_shard)):
        files = []
        for name, content, label in samples[start : start + per_shard]:
            files.append((name, content))
            if label is not None:
                files.append((f"{name.rpartition('.')[0]}.cls", str(label).encode()))
        write_tar(root / f"{split}-{number:06d}.tar", files)


def shards_of_folder(folder: Path, root: Path, per_shard: int = 7) -> Path:
    """Pack `folder/SPLIT/<class>/` into shards, in the order in which folders are read."""
    classes = sorted(path.name for path in (folder / "train").iterdir())
    for split in ("train", "val"):
        files = sorted((folder / split).rglob("*.*"), key=lambda path: (path.parts[-2], str(path)))
        samples = [(f"{p.parts[-2]}/{p.name}", p.read_bytes(), classes.index(p.parts[-2])) for p in files]
        write_samples(root, split, list(samples), per_shard)
    (root / "classes.txt").write_text("\n".join(classes))
    return root
