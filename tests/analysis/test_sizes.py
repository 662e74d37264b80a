"""ResNets are tested at another size than they are trained at: everything that is made of them takes the test's."""

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

import maskfeat
from maskfeat.analysis.export import export
from maskfeat.analysis.extract_features import main as extract_features
from maskfeat.analysis.hub import model_card
from maskfeat.analysis.inspect_checkpoint import inspect
from maskfeat.analysis.probes import probe as probes
from maskfeat.analysis.probes.command import main as probe
from maskfeat.analysis.probes.sweep import Plan
from maskfeat.errors import UserError
from tests.analysis.saved import IMAGES, save_network
from tests.small import MFM_PT, MFM_RECIPES, R50_FT

TRAINED, TESTED = 32, 40
RESNET = (MFM_RECIPES / "in1k_R50_MFM_FT.yaml", R50_FT)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("resnet") / "resnet.pyth", RESNET)


def test_its_size(resnet: Path) -> None:
    model = maskfeat.load_model(resnet, device="cpu")
    assert (model.backbone.clip_size, model.clip_size) == ((TRAINED, TRAINED), (TESTED, TESTED))
    assert f"for {TESTED} x {TESTED} pixels" in inspect(str(resnet))["network"]
    assert f"for {TESTED} x {TESTED} pixels" in model_card(model, "mit", "resnet")


def test_torchvisions_own_transforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second weights of ResNet-50 and larger ones are shown larger crops of a smaller image than the first."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    cached = tmp_path / "hub" / "checkpoints" / weights.url.rsplit("/", 1)[1]
    cached.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet50().state_dict(), cached)
    data = maskfeat.load_model(str(weights), device="cpu").cfg.DATA
    assert (data.TEST_SHORT_SIDE, data.TEST_CROP_SIZE, data.TEST_INTERPOLATION) == (232, 224, "bilinear")


def test_votes_that_nobody_gave() -> None:
    """With one neighbour, one class has a vote: it may be the first, and no other is among the five."""
    scores = torch.zeros(21, 21)
    scores[:, 20] = 1.0
    val = SimpleNamespace(label=np.arange(21), rows=np.arange(21))
    top1, top5, all5 = (probes._accuracy(scores, val, k, least) for k, least in ((1, 0.0), (5, 0.0), (5, -np.inf)))
    assert top1 == top5 == pytest.approx(100 / 21) and all5 > top5


def test_one_that_predicts_spectra_takes_one_size(tmp_path: Path) -> None:
    opts = ["DATA.TEST_CROP_SIZE", "64"]
    path = save_network(tmp_path / "mfm.pyth", (MFM_RECIPES / "in1k_R50_MFM_PT.yaml", [*MFM_PT, *opts]))
    assert maskfeat.load_model(path, device="cpu").clip_size == (32, 32)


def test_tokens(resnet: Path, image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(epochs=1, least_steps=2, batch=8, optimizer="adamw")
    quick = functools.partial(probes.attentive_probe, plan=plan, lrs=(0.01,))
    monkeypatch.setattr(probes, "attentive_probe", quick)
    given = ["--checkpoint", str(resnet), "--device", "cpu", "--workers", "0"]
    output = tmp_path / "a.npz"
    assert extract_features([*given, "--data", f"{image_data}/val", "--pool", "tokens", "--output", str(output)]) == 0
    with np.load(output) as found:
        assert found["tokens"].shape == (16, 4, 512)
    few = ["--data", str(image_data), "--kind", "attentive", "--few", "4"]
    assert probe([*given, *few]) == 0


def test_the_folder_that_is_exported_is_not_overwritten(tmp_path: Path) -> None:
    model = maskfeat.load_model(save_network(tmp_path / "a.pyth", IMAGES), device="cpu")
    export(model, "hf", tmp_path / "hf")
    again = maskfeat.load_model(tmp_path / "hf", device="cpu")
    with pytest.raises(UserError, match="model.safetensors is what is read"):
        export(again, "safetensors", tmp_path / "hf" / "model.safetensors")


@pytest.mark.slow
def test_exported_programs(resnet: Path, tmp_path: Path) -> None:
    model = maskfeat.load_model(resnet, device="cpu")
    export(model, "torch.export", tmp_path / "a.pt2")
    program = torch.export.load(str(tmp_path / "a.pt2")).module()
    x = torch.randn(2, 3, TESTED, TESTED)
    torch.testing.assert_close(program(x)[0], model.objective.logits(x))
