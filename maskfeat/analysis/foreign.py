"""Networks by the names and shapes of their parameters: files of other programs carry no config.

A `Guess` is a recipe of the project with the keys that differ. Where a shape does not show a value, the recipe's stays,
and the guess says so.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from maskfeat.analysis.shapes import Shapes, Unlike, shapes_in
from maskfeat.errors import UserError
from maskfeat.models.mvit import adaptive_strides
from maskfeat.models.resnet import STAGES, STRIDE

CLASSIFIER, PRETRAINED, BACKBONE = "classifier", "pre-trained", "backbone"
"""Kinds of files: a network that classifies, one with the head of its pre-training, and one with neither."""

IMAGENET = {"DATA.MEAN": [0.485, 0.456, 0.406], "DATA.STD": [0.229, 0.224, 0.225]}
_HEADS = {1280: 16, 1408: 16, 1664: 16}
"""Attention heads by width where they are not 64 wide: ViT-H, -g and -G."""
_BINS = 9
_VIT_BLOCK = re.compile(
    r"blocks\.[0-9]{1,4}\.(norm[12]\.(weight|bias)|attn\.(qkv|q|k|v|proj)\.(weight|bias)|attn\.[qv]_bias"
    r"|mlp\.fc[12]\.(weight|bias))"
)
_MVIT_BLOCK = re.compile(
    rf"{_VIT_BLOCK.pattern}|blocks\.[0-9]{{1,4}}\.(proj\.(weight|bias)|attn\.(rel_pos_[hwt]|(pool|norm)_[qkv]\.(weight|bias)))"
)


class Guess(NamedTuple):
    """What a file's names and shapes say.

    Attributes:
        recipe: a name below configs/.
        keys: of the config, which may equal those of the recipe.
        kind: see `CLASSIFIER`.
        writer: what wrote the file, in words.
        notes: what is assumed, one sentence each.
    """

    recipe: str
    keys: dict[str, Any]
    kind: str
    writer: str
    notes: list[str]


SHOWN = "shown"
"""Key of the content of weights that torchvision knows by name: the keys of the config that it shows images with."""


def guess(content: Mapping[str, Any]) -> Guess | None:
    """Return the network whose names and shapes a file has; None if it is none of those that are known here."""
    shapes = shapes_in(content)
    for known in (_mvit, _vit, _clip_vit, _resnet):
        try:
            return known(shapes, content)
        except Unlike:
            continue
    return None


def holds_no_head(content: Mapping[str, Any]) -> bool:
    """Return whether names are those of a ViT, an MViTv2 or a ResNet without a head that is known here."""
    shapes = shapes_in(content)
    if shapes.have("blocks."):
        with suppress(Unlike):
            return _head(shapes, content)[0] == BACKBONE
    return shapes.have("layer1.0.conv1.") and not shapes.have("fc.", "head.", "decoder.")


def _whole(number: int, divisor: int) -> int:
    """Return number / divisor, which must be whole."""
    if divisor < 1 or number % divisor:
        raise Unlike
    return number // divisor


def _side(number: int) -> int:
    """Return the side of a square of so many cells."""
    side = math.isqrt(max(number, 0))
    if side * side != number or not side:
        raise Unlike
    return side


def _depth(shapes: Shapes, allowed: re.Pattern[str]) -> int:
    """Return the number of blocks; all their parameters must be `allowed`."""
    names = [name for name in shapes if name.startswith("blocks.")]
    if not names or not all(allowed.fullmatch(name) for name in names):
        raise Unlike
    numbers = {int(name.split(".")[1]) for name in names}
    if numbers != set(range(len(numbers))):
        raise Unlike
    return len(numbers)


def _block(shapes: Shapes) -> dict[str, Any]:
    """Return what the first block says of all: MLP and biases."""
    (width,) = shapes.of("blocks.0.norm1.weight", 1)
    hidden, _ = shapes.of("blocks.0.mlp.fc1.weight", 2)
    biased = shapes.have("blocks.0.attn.qkv.bias", "blocks.0.attn.q.bias", "blocks.0.attn.q_bias")
    return {"MVIT.MLP_RATIO": hidden / width, "MVIT.QKV_BIAS": biased, "MVIT.CLS_EMBED_ON": "cls_token" in shapes}


def _heads(width: int) -> tuple[int, str]:
    """Return the number of attention heads of a plain ViT, which no shape shows, and a note."""
    heads = _HEADS.get(width, width // 64)
    if not heads or width % heads or (width % 64 and width not in _HEADS):
        raise UserError(
            f"a ViT whose tokens have {width} channels: no shape shows its number of attention heads, and they cannot "
            "be 64 wide; give the recipe (cfg, --cfg)"
        )
    return heads, f"no shape shows the number of attention heads: {heads} of {width // heads} channels are assumed"


def _crops(side: int) -> dict[str, Any]:
    return {"DATA.TRAIN_CROP_SIZE": side, "DATA.TEST_CROP_SIZE": side}


def _hog(shapes: Shapes, token: int, depth: int) -> dict[str, Any]:
    """Return the keys of MaskFeat's target: 3 colours x 9 orientations x cells^2 numbers for a token."""
    features, _ = shapes.of("pred_head.projections.0.weight", 2)
    cells = _side(_whole(features, 3 * _BINS))
    return {"MASK.HOG_CELL": _whole(token, cells), "MASK.PRETRAIN_DEPTH": [depth - 1]}


