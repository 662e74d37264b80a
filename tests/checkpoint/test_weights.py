"""Weights from files: reports, sizes, axes, older names, and errors that name the key."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskfeat.checkpoint.reading import model_state, read_checkpoint
from maskfeat.checkpoint.weights import clean_names, fuse_qkv, resize_weight
from maskfeat.models.mvit import MViT
from maskfeat.models.vit import ViT
from maskfeat.objectives.base import Objective
from maskfeat.objectives.classification import Classification
from maskfeat.objectives.maskfeat import MaskFeat


def vit(size: int = 32, **changes: object) -> ViT:
    return ViT(**{"image_size": (size, size), "patch": (8, 8), "width": 16, "depth": 2, "num_heads": 2, **changes})


def mvit(axes: int = 3, size: int = 32, **changes: object) -> MViT:
    cut = 3 - axes
    options = {
        "clip_size": (4, size, size)[cut:],
        "kernel": (3, 7, 7)[cut:],
        "stride": (2, 4, 4)[cut:],
        "padding": (1, 3, 3)[cut:],
        "pool_kernel": (3, 3, 3)[cut:],
        "stride_q": {1: (1, 2, 2)[cut:]},
        "stride_kv_adaptive": (1, 4, 4)[cut:],
        "width": 16,
        "depth": 2,
    }
    return MViT(**{**options, **changes})


def copy_of(objective: Objective) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in objective.released_state().items()}


def test_pretraining_to_classifier() -> None:
    source = MaskFeat(vit(maskable=True), cell=4)
    target = Classification(vit(), num_classes=3)
    report = target.load_released_state(source.released_state())
    assert set(report.fresh) == {"norm.weight", "norm.bias", "head.projection.weight", "head.projection.bias"}
    assert {name.split(".")[0] for name in report.dropped} == {"mask_token", "hogs", "pred_head"}
    for name, value in target.backbone.state_dict().items():
        assert (value == source.backbone.state_dict()[name]).all(), name
    for word in ("loaded", "resized", "fresh", "dropped", "mask_token"):
        assert word in report.table()


def test_round_trip_is_exact_and_complete() -> None:
    source, target = Classification(vit(), num_classes=3), Classification(vit(), num_classes=3)
    report = target.load_released_state(source.released_state())
    assert len(report.loaded) == len(source.state_dict())
    assert not (report.fresh or report.dropped or report.resized)
    assert all((a == b).all() for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True))


def test_missing_left_over_and_misshapen_are_errors_that_can_be_allowed() -> None:
    objective = Classification(vit(), num_classes=3)
    state = copy_of(objective)
    del state["blocks.1.norm1.weight"]
    state["blocks.9.norm1.weight"] = torch.zeros(16)
    state["head.projection.weight"] = torch.zeros(7, 16)
    with pytest.raises(ValueError) as error:
        objective.load_released_state(state)
    for word in (
        "blocks.1.norm1.weight",
        "blocks.9.norm1.weight",
        "(7, 16) -> (3, 16)",
        "TRAIN.CHECKPOINT_ALLOW",
    ):
        assert word in str(error.value)
    report = objective.load_released_state(state, allow=["blocks.?.norm1.weight", "head.*"])
    assert report.fresh == ["blocks.1.norm1.weight", "head.projection.weight"]
    assert set(report.dropped) == {"blocks.9.norm1.weight", "head.projection.weight"}


def test_a_classifier_file_without_its_head_is_not_taken_for_pretraining() -> None:
    objective = Classification(vit(), num_classes=3)
    state = {k: v for k, v in copy_of(objective).items() if not k.startswith("head.")}
    with pytest.raises(ValueError, match="head.projection.weight is not in the file"):
        objective.load_released_state(state)


def test_foreign_file_is_refused_even_where_all_is_allowed() -> None:
    with pytest.raises(ValueError, match="no parameter in the file fits"):
        Classification(vit(), num_classes=3).load_released_state({"conv1.weight": torch.zeros(1)}, allow=["*"])


def test_positions_of_another_image_size() -> None:
    source, target = Classification(vit(32), num_classes=3), Classification(vit(64), num_classes=3)
    report = target.load_released_state(source.released_state())
    assert list(report.resized) == ["pos_embed"]
    mine, theirs = target.backbone.pos_embed, source.backbone.pos_embed
    assert (mine[:, 0] == theirs[:, 0]).all(), "the class token's position is kept"
    on_grid = theirs[:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(on_grid, size=(8, 8), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(mine[:, 1:].reshape(1, 8, 8, 16), expected)


def test_positions_of_another_clip() -> None:
    source = Classification(mvit(position="separate"), num_classes=3)
    target = Classification(mvit(position="separate", clip_size=(8, 64, 64)), num_classes=3)
    report = target.load_released_state(source.released_state())
    assert {"pos_embed_temporal", "pos_embed_spatial"} <= set(report.resized)
    assert any("rel_pos_h" in name for name in report.resized) and any("rel_pos_t" in n for n in report.resized)
    line = torch.arange(5.0)[:, None].expand(5, 2)
    resized = resize_weight("blocks.0.attn.rel_pos_t", line, torch.Size((9, 2)))
    expected = torch.nn.functional.interpolate(line.T[None], size=9, mode="linear")[0].T
    torch.testing.assert_close(resized, expected)


def test_images_to_clips_and_back() -> None:
    flat = Classification(mvit(axes=2), num_classes=3)
    deep = Classification(mvit(axes=3), num_classes=3)
    report = deep.load_released_state(flat.released_state(), allow=["*.rel_pos_t"])
    patch, pool = deep.backbone.patch_embed.proj.weight, deep.backbone.blocks[0].attn.pool_q.weight
    assert (patch[:, :, 1] == flat.backbone.patch_embed.proj.weight).all(), "the kernel stands at the centre frame"
    assert (patch[:, :, [0, 2]] == 0).all()
    for frame in range(3):
        assert (pool[:, :, frame] == flat.backbone.blocks[0].attn.pool_q.weight).all()
    assert "patch_embed.proj.weight" in report.resized
    deep.load_released_state(flat.released_state(), allow=["*.rel_pos_t"], average=True)
    torch.testing.assert_close(patch.sum(dim=2), flat.backbone.patch_embed.proj.weight)
    assert (patch == patch[:, :, :1]).all()
    back = Classification(mvit(axes=2), num_classes=3)
    back.load_released_state(deep.released_state(), allow=["*.rel_pos_t"])
    torch.testing.assert_close(back.backbone.patch_embed.proj.weight, flat.backbone.patch_embed.proj.weight)
    torch.testing.assert_close(
        back.backbone.blocks[0].attn.pool_q.weight, 3 * flat.backbone.blocks[0].attn.pool_q.weight
    )


def test_older_names() -> None:
    objective = Classification(mvit(), num_classes=3)
    whole = copy_of(objective)
    split = {}
    for name, value in whole.items():
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                split[name.replace("qkv", letter)] = part
        else:
            split[name] = value
    assert all((fuse_qkv(split)[name] == value).all() for name, value in whole.items())
    wrapped = {f"module.{name}": value for name, value in split.items()}
    report = Classification(mvit(), num_classes=3).load_released_state(wrapped)
    assert len(report.loaded) == len(whole)
    assert list(clean_names({"encoder.a": whole["norm.bias"]}, ["encoder."])) == ["a"]
    del split["blocks.0.attn.k.weight"]
    with pytest.raises(ValueError, match="must all be present"):
        fuse_qkv(split)


def test_query_and_value_biases_of_other_vits() -> None:
    state = {"blocks.0.attn.q_bias": torch.arange(3.0), "blocks.0.attn.v_bias": torch.arange(3.0) + 5}
    fused = fuse_qkv({**state, "blocks.0.attn.qkv.weight": torch.zeros(9, 3)})
    assert list(fused) == ["blocks.0.attn.qkv.bias", "blocks.0.attn.qkv.weight"]
    assert fused["blocks.0.attn.qkv.bias"].tolist() == [0, 1, 2, 0, 0, 0, 5, 6, 7]
    with pytest.raises(ValueError, match="blocks.0.attn.v_bias"):
        fuse_qkv({"blocks.0.attn.q_bias": torch.zeros(3)})


def test_eight_bit_floats_become_floats() -> None:
    objective = Classification(mvit(), num_classes=3)
    state = {name: value.to(torch.float8_e4m3fn) for name, value in copy_of(objective).items()}
    state["blocks.0.attn.rel_pos_h"] = torch.ones(3, 16, dtype=torch.float8_e4m3fn)
    report = objective.load_released_state(state)
    assert list(report.resized) == ["blocks.0.attn.rel_pos_h"]
    for name, value in copy_of(objective).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name].float()) or name in report.resized
    assert (objective.backbone.blocks[0].attn.rel_pos_h == 1).all()


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("quantized", r"a quantized tensor \(torch.qint8\)"),
        ("sparse", r"not a dense tensor \(torch.sparse_coo\)"),
        ("complex", "a tensor of torch.complex64"),
        ("meta", r"a tensor without values \(on the meta device\)"),
        ("text", "a str, not a tensor"),
    ],
)
def test_what_is_no_weight_is_refused_by_name(tmp_path: Path, kind: str, words: str) -> None:
    objective = Classification(vit(), num_classes=3)
    state: dict[str, Any] = copy_of(objective)
    name = "blocks.1.attn.qkv.weight"
    weight = state[name]
    state[name] = {
        "quantized": lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "sparse": lambda: weight.to_sparse(),
        "complex": lambda: weight.to(torch.complex64),
        "meta": lambda: weight.to("meta"),
        "text": lambda: "weight",
    }[kind]()
    torch.save({"model_state": state}, tmp_path / "a.pyth")
    read = model_state(read_checkpoint(tmp_path / "a.pyth"))
    with pytest.raises(ValueError, match=f"1 entries cannot be loaded into parameters:\n  {name} is {words}\n.*ALLOW"):
        objective.load_released_state(read)
    before = copy_of(objective)[name]
    report = objective.load_released_state(read, allow=[name])
    assert report.fresh == [name] and report.dropped == [name]
    assert torch.equal(copy_of(objective)[name], before)
