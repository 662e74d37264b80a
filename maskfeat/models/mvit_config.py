"""The config of ViT and MViTv2: the MVIT section, its checks, and how both are built from it."""

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

from yacs.config import CfgNode

from maskfeat.errors import UserError
from maskfeat.models.base import INITS
from maskfeat.models.mvit import MViT, adaptive_strides
from maskfeat.models.vit import ViT
from maskfeat.registry import BELOW_1, BackboneSpec, Range, datasets_in_use, register

N = TypeVar("N", int, float)

_MUL_KEYS = ("DIM_MUL", "HEAD_MUL")
_STRIDE_KEYS = ("POOL_Q_STRIDE", "POOL_KV_STRIDE")
_FACTOR_MAX = 100
_STRIDE_MAX = 1024


def _keys(cfg: CfgNode) -> None:
    """ViT and MViTv2; without effect for other values of MODEL.ARCH."""
    cfg.MVIT = CfgNode()
    cfg.MVIT.MODE = "conv"  # how queries, keys and values are pooled: only "conv"
    cfg.MVIT.POOL_FIRST = False  # only False
    cfg.MVIT.CLS_EMBED_ON = True  # a class token
    cfg.MVIT.PATCH_2D = False  # True: images, and two numbers in each PATCH_* key; False: clips, and three
    cfg.MVIT.PATCH_KERNEL = [3, 7, 7]  # of the patch embedding: frames, height, width
    cfg.MVIT.PATCH_STRIDE = [2, 4, 4]  # the same
    cfg.MVIT.PATCH_PADDING = [2, 4, 4]  # the same
    cfg.MVIT.EMBED_DIM = 96  # width of the first block
    cfg.MVIT.NUM_HEADS = 1  # attention heads of the first block
    cfg.MVIT.MLP_RATIO = 4.0  # hidden width of an MLP over the width of its block
    cfg.MVIT.QKV_BIAS = True  # biases of the q, k and v projections
    cfg.MVIT.DROPOUT_RATE = 0.0  # of the tokens with their positions, after attention and in MLPs, 0 .. 1
    # of the last block, 0 .. 1; grows linearly from 0; every process drops its own paths (published: all the same)
    cfg.MVIT.DROPPATH_RATE = 0.1
    cfg.MVIT.LAYER_SCALE_INIT_VALUE = 0.0  # only 0.0: no layer scale
    cfg.MVIT.DEPTH = 16  # blocks
    cfg.MVIT.NORM = "layernorm"  # only "layernorm"
    cfg.MVIT.NORM_STEM = False  # only False
    cfg.MVIT.DIM_MUL = []  # [[block, factor], ...]: the width grows on the way into that block
    cfg.MVIT.DIM_MUL_IN_ATT = False  # only False: the MLP of the block before widens
    cfg.MVIT.HEAD_MUL = []  # [[block, factor], ...]: heads
    # [[block, t, h, w], ...]: stride of the query pooling; a block that is not named has no pooling layer for queries
    cfg.MVIT.POOL_Q_STRIDE = []
    cfg.MVIT.POOL_KV_STRIDE = []  # the same for keys and values; [] (or what it gives) where the next key is given
    cfg.MVIT.POOL_KV_STRIDE_ADAPTIVE = None  # [t, h, w], divided by each query stride as it happens
    cfg.MVIT.POOL_KVQ_KERNEL = None  # [t, h, w]: pooling kernel; None only where nothing is pooled
    cfg.MVIT.RESIDUAL_POOLING = False  # add the pooled query to the attention's output
    cfg.MVIT.SEPARATE_QKV = False  # only False: one linear layer for q, k and v
    cfg.MVIT.USE_ABS_POS = True  # absolute positions
    cfg.MVIT.SEP_POS_EMBED = False  # clips: absolute positions in space and in time apart
    cfg.MVIT.REL_POS_SPATIAL = False  # relative positions in space
    cfg.MVIT.REL_POS_TEMPORAL = False  # relative positions in time
    cfg.MVIT.REL_POS_ZERO_INIT = False  # start relative positions at zero
    cfg.MVIT.ZERO_DECAY_POS_CLS = True  # no weight decay on positions and the class token
    cfg.MVIT.USE_MEAN_POOLING = False  # classify the mean of the tokens, not the class token
    cfg.MVIT.HEAD_INIT_SCALE = 1.0  # factor on the classifier's first weights
    # ours: first weights: "pyslowfast" | "beit", that of MFM's paper: cut at one standard deviation (what is left has
    # 0.0108 for 0.0200), the last layers of both branches of block i over sqrt(2 i), and biases 0 for 0.02 | "mae":
    # Xavier uniform weights, biases 0, positions that start as sines and cosines; for networks narrower than 768
    cfg.MVIT.INIT = "pyslowfast"