def _head(shapes: Shapes, content: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Return kind, writer and keys that the head of a transformer says."""
    own = "PySlowFast or maskfeat"
    if "pred_head.transforms.0.0.weight" in shapes and shapes.have("pred_head.projections.0."):
        return PRETRAINED, f"{own} (MaskFeat)", {}
    if shapes.have("decoder_embed.", "decoder_pos_embed"):
        writer = "PySlowFast (MAE)" if shapes.have("pred_head.") else "MAE"
        return BACKBONE, writer, {"MVIT.USE_MEAN_POOLING": False}  # its norm is of tokens
    if "decoder.0.weight" in shapes:
        kind = PRETRAINED if shapes.have("norm.") else BACKBONE  # our decoder stands on a norm
        return kind, "the code of MFM's paper, or maskfeat (MFM)", {"MVIT.USE_MEAN_POOLING": False}
    name = "head.projection.weight" if "head.projection.weight" in shapes else "head.weight"
    mean = shapes.have("fc_norm.")
    if name not in shapes:
        return BACKBONE, "timm or the like, without a classifier", {"MVIT.USE_MEAN_POOLING": mean}
    classes = {"MODEL.NUM_CLASSES": shapes.of(name, 2)[0], "MODEL.MODEL_NAME": "MViT"}
    if name == "head.projection.weight":
        return CLASSIFIER, own, classes  # mean pooling as in the recipes
    writer = "the code of MFM's paper" if "config" in content else "MAE's code" if "args" in content else "timm"
    return CLASSIFIER, writer, {**classes, "MVIT.USE_MEAN_POOLING": mean}


def _vit(shapes: Shapes, content: Mapping[str, Any]) -> Guess:
    """A plain ViT for images."""
    width, _, *patch = shapes.of("patch_embed.proj.weight", 4)
    depth = _depth(shapes, _VIT_BLOCK)
    heads, about_heads = _heads(width)
    kind, writer, said = _head(shapes, content)
    keys = {
        **_block(shapes),
        **IMAGENET,
        "MVIT.DEPTH": depth,
        "MVIT.EMBED_DIM": width,
        "MVIT.NUM_HEADS": heads,
        "MVIT.PATCH_KERNEL": patch,
        "MVIT.PATCH_STRIDE": patch,
        "MVIT.USE_ABS_POS": "pos_embed" in shapes,
        **said,
    }
    notes = [about_heads, "pixels are normalised by the mean and standard deviation of ImageNet"]
    if "pos_embed" in shapes:
        places = shapes.of("pos_embed", 3)[1] - int("cls_token" in shapes)
        keys |= _crops(_side(places) * patch[0])
    else:
        notes.append("no shape shows the size of images: 224 pixels are assumed")
    size = "L" if (width, depth) == (1024, 24) else "B"
    recipe = f"masked_ssl/in1k_VIT_{size}_MaskFeat_FT"
    if kind == PRETRAINED and "decoder.0.weight" in shapes:
        recipe = "mfm/in1k_VIT_B_MFM_PT"
        keys |= _spectrum(shapes, patch[0], keys.get("DATA.TRAIN_CROP_SIZE", 224))
    elif kind == PRETRAINED:
        recipe = f"masked_ssl/in1k_VIT_{size}_MaskFeat_PT"
        keys |= _hog(shapes, patch[0], depth)
    elif writer == "the code of MFM's paper":
        recipe = "mfm/in1k_VIT_B_MFM_FT"
    if kind == CLASSIFIER and "head.projection.weight" in shapes:
        notes.append("no shape shows whether the class token or the mean of tokens is classified: the mean is assumed")
    elif kind == CLASSIFIER and "cls_token" in shapes and not shapes.have("fc_norm."):
        notes.append(
            "no shape shows whether the class token or the mean of tokens is classified: the class token is assumed"
        )
    return Guess(recipe, keys, kind, writer, notes)


def _spectrum(shapes: Shapes, stride: int, crop: int) -> dict[str, Any]:
    """Return the keys of MFM's decoder, which makes `stride` x `stride` pixels of a token."""
    rows = shapes.of("decoder.0.weight", 4)[0]
    return {"MFM.TARGET_CHANNELS": _whole(rows, stride**2), "MFM.RADIUS": min(16.0, crop / 2)}


def _clip_vit(shapes: Shapes, content: Mapping[str, Any]) -> Guess:
    """PySlowFast's plain ViT for clips, with positions in space and time apart."""
    width, _, *patch = shapes.of("patch_embed.proj.weight", 5)
    depth = _depth(shapes, _VIT_BLOCK)
    heads, about_heads = _heads(width)
    frames = shapes.of("pos_embed_temporal", 3)[1] * patch[0]
    side = _side(shapes.of("pos_embed_spatial", 3)[1]) * patch[1]
    kind, writer, said = _head(shapes, content)
    if kind == PRETRAINED:
        raise Unlike
    keys = {
        **_block(shapes),
        **_crops(side),
        "DATA.NUM_FRAMES": frames,
        "MVIT.DEPTH": depth,
        "MVIT.EMBED_DIM": width,
        "MVIT.NUM_HEADS": heads,
        "MVIT.PATCH_KERNEL": patch,
        "MVIT.PATCH_STRIDE": patch,
        "MVIT.PATCH_PADDING": [0, 0, 0],
        "MVIT.USE_ABS_POS": True,
        "MVIT.SEP_POS_EMBED": True,
        **{f"MVIT.{name}": False for name in ("RESIDUAL_POOLING", "REL_POS_SPATIAL", "REL_POS_TEMPORAL")},
        **{f"MVIT.{name}": [] for name in ("DIM_MUL", "HEAD_MUL", "POOL_Q_STRIDE")},
        **{f"MVIT.{name}": None for name in ("POOL_KV_STRIDE_ADAPTIVE", "POOL_KVQ_KERNEL")},
        **said,
    }
    return Guess("masked_ssl/k400_MVITv2_S_16x4_FT", keys, kind, writer, [about_heads, _RATE])


_RATE = (
    "frames are taken as in the recipes of Kinetics: every 4th of 30 per second, mean 0.45, standard deviation 0.225"
)


_KEY_STRIDES = {3: (8, 4, 2, 1), 2: (4, 8, 2, 1)}
"""Where the adaptive strides of keys and values may start, by the number of axes; the first that fits is taken."""


def _mvit(shapes: Shapes, content: Mapping[str, Any]) -> Guess:
    """PySlowFast's MViTv2 for clips or images: its plan of blocks follows from widths, heads and relative positions."""
    kernel = shapes.of("patch_embed.proj.weight", len(shapes.get("patch_embed.proj.weight", ())))[2:]
    axes = len(kernel)
    if axes not in (2, 3) or not any(".attn.pool_q." in name for name in shapes):
        raise Unlike
    depth = _depth(shapes, _MVIT_BLOCK)
    widths = [shapes.of(f"blocks.{i}.norm1.weight", 1)[0] for i in range(depth)]
    pools = [shapes.of(f"blocks.{i}.attn.pool_q.weight", axes + 2) for i in range(depth)]
    heads = [_whole(width, pool[0]) for width, pool in zip(widths, pools, strict=True)]
    starts = {"t": (1,), "h": _KEY_STRIDES[axes], "w": _KEY_STRIDES[axes]}
    names = ("t", "h", "w")[-axes:]
    plans = [_axis(shapes, name, depth, starts[name]) for name in names]
    stem, ones = [plan.stem for plan in plans], [1] * (3 - axes)
    strides = [[plan.strides[i] for plan in plans] for i in range(depth)]
    # Patches of MViTv2 overlap by half and are odd; even ones are taken to lie side by side.
    stride = [(k + 1) // 2 if k % 2 else k for k in kernel]
    padding = [k // 2 if k % 2 else 0 for k in kernel]
    kind, writer, said = _head(shapes, content)
    keys = {
        **_block(shapes),
        **_crops(stem[-1] * stride[-1]),
        "DATA.NUM_FRAMES": stem[0] * stride[0] if axes == 3 else 1,
        "MVIT.PATCH_2D": axes == 2,
        "MVIT.DEPTH": depth,
        "MVIT.EMBED_DIM": widths[0],
        "MVIT.NUM_HEADS": heads[0],
        "MVIT.PATCH_KERNEL": list(kernel),
        "MVIT.PATCH_STRIDE": stride,
        "MVIT.PATCH_PADDING": padding,
        "MVIT.DIM_MUL": _factors(widths),
        "MVIT.HEAD_MUL": _factors(heads),
        "MVIT.POOL_Q_STRIDE": [[i, *ones, *strides[i]] for i in range(depth)],
        "MVIT.POOL_KVQ_KERNEL": [*ones, *pools[0][2:]],
        "MVIT.POOL_KV_STRIDE_ADAPTIVE": [*ones, *(plan.keys for plan in plans)],
        "MVIT.USE_ABS_POS": shapes.have("pos_embed"),
        "MVIT.SEP_POS_EMBED": axes == 3,
        "MVIT.RESIDUAL_POOLING": True,
        "MVIT.REL_POS_SPATIAL": True,
        "MVIT.REL_POS_TEMPORAL": axes == 3,
        **said,
    }
    notes = ["no shape shows the strides of patches, keys and values, nor residual pooling: MViTv2's are assumed"]
    notes += [_RATE] if axes == 3 else ["pixels are normalised by the mean and standard deviation of ImageNet"]
    if axes == 2:
        if kind == PRETRAINED:
            raise Unlike
        recipe, keys = "masked_ssl/in1k_VIT_B_MaskFeat_FT", {**keys, **IMAGENET}
    else:
        size = "L" if (widths[0], depth) == (144, 48) else "S"
        recipe = f"masked_ssl/k400_MVITv2_{size}_16x4_{'MaskFeat_PT' if kind == PRETRAINED else 'FT'}"
    if kind == PRETRAINED:
        pooled = [math.prod(one[axis] for one in strides) for axis in range(3)]
        keys |= _hog(shapes, stride[-1] * pooled[-1], depth)
        last = [_whole(size, by) for size, by in zip(stem, pooled, strict=True)]
        keys["AUG.MASK_WINDOW_SIZE"] = [8, 7, 7] if stem == [8, 56, 56] else last
    return Guess(recipe, keys, kind, writer, notes)


class _Axis(NamedTuple):
    """The plan of the blocks along one axis: tokens of the stem, query strides by block, and where adaptive key/value
    strides start.
    """

    stem: int
    strides: list[int]
    keys: int


def _axis(shapes: Shapes, name: str, depth: int, starts: Iterable[int]) -> _Axis:
    """Return the plan along an axis ("t", "h" or "w") that gives the file's tables of relative positions.

    A table has 2 n - 1 rows for the larger grid n of queries and keys. Where n shrinks, the queries of that block are
    pooled or, if its keys are not yet, those of the block before. The first block pools no queries.
    """
    sizes = [(shapes.of(f"blocks.{i}.attn.rel_pos_{name}", 2)[0] + 1) // 2 for i in range(depth)]
    smaller = [i for i in range(1, depth) if sizes[i] < sizes[i - 1]]
    if len(smaller) > 8:  # of 4 at most in published networks
        raise Unlike
    for start, early in itertools.product(starts, itertools.product((0, 1), repeat=len(smaller))):
        strides = [1] * depth
        for i, before in zip(smaller, early, strict=True):
            strides[i - before] *= max(round(sizes[i - 1] / sizes[i]), 1)
        if strides[0] == 1 and _sizes(sizes[0], strides, start, name == "t") == sizes:
            return _Axis(sizes[0], strides, start)
    raise Unlike


def _sizes(stem: int, strides: list[int], start: int, time: bool) -> list[int]:
    """Return for which grid the table of each block is sized, see `relative_positions.table_lengths`."""
    size, sizes = stem, []
    by_key = adaptive_strides([start], {i: [stride] for i, stride in enumerate(strides)}, len(strides))
    for query, (key,) in zip(strides, by_key, strict=True):
        sizes.append(size if time else max(size // query, size // key))
        size //= query
    return sizes


def _factors(numbers: list[int]) -> list[list[float]]:
    """Return [[block, factor], ...] where a number differs from that of the block before."""
    pairs = enumerate(zip(numbers, numbers[1:], strict=False), start=1)
    return [[block, now / before] for block, (before, now) in pairs if now != before]


def _resnet(shapes: Shapes, content: Mapping[str, Any]) -> Guess:
    """torchvision's ResNet, with its classifier, MFM's decoder or neither."""
    if shapes.of("conv1.weight", 4) != (64, 3, 7, 7) or shapes.of("layer1.0.conv2.weight", 4) != (64, 64, 3, 3):
        raise Unlike
    counts = [_count(shapes, f"layer{stage}.") for stage in range(1, 5)]
    bottleneck = "layer1.0.conv3.weight" in shapes
    depths = [d for d, (block, plan) in STAGES.items() if plan == counts and (block.expansion == 4) == bottleneck]
    if not depths:
        raise Unlike
    keys: dict[str, Any] = {"RESNET.DEPTH": depths[0]}
    imagenet = {**IMAGENET, **_crops(224)}
    said = "pixels are normalised by the mean and standard deviation of ImageNet"
    if "decoder.0.weight" in shapes:
        keys |= _spectrum(shapes, STRIDE, 224)
        if keys["MFM.TARGET_CHANNELS"] == 1:
            return Guess("mfm/in1k_R50_MFM_PT", keys, PRETRAINED, "CoinCheung's MFM, or maskfeat", [_GREY])
        return Guess("mfm/in1k_R50_MFM_paper_PT", keys, PRETRAINED, "the code of MFM's paper, or maskfeat", [said])
    recipe = "mfm/in1k_R50_MFM_FT"
    if "fc.weight" not in shapes:
        keys |= {**imagenet, "DATA.TEST_SHORT_SIDE": 256}
        return Guess(recipe, keys, BACKBONE, "torchvision or the like, without a classifier", [said])
    keys["MODEL.NUM_CLASSES"] = shapes.of("fc.weight", 2)[0]
    if "config" in content:
        keys |= {**imagenet, "DATA.TEST_SHORT_SIDE": 256}
        return Guess(recipe, keys, CLASSIFIER, "the code of MFM's paper", [said])
    if "args" in content:
        return Guess(recipe, keys, CLASSIFIER, "CoinCheung's MFM, or a training script of torchvision", [_GREY])
    keys |= {**imagenet, "DATA.TEST_SHORT_SIDE": 256, "DATA.TEST_INTERPOLATION": "bilinear"}
    if SHOWN in content:
        return Guess(recipe, keys | content[SHOWN], CLASSIFIER, "torchvision", [])
    return Guess(recipe, keys, CLASSIFIER, "torchvision", [said])


_GREY = "pixels are normalised as in CoinCheung's MFM: mean 0.4, standard deviation 0.2"


def _count(shapes: Iterable[str], start: str) -> int:
    """Return the number of blocks of a stage."""
    return len({name.split(".")[1] for name in shapes if name.startswith(start)})
