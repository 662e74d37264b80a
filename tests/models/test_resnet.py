"""torchvision's ResNet behind the backbone protocol."""

from pathlib import Path

import pytest
import torch
import torchvision

from maskfeat.batch import Batch
from maskfeat.build import build_objective, build_optimizer
from maskfeat.config import load_config
from maskfeat.models.resnet import STAGES, ResNet
from maskfeat.objectives.classification import Classification
from tests.small import REPO

FT = REPO / "configs" / "mfm" / "in1k_R50_MFM_FT.yaml"


@pytest.mark.parametrize("depth", sorted(set(STAGES) - {10}))
def test_names_and_shapes_are_torchvisions(depth: int) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
        ours = build_objective(load_config(FT, ["RESNET.DEPTH", str(depth)])).released_state()
    assert [(n, v.shape) for n, v in ours.items()] == [(n, v.shape) for n, v in theirs.items()]


@pytest.mark.parametrize("side", [64, 75, 96])
def test_logits_are_torchvisions(side: int) -> None:
    reference = torchvision.models.resnet18(num_classes=7)
    objective = Classification(ResNet(depth=18), num_classes=7, mean_pooling=True, head_init_scale=None)
    report = objective.load_released_state(reference.state_dict())
    assert not report.fresh and not report.dropped and not report.resized
    clip = torch.randn(3, 3, side, side)
    for training in (True, False):
        expected = reference.train(training)(clip)
        torch.testing.assert_close(objective.train(training).logits(clip), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(objective.predict(Batch(clip)), reference(clip).softmax(dim=1))


def test_a_new_classifier_starts_as_torchvisions() -> None:
    torch.manual_seed(4)
    objective = build_objective(load_config(FT, ["RESNET.DEPTH", "18"]))
    weight, bias = objective.released_state()["fc.weight"], objective.released_state()["fc.bias"]
    bound = 512**-0.5
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert bias.abs().max() <= bound and bias.std() > 0


@pytest.mark.parametrize("depth", [10, 50])
def test_blocks_may_begin_as_their_skip_path(depth: int) -> None:
    """The last batch norm of each block, and no other, starts with weight 0: block by block the input comes through."""
    last = "bn3" if depth == 50 else "bn2"
    for zero_init in (True, False):
        backbone = ResNet(depth=depth, zero_init=zero_init)
        norms = {n: m for n, m in backbone.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
        zero = {name for name, norm in norms.items() if (norm.weight == 0).all()}
        assert zero == ({name for name in norms if name.endswith(last)} if zero_init else set())
        assert all((norm.weight == 1).all() for name, norm in norms.items() if name not in zero)
        assert len(zero) in (0, backbone.num_blocks)
    assert load_config(FT).RESNET.ZERO_INIT_FINAL_BN is False
    assert build_objective(load_config(FT, ["RESNET.DEPTH", "10"])).backbone.layer1[0].bn2.weight.min() == 1


def test_layers_for_layer_decay() -> None:
    assert ResNet(depth=10).num_blocks == 4
    backbone = ResNet(depth=50)
    assert backbone.num_blocks == 16
    expected = {"conv1.weight": 0, "bn1.bias": 0, "layer1.0.conv1.weight": 1, "layer1.2.bn3.weight": 3,
                "layer2.0.downsample.0.weight": 4, "layer3.0.conv1.weight": 8, "layer4.2.conv3.weight": 16,
                "fc.weight": 17, "decoder.0.weight": 17}  # fmt: skip
    assert {name: backbone.layer_id(name) for name in expected} == expected
    layers = [backbone.layer_id(name) for name, _ in backbone.named_parameters()]
    assert layers == sorted(layers) and set(layers) == set(range(17))
    cfg = load_config(FT, ["RESNET.DEPTH", "18", "SOLVER.LAYER_DECAY", "0.5", "SOLVER.ZERO_WD_1D_PARAM", "True"])
    groups = build_optimizer(cfg, build_objective(cfg)).param_groups
    assert {group["layer_decay"] for group in groups} == {0.5**k for k in range(10)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.02}


@pytest.mark.parametrize(("side", "grid"), [(224, (7, 7)), (160, (5, 5)), (33, (2, 2)), (32, (1, 1))])
def test_grid(side: int, grid: tuple[int, int]) -> None:
    backbone = ResNet(depth=10, image_size=(side, side))
    tokens = backbone.forward_tokens(torch.randn(2, 3, side, side))
    assert tokens.grid == backbone.grid == grid
    assert tokens.x.shape == (2, grid[0] * grid[1], backbone.width) and not tokens.has_class_token


@pytest.mark.parametrize("bf16", [False, True])
def test_images_lie_channels_last_in_bfloat16(bf16: bool) -> None:
    """There convolutions of a CPU take half the time; in float32 nothing is copied."""
    backbone, seen = ResNet(depth=10, image_size=(64, 64)), []
    backbone.layer3.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        backbone(torch.randn(2, 3, 64, 64))
        assert seen[0].is_contiguous(memory_format=torch.channels_last if bf16 else torch.contiguous_format)
        assert backbone.to("meta")(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 4, 512)


def test_what_is_saved_loads_with_torchvision_alone(tmp_path: Path) -> None:
    objective = build_objective(load_config(FT, ["RESNET.DEPTH", "18", "MODEL.NUM_CLASSES", "5"])).eval()
    path = tmp_path / "file.pyth"
    torch.save({"model_state": objective.released_state()}, path)
    reference = torchvision.models.resnet18(num_classes=5).eval()
    reference.load_state_dict(torch.load(path, weights_only=True)["model_state"])
    clip = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(reference(clip).softmax(dim=1), objective.predict(Batch(clip)))
