"""Weights from files: reports, sizes, axes, older names, and errors that name the key."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskfeat.checkpoint.reading import model_state, read_checkpoint
from maskfeat.checkpoint.resizing import resize_weight
from maskfeat.checkpoint.weights import clean_names, fuse_qkv, list_problems
from maskfeat.errors import NotFinite
from maskfeat.models.mvit import MViT
from maskfeat.models.resnet import ResNet
from maskfeat.models.vit import ViT
from maskfeat.objectives.base import Objective
from maskfeat.objectives.classification import Classification
from maskfeat.objectives.maskfeat import MaskFeat
from maskfeat.objectives.mfm import MFM


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
        "stride_q": {0: (1, 1, 1)[cut:], 1: (1, 2, 2)[cut:]},
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


def test_a_long_list_of_problems_is_cut() -> None:
    assert list_problems(["a", "b"], most=2) == "a\n  b"
    assert list_problems(["a"] * 7, most=2) == "a\n  a\n  and 5 more"


def test_positions_of_a_wide_model() -> None:
    """Widths above 256 are equal without being the same object of Python."""
    wide = torch.randn(1, 16, 320)
    resized = resize_weight("pos_embed_spatial", wide, torch.Size((1, 64, 320)))
    assert resized is not None and resized.shape == (1, 64, 320)
    assert resize_weight("pos_embed_spatial", wide, torch.Size((1, 64, 384))) is None


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


@pytest.mark.parametrize(
    ("have", "want"),
    [
        ({"clip_size": (8, 32, 32)}, {"clip_size": (8, 64, 64)}),  # 4 x 8 x 8 and 4 x 16 x 16 are squares, too
        ({"clip_size": (8, 32, 32)}, {"axes": 2, "size": 128}),
        ({"axes": 2, "size": 32}, {"clip_size": (8, 32, 32)}),
    ],
)
def test_joint_positions_of_clips_are_not_taken_for_those_of_a_square(
    have: dict[str, Any], want: dict[str, Any]
) -> None:
    source, target = (Classification(mvit(position="joint", **kind), num_classes=3) for kind in (have, want))
    state = source.released_state()
    with pytest.raises(ValueError, match="pos_embed has a different shape"):
        target.load_released_state(state, allow=["*.rel_pos_t"])


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
    wrapped = {f"module.encoder.{name}": value for name, value in split.items()}
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


def test_eight_bit_floats_are_summed_over_time() -> None:
    objective = Classification(vit(), num_classes=3)
    state = copy_of(objective)
    state["patch_embed.proj.weight"] = torch.ones(16, 3, 2, 8, 8, dtype=torch.float8_e4m3fn)
    objective.load_released_state(state)
    assert (objective.backbone.patch_embed.proj.weight == 2).all()


def test_patches_of_another_size_have_no_rule() -> None:
    image, shape = torch.zeros(4, 3, 1, 8, 8), torch.Size((4, 3, 3, 16, 16))
    assert resize_weight("patch_embed.proj.weight", image, shape) is None


@pytest.mark.parametrize("name", ["norm.weight", "blocks.0.attn.rel_pos_h", "pos_embed_spatial", "pos_embed"])
@pytest.mark.parametrize(("have", "want"), [((1, 1, 8), (8,)), ((4, 8), (8,)), ((8,), (4, 8)), ((), (1, 4, 8))])
def test_other_numbers_of_axes_have_no_rule(name: str, have: tuple[int, ...], want: tuple[int, ...]) -> None:
    assert resize_weight(name, torch.zeros(have), torch.Size(want)) is None


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


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "model.", "backbone.", "encoder.", "module._orig_mod.", "_orig_mod.model.module.",
     "model.backbone._orig_mod.", "module.model.encoder."],
)  # fmt: skip
def test_prefixes_in_any_nesting(prefix: str) -> None:
    source = MaskFeat(vit(maskable=True), cell=4)
    state = {prefix + name: value for name, value in source.released_state().items()}
    assert len(MaskFeat(vit(maskable=True), cell=4).load_released_state(state).loaded) == len(state)
    target = Classification(vit(), num_classes=3)
    report = target.load_released_state(state)
    assert {name.split(".")[0] for name in report.dropped} == {"mask_token", "hogs", "pred_head"}
    assert (target.backbone.blocks[1].attn.qkv.weight == source.backbone.blocks[1].attn.qkv.weight).all()


def test_names_that_have_different_prefixes() -> None:
    """The paper's MFM files have an encoder and a decoder; others a backbone and a head; blocks may be compiled."""
    source = MFM(vit(), mean=(0.4,) * 3, std=(0.2,) * 3, radius=6)
    state = {
        f"module.{name}" if name.startswith("decoder.") else f"module.encoder.{name}": value
        for name, value in source.released_state().items()
    }
    report = Classification(vit(), num_classes=3).load_released_state(state)
    assert set(report.dropped) == {"norm.weight", "norm.bias", "decoder.0.weight", "decoder.0.bias"}

    whole = copy_of(Classification(vit(), num_classes=3))
    state = {f"backbone.{k}" if not k.startswith(("head.", "norm.")) else k: v for k, v in whole.items()}
    state = {name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in state.items()}
    target = Classification(vit(), num_classes=3)
    assert len(target.load_released_state(state).loaded) == len(whole)
    assert all(torch.equal(value, whole[name]) for name, value in target.released_state().items())


