"""torchvision's ResNet (He et al., CVPR 2016) as a backbone, with torchvision's parameter names."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet
from yacs.config import CfgNode

from maskfeat.models.base import Tokens
from maskfeat.registry import BackboneSpec, lookup, register

STAGES: dict[int, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    10: (BasicBlock, [1, 1, 1, 1]),
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
    152: (Bottleneck, [3, 8, 36, 3]),
}
"""RESNET.DEPTH -> type of block, blocks in each stage: torchvision's, and depth 10 for quick experiments."""

STRIDE = 32
"""Total stride: pixels of the image along each axis for one position of the last feature map."""


class ResNet(TorchvisionResNet):
    """A ResNet without pooling and classifier that returns its last feature map as tokens, for images of any size.

    On CUDA it runs in channels-last layout, which cuDNN's kernels for tensor cores expect; on CPUs that gains nothing.

    Args:
        depth: a key of `STAGES`.
        image_size: (H, W) in pixels for which `grid` is reported.
        zero_init: start the last batch norm of every residual block with weight 0, so that each block begins as its
            skip path (Goyal et al., 2017, section 5.1).
    """

    supports_hidden = False
    needs_norm = False
    classifier = "fc."
    frame_stride = 1

    def __init__(self, *, depth: int = 50, image_size: Sequence[int] = (224, 224), zero_init: bool = False) -> None:
        block, blocks = STAGES[depth]
        super().__init__(block, blocks, zero_init_residual=zero_init)
        self.width = self.fc.in_features
        del self.avgpool, self.fc
        self.clip_size: tuple[int, ...] = (image_size[0], image_size[1])
        self.grid: tuple[int, ...] = tuple(-(-side // STRIDE) for side in self.clip_size)
        self.token_pixels = (STRIDE, STRIDE)
        self.num_blocks = sum(blocks)
        self._blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens of images: (B, 3, H, W) -> (B, H/32 W/32, D)."""
        return self.forward_tokens(x).x

    def forward_tokens(self, clip: Tensor, hidden: Tensor | None = None) -> Tokens:
        """Compute the tokens of an image.

        Args:
            clip: (B, 3, H, W) float.
            hidden: must be None.

        Returns:
            tokens (B, H/32 W/32, D) on the grid (H/32, W/32), rounded up.
        """
        assert hidden is None, "a ResNet has no input tokens that could be hidden"
        # Of the units that multiply in 16 bits, those of a CPU as well; in float32 a CPU does not care.
        if clip.is_cuda or (clip.is_cpu and torch.is_autocast_enabled("cpu")):
            clip = clip.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(self.relu(self.bn1(self.conv1(clip))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return Tokens(x.flatten(2).transpose(1, 2), tuple(x.shape[2:]))

    def no_weight_decay(self) -> set[str]:
        """Return no names: nothing is exempt from weight decay by name."""
        return set()

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the residual blocks of all stages."""
        return [block for stage in (self.layer1, self.layer2, self.layer3, self.layer4) for block in stage]

    def layer_id(self, name: str) -> int:
        """Return the layer of a parameter for layer-wise learning rate decay.

        The stem is layer 0, residual block i, counted over all stages, is layer i + 1, the rest is `num_blocks` + 1.
        """
        if name.startswith(("conv1.", "bn1.")):
            return 0
        if not name.startswith("layer"):
            return self.num_blocks + 1
        stage, block = name.split(".")[:2]
        return sum(self._blocks[: int(stage.removeprefix("layer")) - 1]) + int(block) + 1


def _keys(cfg: CfgNode) -> None:
    cfg.RESNET = CfgNode()
    cfg.RESNET.DEPTH = 50  # 18 | 34 | 50 | 101 | 152, torchvision's; 10 for trials on small machines
    # start the last batch norm of each residual block with weight 0, as MFM's paper: the gradient of its first step is
    # then ten times smaller
    cfg.RESNET.ZERO_INIT_FINAL_BN = False


# Keys of PySlowFast's ResNets that are not read here: with another value the same YAML would train another model there.
_OTHERS: dict[str, object] = {
    "BN.USE_PRECISE_STATS": False,
    "BN.NORM_TYPE": "batchnorm",
    "MODEL.DROPCONNECT_RATE": 0.0,
    "RESNET.NUM_GROUPS": 1,
    "RESNET.WIDTH_PER_GROUP": 64,
    "RESNET.STRIDE_1X1": False,
    "RESNET.SPATIAL_DILATIONS": [[1], [1], [1], [1]],
    "RESNET.SPATIAL_STRIDES": [[1], [2], [2], [2]],
    "RESNET.ZERO_INIT_FINAL_CONV": False,
}


def _check(cfg: CfgNode) -> Iterator[str]:
    for key, only in _OTHERS.items():
        given = lookup(cfg, key)
        if given is not None and given != only:
            yield f"{key} {given!r} is not supported for MODEL.ARCH 'resnet'; the only value is {only!r}"
    decay = 0.0 if cfg.SOLVER.ZERO_WD_1D_PARAM else cfg.SOLVER.WEIGHT_DECAY
    if lookup(cfg, "BN.WEIGHT_DECAY") not in (None, decay):
        yield (
            f"BN.WEIGHT_DECAY must be {decay:g}, as SOLVER.WEIGHT_DECAY and SOLVER.ZERO_WD_1D_PARAM "
            f"{cfg.SOLVER.ZERO_WD_1D_PARAM} make it; given {lookup(cfg, 'BN.WEIGHT_DECAY')!r}"
        )
    if cfg.MODEL.ACT_CHECKPOINT:
        yield (
            "MODEL.ACT_CHECKPOINT must be False for MODEL.ARCH 'resnet' (its batch norms would count a batch twice); "
            "given True; TRAIN.MIXED_PRECISION and TRAIN.MICRO_BATCH_SIZE save memory, too"
        )


def build_resnet(cfg: CfgNode, maskable: bool = False) -> ResNet:
    """Return the ResNet of RESNET.DEPTH."""
    assert not maskable, "a ResNet has no mask token"
    return ResNet(
        depth=cfg.RESNET.DEPTH,
        image_size=(cfg.DATA.TRAIN_CROP_SIZE,) * 2,
        zero_init=cfg.RESNET.ZERO_INIT_FINAL_BN,
    )


register(
    BackboneSpec(
        name="resnet",
        title="torchvision's ResNet",
        build=build_resnet,
        keys=_keys,
        architecture=("RESNET.DEPTH",),
        initial=("RESNET.ZERO_INIT_FINAL_BN",),
        choices={"RESNET.DEPTH": (50, 10, 18, 34, 101, 152)},
        check=_check,
        media=("image",),
        any_size=True,
        act_checkpoint=False,
        token_pixels=STRIDE,
    )
)
