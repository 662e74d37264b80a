"""Checks between keys, before any work: what was given, what was expected, and which key mends it."""

from collections.abc import Iterator, Mapping
from math import prod

from yacs.config import CfgNode

from maskfeat.config.ranges import check_single_keys, lookup

_TRANSFORMERS = ("mvit", "maskmvit")
_ARCHS = {
    "MViT": _TRANSFORMERS,
    "MaskMViT": _TRANSFORMERS,
    "ResNet": ("resnet",),
    "MFM": (*_TRANSFORMERS, "resnet"),
}
_RESNET_STRIDE = 32  # pixels on the side of what one value of a ResNet's last feature map stands for

_MUL_KEYS = ("MVIT.DIM_MUL", "MVIT.HEAD_MUL")
_STRIDE_KEYS = ("MVIT.POOL_Q_STRIDE", "MVIT.POOL_KV_STRIDE")


def validate(cfg: CfgNode) -> None:
    """Checks a whole config. It reads no file: data and checkpoints are looked for when they are opened.

    Raises:
        ValueError: names every problem of the first stage (single values, then objective, backbone and data, then
            lists of blocks, then their combinations) that has one.
    """
    for stage in (check_single_keys, _methods, _lists, _combinations):
        problems = list(stage(cfg))
        if len(problems) == 1:
            raise ValueError(problems[0])
        if problems:
            raise ValueError(f"the config has {len(problems)} problems:\n- " + "\n- ".join(problems))


def _is_resnet(cfg: CfgNode) -> bool:
    return bool(cfg.MODEL.ARCH == "resnet")


def _methods(cfg: CfgNode) -> Iterator[str]:
    """Which objective goes with which backbone and which data."""
    name, arch = cfg.MODEL.MODEL_NAME, cfg.MODEL.ARCH
    if arch not in _ARCHS[name]:
        supported = " or ".join(repr(a) for a in _ARCHS[name])
        hint = {
            "MaskMViT": "MaskFeat hides patches of a ViT or an MViTv2; to pre-train a ResNet, MODEL.MODEL_NAME 'MFM'",
            "MViT": "a ResNet classifies with MODEL.MODEL_NAME 'ResNet'",
            "ResNet": "a ViT or an MViTv2 classifies with MODEL.MODEL_NAME 'MViT'",
        }[name]
        yield f"MODEL.MODEL_NAME {name!r} supports MODEL.ARCH {supported}; given {arch!r}: {hint}"
    for section in ("TRAIN", "TEST"):
        clips = cfg[section].ENABLE and cfg[section].DATASET.lower() == "kinetics"
        if clips and (name == "MFM" or _is_resnet(cfg)):
            method = "masked frequency modelling" if name == "MFM" else "torchvision's ResNet"
            yield (
                f"MODEL.MODEL_NAME {name!r} ({method}) supports images, {section}.DATASET imagenet; given "
                f"{cfg[section].DATASET}: clips are pre-trained with 'MaskMViT' and classified with 'MViT'"
            )


def _lists(cfg: CfgNode) -> Iterator[str]:
    """Shapes that later checks rely on."""
    if _is_resnet(cfg):
        return
    mvit = cfg.MVIT
    axes = 2 if mvit.PATCH_2D else 3
    for key in ("PATCH_KERNEL", "PATCH_STRIDE", "PATCH_PADDING"):
        if len(mvit[key]) != axes:
            yield (
                f"MVIT.{key} must have {axes} numbers where MVIT.PATCH_2D is {mvit.PATCH_2D}; "
                f"given {mvit[key]!r}; set MVIT.{key} or MVIT.PATCH_2D"
            )
    for key in _MUL_KEYS:
        for entry in lookup(cfg, key):
            if len(entry) != 2 or not isinstance(entry[0], int) or entry[1] <= 0:
                yield f"{key} must be a list of [block, factor above 0]; given {entry!r}"
    for key in _STRIDE_KEYS:
        for entry in lookup(cfg, key):
            if len(entry) != 4 or min(entry[1:]) < 1:
                yield f"{key} must be a list of [block, t, h, w] with strides of at least 1; given {entry!r}"
    for key in (*_MUL_KEYS, *_STRIDE_KEYS):
        first = 1 if key == "MVIT.DIM_MUL" else 0  # the width can only change after block 0
        outside = [str(entry[0]) for entry in lookup(cfg, key) if entry and not first <= entry[0] < mvit.DEPTH]
        if outside:
            yield (
                f"{key} names block {', '.join(outside)}, but with MVIT.DEPTH {mvit.DEPTH} it may name "
                f"blocks {first} to {mvit.DEPTH - 1}; set {key} or MVIT.DEPTH"
            )


