"""Costs of backbones by module, against counts written out by hand."""

import pytest
import torch

from maskfeat.build import build_backbone
from maskfeat.engine.flops import Cost, cost_table, module_costs, multiply_adds
from maskfeat.models.resnet import ResNet
from maskfeat.models.vit import ViT
from tests.golden.golden import recipe


def tiny(**other: object) -> ViT:
    with torch.device("meta"):
        return ViT(image_size=(32, 16), patch=(8, 8), width=12, depth=3, num_heads=2, class_token=True, **other)


def test_a_vit_by_hand() -> None:
    costs = module_costs(tiny())
    assert list(costs) == ["patch_embed", "blocks.0", "blocks.1", "blocks.2", "total"]
    patches, width, heads = 8, 12, 2
    tokens = patches + 1
    embed = Cost(width * 3 * 64 + width, patches * 3 * 64 * width, patches * width)
    linears = 3 * width**2 + width**2 + 8 * width**2  # qkv, projection, MLP
    block = Cost(
        parameters=linears + 3 * width + width + 4 * width + width + 2 * 2 * width,
        multiply_adds=tokens * linears + 2 * tokens**2 * width,
        activations=tokens * (3 + 1 + 4 + 1) * width + heads * tokens**2 + tokens * width,
    )
    assert costs["patch_embed"] == embed
    assert [costs[f"blocks.{i}"] for i in range(3)] == [block] * 3
    total = costs["total"]
    assert total.multiply_adds == embed.multiply_adds + 3 * block.multiply_adds == multiply_adds(tiny())
    assert total.activations == embed.activations + 3 * block.activations
    assert total.parameters == sum(p.numel() for p in tiny().parameters())


def test_a_resnet_by_hand() -> None:
    with torch.device("meta"):
        resnet = ResNet(depth=10, image_size=(64, 64))
    costs = module_costs(resnet)
    assert "maxpool" not in costs and "relu" not in costs, "they have no cost of these kinds"
    assert costs["conv1"] == Cost(64 * 3 * 49, 32 * 32 * 64 * 3 * 49, 32 * 32 * 64)
    assert costs["bn1"] == Cost(2 * 64, 0, 0)
    parts = [cost for name, cost in costs.items() if name != "total"]
    for field in Cost._fields:
        assert sum(getattr(cost, field) for cost in parts) == getattr(costs["total"], field)


@pytest.mark.slow
def test_the_parts_of_mvit_add_up() -> None:
    with torch.device("meta"):
        backbone = build_backbone(recipe("k400_MVITv2_S_16x4_FT"))
    costs = module_costs(backbone)
    blocks = [cost for name, cost in costs.items() if name.startswith("blocks.")]
    assert len(blocks) == 16 and all(all(cost) for cost in blocks)
    assert sum(cost.multiply_adds for name, cost in costs.items() if name != "total") == costs["total"].multiply_adds
    assert costs["total"].multiply_adds == multiply_adds(backbone)


def test_a_table_has_one_line_for_neighbours_that_cost_the_same() -> None:
    same, other = Cost(7_087_872, 1.45e9, 1_978_668), Cost(590_592, 1.15e8, 999)
    costs = {"patch_embed": other, "blocks.0": same, "blocks.1": same, "blocks.2": other, "norm": other, "total": same}
    assert [line.split() for line in cost_table(costs)] == [
        ["module", "parameters", "multiply-adds", "activations"],
        ["patch_embed", "590.59", "k", "115.00", "M", "999"],
        ["blocks.0", "to", "1,", "each", "7.09", "M", "1.45", "G", "1.98", "M"],
        ["blocks.2", "590.59", "k", "115.00", "M", "999"],
        ["norm", "590.59", "k", "115.00", "M", "999"],
        ["total", "7.09", "M", "1.45", "G", "1.98", "M"],
    ]


@pytest.mark.parametrize("training", [True, False])
def test_a_module_in_training_is_counted_all_the_same(training: bool) -> None:
    assert multiply_adds(tiny(dropout=0.5, drop_path=0.5).train(training)) == multiply_adds(tiny())
