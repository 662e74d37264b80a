"""The eight recipes at full size, forward and backward, against the published implementation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from maskfeat.build import build_objective, build_optimizer
from maskfeat.engine.flops import multiply_adds
from maskfeat.objectives.base import Objective
from tests.golden.golden import golden_batch, load_golden, recipe, salted_objective

GOLDEN = {entry["config"]: entry for entry in load_golden("model_forward_backward")}
MANIFEST = load_golden("state_dict_manifest")
LARGE = {name for name in GOLDEN if "_L_" in name or "k400" in name}
ALL = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in GOLDEN]


def assert_like(value: Tensor, golden: dict[str, Any]) -> None:
    """A tensor against its golden summary: size, mean, norm, first and last numbers."""
    flat = value.detach().double().flatten()
    assert flat.numel() == golden["numel"]
    assert flat.norm().item() == pytest.approx(golden["l2"], rel=1e-5)
    scale = golden["l2"] / golden["numel"] ** 0.5
    assert flat.mean().item() == pytest.approx(golden["mean"], abs=1e-5 * scale)
    for mine, theirs in ((flat[:8], golden["first"]), (flat[-8:], golden["last"])):
        torch.testing.assert_close(mine, torch.tensor(theirs).double(), atol=1e-5 * max(scale, 1e-3), rtol=1e-4)


def assert_gradients(objective: Objective, golden: dict[str, Any]) -> None:
    """Norms by name and in total; what is zero in exact arithmetic only has to be small."""
    norms = {
        objective.released_name(name): p.grad.double().norm().item()
        for name, p in objective.named_parameters()
        if p.grad is not None
    }
    assert norms.keys() == golden["grad_norms"].keys()
    total = golden["grad_norm_total"]
    for name, norm in golden["grad_norms"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-4, abs=1e-6 * total), name
    assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(total, rel=1e-5)


@pytest.mark.full_size
@pytest.mark.parametrize("name", ALL)
def test_forward_and_backward(name: str) -> None:
    golden = GOLDEN[name]
    cfg = recipe(name, golden["opts"])
    objective = salted_objective(cfg, salt=7)
    assert sum(p.numel() for p in objective.parameters()) == golden["params"]
    batch = golden_batch(cfg, golden["seed"], golden["batch"])
    out = objective(batch)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(golden["loss"], rel=1e-5)
    assert_gradients(objective, golden)
    objective.zero_grad(set_to_none=True)
    with torch.no_grad():
        if objective.classifies:
            assert_like(objective.eval().predict(batch), golden["eval_probs"])
        else:
            prediction, target = objective.predict_hidden(batch)
            assert list(prediction.shape) == golden["pred_shape"]
            assert_like(prediction, golden["pred"])
            assert_like(target, golden["target"])


@pytest.mark.parametrize("name", list(GOLDEN))
def test_names_shapes_and_parameter_groups(name: str) -> None:
    cfg = recipe(name)
    with torch.device("meta"):
        objective = build_objective(cfg)
        optimizer = build_optimizer(cfg, objective)
    shapes = {key: list(value.shape) for key, value in objective.released_state().items()}
    assert shapes == MANIFEST[name]
    assert list(shapes) == list(MANIFEST[name]), "released files list their names in this order"
    names = {id(p): objective.released_name(n) for n, p in objective.named_parameters()}
    groups = {
        names[id(p)]: [group["layer_decay"], group["weight_decay"]]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    golden = load_golden("param_groups")[name]
    assert groups.keys() == golden.keys()
    # The order is that of the optimizer states in released files.
    assert list(groups) == list(golden)
    for key, (layer_decay, weight_decay) in golden.items():
        assert groups[key] == [pytest.approx(layer_decay, rel=1e-12), weight_decay], key


# As the papers give them, a view. Folding relative positions into queries and keys widens those.
PUBLISHED_G = {
    "in1k_VIT_B_MaskFeat_FT": (17.6, 0.01),
    "in1k_VIT_L_MaskFeat_FT": (61.6, 0.01),
    "k400_MVITv2_S_16x4_FT": (71, 0.08),
    "k400_MVITv2_L_16x4_FT": (377, 0.06),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PUBLISHED_G))
def test_multiply_adds(name: str) -> None:
    published, tolerance = PUBLISHED_G[name]
    with torch.device("meta"):
        objective = build_objective(recipe(name))
    assert multiply_adds(objective.backbone) / 1e9 == pytest.approx(published, rel=tolerance)