def _combinations(cfg: CfgNode) -> Iterator[str]:
    yield from _processes(cfg)
    yield from _sharding(cfg)
    yield from _datasets(cfg)
    yield from _views(cfg)
    yield from _resident(cfg)
    if _is_resnet(cfg):
        yield from _resnet(cfg)
    else:
        yield from _grids(cfg)
        yield from _widths(cfg)
    yield from _schedule(cfg)
    yield from {"MaskMViT": _maskfeat, "MFM": _mfm}.get(cfg.MODEL.MODEL_NAME, _classification)(cfg)


def _processes(cfg: CfgNode) -> Iterator[str]:
    if cfg.SHARD_ID >= cfg.NUM_SHARDS:
        yield f"SHARD_ID must be below NUM_SHARDS ({cfg.NUM_SHARDS}); given {cfg.SHARD_ID}"
    processes = max(cfg.NUM_GPUS, 1)
    for section in ("TRAIN", "TEST"):
        size = cfg[section].BATCH_SIZE
        if cfg[section].ENABLE and size % processes:
            yield (
                f"{section}.BATCH_SIZE (per machine) must be a multiple of NUM_GPUS; given {size} for "
                f"{processes} GPUs; set {section}.BATCH_SIZE or NUM_GPUS"
            )


def _sharding(cfg: CfgNode) -> Iterator[str]:
    """What goes with parameters in pieces."""
    train, method = cfg.TRAIN, cfg.SOLVER.OPTIMIZING_METHOD
    if not train.ENABLE:
        return
    if train.PARALLEL != "fsdp":
        if train.CHECKPOINT_FORMAT == "sharded":
            yield (
                "TRAIN.CHECKPOINT_FORMAT must be 'gathered' where TRAIN.PARALLEL is not 'fsdp' (nothing is in pieces); "
                "given 'sharded'"
            )
        return
    if method != "adamw":
        yield (
            "SOLVER.OPTIMIZING_METHOD must be 'adamw' where TRAIN.PARALLEL is 'fsdp' (PyTorch has no fused kernel of "
            f"other methods for parameters in pieces); given {method!r}"
        )
    if train.EMA:
        yield (
            "TRAIN.EMA must be 0 where TRAIN.PARALLEL is 'fsdp' (the average would be whole on every GPU); "
            f"given {train.EMA:g}"
        )


def _datasets(cfg: CfgNode) -> Iterator[str]:
    data = cfg.DATA
    used = {cfg[s].DATASET.lower(): f"{s}.DATASET" for s in ("TEST", "TRAIN") if cfg[s].ENABLE}
    if len(used) > 1:
        yield (
            f"TRAIN.DATASET and TEST.DATASET must be the same where both are enabled; given "
            f"{cfg.TRAIN.DATASET!r} and {cfg.TEST.DATASET!r}"
        )
    for name, key in used.items():
        images = name == "imagenet"
        if images != (data.NUM_FRAMES == 1):
            expected = "1 for images" if images else "more than 1 for clips"
            yield f"DATA.NUM_FRAMES must be {expected} ({key} {name}); given {data.NUM_FRAMES}"
        if images != cfg.MVIT.PATCH_2D and not _is_resnet(cfg):
            yield f"MVIT.PATCH_2D must be {images} for {key} {name}; given {cfg.MVIT.PATCH_2D}"
    jitters = cfg.TRAIN.ENABLE and "kinetics" in used and not data.TRAIN_JITTER_SCALES_RELATIVE
    if jitters and data.TRAIN_JITTER_SCALES[0] < data.TRAIN_CROP_SIZE:
        yield (
            f"DATA.TRAIN_JITTER_SCALES must start at DATA.TRAIN_CROP_SIZE ({data.TRAIN_CROP_SIZE}) or above, "
            f"or the crop does not fit; given {data.TRAIN_JITTER_SCALES}"
        )