_INITIAL = ("MVIT.INIT", "MVIT.REL_POS_ZERO_INIT", "MVIT.HEAD_INIT_SCALE")
# Of training, and of what classifies on top of the backbone.
_OTHERS = ("MVIT.DROPOUT_RATE", "MVIT.DROPPATH_RATE", "MVIT.ZERO_DECAY_POS_CLS", "MVIT.USE_MEAN_POOLING")


def _architecture() -> tuple[str, ...]:
    cfg = CfgNode()
    _keys(cfg)
    names = [f"MVIT.{name}" for name in cfg.MVIT]
    return (*(n for n in names if n not in (*_INITIAL, *_OTHERS)), "DATA.TRAIN_CROP_SIZE", "DATA.NUM_FRAMES")


KINDS = {
    "MVIT.PATCH_KERNEL": "list[int]",
    "MVIT.PATCH_STRIDE": "list[int]",
    "MVIT.PATCH_PADDING": "list[int]",
    "MVIT.DIM_MUL": "list[list[number]]",
    "MVIT.HEAD_MUL": "list[list[number]]",
    "MVIT.POOL_Q_STRIDE": "list[list[int]]",
    "MVIT.POOL_KV_STRIDE": "list[list[int]]",
    "MVIT.POOL_KV_STRIDE_ADAPTIVE": "list[int] or None",
    "MVIT.POOL_KVQ_KERNEL": "list[int] or None",
}
CHOICES: dict[str, tuple[object, ...]] = {
    "MVIT.MODE": ("conv",),
    "MVIT.NORM": ("layernorm",),
    "MVIT.INIT": tuple(INITS),
    "MVIT.LAYER_SCALE_INIT_VALUE": (0.0,),
    "MVIT.POOL_FIRST": (False,),
    "MVIT.NORM_STEM": (False,),
    "MVIT.DIM_MUL_IN_ATT": (False,),
    "MVIT.SEPARATE_QKV": (False,),
    # Without effect here, but the same YAML would train another model elsewhere if they were True.
    "MVIT.REV.ENABLE": (False,),
    "MVIT.USE_FIXED_SINCOS_POS": (False,),
}
RANGES = {
    **dict.fromkeys(("MVIT.DROPOUT_RATE", "MVIT.DROPPATH_RATE"), BELOW_1),
    "MVIT.EMBED_DIM": Range(1, 65_536),
    "MVIT.NUM_HEADS": Range(1, 1024),
    "MVIT.DEPTH": Range(1, 1000),
    **dict.fromkeys(("MVIT.PATCH_KERNEL", "MVIT.PATCH_STRIDE"), Range(1, _STRIDE_MAX)),
    **dict.fromkeys(("MVIT.POOL_KV_STRIDE_ADAPTIVE", "MVIT.POOL_KVQ_KERNEL"), Range(1, _STRIDE_MAX)),
    "MVIT.PATCH_PADDING": Range(0, _STRIDE_MAX),
    "MVIT.HEAD_INIT_SCALE": Range(0, 100),
    "MVIT.MLP_RATIO": Range(0, 100, above=True),
}
LENGTHS = {"MVIT.POOL_KV_STRIDE_ADAPTIVE": (3,), "MVIT.POOL_KVQ_KERNEL": (3,)}


def _check_lists(cfg: CfgNode) -> Iterator[str]:
    """Shapes that later checks rely on."""
    mvit = cfg.MVIT
    axes = 2 if mvit.PATCH_2D else 3
    for key in ("PATCH_KERNEL", "PATCH_STRIDE", "PATCH_PADDING"):
        if len(mvit[key]) != axes:
            yield (
                f"MVIT.{key} must have {axes} numbers where MVIT.PATCH_2D is {mvit.PATCH_2D}; "
                f"given {mvit[key]!r}; set MVIT.{key} or MVIT.PATCH_2D"
            )
    for key in _MUL_KEYS:
        for entry in mvit[key]:
            if len(entry) != 2 or not isinstance(entry[0], int) or not 0 < entry[1] <= _FACTOR_MAX:
                yield (
                    f"MVIT.{key} must be a list of [block, factor above 0 and at most {_FACTOR_MAX}]; given {entry!r}"
                )
    for key in _STRIDE_KEYS:
        for entry in mvit[key]:
            if len(entry) != 4 or min(entry[1:]) < 1 or max(entry[1:]) > _STRIDE_MAX:
                yield (
                    f"MVIT.{key} must be a list of [block, t, h, w] with strides of at least 1 and at most "
                    f"{_STRIDE_MAX}; given {entry!r}"
                )
    for key in (*_MUL_KEYS, *_STRIDE_KEYS):
        first = 1 if key == "DIM_MUL" else 0  # the width can only change after block 0
        outside = [str(entry[0]) for entry in mvit[key] if entry and not first <= entry[0] < mvit.DEPTH]
        if outside:
            yield (
                f"MVIT.{key} names block {', '.join(outside)}, but with MVIT.DEPTH {mvit.DEPTH} it may name "
                f"blocks {first} to {mvit.DEPTH - 1}; set MVIT.{key} or MVIT.DEPTH"
            )


