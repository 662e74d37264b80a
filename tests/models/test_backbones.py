"""Backbones behind their protocol: grids, initialisation, the mask token, other sizes and axes."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from maskfeat.build import build_mask_sampler, build_objective
from maskfeat.config import load_config
from maskfeat.errors import UserError
from maskfeat.models.base import Backbone, sine_cosine
from maskfeat.models.mvit import MViT, plan_blocks
from maskfeat.models.vit import ViT
from tests.small import MVIT_FT, RECIPES


def small_vit(**changes: object) -> ViT:
    return ViT(**{"image_size": (32, 48), "patch": (16, 16), "width": 24, "depth": 2, "num_heads": 2, **changes})


def small_mvit(**changes: object) -> MViT:
    options = {
        "clip_size": (4, 32, 32),
        "width": 16,
        "depth": 3,
        "width_mul": {1: 2.0},
        "head_mul": {1: 2.0},
        "stride_q": {0: (1, 1, 1), 1: (1, 2, 2), 2: (1, 1, 1)},
        "stride_kv_adaptive": (1, 4, 4),
    }
    return MViT(**{**options, **changes})


@pytest.mark.parametrize("class_token", [True, False])
def test_vit_tokens(class_token: bool) -> None:
    vit = small_vit(class_token=class_token)
    tokens = vit.forward_tokens(torch.randn(2, 3, 32, 48))
    assert tokens.grid == vit.grid == (2, 3)
    assert tokens.has_class_token == class_token
    assert tokens.patches.shape == (2, 6, 24)
    assert tokens.x.shape == (2, 6 + class_token, 24)


def test_vit_patches_need_not_be_square() -> None:
    vit = small_vit(patch=(16, 8), position=True)
    assert vit.grid == (2, 6) and vit.token_pixels == (16, 8)
    assert vit.forward_tokens(torch.randn(2, 3, 32, 48)).patches.shape == (2, 12, 24)


def test_mvit_tokens() -> None:
    mvit = small_mvit()
    tokens = mvit.forward_tokens(torch.randn(2, 3, 4, 32, 32))
    assert mvit.stem_grid == (2, 8, 8)
    assert tokens.grid == mvit.grid == (2, 4, 4)
    assert tokens.patches.shape == (2, 32, 32)
    assert (mvit.token_pixels, mvit.frame_stride, mvit.width) == ((8, 8), 2, 32)
    assert mvit.blocks[0].mlp.fc1.out_features == 4 * 16
    assert small_mvit(depth=1, width_mul={}, head_mul={}).width == 16


def test_a_config_without_pooling() -> None:
    opts = ["MVIT.POOL_KVQ_KERNEL", "None", "MVIT.POOL_Q_STRIDE", "[]", "MVIT.POOL_KV_STRIDE_ADAPTIVE", "None"]
    objective = build_objective(load_config(RECIPES / "k400_MVITv2_S_16x4_FT.yaml", [*MVIT_FT, *opts]))
    assert not [name for name, _ in objective.named_parameters() if "pool_" in name]


@pytest.mark.parametrize("position", ["joint", "separate"])
def test_mvit_positions_matter(position: str) -> None:
    mvit = small_mvit(position=position, relative_space=False, relative_time=False)
    assert "pos_embed" in " ".join(name for name, _ in mvit.named_parameters())
    assert mvit.no_weight_decay() <= {name for name, _ in mvit.named_parameters()}
    before = mvit.forward_tokens(torch.ones(1, 3, 4, 32, 32)).x
    table = mvit.pos_embed if position == "joint" else mvit.pos_embed_temporal
    with torch.no_grad():
        table.mul_(-3.0)
    assert not torch.allclose(before, mvit.forward_tokens(torch.ones(1, 3, 4, 32, 32)).x, atol=1e-4)


@pytest.mark.parametrize("position", ["joint", "separate"])
def test_parameters_stand_in_the_published_order(position: str) -> None:
    """By which states of optimizers know them."""
    names = [name for name, _ in small_mvit(position=position, maskable=True).named_parameters()]
    positions = ["pos_embed"] if position == "joint" else ["pos_embed_spatial", "pos_embed_temporal", "pos_embed_class"]
    assert names[: len(positions) + 2] == ["cls_token", *positions, "mask_token"]


def test_strides_and_kernels_that_do_not_agree() -> None:
    with pytest.raises(UserError, match=r"the stride \(1, 3, 3\) .* MVIT.POOL_Q_STRIDE and MVIT.POOL_KVQ_KERNEL"):
        small_mvit(clip_size=(4, 48, 48), stride_q={1: (1, 3, 3)})


def test_masks_of_an_image_mvit_are_drawn_on_its_last_grid() -> None:
    """As published, and so that no target is of a patch of which the network sees a part."""
    opts = ["DATA.TRAIN_CROP_SIZE", "64", "MVIT.DEPTH", "4", "MVIT.EMBED_DIM", "24", "MVIT.NUM_HEADS", "1"]
    opts += ["MVIT.PATCH_KERNEL", "[7, 7]", "MVIT.PATCH_STRIDE", "[4, 4]", "MVIT.PATCH_PADDING", "[3, 3]"]
    opts += ["MVIT.POOL_Q_STRIDE", "[[1, 1, 2, 2], [3, 1, 2, 2]]", "MVIT.POOL_KVQ_KERNEL", "[1, 3, 3]"]
    cfg = load_config(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", [*opts, "MASK.PRETRAIN_DEPTH", "[3]"])
    backbone, sampler = build_objective(cfg).backbone, build_mask_sampler(cfg)
    assert isinstance(backbone, MViT) and (backbone.stem_grid, backbone.grid) == ((16, 16), (4, 4))
    assert sampler is not None and sampler(np.random.default_rng(0)).shape == (4, 4)


def test_image_mvit_has_two_axes() -> None:
    mvit = small_mvit(
        clip_size=(32, 32),
        kernel=(7, 7),
        stride=(4, 4),
        padding=(3, 3),
        stride_q={0: (1, 1), 1: (2, 2), 2: (1, 1)},
        stride_kv_adaptive=(4, 4),
        pool_kernel=(3, 3),
    )
    tokens = mvit.forward_tokens(torch.randn(2, 3, 32, 32))
    assert tokens.grid == (4, 4) and mvit.frame_stride == 1
    assert mvit.blocks[0].attn.pool_q.weight.shape == (16, 1, 3, 3)


@pytest.mark.parametrize("make", [small_vit, small_mvit])
def test_hidden_pixels_cannot_be_seen(make: object) -> None:
    """With everything hidden the output does not depend on the clip, and the mask token is what is seen."""
    backbone: Backbone = make(maskable=True)  # type: ignore[operator]
    size = backbone.clip_size  # type: ignore[attr-defined]
    hidden = torch.ones(1, *([2] * len(size)), dtype=torch.bool)
    outputs = [backbone.forward_tokens(torch.randn(1, 3, *size), hidden).x for _ in range(2)]
    torch.testing.assert_close(outputs[0], outputs[1])
    visible = [backbone.forward_tokens(torch.randn(1, 3, *size), ~hidden).x for _ in range(2)]
    assert not torch.allclose(visible[0], visible[1], atol=1e-4)


def test_wrong_size_names_the_keys() -> None:
    with pytest.raises(ValueError, match="DATA.TRAIN_CROP_SIZE"):
        small_vit().forward_tokens(torch.randn(1, 3, 64, 64))


def test_initialisation() -> None:
    for backbone in (small_vit(width=96, maskable=True), small_mvit(width=96, maskable=True)):
        for name, parameter in backbone.named_parameters():
            if name == "patch_embed.proj.bias":
                # PyTorch's: uniform within one over the root of the inputs of a patch.
                bound = backbone.get_parameter("patch_embed.proj.weight")[0].numel() ** -0.5
                assert parameter.abs().max() <= bound
                assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.25)
                assert parameter.abs().max() > 0.8 * bound and parameter.mean().abs() < 0.2 * bound
            elif name.endswith("bias"):
                assert (parameter == 0.02).all(), name
            elif ".norm" in name:
                assert (parameter == 1.0).all(), name
            elif parameter.numel() > 3000:
                assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    assert (small_mvit(relative_zero_init=True).blocks[0].attn.rel_pos_h == 0).all()
    assert small_mvit().blocks[0].attn.rel_pos_h.all()


@pytest.mark.parametrize("make", [small_vit, small_mvit])
def test_initialisation_of_mae(make: Callable[..., ViT | MViT]) -> None:
    """Xavier uniform weights, that of patches as of a linear layer; biases 0; positions as timm's sines and cosines."""
    backbone = make(width=96, depth=3, maskable=True, init="mae")
    for name, parameter in backbone.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0.0).all(), name
        elif ".norm" in name:
            assert (parameter == 1.0).all(), name
        elif name.startswith("blocks") and ".rel_pos" not in name and ".pool" not in name:
            limit = math.sqrt(6 / sum(parameter.shape))
            assert 0.98 * limit < parameter.abs().max() <= limit, name
    weight = backbone.patch_embed.proj.weight
    limit = math.sqrt(6 / (96 + weight[0].numel()))
    assert 0.98 * limit < weight.abs().max() <= limit