def _views(cfg: CfgNode) -> Iterator[str]:
    """How images are repeated in training, and resized in evaluation."""
    aug, data = cfg.AUG, cfg.DATA
    if aug.REPEATS > 1 and not aug.ENABLE:
        yield f"AUG.REPEATS must be 1 where AUG.ENABLE is False; given {aug.REPEATS}"
    if aug.REPEATS > 1 and aug.NUM_SAMPLE > 1:
        yield f"AUG.REPEATS or AUG.NUM_SAMPLE must be 1; given {aug.REPEATS} and {aug.NUM_SAMPLE}"
    if aug.ENABLE and aug.AA_TYPE and aug.INTERPOLATION == "lanczos":
        yield (
            "AUG.INTERPOLATION must be 'bicubic', 'bilinear' or 'nearest' where AUG.AA_TYPE is given (Pillow turns no "
            "picture with Lanczos); given 'lanczos'"
        )
    if not data.TEST_SHORT_SIDE:
        return
    if data.TEST_SHORT_SIDE < data.TEST_CROP_SIZE:
        yield (
            f"DATA.TEST_SHORT_SIDE must be at least DATA.TEST_CROP_SIZE ({data.TEST_CROP_SIZE}), or 0; given "
            f"{data.TEST_SHORT_SIDE}"
        )
    if data.NUM_FRAMES > 1:
        yield f"DATA.TEST_SHORT_SIDE is for images and must be 0 for clips; given {data.TEST_SHORT_SIDE}"


def _resident(cfg: CfgNode) -> Iterator[str]:
    """What is drawn on the device, of images that are kept there."""
    if not cfg.DATA_LOADER.RESIDENT:
        return
    aug = cfg.AUG
    if cfg.DATA.NUM_FRAMES > 1:
        yield "DATA_LOADER.RESIDENT keeps images, and must be False for clips (DATA.NUM_FRAMES above 1); given True"
    if cfg.TRAIN.ENABLE and aug.INTERPOLATION != "bilinear":
        yield f"AUG.INTERPOLATION must be 'bilinear' where DATA_LOADER.RESIDENT is True; given {aug.INTERPOLATION!r}"
    unsupported = {"AA_TYPE": "", "COLOR_JITTER": None, "RE_PROB": 0.0, "NUM_SAMPLE": 1, "REPEATS": 1}
    for key, needed in unsupported.items() if cfg.TRAIN.ENABLE and aug.ENABLE else ():
        if (aug[key] or None) != (needed or None):
            yield (
                f"AUG.{key} must be {needed!r} where DATA_LOADER.RESIDENT is True (training crops and mirrors there, "
                f"and does no more); given {aug[key]!r}"
            )


def _resnet(cfg: CfgNode) -> Iterator[str]:
    if cfg.MODEL.ACT_CHECKPOINT:
        yield (
            "MODEL.ACT_CHECKPOINT must be False for MODEL.ARCH 'resnet' (its batch norms would count a batch twice); "
            "given True; TRAIN.MIXED_PRECISION and TRAIN.MICRO_BATCH_SIZE save memory, too"
        )


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
    if cfg.MVIT.POOL_KV_STRIDE and cfg.MVIT.POOL_KV_STRIDE_ADAPTIVE is not None:
        yield "MVIT.POOL_KV_STRIDE must be [] where MVIT.POOL_KV_STRIDE_ADAPTIVE is given; both are given"


