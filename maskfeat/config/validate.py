"""Checks between keys, before any work. A message says what was given, what was expected, and which key to change."""

from collections.abc import Iterable, Iterator

from yacs.config import CfgNode

from maskfeat.config.ranges import check_single_keys
from maskfeat.config.schema import schema
from maskfeat.errors import UserError
from maskfeat.registry import Registered, backbone_spec, datasets_in_use, load, lookup, objective_spec


def validate(cfg: CfgNode) -> None:
    """Validate a whole config. No file is read: data and checkpoints are looked for when they are opened.

    Raises:
        UserError: lists all problems of the first stage that has any. Stages: single values; objective, backbone and
            data; lists of blocks; combinations.
    """
    rules = schema(cfg.PLUGINS).rules
    for stage in (lambda cfg: check_single_keys(cfg, rules), _methods, _lists, _combinations):
        problems = list(stage(cfg))
        if len(problems) == 1:
            raise UserError(problems[0])
        if problems:
            raise UserError(f"the config has {len(problems)} problems:\n- " + "\n- ".join(problems))


def _either(words: Iterable[str]) -> str:
    """Return "a, b or c"; "none" where there are none."""
    *first, last = list(words) or ["none"]
    return f"{', '.join(first)} or {last}" if first else last


def _takes(registered: Registered, media: str) -> list[str]:
    """Return the values of MODEL.MODEL_NAME that support images or clips, with one backbone at least."""
    backbones = [backbone for backbone in registered.backbones.values() if media in backbone.media]
    return [
        name
        for name, objective in registered.objectives.items()
        if media in objective.media and any(objective.supports(backbone) for backbone in backbones)
    ]


def _methods(cfg: CfgNode) -> Iterator[str]:
    """Yield problems of the combination of objective, backbone and data."""
    registered = load(cfg.PLUGINS)
    objective, backbone = objective_spec(cfg), backbone_spec(cfg)
    name, arch = cfg.MODEL.MODEL_NAME, cfg.MODEL.ARCH
    if not objective.supports(backbone):
        supported = _either(repr(key) for key, spec in registered.backbones.items() if objective.supports(spec))
        hint = f": {objective.backbone_hint}" if objective.backbone_hint else ""
        yield f"MODEL.MODEL_NAME {name!r} supports MODEL.ARCH {supported}; given {arch!r}{hint}"
    for key, dataset in datasets_in_use(cfg):
        limited = [spec for spec in (objective, backbone) if dataset.media not in spec.media]
        if limited:
            media, title = limited[0].media, limited[0].title or limited[0].name
            names = _either(other for other, spec in registered.datasets.items() if spec.media in media)
            able = _either(repr(other) for other in _takes(registered, dataset.media))
            yield (
                f"MODEL.MODEL_NAME {name!r} ({title}) supports {_either(f'{m}s' for m in media)}, {key} "
                f"{names}; given {dataset.name}: {dataset.media}s go with MODEL.MODEL_NAME {able}"
            )


def _lists(cfg: CfgNode) -> Iterator[str]:
    """Yield problems of lists that later checks rely on."""
    for spec in (backbone_spec(cfg), objective_spec(cfg), *dict.fromkeys(spec for _, spec in datasets_in_use(cfg))):
        yield from spec.check_lists(cfg)


def _combinations(cfg: CfgNode) -> Iterator[str]:
    yield from _processes(cfg)
    yield from _sharding(cfg)
    yield from _datasets(cfg)
    yield from _views(cfg)
    yield from _resident(cfg)
    yield from _several_labels(cfg)
    yield from backbone_spec(cfg).check(cfg)
    yield from _schedule(cfg)
    yield from _best(cfg)
    yield from _objective(cfg)


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
    """Yield problems of keys for sharded parameters."""
    train, method = cfg.TRAIN, cfg.SOLVER.OPTIMIZING_METHOD
    if not train.ENABLE:
        return
    if train.PARALLEL != "fsdp":
        if train.CHECKPOINT_FORMAT == "sharded":
            yield (
                "TRAIN.CHECKPOINT_FORMAT must be 'gathered' where TRAIN.PARALLEL is not 'fsdp' (nothing is sharded); "
                "given 'sharded'"
            )
        return
    if method != "adamw":
        yield (
            "SOLVER.OPTIMIZING_METHOD must be 'adamw' where TRAIN.PARALLEL is 'fsdp' (PyTorch has no fused kernel of "
            f"other methods for sharded parameters); given {method!r}"
        )
    if train.EMA:
        yield (
            "TRAIN.EMA must be 0 where TRAIN.PARALLEL is 'fsdp' (the average would not be sharded); "
            f"given {train.EMA:g}"
        )


def _datasets(cfg: CfgNode) -> Iterator[str]:
    used = {spec: key for key, spec in reversed(list(datasets_in_use(cfg)))}
    if len(used) > 1:
        yield (
            f"TRAIN.DATASET and TEST.DATASET must be the same where both are enabled; given "
            f"{cfg.TRAIN.DATASET!r} and {cfg.TEST.DATASET!r}"
        )
    for spec, key in used.items():
        images = spec.media == "image"
        if images != (cfg.DATA.NUM_FRAMES == 1):
            expected = "1 for images" if images else "more than 1 for clips"
            yield f"DATA.NUM_FRAMES must be {expected} ({key} {spec.name}); given {cfg.DATA.NUM_FRAMES}"
        if cfg.DATA.SOURCES and not spec.mixes:
            yield f"DATA.SOURCES must be [] for {key} {spec.name}, which does not read it"
        yield from spec.check(cfg)


