"""The suites of the evidence: data, methods, recipes and budgets."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from maskfeat.config.recipes import CONFIG_ROOT

CONFIGS = CONFIG_ROOT


@dataclass(frozen=True)
class Family:
    """A backbone and its fine-tuning recipe, which is also used for training from scratch."""

    name: str
    fine_tuning: str


@dataclass(frozen=True)
class Method:
    """A pre-training method: name, title in the report, backbone and recipe."""

    name: str
    title: str
    family: Family
    pretraining: str
    has_controls: bool = False


@dataclass(frozen=True)
class Control:
    """A control that should remove the gain.

    Attributes:
        opts: overrides for pre-training; None = a checkpoint whose backbone is replaced by a newly initialised one.
    """

    name: str
    title: str
    opts: tuple[str, ...] | None


CONTROLS = (
    Control("shuffled", "targets of another image", ("MASK.SHUFFLE_TARGETS", "True")),
    Control("unmasked", "mask ratio 0", ("AUG.MASK_RATIO", "0.0")),
    Control("headless", "all but the backbone loaded", None),
)


@dataclass(frozen=True)
class Labels:
    """A set of labelled data, on which fine-tuning is compared with training from scratch.

    Attributes:
        title: in the report.
        folder: below the data of the suite.
        opts: overrides for every training on it.
        tuning: folder of a part of its training samples with held-out ones of the training set as `val`, on which
            settings of `grid` are compared; "" = none, and there is no grid.
        grid: overrides to choose from, by name: once for each method and once for training from scratch.
    """

    title: str
    folder: str
    opts: tuple[str, ...] = ()
    tuning: str = ""
    grid: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """The amount of computation.

    Attributes:
        labels: sets of labelled data.
        opts: overrides for every run.
        families: overrides for every run of a family: the size of its backbone.
        pretraining: overrides for pre-training, by method; methods that are not listed are not run at this budget.
        control_seeds: number of seeds for which controls are run.
        fine_tune_controls: whether controls are also fine-tuned, not only probed.
    """

    labels: tuple[Labels, ...]
    opts: tuple[str, ...]
    families: dict[str, tuple[str, ...]] = field(default_factory=dict)
    pretraining: dict[str, tuple[str, ...]] = field(default_factory=dict)
    control_seeds: int = 1
    fine_tune_controls: bool = False


GRAY = ", in grey"
"""After the name of a probe that sees no colour."""


@dataclass(frozen=True)
class Suite:
    """A data set and the methods that are run on it.

    Attributes:
        unlabelled: the folder for pre-training, below the data of the suite.
        probes: kinds of probes of frozen features.
        gray_probes: whether they are fitted a second time, to what a network sees in grey.
        blocks: the blocks that kNN and linear probes read, as --blocks of tools/probe.py.
        relative_lists: whether paths of lists are relative to the folder for pre-training.
    """

    name: str
    title: str
    unlabelled: str
    methods: tuple[Method, ...]
    budgets: dict[str, Budget]
    probes: tuple[str, ...] = ("linear", "knn")
    gray_probes: bool = False
    blocks: str = "4"
    relative_lists: bool = False

    def all_probes(self) -> tuple[str, ...]:
        """Return the names of the probes, those in grey as the kind and `GRAY`."""
        return (*self.probes, *(kind + GRAY for kind in self.probes if self.gray_probes))


_BF16 = ("TRAIN.MIXED_PRECISION", "bf16", "TEST.MIXED_PRECISION", "bf16")
_GPU = ("NUM_GPUS", "1", *_BF16, "TRAIN.COMPILE", "True", "DATA_LOADER.NUM_WORKERS", "8")

# bfloat16 only in training: a step takes 0.6 to 0.7 of float32 on a CPU that multiplies in it, and more on any other.
_NIGHT = ("NUM_GPUS", "0", "TRAIN.MIXED_PRECISION", "bf16")

# With every control of every seed.
_ON_GPU: dict[str, Any] = {"opts": _GPU, "control_seeds": 100, "fine_tune_controls": True}

_BIG = ("TRAIN.BATCH_SIZE", "512", "SOLVER.BASE_LR", "2e-3")

_VIT = Family("ViT", "cifar10/cifar10_VIT_FT.yaml")
_RESNET = Family("ResNet", "cifar10/cifar10_R10_FT.yaml")
_MVIT = Family("MViTv2", "shapes/shapes_MVITv2_FT.yaml")


def _epochs(number: int, warmup: float, looks: int = 10) -> tuple[str, ...]:
    """Return overrides for `number` epochs, with `looks` validations and checkpoints spread over them."""
    every = str(max(number // looks, 1))
    return (
        *("SOLVER.MAX_EPOCH", str(number), "SOLVER.WARMUP_EPOCHS", str(warmup)),
        *("TRAIN.EVAL_PERIOD", every, "TRAIN.CHECKPOINT_PERIOD", every),
    )


_WIDE_VIT = ("MVIT.EMBED_DIM", "192", "MVIT.NUM_HEADS", "3", "MVIT.DEPTH", "9")


# Of configs/masked_ssl/_base_/k400_ft.yaml.
_AUGMENTED = (
    *("AUG.AA_TYPE", "rand-m7-mstd0.5-inc1", "AUG.RE_PROB", "0.25", "MIXUP.ENABLE", "True"),
    *("MODEL.LOSS_FUNC", "soft_cross_entropy", "SOLVER.CLIP_GRAD_L2NORM", "5.0"),
)


def _grid(rates: Sequence[str], epochs: Sequence[int], augmented: bool = False) -> dict[str, tuple[str, ...]]:
    """Return every combination of learning rates and numbers of epochs, a tenth of which warm up.

    Args:
        augmented: the longest ones once more, with the published augmentation.
    """
    grid = {
        f"lr {rate}, {number} epochs": ("SOLVER.BASE_LR", rate, *_epochs(number, number / 10, looks=5))
        for rate in rates
        for number in epochs
    }
    longest = [f"lr {rate}, {max(epochs)} epochs" for rate in rates if augmented]
    return {**grid, **{f"{name}, published augmentation": (*grid[name], *_AUGMENTED) for name in longest}}


def _both(
    all_rates: Sequence[str],
    all_epochs: Sequence[int],
    few_rates: Sequence[str],
    few_epochs: Sequence[int],
    augmented: bool = False,
) -> tuple[Labels, ...]:
    """Return all labels and five of each class, with a grid each."""
    return (
        Labels("all labels", "all", (), "all_tuning", _grid(all_rates, all_epochs, augmented)),
        Labels("5 of each class", "few", (), "few_tuning", _grid(few_rates, few_epochs, augmented)),
    )


_CALTECH_VIT = Family("ViT", "caltech101/caltech101_VIT_FT.yaml")
_CALTECH_RESNET = Family("ResNet", "caltech101/caltech101_R10_FT.yaml")
_JHMDB_MVIT = Family("MViTv2", "jhmdb/jhmdb_MVITv2_FT.yaml")
_THREE_PROBES = ("linear", "attentive", "knn")

CIFAR10 = Suite(
    "cifar10",
    "CIFAR-10",
    unlabelled="all",
    methods=(
        Method("maskfeat", "MaskFeat, ViT", _VIT, "cifar10/cifar10_VIT_MaskFeat_PT.yaml", has_controls=True),
        Method("mfm_vit", "MFM, ViT", _VIT, "cifar10/cifar10_VIT_MFM_PT.yaml"),
        Method("mfm_resnet", "MFM, ResNet-10", _RESNET, "cifar10/cifar10_R10_MFM_PT.yaml"),
    ),
    budgets={
        "gpu": Budget(
            labels=(
                Labels("all labels", "all", _epochs(40, 4)),
                Labels("a tenth of the labels", "tenth", _epochs(60, 5)),
            ),
            **_ON_GPU,
            families={"ViT": _WIDE_VIT},
            pretraining={
                "maskfeat": (*_epochs(100, 5), *_BIG, "MASK.PRETRAIN_DEPTH", "[8]"),
                "mfm_vit": (*_epochs(100, 5), *_BIG),
                "mfm_resnet": (*_epochs(60, 5), *_BIG),
            },
        ),
    },
)

CALTECH101 = Suite(
    "caltech101",
    "Caltech-101",
    unlabelled="all",
    methods=(
        Method(
            "maskfeat", "MaskFeat, ViT", _CALTECH_VIT, "caltech101/caltech101_VIT_MaskFeat_PT.yaml", has_controls=True
        ),
        Method("mfm_vit", "MFM, ViT", _CALTECH_VIT, "caltech101/caltech101_VIT_MFM_PT.yaml"),
        Method("mfm_resnet", "MFM, ResNet-10", _CALTECH_RESNET, "caltech101/caltech101_R10_MFM_PT.yaml"),
    ),
    budgets={
        "cpu": Budget(
            labels=(Labels("5 of each class", "few", (), "few_tuning", _grid(("3e-4", "1e-3"), (10, 20))),),
            opts=("NUM_GPUS", "0"),
            pretraining={"maskfeat": _epochs(12, 1, looks=4)},
        ),
        "night": Budget(
            labels=_both(("3e-4", "1e-3"), (10, 20), ("3e-4", "1e-3"), (20, 60)),
            opts=_NIGHT,
            pretraining={
                "maskfeat": _epochs(100, 5),
                "mfm_vit": _epochs(30, 2),
                "mfm_resnet": _epochs(30, 2),
            },
        ),
        "gpu": Budget(
            labels=_both(("3e-4", "1e-3"), (50, 100), ("3e-4", "1e-3"), (50, 200)),
            **_ON_GPU,
            pretraining={
                "maskfeat": _epochs(400, 20),
                "mfm_vit": _epochs(200, 10),
                "mfm_resnet": _epochs(200, 10),
            },
        ),
    },
    probes=_THREE_PROBES,
    blocks="1",
)

JHMDB = Suite(
    "jhmdb",
    "JHMDB-21",
    unlabelled="all",
    methods=(
        Method("maskfeat", "MaskFeat, MViTv2", _JHMDB_MVIT, "jhmdb/jhmdb_MVITv2_MaskFeat_PT.yaml", has_controls=True),
    ),
    budgets={
        "cpu": Budget(
            labels=(Labels("all labels", "all", (), "all_tuning", _grid(("3e-4", "1e-3"), (10, 20))),),
            opts=("NUM_GPUS", "0"),
            pretraining={"maskfeat": _epochs(20, 2, looks=4)},
        ),
        "night": Budget(
            labels=_both(("3e-4", "1e-3"), (20, 50), ("3e-4", "1e-3"), (50, 150), augmented=True),
            opts=_NIGHT,
            pretraining={"maskfeat": _epochs(150, 8)},
        ),
        "gpu": Budget(
            labels=_both(("3e-4", "1e-3"), (50, 100), ("3e-4", "1e-3"), (100, 300), augmented=True),
            **_ON_GPU,
            pretraining={"maskfeat": _epochs(600, 30)},
        ),
    },
    probes=_THREE_PROBES,
    gray_probes=True,  # clips of an action come from few films, which random filters tell apart by colour
    blocks="1",
)

SHAPES = Suite(
    "shapes",
    "synthetic motions",
    unlabelled="all",
    methods=(
        Method("maskfeat", "MaskFeat, MViTv2", _MVIT, "shapes/shapes_MVITv2_MaskFeat_PT.yaml", has_controls=True),
    ),
    budgets={
        "gpu": Budget(
            labels=(
                Labels("all labels", "all", _epochs(20, 2)),
                Labels("a tenth of the labels", "tenth", _epochs(60, 5)),
            ),
            **_ON_GPU,
            pretraining={"maskfeat": _epochs(100, 5)},
        ),
    },
    relative_lists=True,
)

SUITES = {suite.name: suite for suite in (CALTECH101, CIFAR10, JHMDB, SHAPES)}