def _check(cfg: CfgNode) -> Iterator[str]:
    for key, dataset in datasets_in_use(cfg):
        images = dataset.media == "image"
        if images != cfg.MVIT.PATCH_2D:
            yield f"MVIT.PATCH_2D must be {images} for {key} {dataset.name}; given {cfg.MVIT.PATCH_2D}"
            break  # TRAIN.DATASET and TEST.DATASET are the same
    if cfg.MVIT.PATCH_2D and cfg.MVIT.USE_ABS_POS and cfg.MVIT.SEP_POS_EMBED:
        yield "MVIT.SEP_POS_EMBED must be False for images (MVIT.PATCH_2D), whose positions have no time; given True"
    yield from _grids(cfg)
    yield from _widths(cfg)


def _grids(cfg: CfgNode) -> Iterator[str]:
    stride = cfg.MVIT.PATCH_STRIDE
    for key in ("TRAIN_CROP_SIZE", "TEST_CROP_SIZE"):
        if any(cfg.DATA[key] % s for s in stride[-2:]):
            yield (
                f"DATA.{key} must be a multiple of MVIT.PATCH_STRIDE {stride}; given {cfg.DATA[key]}; "
                f"set DATA.{key} or MVIT.PATCH_STRIDE"
            )
    if len(stride) == 3 and cfg.DATA.NUM_FRAMES % stride[0]:
        yield (
            f"DATA.NUM_FRAMES must be a multiple of the first number of MVIT.PATCH_STRIDE {stride}; "
            f"given {cfg.DATA.NUM_FRAMES}"
        )
    yield from _key_strides(cfg)


def _key_strides(cfg: CfgNode) -> Iterator[str]:
    """PySlowFast writes the strides that the adaptive one gives into the config that it saves: they may be given."""
    mvit = cfg.MVIT
    given, adaptive = _by_block(mvit.POOL_KV_STRIDE), mvit.POOL_KV_STRIDE_ADAPTIVE
    if not given or not adaptive:
        return
    filled = [list(stride) for stride in adaptive_strides(adaptive, _by_block(mvit.POOL_Q_STRIDE), mvit.DEPTH)]
    if given != dict(enumerate(filled)):
        rows = [[block, *stride] for block, stride in enumerate(filled)]
        yield (
            f"MVIT.POOL_KV_STRIDE must be [] where MVIT.POOL_KV_STRIDE_ADAPTIVE is given, or what {adaptive} gives: "
            f"{rows}; given {mvit.POOL_KV_STRIDE}; set one of the two, the other to [] or None"
        )


def _widths(cfg: CfgNode) -> Iterator[str]:
    mvit = cfg.MVIT
    for block in range(mvit.DEPTH):
        width = mvit.EMBED_DIM * math.prod(factor for at, factor in mvit.DIM_MUL if at <= block)
        heads = mvit.NUM_HEADS * math.prod(factor for at, factor in mvit.HEAD_MUL if at <= block)
        if width % 1 or heads % 1 or width < 1 or heads < 1 or width % heads:
            yield (
                f"block {block} would be {width:g} wide with {heads:g} attention heads, and must be a "
                f"multiple of them; set MVIT.EMBED_DIM, MVIT.NUM_HEADS, MVIT.DIM_MUL or MVIT.HEAD_MUL"
            )
            return


def _mask_grid(cfg: CfgNode) -> tuple[int, ...]:
    """Images: the grid of the last block's tokens. Clips: AUG.MASK_WINDOW_SIZE."""
    if not cfg.MVIT.PATCH_2D:
        return tuple(cfg.AUG.MASK_WINDOW_SIZE)
    side = cfg.DATA.TRAIN_CROP_SIZE
    pooled = [strides[-2:] for block, *strides in cfg.MVIT.POOL_Q_STRIDE if block < cfg.MVIT.DEPTH]
    grid = tuple(
        side // (stride * math.prod(strides[axis] for strides in pooled))
        for axis, stride in enumerate(cfg.MVIT.PATCH_STRIDE)
    )
    if math.prod(grid) == 0:
        raise UserError(f"DATA.TRAIN_CROP_SIZE {side} is smaller than a patch, MVIT.PATCH_STRIDE")
    return grid


def _by_block(rows: Sequence[Sequence[N]]) -> dict[int, list[N]]:
    """[[block, value, ...], ...] as the YAMLs write it -> {block: [value, ...]}."""
    return {int(block): list(values) for block, *values in rows}