def _views(cfg: CfgNode) -> Iterator[str]:
    """Yield problems of repeated augmentation in training, and of resizing in evaluation."""
    aug, data = cfg.AUG, cfg.DATA
    if aug.REPEATS > 1 and not aug.ENABLE:
        yield f"AUG.REPEATS must be 1 where AUG.ENABLE is False; given {aug.REPEATS}"
    if aug.REPEATS > 1 and aug.NUM_SAMPLE > 1:
        yield f"AUG.REPEATS or AUG.NUM_SAMPLE must be 1; given {aug.REPEATS} and {aug.NUM_SAMPLE}"
    if aug.ENABLE and aug.AA_TYPE and aug.INTERPOLATION == "lanczos":
        yield (
            "AUG.INTERPOLATION must be 'bicubic', 'bilinear' or 'nearest' where AUG.AA_TYPE is given (Pillow cannot "
            "rotate with Lanczos); given 'lanczos'"
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
    """Yield problems of images that are kept on the device."""
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


def _several_labels(cfg: CfgNode) -> Iterator[str]:
    """Yield problems of samples that have several classes."""
    if not cfg.DATA.MULTI_LABEL:
        return
    needed: dict[str, object] = {"DATA_LOADER.RESIDENT": False}
    if objective_spec(cfg).classifies:
        # A mixed sample would have shares of classes, and smoothing takes the classes for exclusive.
        needed |= {"MODEL.LOSS_FUNC": "bce_logit", "MIXUP.ENABLE": False}
    for key, expected in needed.items():
        if lookup(cfg, key) != expected:
            yield f"{key} must be {expected!r} where DATA.MULTI_LABEL is True; given {lookup(cfg, key)!r}"
    if "," in cfg.DATA.PATH_LABEL_SEPARATOR:
        yield (
            "DATA.PATH_LABEL_SEPARATOR must not be ',' where DATA.MULTI_LABEL is True (commas separate the labels of a "
            f"line); given {cfg.DATA.PATH_LABEL_SEPARATOR!r}"
        )


def _schedule(cfg: CfgNode) -> Iterator[str]:
    solver = cfg.SOLVER
    cosine = solver.LR_POLICY == "cosine"
    ends_at_peak = cosine and solver.COSINE_AFTER_WARMUP and 0 < solver.WARMUP_EPOCHS == solver.MAX_EPOCH
    if solver.WARMUP_EPOCHS > solver.MAX_EPOCH or ends_at_peak:
        yield (
            f"SOLVER.WARMUP_EPOCHS must be below SOLVER.MAX_EPOCH ({solver.MAX_EPOCH}); given "
            f"{solver.WARMUP_EPOCHS:g}; set SOLVER.WARMUP_EPOCHS or SOLVER.MAX_EPOCH"
        )
    if solver.WARMUP_EPOCHS and solver.WARMUP_START_LR > solver.BASE_LR:
        yield (
            f"SOLVER.WARMUP_START_LR must be at most SOLVER.BASE_LR ({solver.BASE_LR:g}) where SOLVER.WARMUP_EPOCHS is "
            f"above 0 (warm-up would begin with too high a rate); given {solver.WARMUP_START_LR:g}"
        )
    if solver.CLIP_GRAD_VAL and solver.CLIP_GRAD_L2NORM:
        yield (
            f"SOLVER.CLIP_GRAD_VAL or SOLVER.CLIP_GRAD_L2NORM must be None; given {solver.CLIP_GRAD_VAL:g} and "
            f"{solver.CLIP_GRAD_L2NORM:g}"
        )
    sgd = solver.OPTIMIZING_METHOD == "sgd"
    if sgd and solver.NESTEROV and (not solver.MOMENTUM or solver.DAMPENING):
        yield (
            "SOLVER.NESTEROV must be False where SOLVER.MOMENTUM is 0 or SOLVER.DAMPENING above 0; given True, "
            f"{solver.MOMENTUM:g} and {solver.DAMPENING:g}"
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


def _best(cfg: CfgNode) -> Iterator[str]:
    """Yield problems of keeping the best checkpoint where nothing is validated."""
    period, last = cfg.TRAIN.EVAL_PERIOD, cfg.SOLVER.MAX_EPOCH
    validated = period and (period <= last or objective_spec(cfg).classifies)
    if cfg.TRAIN.ENABLE and cfg.TRAIN.KEEP_BEST and not validated:
        yield (
            f"TRAIN.KEEP_BEST must be False where nothing is validated: TRAIN.EVAL_PERIOD is {period}, and "
            f"SOLVER.MAX_EPOCH {last}; given True"
        )


def _objective(cfg: CfgNode) -> Iterator[str]:
    """Yield problems of the keys that the objective requires, and those of its own checks."""
    spec, name, loss = objective_spec(cfg), cfg.MODEL.MODEL_NAME, cfg.MODEL.LOSS_FUNC
    if loss not in spec.losses:
        losses = _either(map(repr, spec.losses))
        yield f"MODEL.LOSS_FUNC must be {losses} for MODEL.MODEL_NAME {name!r}; given {loss!r}"
    needed = {**spec.requires, "AUG.GEN_MASK_LOADER": spec.mask_sampler is not None}
    if not spec.classifies:
        needed["MIXUP.ENABLE"] = False
    why = " (it is not pre-trained)" if spec.classifies else ""
    for key, expected in needed.items():
        if lookup(cfg, key) != expected:
            yield f"{key} must be {expected!r} for MODEL.MODEL_NAME {name!r}{why}; given {lookup(cfg, key)!r}"
    if cfg.TEST.ENABLE and not spec.classifies:
        yield f"TEST.ENABLE must be False for MODEL.MODEL_NAME {name!r} (no classes to test); given True"
    yield from spec.check(cfg)
