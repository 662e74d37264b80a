"""What the correctness parts share: several checks in one part, comparisons with a limit, small recipes."""

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from benchmarks.cases import CONFIGS
from benchmarks.gpu.parts import Context, Failed, Figures
from benchmarks.measure import in_float32
from maskfeat.config import load_config
from maskfeat.demos.scenes import MOTIONS, SHAPES
from maskfeat.demos.synthetic import make_clips, make_images
from maskfeat.engine.parallelize import choose_kernels
from tests import small

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
VIT_PT = ("masked_ssl/in1k_VIT_B_MaskFeat_PT.yaml", small.VIT_PT)
VIT_FT = ("masked_ssl/in1k_VIT_B_MaskFeat_FT.yaml", [*small.VIT_FT, "TRAIN.CHECKPOINT_FILE_PATH", ""])
MVIT_PT = ("masked_ssl/k400_MVITv2_S_16x4_MaskFeat_PT.yaml", small.MVIT_PT)
MVIT_FT = ("masked_ssl/k400_MVITv2_S_16x4_FT.yaml", [*small.MVIT_FT, "TRAIN.CHECKPOINT_FILE_PATH", ""])
MFM_PT = ("mfm/in1k_R50_MFM_PT.yaml", small.MFM_PT)
RESIDENT = ("DATA_LOADER.RESIDENT", "True", "AUG.INTERPOLATION", "bilinear")
Recipe = tuple[str, Sequence[str]]

Check = Callable[[Context], Figures]


def all_of(checks: Mapping[str, Check]) -> Check:
    """Return one check that makes several: each leaves its figures under its name, and all are made if one fails."""

    def run(context: Context) -> Figures:
        wrong = []
        for name, check in checks.items():
            try:
                context.note(**{name: check(context)})
                logger.info("%s: %s", name, context.figures[name])
            except Failed as error:
                wrong.append(f"{name}: {error}")
            except Exception as error:  # one check's bug is reported and does not keep the others from being made
                traceback.print_exc()
                first = (str(error).strip().splitlines() or [""])[0]
                wrong.append(f"{name}: {type(error).__name__}: {first}")
                if "CUDA error" in str(error):  # nothing that follows in this process can be right
                    left = list(checks)[list(checks).index(name) + 1 :]
                    context.not_run += [f"{other}: after a CUDA error" for other in left]
                    context.note()
                    break
            context.note()
        if wrong:
            raise Failed("; ".join(wrong))
        return {}

    return run


def expect(what: str, found: float, limit: float) -> float:
    """Return a deviation that is at most `limit`; one that is more, or NaN, is a failure."""
    if not found <= limit:
        raise Failed(f"{what} is {found:.3g} off, at most {limit:g} expected")
    return found


def relative(found: float, expected: float) -> float:
    """How far a number is from what it should be, relative to that."""
    return abs(found - expected) / max(abs(expected), 1e-30)


def distance(found: Tensor, expected: Tensor) -> float:
    """|a - b| / |b| in L2 norms, in float64 on the CPU."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def largest(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number that is expected."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


@contextmanager
def exact() -> Iterator[None]:
    """Matrix products and convolutions in full float32."""
    choose_kernels(tf32=False, benchmark=False)
    with in_float32():
        yield


def small_config(recipe: Recipe, context: Context, *opts: str) -> CfgNode:
    """A recipe in the size of the tests, for the device."""
    path, shrunk = recipe
    fixed = ["NUM_GPUS", str(int(context.cuda)), "OUTPUT_DIR", str(context.folder)]
    return load_config(CONFIGS / path, [*shrunk, *fixed, *opts])


def image_files(context: Context) -> list[str]:
    """Overrides that lead to 40 + 16 real JPEG files of four classes."""
    root = make_images(context.data / "images", SHAPES[:4], train_per_class=10, val_per_class=4, size=(48, 64))
    return ["DATA.PATH_TO_DATA_DIR", str(root)]


def clip_files(context: Context) -> list[str]:
    """Overrides that lead to 16 + 8 + 8 real H.264 files of four classes."""
    counts: dict[str, Any] = {"train_per_class": 4, "val_per_class": 2, "test_per_class": 2}
    root = make_clips(context.data / "clips", MOTIONS[:4], num_frames=20, size=(48, 64), **counts)
    return ["DATA.PATH_TO_DATA_DIR", str(root), "DATA.PATH_PREFIX", str(root)]


def log_of(path: Path, lines: int = 15) -> str:
    """The last lines of a file."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