def test_positions_start_as_sines_and_cosines() -> None:
    table = sine_cosine((3, 4), 16).reshape(3, 4, 16)
    for axis, (row, column) in enumerate(((2, 1), (2, 3))):
        place = (row, column)[axis]
        angles = place * 10000.0 ** -(torch.arange(4) / 4)
        wanted = torch.cat([angles.sin(), angles.cos()])
        torch.testing.assert_close(table[row, column, 8 * axis : 8 * axis + 8], wanted)
    assert sine_cosine((2, 2, 2), 16)[:, 12:].eq(0).all(), "two channels of sines and two of cosines an axis"
    vit = small_vit(init="mae")
    assert vit.pos_embed is not None
    torch.testing.assert_close(vit.pos_embed[0, -vit.grid[0] * vit.grid[1] :], sine_cosine(vit.grid, vit.width))


@pytest.mark.parametrize("make", [small_vit, small_mvit])
def test_initialisation_of_beit(make: Callable[..., ViT | MViT]) -> None:
    """Weights are cut at one standard deviation of 0.02, of which 0.0108 is left; branches end smaller with depth."""
    backbone = make(width=96, depth=3, maskable=True, init="beit")
    drawn = {
        name
        for name, parameter in backbone.named_parameters()
        if parameter.numel() > 3000 and ".norm" not in name and ".rel_pos" not in name and ".pool" not in name
    }
    assert {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "blocks.2.mlp.fc2.weight"} <= drawn
    for name, parameter in backbone.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0.0).all(), name
        elif ".norm" in name:
            assert (parameter == 1.0).all(), name
        elif ".rel_pos" not in name:
            factor = (2 * backbone.layer_id(name)) ** -0.5 if name.endswith(("attn.proj.weight", "fc2.weight")) else 1.0
            assert 0.9 * 0.02 * factor < parameter.abs().max() <= 0.02001 * factor, name
            if name in drawn:
                assert parameter.std().item() == pytest.approx(0.0108 * factor, rel=0.03), name


