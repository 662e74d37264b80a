"""Promise 11: media that is damaged at random does not crash a worker, nor fill its memory, nor hold it up."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.media import paint
from tests.reliability.mutations import MEMORY, PICTURES, SECONDS, mutated
from tests.reliability.scale import SOAK, note, size
from tests.small import REPO

SEED = 11
CHUNK = 500
"""Inputs of one process."""
MOVIES = {
    "h264.mp4": ("libx264", {"g": "12", "bf": "2"}, {}),
    "h264_fragments.mp4": ("libx264", {"g": "12", "bf": "2"}, {"movflags": "frag_keyframe+empty_moov"}),
    "h264.mkv": ("libx264", {"g": "12", "bf": "2"}, {}),
    "h264.avi": ("libx264", {"g": "12"}, {}),
    "h264.ts": ("libx264", {"g": "12"}, {}),
    "hevc.mp4": ("libx265", {"g": "12", "x265-params": "log-level=none:pools=1"}, {}),
    "hevc.mkv": ("libx265", {"g": "12", "x265-params": "log-level=none:pools=1"}, {}),
    "mpeg4.mp4": ("mpeg4", {"g": "12", "bf": "2"}, {}),
    "mpeg4.avi": ("mpeg4", {"g": "12"}, {}),
    "vp9.webm": ("libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}, {}),
    "vp9.mp4": ("libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}, {}),
    "vp8.webm": ("libvpx", {"g": "12", "deadline": "realtime"}, {}),
    "av1.mkv": ("libsvtav1", {"g": "12", "preset": "12"}, {}),
    "av1.mp4": ("libsvtav1", {"g": "12", "preset": "12"}, {}),
    "h264.flv": ("libx264", {"g": "12"}, {}),
}


def pictures(folder: Path) -> None:
    """A picture of every kind that the readers take."""
    image = Image.fromarray(paint(99))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "plain.jpg", quality=80)
    image.save(folder / "progressive.jpg", progressive=True, subsampling=0)
    image.save(folder / "turned.jpg", exif=exif, quality=90)
    image.convert("L").save(folder / "grey.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "plain.png")
    image.quantize(16).save(folder / "palette.png")
    image.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray((np.arange(64 * 64) * 13 % 65536).astype(np.uint16).reshape(64, 64)).save(folder / "deep.png")
    image.save(folder / "plain.webp")
    image.save(folder / "lossless.webp", lossless=True, exif=exif)
    image.save(folder / "moving.webp", save_all=True, append_images=[Image.fromarray(paint(5))])


def movies(folder: Path) -> None:
    """A video of every codec and container for which there is an encoder."""
    from tests.data.media import write_video

    for name, (codec, options, container_options) in MOVIES.items():
        try:
            write_video(folder / name, 24, codec, options=options, container_options=container_options)
        except pytest.skip.Exception:
            (folder / name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("media")
    pictures(folder)
    movies(folder)
    shared = Path(os.environ.get("MASKFEAT_SHARED", REPO.parent / "shared")) / "data"
    real = [*(shared / "damaged").rglob("*.*"), *(shared / "kinetics_samples" / "videos").glob("*.m*")]
    real += sorted((shared / "imagenet_samples" / "val").rglob("*.*"))[:10]
    for path in sorted(real) if SOAK else []:
        if 0 < path.stat().st_size < 300_000 and path.suffix.lower() in (*PICTURES, ".mp4", ".mkv"):
            shutil.copy(path, folder / f"real_{path.name}")
    made = sorted(folder.iterdir())
    assert len(made) > 20
    return made


def run(job: dict[str, Any], folder: Path) -> tuple[int, list[dict[str, Any]], str]:
    """Reads a job's inputs in a process: its exit code, the outcomes, and which input it was at when it ended."""
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({**job, "folder": str(folder)}))
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.reliability.mutations", str(folder / "job.json"), str(folder / "out.jsonl")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=3000)
    out = folder / "out.jsonl"
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    last = lines[-1].get("begun", "the end") if lines else "the beginning"
    return done.returncode, [line for line in lines if "begun" not in line], f"{last}\n{done.stderr[-1500:]}"


def test_the_same_number_makes_the_same_input(sources: list[Path]) -> None:
    for number in range(60):
        first, second = mutated(sources, SEED, number), mutated(sources, SEED, number)
        assert first == second
    assert len({mutated(sources, SEED, number)[1] for number in range(0, 600, len(sources))}) > 5


@pytest.mark.slow
def test_nothing_crashes(sources: list[Path], tmp_path: Path) -> None:
    count = size(300, 10_000)
    chunks = [list(range(start, min(start + CHUNK, count))) for start in range(0, count, CHUNK)]
    jobs = [{"sources": [str(path) for path in sources], "seed": SEED, "numbers": numbers} for numbers in chunks]
    with ThreadPoolExecutor(size(1, 2)) as pool:
        outcomes = list(pool.map(lambda part: run(part[1], tmp_path / str(part[0])), enumerate(jobs)))
    ended = [f"seed {SEED}, exit code {code} at {last}" for code, _, last in outcomes if code != 0]
    found = [result for _, results, _ in outcomes for result in results]
    wrong = [f"seed {SEED}: {r}" for r in found if r["outcome"] not in ("read", "refused")]
    wrong += [f"seed {SEED}, memory: {r}" for r in found if r["memory"] > MEMORY // 2]
    kinds = Counter(result["outcome"] for result in found)
    if found:
        largest, slowest = max(found, key=lambda r: r["memory"]), max(found, key=lambda r: r["seconds"])
        note(
            11,
            f"{len({r['number'] for r in found})} damaged inputs, {len(found)} readings by "
            f"{len({r['reader'] for r in found})} readers: {kinds['read']} read, {kinds['refused']} refused, "
            f"{len(ended)} crashes, {len(wrong)} wrong; at most {largest['memory'] / 1e6:.0f} MB ({largest['source']}) "
            f"and {slowest['seconds']:.1f} s ({slowest['source']})",
        )
    assert not ended and not wrong, "\n".join(ended + wrong)
    assert {r["number"] for r in found} == set(range(count))
    assert min(kinds["read"], kinds["refused"]) > count // 10, "damage of one kind only"
    assert all(r["seconds"] < SECONDS for r in found)