def _pools(cfg: CfgNode) -> bool:
    mvit = cfg.MVIT
    return bool(mvit.POOL_Q_STRIDE or mvit.POOL_KV_STRIDE or mvit.POOL_KV_STRIDE_ADAPTIVE)


def _build_vit(cfg: CfgNode, maskable: bool) -> ViT:
    mvit = cfg.MVIT
    return ViT(
        image_size=(cfg.DATA.TRAIN_CROP_SIZE,) * 2,
        patch=mvit.PATCH_STRIDE,
        width=mvit.EMBED_DIM,
        depth=mvit.DEPTH,
        num_heads=mvit.NUM_HEADS,
        mlp_ratio=mvit.MLP_RATIO,
        qkv_bias=mvit.QKV_BIAS,
        drop_path=mvit.DROPPATH_RATE,
        dropout=mvit.DROPOUT_RATE,
        class_token=mvit.CLS_EMBED_ON,
        position=mvit.USE_ABS_POS,
        maskable=maskable,
        init=mvit.INIT,
    )


def _build_mvit(cfg: CfgNode, maskable: bool) -> MViT:
    mvit = cfg.MVIT
    frames = () if mvit.PATCH_2D else (cfg.DATA.NUM_FRAMES,)
    axes = len(mvit.PATCH_KERNEL)  # images leave the first of (t, h, w) out
    if mvit.POOL_KVQ_KERNEL is None and _pools(cfg):
        raise UserError("MVIT.POOL_KVQ_KERNEL is None, expected a kernel such as [3, 3, 3] where queries are pooled")
    position = "none"
    if mvit.USE_ABS_POS:
        position = "separate" if mvit.SEP_POS_EMBED else "joint"
    return MViT(
        clip_size=(*frames, cfg.DATA.TRAIN_CROP_SIZE, cfg.DATA.TRAIN_CROP_SIZE),
        kernel=mvit.PATCH_KERNEL,
        stride=mvit.PATCH_STRIDE,
        padding=mvit.PATCH_PADDING,
        width=mvit.EMBED_DIM,
        depth=mvit.DEPTH,
        num_heads=mvit.NUM_HEADS,
        width_mul={block: factor[0] for block, factor in _by_block(mvit.DIM_MUL).items()},
        head_mul={block: factor[0] for block, factor in _by_block(mvit.HEAD_MUL).items()},
        stride_q={block: [int(s) for s in stride][-axes:] for block, stride in _by_block(mvit.POOL_Q_STRIDE).items()},
        stride_kv={block: [int(s) for s in stride][-axes:] for block, stride in _by_block(mvit.POOL_KV_STRIDE).items()},
        stride_kv_adaptive=mvit.POOL_KV_STRIDE_ADAPTIVE and mvit.POOL_KV_STRIDE_ADAPTIVE[-axes:],
        pool_kernel=(mvit.POOL_KVQ_KERNEL or [1, 1, 1])[-axes:],
        mlp_ratio=mvit.MLP_RATIO,
        qkv_bias=mvit.QKV_BIAS,
        drop_path=mvit.DROPPATH_RATE,
        dropout=mvit.DROPOUT_RATE,
        class_token=mvit.CLS_EMBED_ON,
        position=position,
        relative_space=mvit.REL_POS_SPATIAL,
        relative_time=mvit.REL_POS_TEMPORAL and not mvit.PATCH_2D,
        relative_zero_init=mvit.REL_POS_ZERO_INIT,
        residual_pooling=mvit.RESIDUAL_POOLING,
        maskable=maskable,
        init=mvit.INIT,
    )


def build_transformer(cfg: CfgNode, maskable: bool = False) -> ViT | MViT:
    """Return a plain ViT where patches are 2-D, do not overlap and nothing is pooled; otherwise an MViTv2."""
    mvit = cfg.MVIT
    plain = list(mvit.PATCH_KERNEL) == list(mvit.PATCH_STRIDE) and not any(mvit.PATCH_PADDING)
    if mvit.PATCH_2D and plain and not _pools(cfg) and not mvit.REL_POS_SPATIAL:
        return _build_vit(cfg, maskable)
    return _build_mvit(cfg, maskable)


TRANSFORMER = register(
    BackboneSpec(
        name="mvit",
        aliases=("maskmvit",),
        title="ViT and MViTv2",
        build=build_transformer,
        keys=_keys,
        architecture=_architecture(),
        initial=_INITIAL,
        kinds=KINDS,
        choices=CHOICES,
        ranges=RANGES,
        lengths=LENGTHS,
        check_lists=_check_lists,
        check=_check,
        mask_grid=_mask_grid,
        classifier=lambda cfg: {
            "mean_pooling": cfg.MVIT.USE_MEAN_POOLING,
            "head_init_scale": cfg.MVIT.HEAD_INIT_SCALE,
        },
    )
)
