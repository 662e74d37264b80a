"""The linear probe: against scikit-learn, and that test samples decide nothing."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import blobs, stored

from maskfeat.analysis.probes import sweep
from maskfeat.analysis.probes.features import Stored
from maskfeat.analysis.probes.linear import LinearHead, linear_probe
from maskfeat.analysis.probes.split import held_out
from maskfeat.analysis.probes.sweep import Chosen, Heads, Plan, Setting, _Optimizer, best_on, fit

CPU = torch.device("cpu")
QUICK = Plan(epochs=10, least_steps=200, batch=512, optimizer="sgd")


def probed(train: Stored, test: Stored, classes: int = 4, seed: int = 0, plan: Plan = QUICK, **more: object) -> Chosen:
    columns = {"all": torch.arange(train.x.shape[-1])}
    held = held_out(train.label[train.rows], seed)
    grid = {"lrs": (0.01, 0.1), "weight_decays": (1e-4, 0.03), **more}
    return linear_probe(train, test, columns, classes, held, seed, CPU, plan=plan, **grid)  # type: ignore[arg-type]


def top1(found: Chosen, test: Stored) -> float:
    return 100.0 * float((found.scores.argmax(dim=1).numpy() == test.label[test.rows]).mean())


def test_what_is_separable_is_separated() -> None:
    train, test = stored(*blobs(200, 12.0, 0)), stored(*blobs(100, 12.0, 1))
    assert top1(probed(train, test), test) == 100.0


@pytest.mark.slow
@pytest.mark.parametrize(("distance", "width", "number"), [(0.5, 8, 600), (0.3, 60, 400)])
def test_noisy_data_are_told_apart_as_well_as_scikit_learn_does(distance: float, width: int, number: int) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    (x, label), (y, other) = blobs(number, distance, 0, width), blobs(4000, distance, 1, width)
    mean, std = x.mean(axis=0), x.std(axis=0)
    best = max(
        linear_model.LogisticRegression(C=c, max_iter=500).fit((x - mean) / std, label).score((y - mean) / std, other)
        for c in (0.003, 0.03, 0.3, 3.0)  # the best in hindsight: no held-out part could choose a better one
    )
    found = top1(probed(stored(x, label), stored(y, other)), stored(y, other))
    assert 35 < 100 * best < 95, "neither hopeless nor trivial"
    assert found > 100 * best - 1.0


@pytest.mark.slow
def test_one_setting_ends_at_the_minimum_of_the_penalised_loss() -> None:
    x, label = blobs(150, 0.5, 0)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    heads = Heads(lambda _: LinearHead(torch.arange(8), 4), [Setting("", 0.1, 0.02), Setting("", 0.3, 0.1)], 0, CPU)
    plan = Plan(epochs=1, least_steps=600, batch=150, optimizer="sgd")
    fit(heads, plan, lambda rows, _: torch.from_numpy(x[rows]).float(), np.arange(150), label, 0, "")
    ((_, _, weights),) = heads.groups
    for number, setting in enumerate(heads.settings):
        weight, bias = (weights[f"linear.{name}"][number].detach().double() for name in ("weight", "bias"))
        weight.requires_grad_(), bias.requires_grad_()
        loss = F.cross_entropy(F.linear(torch.from_numpy(x), weight, bias), torch.from_numpy(label))
        both = weight.square().sum() + bias.square().sum()
        (loss + setting.weight_decay / 2 * both).backward()
        assert weight.grad is not None and weight.grad.abs().max() < 1e-3 and weight.abs().max() > 0.05


def test_settings_are_trained_as_if_each_were_alone() -> None:
    x, label = blobs(100, 0.5, 0)
    settings = [Setting("few", 0.01, 0.0), Setting("all", 0.1, 0.01), Setting("few", 0.1, 0.1)]
    columns = {"few": torch.tensor([0, 3]), "all": torch.arange(8)}
    plan = Plan(epochs=3, least_steps=5, batch=32, optimizer="sgd")

    def read(rows: np.ndarray, view: int) -> torch.Tensor:
        return torch.from_numpy(x[rows]).float() / 10

    def logits(chosen: list[Setting]) -> torch.Tensor:
        heads = Heads(lambda name: LinearHead(columns[name], 4), chosen, 0, CPU)
        fit(heads, plan, read, np.arange(100), label, 3, "")
        return heads(read(np.arange(100), 0)).detach()

    together = logits(settings)
    for number, setting in enumerate(settings):
        torch.testing.assert_close(together[number], logits([setting])[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[2], atol=1e-2)


@pytest.mark.slow
def test_labels_of_test_samples_choose_nothing() -> None:
    train, test = stored(*blobs(120, 0.3, 0, 30)), stored(*blobs(50, 0.3, 1, 30))
    plain = probed(train, test)
    other = probed(train, test._replace(label=(test.label + 1) % 4))
    assert other.setting == plain.setting and other.held_out == plain.held_out
    assert torch.equal(other.scores, plain.scores)


@pytest.mark.slow
def test_held_out_samples_choose() -> None:
    train, test = stored(*blobs(120, 0.4, 0, 30)), stored(*blobs(50, 0.4, 1, 30))
    held = held_out(train.label, 0)
    assert held.sum() == pytest.approx(24, abs=2)
    found = probed(train, test)
    shuffled = train.label.copy()
    shuffled[held] = (shuffled[held] + 1) % 4
    with_others = probed(train._replace(label=shuffled), test)
    assert found.held_out != with_others.held_out
    assert max(found.held_out) > max(with_others.held_out)


def test_the_chosen_setting_is_fitted_to_all_and_chosen_within_one_standard_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted, slacks = [], []
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "fit", lambda *given: (fitted.append(given[3].tolist()), fit(*given))[1])
        patched.setattr(sweep, "best_on", lambda *given, slack: (slacks.append(slack), best_on(*given, slack))[1])
        train = stored(*blobs(100, 0.4, 0))
        probed(train, stored(*blobs(20, 0.4, 1)), plan=QUICK._replace(least_steps=5, epochs=1))
    held = held_out(train.label, 0)
    assert [sorted(rows) for rows in fitted] == [np.flatnonzero(~held).tolist(), list(range(100))] and slacks == [1.0]


def test_the_rate_warms_up_and_falls_along_a_cosine_to_nearly_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    factors: list[float] = []
    monkeypatch.setattr(_Optimizer, "step", lambda self, factor: factors.append(factor))
    x, label = blobs(50, 0.5, 0)
    heads = Heads(lambda _: LinearHead(torch.arange(8), 4), [Setting("", 0.1, 0.0)], 0, CPU)
    plan = Plan(epochs=1, least_steps=100, batch=50, optimizer="sgd")
    fit(heads, plan, lambda rows, _: torch.from_numpy(x[rows]).float(), np.arange(50), label, 0, "")
    warmup = factors.index(1.0) + 1
    assert len(factors) == 100 and 1 <= warmup <= 20 and factors[0] == pytest.approx(1 / warmup)
    rest = np.arange(100 - warmup) / (100 - warmup)
    assert factors[warmup:] == pytest.approx((0.5 * (1 + np.cos(np.pi * rest))).tolist())


def test_the_seed_decides_everything() -> None:
    train, test = stored(*blobs(100, 0.4, 0)), stored(*blobs(50, 0.4, 1))
    plan = QUICK._replace(least_steps=30, batch=40)
    first, again, other = (probed(train, test, seed=seed, plan=plan).scores for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.slow
def test_scores_of_views_are_averaged() -> None:
    train = stored(*blobs(100, 0.4, 0))
    parts = [blobs(40, 0.4, seed)[0] for seed in (1, 2)]
    both = probed(train, stored(np.stack(parts, axis=1), np.zeros(40))).scores
    alone = [probed(train, stored(part, np.zeros(40))).scores for part in parts]
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)
    assert not torch.allclose(alone[0], alone[1], atol=0.05)


def test_scores_that_are_not_finite_never_win() -> None:
    right = torch.tensor([[0.6, 0.4], [0.3, 0.7]])
    broken = torch.full((2, 2), float("nan"))
    surer = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    label = torch.tensor([0, 1])
    assert best_on(torch.stack([broken, right, surer]), label) == (2, [0.0, 100.0, 100.0])
    assert best_on(torch.stack([broken, 1 - right]), label)[0] == 1


def test_of_equally_good_settings_the_one_that_is_less_sure_of_errors_is_best() -> None:
    """Within a standard error of the highest accuracy: 6 of 10 right, and its standard error 0.155."""
    label = torch.zeros(10, dtype=torch.int64)

    def of(right: int, sure: float) -> torch.Tensor:
        first = torch.tensor([sure] * right + [1 - sure] * (10 - right))
        return torch.stack([first, 1 - first], dim=1)

    tried = torch.stack([of(6, 0.99), of(5, 0.6), of(4, 0.51)])
    assert [best_on(tried, label, slack)[0] for slack in (0.0, 0.6, 0.7, 1.2, 1.4)] == [0, 0, 1, 1, 2]
    assert best_on(tried, label, 1.0)[1] == pytest.approx([60, 50, 40])


def test_a_learning_rate_that_diverges_does_not_win() -> None:
    train, test = stored(*blobs(100, 0.5, 0)), stored(*blobs(50, 0.5, 1))
    found = probed(train, test, lrs=(1e20, 0.1), weight_decays=(1.0,))
    assert found.setting.lr == 0.1


def test_a_fifth_of_each_class_is_held_out(caplog: pytest.LogCaptureFixture) -> None:
    label = np.array([0] * 50 + [1] * 3 + [2] * 2 + [3])
    held = held_out(label, 0)
    assert [int(held[label == number].sum()) for number in range(4)] == [10, 1, 0, 0]
    assert "2 of 4 classes have fewer than 3 training samples" in caplog.text and "on 11 of the others" in caplog.text
    assert not np.array_equal(held, held_out(label, 1)) and np.array_equal(held, held_out(label, 0))
    with pytest.raises(ValueError, match="no class has 3 training samples"):
        held_out(np.array([0, 0, 1, 1, 2]), 0)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_optimizers_are_those_of_pytorch(kind: str) -> None:
    settings = [Setting("", 0.1, 0.0), Setting("", 0.02, 0.3)]
    heads = Heads(lambda _: torch.nn.Linear(3, 2), settings, 0, CPU)
    ((_, module, weights),) = heads.groups
    alone = [copy.deepcopy(module) for _ in settings]
    theirs: list[torch.optim.Optimizer] = [
        torch.optim.SGD(one.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=decay)
        if kind == "sgd"
        else torch.optim.AdamW(one.parameters(), lr, weight_decay=decay)
        for one, (_, lr, decay) in zip(alone, settings, strict=True)
    ]
    ours = _Optimizer(heads, kind)
    for step in range(5):
        factor = 1 / (1 + step)
        for number, (one, optimizer) in enumerate(zip(alone, theirs, strict=True)):
            optimizer.param_groups[0]["lr"] = factor * settings[number].lr
            for parameter in one.parameters():
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
        for name, weight in weights.items():
            weight.grad = torch.stack([one.get_parameter(name).grad for one in alone])  # type: ignore[misc]
        ours.step(factor)
        for name, weight in weights.items():
            torch.testing.assert_close(
                weight.detach(), torch.stack([one.get_parameter(name) for one in alone]).detach()
            )