def test_only_the_chosen_initialisation_draws() -> None:
    """Weights of a seed are those of earlier versions: nothing more is drawn by default."""
    states = []
    for init in ({}, {"init": "pyslowfast"}):
        torch.manual_seed(3)
        states.append(small_vit(maskable=True, **init).state_dict())
        states[-1]["next draw"] = torch.rand(1)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_adaptive_strides_follow_the_queries() -> None:
    plans = plan_blocks(4, 96, 1, {1: 2.0, 3: 2.0}, {1: 2.0, 3: 2.0}, {1: (1, 2, 2), 3: (1, 2, 2)}, {}, (1, 8, 8))
    assert [p.stride_kv for p in plans] == [(1, 8, 8), (1, 4, 4), (1, 4, 4), (1, 2, 2)]
    assert [(p.width, p.width_out, p.num_heads) for p in plans] == [
        (96, 192, 1),
        (192, 192, 2),
        (192, 384, 2),
        (384, 384, 4),
    ]
    # A width is rounded to a multiple of the heads that the next block has.
    assert plan_blocks(2, 10, 2, {1: 1.4}, {1: 2.0}, {}, {}, None)[0].width_out == 16


def test_blocks_that_the_strides_do_not_name_have_no_pooling_layers() -> None:
    """As PySlowFast builds MViTv1's recipes, which name the blocks that pool queries, and adaptive strides for all."""
    some = small_mvit(stride_q={1: (1, 2, 2)})
    assert [block.attn.pool_q is None for block in some.blocks] == [True, False, True]
    assert not any(block.attn.pool_k is None for block in some.blocks)
    assert {name for name, _ in some.named_parameters() if ".pool_q" in name} == {"blocks.1.attn.pool_q.weight"}
    fewer = small_mvit(stride_q={}, stride_kv={2: (1, 2, 2)}, stride_kv_adaptive=None)
    assert [block.attn.pool_v is None for block in fewer.blocks] == [True, True, False]
    cfg = load_config(RECIPES / "k400_MVITv2_S_16x4_FT.yaml", [*MVIT_FT, "MVIT.POOL_Q_STRIDE", "[[1, 1, 2, 2]]"])
    names = [name for name, _ in build_objective(cfg).named_parameters()]
    assert any("blocks.1.attn.pool_q" in n for n in names) and not any("blocks.0.attn.pool_q" in n for n in names)


