"""From a config to objects.

`maskfeat.registry` finds the objective, the backbone and the data set that the config names; each is built by the
function in its spec, beside its class. What is common to all of them is built here.
"""

from collections.abc import Sequence

import torch
from torch.optim import Optimizer
from yacs.config import CfgNode

from maskfeat.data.bad_samples import BadSampleLog
from maskfeat.data.datasets.base import DatasetRequest
from maskfeat.data.datasets.classes import check_labels
from maskfeat.data.datasets.imagenet import ImageFolder
from maskfeat.data.loader import BatchLoader, LabelledSamples, Loader
from maskfeat.data.resident_loader import ResidentLoader
from maskfeat.data.samplers import EpochSampler
from maskfeat.distributed.world import World, available_cores
from maskfeat.errors import UserError
from maskfeat.masking import MaskSampler
from maskfeat.models.base import Backbone
from maskfeat.objectives.base import Objective
from maskfeat.optim.optimizers import make_optimizer
from maskfeat.optim.param_groups import parameter_groups
from maskfeat.optim.schedule import lr_at_epoch
from maskfeat.registry import backbone_spec, dataset_spec, objective_spec, tests_at_any_size

SPLITS = ("train", "val", "test")


def build_backbone(cfg: CfgNode, maskable: bool = False) -> Backbone:
    """Return the backbone of MODEL.ARCH; `maskable` = with a mask token."""
    backbone: Backbone = backbone_spec(cfg).build(cfg, maskable)
    return backbone


def build_objective(cfg: CfgNode) -> Objective:
    """Return the objective of MODEL.MODEL_NAME with its backbone: a float32 module on the CPU."""
    spec = objective_spec(cfg)
    objective: Objective = spec.build(cfg, build_backbone(cfg, maskable=spec.hides_patches))
    return objective


def build_optimizer(cfg: CfgNode, objective: Objective) -> Optimizer:
    """AdamW or SGD; each group has "layer_decay" (its learning rate multiplier) and "weight_decay"."""
    solver = cfg.SOLVER
    groups = parameter_groups(
        ((objective.released_name(name), parameter) for name, parameter in objective.named_parameters()),
        layer_id=objective.layer_id,
        last_layer=objective.backbone.num_blocks + 1,
        weight_decay=solver.WEIGHT_DECAY,
        layer_decay=solver.LAYER_DECAY,
        no_decay_1d=solver.ZERO_WD_1D_PARAM,
        no_decay_names=objective.backbone.no_weight_decay() if cfg.MVIT.ZERO_DECAY_POS_CLS else (),
    )
    return make_optimizer(
        groups,
        solver.OPTIMIZING_METHOD,
        lr=lr_at_epoch(cfg, 0.0),
        betas=solver.BETAS,
        momentum=solver.MOMENTUM,
        dampening=solver.DAMPENING,
        nesterov=solver.NESTEROV,
    )


def build_mask_sampler(cfg: CfgNode) -> MaskSampler | None:
    """Return what samples the masks of pre-training; None where nothing is hidden."""
    objective, backbone = objective_spec(cfg), backbone_spec(cfg)
    if objective.mask_sampler is None or not cfg.AUG.GEN_MASK_LOADER:
        return None
    sampler: MaskSampler = objective.mask_sampler(cfg, () if backbone.mask_grid is None else backbone.mask_grid(cfg))
    return sampler


def build_loader(
    cfg: CfgNode,
    split: str,
    world: World | None = None,
    num_clips: int | None = None,
    device: torch.device | None = None,
    plain: bool = False,
    classes: Sequence[str] | None = None,
) -> BatchLoader:
    """Batches of a split for one process.

    Each `for` over them gives the epoch that `set_epoch(number)` named last: without it, the same order and the same
    random draws again.

    Args:
        split: "train" (shuffled, augmented, full batches only), "val" (one central view) or "test" (every view).
        world: where this process stands; None = alone on its machine.
        num_clips: clips a video in testing; None = TEST.NUM_ENSEMBLE_VIEWS.
        device: where batches are finished and handed out; None = the CPU.
        plain: "train" as "val" shows its samples: in order, not augmented, every one.
        classes: names that number the classes; None = those of the training set.

    Raises:
        UserError: where the data is not there or smaller than a batch; the message names the key.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
    trains = split == "train" and not plain
    objective = objective_spec(cfg)
    if not trains:
        _check_size(cfg)
    world = world or World()
    request = DatasetRequest(split, trains, build_mask_sampler(cfg), num_clips, classes)
    dataset: LabelledSamples = dataset_spec(cfg, "TEST" if split == "test" else "TRAIN").build(cfg, request)
    kept = _can_be_kept(dataset) if cfg.DATA_LOADER.RESIDENT else None
    if objective.classifies:
        check_labels(split, dataset, cfg.MODEL.NUM_CLASSES, trains)
    sampler = EpochSampler(
        len(dataset),
        _batch_size(cfg, split, trains, world),
        rank=world.rank,
        world_size=world.size,
        shuffle=trains,
        drop_last=trains,
        seed=cfg.RNG_SEED,
        views=dataset.views,
        repeats=cfg.AUG.REPEATS if trains else 1,
        mixture=getattr(dataset, "mixture", ()) if trains else (),
    )
    bad_samples = BadSampleLog(cfg.OUTPUT_DIR, len(dataset), cfg.DATA.MAX_BAD_FRACTION, split, dataset)
    # More workers than cores only take each other's time; how many there are changes nothing in the data.
    workers = min(cfg.DATA_LOADER.NUM_WORKERS, max(available_cores() // world.local_size, 1))
    if kept is not None:
        return ResidentLoader(kept, sampler, bad_samples, workers, device=device)
    return Loader(dataset, sampler, bad_samples, workers, cfg.DATA_LOADER.PIN_MEMORY, device=device)


def _check_size(cfg: CfgNode) -> None:
    """Raise UserError where a model is evaluated at another size than it is built for."""
    if not tests_at_any_size(cfg) and cfg.DATA.TEST_CROP_SIZE != cfg.DATA.TRAIN_CROP_SIZE:
        raise UserError(
            f"DATA.TEST_CROP_SIZE is {cfg.DATA.TEST_CROP_SIZE} and DATA.TRAIN_CROP_SIZE {cfg.DATA.TRAIN_CROP_SIZE}: "
            "this model is built for one size, set both to it"
        )


def _batch_size(cfg: CfgNode, split: str, trains: bool, world: World) -> int:
    """Return how many samples a batch of one process has."""
    key, section = ("TEST.BATCH_SIZE", cfg.TEST) if split == "test" else ("TRAIN.BATCH_SIZE", cfg.TRAIN)
    size, left = divmod(section.BATCH_SIZE, world.local_size)
    if left or not size:
        raise UserError(
            f"{key} is {section.BATCH_SIZE} a machine, which {world.local_size} processes cannot share evenly"
        )
    if split != "test" and not trains:
        # As many at once as in training: what fits there fits here. (A test has a batch size of its own.)
        return int(min(size, cfg.TRAIN.MICRO_BATCH_SIZE or size))
    return int(size)


def _can_be_kept(dataset: LabelledSamples) -> ImageFolder:
    """Return a data set that `ResidentLoader` takes; UserError for any other one."""
    if isinstance(dataset, ImageFolder):
        return dataset
    raise UserError(
        "DATA_LOADER.RESIDENT must be False for a data set of a plugin that does not build a "
        f"maskfeat.data.datasets.imagenet.ImageFolder; given True and a {type(dataset).__name__}"
    )
