"""Mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019) for images and clips, with timm's formulas."""

import numpy as np
import torch
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torch import Tensor

from maskfeat.errors import UserError


class Mixup:
    """Mix every sample of a batch with the sample at the same position of the reversed batch.

    The mixing ratio, and the box of CutMix, are drawn once per batch; the box spans all frames. Random numbers come
    from numpy's global generator, which the training loop seeds for every step.

    Args:
        alpha, cutmix_alpha: parameters of the Beta distributions of Mixup and CutMix; 0 disables one of them.
        prob: probability that a batch is mixed at all.
        switch_prob: probability of CutMix if both are enabled.
        smoothing: label smoothing eps: targets are 1 - eps + eps/K for the class and eps/K for the others.
        num_classes: K.
        smooth_others: distribute eps over the other classes alone: 1 - eps for the class, eps/(K - 1) for the others.

    Raises:
        UserError: if both are disabled.
    """

    def __init__(
        self,
        alpha: float,
        cutmix_alpha: float,
        prob: float,
        switch_prob: float,
        smoothing: float,
        num_classes: int,
        smooth_others: bool = False,
    ) -> None:
        if alpha <= 0 and cutmix_alpha <= 0:
            raise UserError(
                f"MIXUP.ALPHA is {alpha} and MIXUP.CUTMIX_ALPHA is {cutmix_alpha}: expected one above 0, "
                "or MIXUP.ENABLE False"
            )
        self.alpha, self.cutmix_alpha = alpha, cutmix_alpha
        self.prob, self.switch_prob = prob, switch_prob
        # timm leaves eps/K to the class itself; with this larger eps the other classes get eps/(K - 1) each.
        self.smoothing = smoothing * num_classes / (num_classes - 1) if smooth_others and num_classes > 1 else smoothing
        self.num_classes = num_classes

    def __call__(self, clip: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            clip: (B, C, [T,] H, W).
            label: (B,) int64.

        Returns:
            the mixed clip, of the same shape, and soft targets (B, K) float32.
        """
        lam = 1.0
        if np.random.rand() < self.prob:
            cut = self.alpha <= 0 or (self.cutmix_alpha > 0 and np.random.rand() < self.switch_prob)
            alpha = self.cutmix_alpha if cut else self.alpha
            lam = float(np.random.beta(alpha, alpha))
            if cut:
                (top, bottom, left, right), lam = cutmix_bbox_and_lam(clip.shape, lam)
                clip = clip.clone()
                clip[..., top:bottom, left:right] = clip.flip(0)[..., top:bottom, left:right]
            else:
                clip = torch.lerp(clip.flip(0), clip, lam)
        return clip, mixup_target(label, self.num_classes, float(lam), self.smoothing)
