"""Classification: fine-tuning, testing, probing.

Shape legend: B samples, K classes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from maskfeat.batch import Batch, StepOutput
from maskfeat.checkpoint.names import renamed
from maskfeat.checkpoint.weights import LoadRules
from maskfeat.errors import UserError
from maskfeat.models.base import Backbone
from maskfeat.models.heads import ClassifierHead, init_on, pool_tokens, token_norm
from maskfeat.objectives.base import Objective, can_be_read
from maskfeat.objectives.mixup import Mixup
from maskfeat.registry import BELOW_1, SHARE, ObjectiveSpec, Range, backbone_spec, register

# What pre-training files carry and a classifier has no use for.
_PRETRAINING = ("pred_head.*", "mask_token", "hogs.*", "decoder.*", "decoder_*")
_MARKS = ("pred_head.", "mask_token", "decoder.")
_HEAD = "head.projection."
_MEAN_NORM = "fc_norm."


class Classification(Objective):
    """Classify with cross-entropy, or with binary cross-entropy per class, on hard or soft targets.

    Args:
        backbone: any.
        num_classes: K.
        mean_pooling: average the patch tokens instead of using the class token.
        dropout: before the classifier.
        head_init_scale: factor on the classifier's initial weight and bias; None = PyTorch's own.
        mixup: applied in training mode to batches with hard labels; soft targets are used unchanged.
        binary: a sigmoid per class (Wightman et al., 2021, section 2) instead of a softmax; the loss is the mean over
            samples and classes.
        multi_label: a sample may have several classes: probabilities are those of each class by itself.
    """

    classifies = True

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        mean_pooling: bool = False,
        dropout: float = 0.0,
        head_init_scale: float | None = 1.0,
        mixup: Mixup | None = None,
        binary: bool = False,
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes, self.mean_pooling = num_classes, mean_pooling
        self.mixup, self.binary, self.multi_label = mixup, binary, multi_label
        self.norm = token_norm(backbone)
        self.head = ClassifierHead(backbone.width, num_classes, dropout, head_init_scale, init_on(backbone))

    def logits(self, clip: Tensor) -> Tensor:
        """Return logits (B, K) of clip (B, C, [T,] H, W)."""
        tokens = self.backbone.forward_tokens(clip)
        return self.head(pool_tokens(tokens, self.norm, self.mean_pooling))

    def prepare(self, batch: Batch) -> Batch:
        """Mix a batch with hard labels in training mode; soft targets are used unchanged."""
        if self.mixup is None or not self.training or batch.label is None or batch.label.is_floating_point():
            return batch
        self._check_labels(batch.label)
        clip, label = self.mixup(batch.clip, batch.label)
        return replace(batch, clip=clip, label=label)

    def forward(self, batch: Batch) -> StepOutput:
        """Return the mean loss, and the accuracy only where targets are hard and nothing was mixed.

        Raises:
            UserError: the batch has no labels, its clips are of another size than the backbone was built for, or, on
                the CPU, a label is none of 0 to K - 1.
        """
        if batch.label is None:
            raise UserError("classification got a batch without labels: the data set must carry them")
        batch = self.prepare(batch)
        clip, label = batch.clip, batch.label
        assert label is not None
        if label.is_floating_point():
            label = label.float()
        else:
            self._check_labels(label)
            label = label.long()
        logits = self.logits(clip).float()
        loss = self.loss(logits, label)
        if label.is_floating_point():
            return StepOutput(loss, {})
        top1 = (logits.argmax(dim=1) == label).float().mean()
        return StepOutput(loss, {"top1": top1.detach()})

    def loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the loss, a scalar, of logits (B, K) float32 and label (B,) int64 or (B, K) float32."""
        if not self.binary:
            return F.cross_entropy(logits, label)
        target = label if label.is_floating_point() else F.one_hot(label, self.num_classes).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, target)

    def released_name(self, name: str) -> str:
        return super().released_name(name.replace(_HEAD, self.backbone.classifier))

    def _check_labels(self, label: Tensor) -> None:
        # On a device the kernel's own assertion speaks; reading the values here would stop for the device.
        if can_be_read(label) and len(label) and not 0 <= int(label.min()) <= int(label.max()) < self.num_classes:
            raise UserError(
                f"labels run from {int(label.min())} to {int(label.max())}, but MODEL.NUM_CLASSES is {self.num_classes}"
            )

    def predict(self, batch: Batch) -> Tensor:
        """Return (B, K) float32 probabilities, which add up to 1 unless `multi_label`."""
        logits = self.logits(batch.clip).float()
        return torch.sigmoid(logits) if self.multi_label else torch.softmax(logits, dim=1)

    def renamed_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Take the names that timm, MAE and the MFM paper's code give final norm and classifier: `fc_norm` is of
        averaged tokens, `norm` of tokens.

        Raises:
            UserError: the file has a norm of averaged tokens and tokens are not averaged, or two names become one.
        """
        of_mean = any(name.startswith(_MEAN_NORM) for name in state)
        if not self.backbone.needs_norm or (self.mean_pooling and not of_mean):
            return state
        if of_mean and not self.mean_pooling:
            raise UserError(f"the file has {_MEAN_NORM}*, a norm of averaged tokens: set MVIT.USE_MEAN_POOLING True")
        names = {_MEAN_NORM: "norm.", "head.": self.backbone.classifier}
        return renamed(state, lambda name: re.sub(r"^(fc_norm\.|head\.)(?=\w+$)", lambda found: names[found[0]], name))

    def load_rules(self, state: Mapping[str, Tensor]) -> LoadRules:
        if not any(name.startswith(_MARKS) for name in state):
            return LoadRules()
        return LoadRules(fresh=(f"{self.backbone.classifier}*",), dropped=_PRETRAINING, anew=("norm.*",))


def _keys(cfg: CfgNode) -> None:
    cfg.MIXUP = CfgNode()
    # mixup, cutmix and label smoothing; every process draws its own ratio and box (published: one draw for all of them)
    cfg.MIXUP.ENABLE = False
    cfg.MIXUP.ALPHA = 0.8  # parameter of the Beta distribution of mixup; 0 = no mixup
    cfg.MIXUP.CUTMIX_ALPHA = 1.0  # the same of cutmix; 0 = no cutmix
    cfg.MIXUP.PROB = 1.0  # probability of mixup or cutmix
    cfg.MIXUP.SWITCH_PROB = 0.5  # probability of cutmix where both are enabled
    cfg.MIXUP.LABEL_SMOOTH_VALUE = 0.1  # label smoothing
    cfg.MIXUP.LABEL_SMOOTH_OTHERS = False  # ours: spread label smoothing over the other classes only


def _check(cfg: CfgNode) -> Iterator[str]:
    if cfg.MIXUP.ENABLE and cfg.MODEL.LOSS_FUNC == "cross_entropy":
        yield (
            "MODEL.LOSS_FUNC must be 'soft_cross_entropy' or 'bce_logit' where MIXUP.ENABLE is True; "
            f"given {cfg.MODEL.LOSS_FUNC!r}"
        )
    if cfg.MIXUP.ENABLE and cfg.MIXUP.ALPHA <= 0 and cfg.MIXUP.CUTMIX_ALPHA <= 0:
        yield "MIXUP.ALPHA or MIXUP.CUTMIX_ALPHA must be above 0 where MIXUP.ENABLE is True; given 0 and 0"


def build_classification(cfg: CfgNode, backbone: Backbone) -> Classification:
    """Return a classifier of MODEL.NUM_CLASSES on top of a backbone."""
    mixup = None
    if cfg.MIXUP.ENABLE:
        mixup = Mixup(
            alpha=cfg.MIXUP.ALPHA,
            cutmix_alpha=cfg.MIXUP.CUTMIX_ALPHA,
            prob=cfg.MIXUP.PROB,
            switch_prob=cfg.MIXUP.SWITCH_PROB,
            smoothing=cfg.MIXUP.LABEL_SMOOTH_VALUE,
            num_classes=cfg.MODEL.NUM_CLASSES,
            smooth_others=cfg.MIXUP.LABEL_SMOOTH_OTHERS,
        )
    return Classification(
        backbone,
        num_classes=cfg.MODEL.NUM_CLASSES,
        dropout=cfg.MODEL.DROPOUT_RATE,
        mixup=mixup,
        binary=cfg.MODEL.LOSS_FUNC == "bce_logit",
        multi_label=cfg.DATA.MULTI_LABEL,
        **backbone_spec(cfg).classifier(cfg),
    )


def _register(name: str, backbones: tuple[str, ...], hint: str) -> None:
    register(
        ObjectiveSpec(
            name=name,
            title="classification",
            build=build_classification,
            classifies=True,
            losses=("cross_entropy", "soft_cross_entropy", "bce_logit"),
            backbones=backbones,
            backbone_hint=hint,
            requires={"MASK.ENABLE": False, "MASK.PRED_HOG": False},
            keys=_keys,
            architecture=("MODEL.NUM_CLASSES", "MVIT.USE_MEAN_POOLING"),
            ranges={
                **dict.fromkeys(("MIXUP.ALPHA", "MIXUP.CUTMIX_ALPHA"), Range(0, 100)),
                **dict.fromkeys(("MIXUP.PROB", "MIXUP.SWITCH_PROB"), SHARE),
                "MIXUP.LABEL_SMOOTH_VALUE": BELOW_1,
            },
            check=_check,
        )
    )


_register("MViT", ("mvit",), "a ResNet classifies with MODEL.MODEL_NAME 'ResNet', any backbone with 'Classification'")
_register("ResNet", ("resnet",), "a ViT or an MViTv2 classifies with MODEL.MODEL_NAME 'MViT'")
_register("Classification", (), "")