def _widths(cfg: CfgNode) -> Iterator[str]:
    mvit = cfg.MVIT
    for block in range(mvit.DEPTH):
        width = mvit.EMBED_DIM * prod(factor for at, factor in mvit.DIM_MUL if at <= block)
        heads = mvit.NUM_HEADS * prod(factor for at, factor in mvit.HEAD_MUL if at <= block)
        if width % 1 or heads % 1 or width < 1 or heads < 1 or width % heads:
            yield (
                f"block {block} would be {width:g} wide with {heads:g} attention heads, and must be a "
                f"multiple of them; set MVIT.EMBED_DIM, MVIT.NUM_HEADS, MVIT.DIM_MUL or MVIT.HEAD_MUL"
            )
            return


def _schedule(cfg: CfgNode) -> Iterator[str]:
    solver = cfg.SOLVER
    cosine = solver.LR_POLICY == "cosine"
    ends_at_peak = cosine and solver.COSINE_AFTER_WARMUP and 0 < solver.WARMUP_EPOCHS == solver.MAX_EPOCH
    if solver.WARMUP_EPOCHS > solver.MAX_EPOCH or ends_at_peak:
        yield (
            f"SOLVER.WARMUP_EPOCHS must be below SOLVER.MAX_EPOCH ({solver.MAX_EPOCH}); given "
            f"{solver.WARMUP_EPOCHS:g}; set SOLVER.WARMUP_EPOCHS or SOLVER.MAX_EPOCH"
        )
    if cosine and solver.COSINE_END_LR > solver.BASE_LR:
        yield (
            f"SOLVER.COSINE_END_LR must be at most SOLVER.BASE_LR ({solver.BASE_LR:g}); given {solver.COSINE_END_LR:g}"
        )
    if cosine:
        return
    if not solver.STEPS or len(solver.STEPS) != len(solver.LRS):
        yield (
            f"SOLVER.STEPS and SOLVER.LRS must be of one length, at least 1, for SOLVER.LR_POLICY "
            f"{solver.LR_POLICY!r}; given {solver.STEPS} and {solver.LRS}"
        )
    elif solver.STEPS[0] != 0 or sorted(set(solver.STEPS)) != solver.STEPS:
        yield f"SOLVER.STEPS must start at 0 and ascend; given {solver.STEPS}"


def _pretraining(cfg: CfgNode, needed: Mapping[str, object]) -> Iterator[str]:
    """What a pre-training config must hold."""
    name = cfg.MODEL.MODEL_NAME
    for key, expected in {**needed, "AUG.GEN_MASK_LOADER": True, "MIXUP.ENABLE": False}.items():
        if lookup(cfg, key) != expected:
            yield f"{key} must be {expected!r} for MODEL.MODEL_NAME {name!r}; given {lookup(cfg, key)!r}"
    if cfg.TEST.ENABLE:
        yield f"TEST.ENABLE must be False for MODEL.MODEL_NAME {name!r} (no classes to test); given True"


def _mfm(cfg: CfgNode) -> Iterator[str]:
    yield from _pretraining(cfg, {"MODEL.LOSS_FUNC": "frequency", "MASK.ENABLE": False, "MASK.PRED_HOG": False})
    crop = cfg.DATA.TRAIN_CROP_SIZE
    if _is_resnet(cfg) and crop % _RESNET_STRIDE:
        yield (
            f"DATA.TRAIN_CROP_SIZE must be a multiple of {_RESNET_STRIDE} to pre-train MODEL.ARCH 'resnet', which "
            f"makes one token of {_RESNET_STRIDE} x {_RESNET_STRIDE} pixels; given {crop}"
        )
    if crop / 2 < cfg.MFM.RADIUS:
        yield (
            f"MFM.RADIUS must be at most half of DATA.TRAIN_CROP_SIZE ({crop}), or little is left outside of the disc; "
            f"given {cfg.MFM.RADIUS:g}"
        )


