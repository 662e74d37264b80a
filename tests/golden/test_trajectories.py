"""Eight optimisation steps of four small models, and the published checkpoints: loaded, continued, fine-tuned from."""

from pathlib import Path
from typing import Any

import pytest
import torch

from maskfeat.build import build_optimizer
from maskfeat.checkpoint.reading import model_state, read_checkpoint
from maskfeat.engine.parallelize import apply_activation_checkpointing
from maskfeat.objectives.base import Objective
from maskfeat.optim.optimizers import load_optimizer_state
from tests.golden.golden import final_norm, follow, golden_batch, load_golden, recipe, salted_objective

RUNS = {entry["name"]: entry for entry in load_golden("training_trajectories")}
FINETUNED = {entry["finetune"]: entry for entry in load_golden("finetune_from_pretrain")}


def published_file(shared: Path, name: str) -> dict[str, Any]:
    (path,) = (shared / "goldens" / name / "checkpoints").glob("*.pyth")
    return read_checkpoint(path)


def assert_follows(run: dict[str, Any], logged: list[dict[str, float]], rel: float = 1e-5) -> None:
    for mine, golden in zip(logged, run["steps"][-len(logged) :], strict=True):
        assert mine["lr"] == pytest.approx(golden["lr"], rel=1e-12)
        assert mine["loss"] == pytest.approx(golden["loss"], rel=rel)
        assert mine["grad_norm"] == pytest.approx(golden["grad_norm"], rel=10 * rel)


def assert_final_norm(run: dict[str, Any], objective: Objective) -> None:
    assert final_norm(objective) == pytest.approx(run["final_param_l2"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_eight_steps(name: str) -> None:
    run = RUNS[name]
    cfg = recipe(run["config"], run["opts"])
    objective = salted_objective(cfg, salt=run["seed"])
    logged = follow(run, objective, build_optimizer(cfg, objective), first=0)
    assert_follows(run, logged)
    assert_final_norm(run, objective)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_accumulated_steps(name: str) -> None:
    """Micro-batches of 1 and 3 samples, with unlike numbers of hidden tokens, give the same steps."""
    run = RUNS[name]
    cfg = recipe(run["config"], run["opts"])
    objective = salted_objective(cfg, salt=run["seed"])
    logged = follow(run, objective, build_optimizer(cfg, objective), first=0, micro_batch=3)
    assert_follows(run, logged)
    assert_final_norm(run, objective)


@pytest.mark.parametrize("name", list(RUNS))
def test_recomputed_activations_change_nothing(name: str) -> None:
    run = RUNS[name]
    cfg = recipe(run["config"], run["opts"])
    plain, saving = (salted_objective(cfg, salt=run["seed"]) for _ in range(2))
    names = list(saving.released_state())
    apply_activation_checkpointing(saving)
    assert list(saving.released_state()) == names
    logged = [follow(run, objective, build_optimizer(cfg, objective), first=6) for objective in (plain, saving)]
    assert logged[0] == logged[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_bf16_stays_close(name: str) -> None:
    run = RUNS[name]
    cfg = recipe(run["config"], run["opts"])
    objective = salted_objective(cfg, salt=run["seed"])
    logged = follow(run, objective, build_optimizer(cfg, objective), first=0, precision="bf16")
    for mine, golden in zip(logged, run["steps"], strict=True):
        assert mine["loss"] == pytest.approx(golden["loss"], rel=0.02)


@pytest.mark.parametrize("name", list(RUNS))
def test_published_checkpoint_goes_on(name: str, shared: Path) -> None:
    run = RUNS[name]
    cfg = recipe(run["config"], run["opts"])
    content = published_file(shared, name)
    objective = salted_objective(cfg, salt=0)
    report = objective.load_released_state(model_state(content))
    assert not (report.fresh or report.dropped or report.resized)
    optimizer = build_optimizer(cfg, objective)
    load_optimizer_state(optimizer, content["optimizer_state"])
    logged = follow(run, objective, optimizer, first=content["epoch"] + 1)
    assert len(logged) == 4
    assert_follows(run, logged)
    assert_final_norm(run, objective)


@pytest.mark.parametrize("name", list(FINETUNED))
def test_finetuning_starts_from_pretraining(name: str, shared: Path) -> None:
    golden = FINETUNED[name]
    run = RUNS[name]
    cfg = recipe(run["config"], run["opts"])
    objective = salted_objective(cfg, salt=run["seed"])
    report = objective.load_released_state(model_state(published_file(shared, golden["pretrain"])))
    assert sorted(report.loaded + list(report.resized)) == sorted(golden["loaded"])
    assert sorted(report.resized) == sorted(golden["resized"])
    assert sorted(report.fresh) == sorted(golden["not_loaded"])
    assert sorted(report.dropped) == sorted(golden["unused"])
    batch = golden_batch(cfg, golden["input_seed"], golden["batch"])
    with torch.no_grad():
        probabilities = objective.eval().predict(batch)
    torch.testing.assert_close(probabilities, torch.tensor(golden["eval_probs"]), rtol=1e-4, atol=1e-7)