@pytest.mark.slow
@pytest.mark.parametrize("which", ["whole", "backbone"])
def test_compiled_objectives_write_and_read_plain_names(which: str) -> None:
    plain = Classification(ResNet(depth=10), num_classes=3)
    names = list(plain.released_state())
    inside = plain.state_dict()
    if which == "whole":
        state = torch.compile(plain).state_dict()
        assert "_orig_mod.head.projection.weight" in state
    else:
        plain.backbone = torch.compile(plain.backbone)  # type: ignore[assignment]
        state = plain.state_dict()
        assert "backbone._orig_mod.conv1.weight" in state
        assert list(plain.released_state()) == names
        plain.load_released_state({name: value + 1 for name, value in plain.released_state().items()})
    other = Classification(ResNet(depth=10), num_classes=3)
    assert len(other.load_released_state(state).loaded) == len(names)
    assert all(torch.equal(value, inside[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "encoder.", "_orig_mod."])
def test_a_name_with_and_without_a_prefix_is_refused(prefix: str) -> None:
    objective = Classification(vit(), num_classes=3)
    state = copy_of(objective)
    state[f"{prefix}norm.weight"] = torch.zeros(16)
    with pytest.raises(ValueError, match=f"norm.weight twice, as norm.weight and as {prefix}norm.weight"):
        objective.load_released_state(state, allow=["*"])
    with pytest.raises(ValueError, match="norm.weight twice"):
        clean_names(state, [prefix])
    both = {f"{start}{name}": value for name, value in copy_of(objective).items() for start in ("model.", "backbone.")}
    with pytest.raises(ValueError, match="twice, as model.* and as backbone"):
        objective.load_released_state(both)


def test_another_prefix_is_named_with_the_key_that_removes_it() -> None:
    objective = Classification(vit(), num_classes=3)
    state = {f"module.student.{name}": value for name, value in copy_of(objective).items()}
    with pytest.raises(ValueError, match=r"'module.student.'.*CHECKPOINT_CLEAR_NAME_PATTERN \"\['module.student.'\]\""):
        objective.load_released_state(state)
    with pytest.raises(ValueError, match=r"no parameter in the file fits.*\n.*CHECKPOINT_CLEAR_NAME_PATTERN"):
        objective.load_released_state(state, allow=["*"])
    assert len(objective.load_released_state(clean_names(state, ["module.student."])).loaded) == len(state)
    state = copy_of(objective)
    del state["norm.weight"]
    with pytest.raises(ValueError) as error:
        objective.load_released_state(state)
    assert "CLEAR_NAME_PATTERN" not in str(error.value), "nothing begins with a prefix here"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layer1.0.conv1.weight", lambda value: value.index_fill(0, torch.tensor([0]), float("nan"))),
        ("bn1.running_var", lambda value: value + float("inf")),
        ("fc.bias", lambda value: value.half() - float("inf")),
        ("layer2.0.bn1.weight", lambda value: value.double() * 1e300),
        ("bn1.num_batches_tracked", lambda value: value.float() + float("inf")),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_name(name: str, change: Any) -> None:
    objective = Classification(ResNet(depth=10), num_classes=3)
    state = copy_of(objective)
    state[name] = change(state[name])
    before = copy_of(objective)
    with pytest.raises(NotFinite, match=f"1 parameters are not finite .*\n  {name}\n"):
        objective.load_released_state(state, allow=["*"])
    assert all(torch.equal(value, before[key]) for key, value in objective.released_state().items()), "nothing changed"


def test_what_is_not_used_may_be_anything() -> None:
    state = copy_of(MaskFeat(vit(maskable=True), cell=4))
    state["pred_head.projections.0.weight"].fill_(float("nan"))
    Classification(vit(), num_classes=3).load_released_state(state)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_no_weights(dtype: torch.dtype) -> None:
    objective = Classification(mvit(), num_classes=3)
    state = copy_of(objective)
    name = "blocks.0.attn.qkv.weight"
    state[name] = state[name].to(dtype)
    with pytest.raises(ValueError, match=f"{name} is of {dtype}, expected torch.float32"):
        objective.load_released_state(state)
    for letter, part in zip("qkv", state.pop(name).chunk(3), strict=True):  # as older files have it
        state[f"blocks.0.attn.{letter}.weight"] = part
    with pytest.raises(ValueError, match=f"{name} is of {dtype}"):
        objective.load_released_state(state)
    assert name in objective.load_released_state(state, allow=[name]).fresh


def test_counts_of_batch_norms_stay() -> None:
    objective = Classification(ResNet(depth=10), num_classes=3)
    state = copy_of(objective)
    state["bn1.num_batches_tracked"] = torch.tensor(7)
    state["layer1.0.bn1.num_batches_tracked"] = torch.tensor(8.0, dtype=torch.half)
    objective.load_released_state(state)
    assert int(objective.released_state()["bn1.num_batches_tracked"]) == 7
    assert int(objective.released_state()["layer1.0.bn1.num_batches_tracked"]) == 8
    state["bn1.num_batches_tracked"] = torch.tensor(True)
    with pytest.raises(ValueError, match="bn1.num_batches_tracked is of torch.bool"):
        objective.load_released_state(state)


def test_finetuned_files_of_the_mfm_paper() -> None:
    source = Classification(vit(), num_classes=3, mean_pooling=True)
    torch.nn.init.normal_(source.norm.weight)
    names = {"norm.": "fc_norm.", "head.projection.": "head."}
    state = copy_of(source)
    for ours, theirs in names.items():
        state = {name.replace(ours, theirs) if name.startswith(ours) else name: v for name, v in state.items()}
    assert {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} <= state.keys()
    for prefix in ("", "module."):
        target = Classification(vit(), num_classes=3, mean_pooling=True).eval()
        report = target.load_released_state({prefix + name: value for name, value in state.items()})
        assert not report.fresh and not report.dropped
        clip = torch.randn(2, 3, 32, 32)
        assert torch.equal(target.logits(clip), source.eval().logits(clip))
    with pytest.raises(ValueError, match="MVIT.USE_MEAN_POOLING True"):
        Classification(vit(), num_classes=3).load_released_state(state)
    with pytest.raises(ValueError, match="norm.weight twice"):
        target.load_released_state({**state, "norm.weight": state["fc_norm.weight"]})
    with pytest.raises(ValueError, match="head.projection.weight is not in the file"):
        target.load_released_state({name: v for name, v in state.items() if not name.startswith("head.")})


def test_finetuning_starts_the_final_norm_anew() -> None:
    """As published, also where pre-training had one."""
    source = MFM(vit(), mean=(0.4,) * 3, std=(0.2,) * 3, radius=6)
    torch.nn.init.normal_(source.norm.weight)
    target = Classification(vit(), num_classes=3, mean_pooling=True)
    before = target.norm.weight.clone()
    report = target.load_released_state(source.released_state())
    assert {"norm.weight", "norm.bias"} <= set(report.fresh) & set(report.dropped)
    assert torch.equal(target.norm.weight, before)
    again = MFM(vit(), mean=(0.4,) * 3, std=(0.2,) * 3, radius=6)
    again.load_released_state(source.released_state())
    assert torch.equal(again.norm.weight, source.norm.weight), "pre-training goes on with its own"
