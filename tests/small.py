"""Overrides that shrink the recipes to seconds on a CPU; nothing but overrides."""

from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
RECIPES = REPO / "configs" / "masked_ssl"
MFM_RECIPES = REPO / "configs" / "mfm"

COMMON = [
    "NUM_GPUS", "0", "DATA_LOADER.NUM_WORKERS", "0", "TENSORBOARD.ENABLE", "False", "LOG_PERIOD", "1",
    "SOLVER.WARMUP_EPOCHS", "0", "SOLVER.MAX_EPOCH", "2", "TRAIN.CHECKPOINT_PERIOD", "1", "TRAIN.BATCH_SIZE", "8",
    "TEST.BATCH_SIZE", "8", "MODEL.NUM_CLASSES", "4",
]  # fmt: skip
VIT = [
    "DATA.TRAIN_CROP_SIZE", "32", "DATA.TEST_CROP_SIZE", "32", "MVIT.DEPTH", "2", "MVIT.EMBED_DIM", "24",
    "MVIT.NUM_HEADS", "2",
]  # fmt: skip
MVIT = [
    "DATA.TRAIN_CROP_SIZE", "32", "DATA.TEST_CROP_SIZE", "32", "DATA.NUM_FRAMES", "4", "DATA.TRAIN_JITTER_SCALES",
    "[36, 40]", "MVIT.DEPTH", "2", "MVIT.EMBED_DIM", "16", "MVIT.NUM_HEADS", "1", "MVIT.DIM_MUL", "[[1, 2.0]]",
    "MVIT.HEAD_MUL", "[[1, 2.0]]",
]  # fmt: skip
VIT_PT = [*COMMON, *VIT, "MASK.PRETRAIN_DEPTH", "[1]"]
VIT_FT = [*COMMON, *VIT]
MVIT_PT = [
    *COMMON, *MVIT, "MVIT.POOL_Q_STRIDE", "[[0, 1, 1, 1], [1, 1, 4, 4]]", "AUG.MASK_WINDOW_SIZE", "[2, 2, 2]",
    "MASK.PRETRAIN_DEPTH", "[1]",
]  # fmt: skip
MVIT_FT = [
    *COMMON,
    *MVIT,
    "MVIT.POOL_Q_STRIDE",
    "[[0, 1, 1, 1], [1, 1, 2, 2]]",
    "TEST.NUM_TEMPORAL_CLIPS",
    "[2]",
]

_RESNET = ["RESNET.DEPTH", "10", "TRAIN.CHECKPOINT_FILE_PATH", ""]
MFM_PT = [*COMMON, *_RESNET, "DATA.TRAIN_CROP_SIZE", "32", "DATA.TEST_CROP_SIZE", "32", "MFM.RADIUS", "6"]
R50_FT = [
    *COMMON, *_RESNET, "DATA.TRAIN_CROP_SIZE", "32", "DATA.TEST_CROP_SIZE", "40", "DATA.TEST_SHORT_SIDE", "44",
]  # fmt: skip


def images(root: Path) -> list[str]:
    return ["DATA.PATH_TO_DATA_DIR", str(root)]


def clips(root: Path) -> list[str]:
    return ["DATA.PATH_TO_DATA_DIR", str(root), "DATA.PATH_PREFIX", str(root)]
