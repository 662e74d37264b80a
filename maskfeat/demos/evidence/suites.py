"""The suites of the evidence: data, methods, recipes and budgets."""

from dataclasses import dataclass, field

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
class Budget:
    """The amount of computation.

    Attributes:
        labels: name in the report -> folder of labelled data below the data of the suite.
        opts: overrides for every run.
        families: overrides for every run of a family: the size of its backbone.
        pretraining: overrides for pre-training, by method; methods that are not listed are not run at this budget.
        fine_tuning: overrides for fine-tuning and training from scratch, by folder of labelled data.
        control_seeds: number of seeds for which controls are run.
        fine_tune_controls: whether controls are also fine-tuned, not only probed.
    """

    labels: dict[str, str]
    opts: tuple[str, ...]
    families: dict[str, tuple[str, ...]] = field(default_factory=dict)
    pretraining: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fine_tuning: dict[str, tuple[str, ...]] = field(default_factory=dict)
    control_seeds: int = 1
    fine_tune_controls: bool = False


@dataclass(frozen=True)
class Suite:
    """A data set and the methods that are run on it.

    Attributes:
        unlabelled: the folder for pre-training, below the data of the suite.
        of_clips: whether the data are lists of clips, which need DATA.PATH_PREFIX.
    """

    name: str
    title: str
    unlabelled: str
    methods: tuple[Method, ...]
    budgets: dict[str, Budget]
    of_clips: bool = False


_BF16 = ("TRAIN.MIXED_PRECISION", "bf16", "TEST.MIXED_PRECISION", "bf16")
_CPU = ("NUM_GPUS", "0", *_BF16)
_GPU = ("NUM_GPUS", "1", *_BF16, "TRAIN.COMPILE", "True", "DATA_LOADER.NUM_WORKERS", "8")

_BIG = ("TRAIN.BATCH_SIZE", "512", "SOLVER.BASE_LR", "2e-3")

# A few hundred steps are too few for mixup, cutmix and drop path.
_SHORT = (
    *("MIXUP.ENABLE", "False", "MODEL.LOSS_FUNC", "cross_entropy", "MVIT.DROPPATH_RATE", "0.0"),
    *("TRAIN.BATCH_SIZE", "32"),
)

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


_SMALL_VIT = ("MVIT.EMBED_DIM", "128", "MVIT.NUM_HEADS", "2", "MVIT.DEPTH", "4")
_WIDE_VIT = ("MVIT.EMBED_DIM", "192", "MVIT.NUM_HEADS", "3", "MVIT.DEPTH", "9")

SUITES = {
    "cifar10": Suite(
        "cifar10",
        "CIFAR-10",
        unlabelled="all",
        methods=(
            Method("maskfeat", "MaskFeat, ViT", _VIT, "cifar10/cifar10_VIT_MaskFeat_PT.yaml", has_controls=True),
            Method("mfm_vit", "MFM, ViT", _VIT, "cifar10/cifar10_VIT_MFM_PT.yaml"),
            Method("mfm_resnet", "MFM, ResNet-10", _RESNET, "cifar10/cifar10_R10_MFM_PT.yaml"),
        ),
        budgets={
            "cpu": Budget(
                labels={"a tenth of the labels": "tenth"},
                opts=_CPU,
                families={"ViT": _SMALL_VIT},
                pretraining={
                    "maskfeat": (*_epochs(3, 0.1), "MASK.PRETRAIN_DEPTH", "[3]", "TRAIN.BATCH_SIZE", "64"),
                },
                fine_tuning={"tenth": (*_epochs(6, 1, looks=3), *_SHORT)},
            ),
            "gpu": Budget(
                labels={"all labels": "all", "a tenth of the labels": "tenth"},
                opts=_GPU,
                families={"ViT": _WIDE_VIT},
                pretraining={
                    "maskfeat": (*_epochs(100, 5), *_BIG, "MASK.PRETRAIN_DEPTH", "[8]"),
                    "mfm_vit": (*_epochs(100, 5), *_BIG),
                    "mfm_resnet": (*_epochs(60, 5), *_BIG),
                },
                fine_tuning={"all": _epochs(40, 4), "tenth": _epochs(60, 5)},
                control_seeds=100,
                fine_tune_controls=True,
            ),
        },
    ),
    "shapes": Suite(
        "shapes",
        "synthetic motions",
        unlabelled="all",
        methods=(
            Method("maskfeat", "MaskFeat, MViTv2", _MVIT, "shapes/shapes_MVITv2_MaskFeat_PT.yaml", has_controls=True),
        ),
        budgets={
            "cpu": Budget(
                labels={"a tenth of the labels": "tenth"},
                opts=_CPU,
                pretraining={"maskfeat": _epochs(16, 1, looks=4)},
                fine_tuning={"tenth": _epochs(20, 2, looks=5)},
            ),
            "gpu": Budget(
                labels={"all labels": "all", "a tenth of the labels": "tenth"},
                opts=_GPU,
                pretraining={"maskfeat": _epochs(100, 5)},
                fine_tuning={"all": _epochs(20, 2), "tenth": _epochs(60, 5)},
                control_seeds=100,
                fine_tune_controls=True,
            ),
        },
        of_clips=True,
    ),
}