@pytest.mark.parametrize("make", [small_vit, small_mvit])
def test_dropout_also_drops_tokens_with_their_positions(make: Callable[..., ViT | MViT]) -> None:
    seen = []
    for rate in (0.0, 0.5):
        backbone = make(dropout=rate)
        backbone.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0] == 0))
        backbone.forward_tokens(torch.randn(4, 3, *backbone.clip_size))
        backbone.eval().forward_tokens(torch.randn(4, 3, *backbone.clip_size))
    assert [float(zero.float().mean()) for zero in seen] == [0, 0, pytest.approx(0.5, abs=0.1), 0]


def test_drop_path_grows_linearly() -> None:
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in small_mvit(drop_path=0.3).blocks]
    assert rates == pytest.approx([0.0, 0.15, 0.3])


def test_drop_path_drops_attention_and_mlp() -> None:
    """At a rate of 1 neither branch of a block adds to its residual path in training; both do in evaluation."""
    mvit, vit = small_mvit(drop_path=0.3).blocks[-1], small_vit(drop_path=0.3).blocks[-1]
    for path in (mvit.drop_path, vit.drop_path1, vit.drop_path2):
        assert path.drop_prob == pytest.approx(0.3)
        path.drop_prob = 1.0
    tokens = torch.randn(4, mvit.prefix + math.prod(mvit.grid), mvit.norm1.weight.numel())
    residual = mvit._skip(tokens)
    residual = residual if mvit.proj is None else mvit.proj(mvit.norm2(residual))
    torch.testing.assert_close(mvit(tokens), residual)
    assert not torch.allclose(mvit.eval()(tokens), residual)
    tokens = torch.randn(4, 7, 24)
    torch.testing.assert_close(vit(tokens), tokens)
    assert not torch.allclose(vit.eval()(tokens), tokens)


def test_layers() -> None:
    vit = small_vit(maskable=True)
    expected = {"cls_token": 0, "pos_embed": 0, "mask_token": 0, "patch_embed.proj.weight": 0}
    expected |= {"blocks.0.norm1.weight": 1, "blocks.1.mlp.fc1.bias": 2, "norm.weight": 3}
    assert {name: vit.layer_id(name) for name in expected} == expected
