"""Classification: fine-tuning, testing, probing.

Shape legend: B samples, K classes.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from maskfeat.batch import Batch, StepOutput
from maskfeat.models.base import Backbone
from maskfeat.models.heads import ClassifierHead, pool_tokens, pooled_norm
from maskfeat.objectives.base import Objective
from maskfeat.objectives.mixup import Mixup
from maskfeat.weights import LoadRules

# What pre-training files carry and a classifier has no use for.
_PRETRAINING = ("pred_head.*", "mask_token", "hogs.*")


class Classification(Objective):
    """Cross-entropy on hard or soft targets.

    Args:
        backbone: any.
        num_classes: K.
        mean_pooling: average the patches rather than read the class token.
        dropout: before the classifier.
        head_init_scale: factor on the classifier's initial weight and bias.
        mixup: applied in training mode to batches with hard labels; soft targets are taken as they are.
    """

    classifies = True

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        mean_pooling: bool = False,
        dropout: float = 0.0,
        head_init_scale: float = 1.0,
        mixup: Mixup | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes, self.mean_pooling, self.mixup = num_classes, mean_pooling, mixup
        self.norm = pooled_norm(backbone.width)
        self.head = ClassifierHead(backbone.width, num_classes, dropout, head_init_scale)

    def logits(self, clip: Tensor) -> Tensor:
        """clip (B, C, [T,] H, W) -> (B, K)."""
        tokens = self.backbone.forward_tokens(clip)
        return self.head(pool_tokens(tokens, self.norm, self.mean_pooling))

    def prepare(self, batch: Batch) -> Batch:
        """Mixes a batch with hard labels in training mode; soft targets are taken as they are."""
        if self.mixup is None or not self.training or batch.label is None or batch.label.is_floating_point():
            return batch
        self._check_labels(batch.label)
        clip, label = self.mixup(batch.clip, batch.label)
        return replace(batch, clip=clip, label=label)

    def forward(self, batch: Batch) -> StepOutput:
        """Mean cross-entropy; the share of right answers only where targets are hard and nothing was mixed."""
        if batch.label is None:
            raise ValueError("classification got a batch without labels: the data set must carry them")
        batch = self.prepare(batch)
        clip, label = batch.clip, batch.label
        assert label is not None
        if label.is_floating_point():
            label = label.float()
        else:
            self._check_labels(label)
            label = label.long()
        logits = self.logits(clip).float()
        loss = F.cross_entropy(logits, label)
        if label.is_floating_point():
            return StepOutput(loss, {})
        top1 = (logits.argmax(dim=1) == label).float().mean()
        return StepOutput(loss, {"top1": top1.detach()})

    def _check_labels(self, label: Tensor) -> None:
        # On a device the kernel's own assertion speaks; reading the values here would stop for the device.
        if (
            label.device.type == "cpu"
            and len(label)
            and not 0 <= int(label.min()) <= int(label.max()) < self.num_classes
        ):
            raise ValueError(
                f"labels run from {int(label.min())} to {int(label.max())}, but MODEL.NUM_CLASSES is {self.num_classes}"
            )

    def predict(self, batch: Batch) -> Tensor:
        """(B, K) float32 probabilities."""
        return torch.softmax(self.logits(batch.clip).float(), dim=1)

    def load_rules(self, state: Mapping[str, Tensor]) -> LoadRules:
        pretrained = any(name == "mask_token" or name.startswith("pred_head.") for name in state)
        if not pretrained:
            return LoadRules()
        return LoadRules(fresh=("norm.*", "head.*"), dropped=_PRETRAINING)