def _maskfeat(cfg: CfgNode) -> Iterator[str]:
    yield from _pretraining(cfg, {"MODEL.LOSS_FUNC": "multi_mse", "MASK.ENABLE": True, "MASK.PRED_HOG": True})
    if not 0 <= cfg.AUG.MASK_RATIO < 1:
        yield f"AUG.MASK_RATIO must be at least 0 and below 1 for pre-training; given {cfg.AUG.MASK_RATIO:g}"
    last = cfg.MVIT.DEPTH - 1
    if list(cfg.MASK.PRETRAIN_DEPTH) != [last]:
        yield (
            f"MASK.PRETRAIN_DEPTH must be [{last}], the last block of MVIT.DEPTH {cfg.MVIT.DEPTH}; "
            f"given {cfg.MASK.PRETRAIN_DEPTH}; set MASK.PRETRAIN_DEPTH or MVIT.DEPTH"
        )
    if cfg.MASK.SHUFFLE_TARGETS and max(cfg.AUG.NUM_SAMPLE, cfg.AUG.REPEATS) > 1:
        yield (
            "AUG.NUM_SAMPLE and AUG.REPEATS must be 1 where MASK.SHUFFLE_TARGETS is True (the next image of a batch "
            f"would be the same one); given {cfg.AUG.NUM_SAMPLE} and {cfg.AUG.REPEATS}"
        )
    if cfg.AUG.MASK_TUBE and cfg.AUG.MASK_FRAMES:
        yield "AUG.MASK_TUBE and AUG.MASK_FRAMES exclude each other; both are True"
    yield from _targets(cfg)


def _targets(cfg: CfgNode) -> Iterator[str]:
    """HOG cells and masks on the token grids (t, h, w): of the stem, and of the last block."""
    mvit = cfg.MVIT
    stride = (1, *mvit.PATCH_STRIDE)[-3:]
    frames, crop = cfg.DATA.NUM_FRAMES, cfg.DATA.TRAIN_CROP_SIZE
    pooled = [prod(entry[axis] for entry in mvit.POOL_Q_STRIDE) for axis in (1, 2, 3)]
    if pooled[0] != 1:
        yield (
            f"MVIT.POOL_Q_STRIDE must not pool time in pre-training: every frame of the stem has a target; "
            f"given a stride of {pooled[0]} in all"
        )
    for side in {s * q for s, q in zip(stride[1:], pooled[1:], strict=True)}:
        if side % cfg.MASK.HOG_CELL or crop % side:
            yield (
                f"a token of the last block covers {side} pixels (MVIT.PATCH_STRIDE x MVIT.POOL_Q_STRIDE): "
                f"it must be a multiple of MASK.HOG_CELL ({cfg.MASK.HOG_CELL}), and DATA.TRAIN_CROP_SIZE "
                f"({crop}) a multiple of it"
            )
    if mvit.PATCH_2D:
        return
    stem = [frames // stride[0], crop // stride[1], crop // stride[2]]
    tokens = [size // q for size, q in zip(stem, pooled, strict=True)]
    window = cfg.AUG.MASK_WINDOW_SIZE
    fits = all(s % w == 0 for s, w in zip(stem, window, strict=True))
    meets = all(t and (t % w == 0 or w % t == 0) for t, w in zip(tokens, window, strict=True))
    if not (fits and meets):
        yield (
            f"AUG.MASK_WINDOW_SIZE must divide the stem's grid {stem} (DATA.NUM_FRAMES and "
            f"DATA.TRAIN_CROP_SIZE over MVIT.PATCH_STRIDE) and be a whole multiple or part of the last "
            f"block's {tokens}; given {window}; {tokens} would do"
        )


def _classification(cfg: CfgNode) -> Iterator[str]:
    name, loss = cfg.MODEL.MODEL_NAME, cfg.MODEL.LOSS_FUNC
    for key in ("MASK.ENABLE", "MASK.PRED_HOG", "AUG.GEN_MASK_LOADER"):
        if lookup(cfg, key):
            yield f"{key} must be False for MODEL.MODEL_NAME {name!r} (it is not pre-trained); given True"
    if loss in ("multi_mse", "frequency"):
        yield (
            "MODEL.LOSS_FUNC must be 'cross_entropy', 'soft_cross_entropy' or 'bce_logit' for MODEL.MODEL_NAME "
            f"{name!r}; given {loss!r}"
        )
    elif cfg.MIXUP.ENABLE and loss == "cross_entropy":
        yield (
            f"MODEL.LOSS_FUNC must be 'soft_cross_entropy' or 'bce_logit' where MIXUP.ENABLE is True; given {loss!r}"
        )
