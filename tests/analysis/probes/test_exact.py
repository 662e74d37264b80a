"""Probes of frozen features: against definitions written out, and that test samples decide nothing."""

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from maskfeat.analysis.probes import exact
from maskfeat.analysis.probes.exact import (
    BLOCKS,
    STRENGTHS,
    Features,
    features,
    linear_probe,
    nearest_neighbours,
    standardised,
)
from maskfeat.analysis.probes.knn import TEMPERATURE
from maskfeat.batch import BadSample, Batch
from maskfeat.models.resnet import ResNet
from maskfeat.models.vit import ViT

CPU = torch.device("cpu")


def blobs(number: int, distance: float, seed: int, width: int = 8, classes: int = 4) -> Features:
    """Normal clouds around `classes` corners; features of different scales and offsets."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (number,), generator=generator)
    corners = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    x = distance * corners[label] + torch.randn(number, width, generator=generator)
    return Features(x, label)


def shuffled(given: Features, seed: int, classes: int) -> Features:
    """The same samples with labels that say nothing."""
    return Features(
        given.x, torch.randint(classes, given.label.shape, generator=torch.Generator().manual_seed(1000 + seed))
    )


# ------------------------------------------------------------------ standardised


def test_both_are_standardised_by_the_training_samples() -> None:
    train, test = blobs(50, 2.0, 0), blobs(30, 2.0, 1)
    train.x[:, 3] = 7.0  # it never varies
    found, other = standardised(train, test)
    varied = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(found.x.mean(dim=0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.x[:, varied].std(dim=0), torch.ones(7), atol=1e-5, rtol=0)
    assert torch.isfinite(found.x).all() and torch.isfinite(other.x).all() and not found.x[:, 3].any()
    mean, std = train.x[:, varied].mean(dim=0), train.x[:, varied].std(dim=0)
    torch.testing.assert_close(other.x[:, varied], (test.x[:, varied] - mean) / std)
    assert torch.equal(found.label, train.label) and torch.equal(other.label, test.label)


def test_a_feature_that_hardly_varies_is_not_blown_up() -> None:
    train = blobs(200, 1.0, 0)
    train.x[:, 2] *= 1e-9
    found, _ = standardised(train, train)
    assert found.x[:, 2].std() < 1e-5 and found.x[:, 1].std() == pytest.approx(1.0, rel=1e-4)


# ------------------------------------------------------------------ linear probe


def test_a_separable_problem_is_solved() -> None:
    assert linear_probe(blobs(200, 12.0, 0), blobs(100, 12.0, 1)) == 100.0


def test_labels_that_say_nothing_give_chance() -> None:
    train, test = (shuffled(blobs(800, 1.0, seed), seed, 4) for seed in (2, 3))
    assert 19 < linear_probe(train, test) < 31


def test_units_of_features_do_not_matter() -> None:
    train, test = blobs(200, 0.6, 0), blobs(400, 0.6, 1)
    plain = linear_probe(train, test)
    assert 40 < plain < 99, "a problem that is neither hopeless nor trivial"
    exact = 2.0 ** torch.arange(-3, 5)
    assert linear_probe(*(train._replace(x=train.x * exact), test._replace(x=test.x * exact))) == plain
    scale, shift = torch.linspace(0.1, 9.0, 8), torch.linspace(-30.0, 50.0, 8)
    moved = [given._replace(x=given.x * scale + shift) for given in (train, test)]
    assert linear_probe(*moved) == pytest.approx(plain, abs=0.5)


def test_it_draws_nothing() -> None:
    train, test = blobs(150, 0.6, 0), blobs(150, 0.6, 1)
    state = torch.random.get_rng_state()
    results = set()
    for seed in range(3):
        torch.manual_seed(seed)
        results.add(linear_probe(train, test))
    torch.random.set_rng_state(state)
    assert len(results) == 1
    assert torch.equal(train.x, blobs(150, 0.6, 0).x), "what is given stays as it is"


def hard(seed: int) -> Features:
    """Two classes, hardly more samples than features, a fifth of the labels wrong: the penalty matters."""
    given = blobs(120, 0.25, seed, width=60, classes=2)
    generator = torch.Generator().manual_seed(seed + 50)
    return given._replace(label=(given.label + (torch.rand(120, generator=generator) < 0.2).long()) % 2)


def test_test_samples_decide_nothing() -> None:
    train, test = hard(0), hard(1)
    plain = linear_probe(train, test)
    wrong = linear_probe(train, test._replace(label=1 - test.label))
    assert plain + wrong == pytest.approx(100.0), "the same predictions, whatever the labels"
    halves = [Features(test.x[part], test.label[part]) for part in (slice(0, 60), slice(60, 120))]
    assert sum(linear_probe(train, half) for half in halves) / 2 == pytest.approx(plain)
    far = test.x.clone()
    far[60:] = far[60:] * 1000 + 1e6
    beside = linear_probe(train, Features(far, test.label))
    alone = linear_probe(train, halves[0])
    outliers = linear_probe(train, Features(far[60:], test.label[60:]))
    assert beside == pytest.approx((alone + outliers) / 2), "one half does not change what is said of the other"


def by_hand(train: Features, test: Features, strength: float, classes: int) -> float:
    """Top-1 of the penalised regression of one strength, standardised by all training samples, by plain descent."""
    mean, std = train.x.mean(dim=0), train.x.std(dim=0)
    x, y = ((given.x - mean) / std for given in (train, test))
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=0.3, momentum=0.9)
    for _ in range(1500):
        optimizer.zero_grad()
        logits = x.double() @ weight.T + bias
        loss = -logits.log_softmax(dim=1)[torch.arange(len(x)), train.label].mean()
        (loss + strength * (weight * weight).sum()).backward()
        optimizer.step()
    right = (y.double() @ weight.T + bias).argmax(dim=1) == test.label
    return 100.0 * right.double().mean().item()


def test_one_strength_is_penalised_regression() -> None:
    train, test = hard(2), hard(3)
    found = {strength: linear_probe(train, test, [strength]) for strength in (0.003, 0.3)}
    assert found[0.003] != found[0.3]
    for strength, top1 in found.items():
        assert top1 == pytest.approx(by_hand(train, test, strength, 2), abs=0.9)


def test_every_fifth_training_sample_chooses_the_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[tuple[int, float]] = []
    inner = exact._fit

    def noted(train: Features, strength: float) -> Any:
        fitted.append((len(train.label), strength))
        return inner(train, strength)

    monkeypatch.setattr(exact, "_fit", noted)
    chosen = set()
    for seed in range(6):
        train, test = hard(10 + seed), hard(20 + seed)
        fitted.clear()
        found = linear_probe(train, test, (1e-4, 0.05, 5.0))
        assert fitted[:3] == [(96, 1e-4), (96, 0.05), (96, 5.0)] and fitted[3][0] == 120 and len(fitted) == 4
        standard, _ = standardised(train, test)
        held = torch.tensor([number % 5 == 0 for number in range(120)])
        scores = {}
        for strength in (1e-4, 0.05, 5.0):
            classifier = inner(Features(standard.x[~held], standard.label[~held]), strength)
            guess = torch.from_numpy(classifier.predict(standard.x[held].numpy()))
            scores[strength] = (guess == standard.label[held]).sum().item()
        assert scores[fitted[3][1]] == max(scores.values())
        assert found == linear_probe(train, test, [fitted[3][1]])
        chosen.add(fitted[3][1])
    assert len(chosen) > 1, "not always the same one"


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("distance", [0.6, 12.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_gradient_vanishes_where_the_fit_ends(strength: float, distance: float, classes: int) -> None:
    train, _ = standardised(blobs(200, distance, 0, classes=classes), blobs(2, distance, 1))
    classifier = exact._fit(train, strength)
    coefficients, intercepts = torch.from_numpy(classifier.coef_), torch.from_numpy(classifier.intercept_)
    if classes == 2:  # one vector: half the difference of the logits for either class
        coefficients, intercepts = (torch.cat([-value, value]) / 2 for value in (coefficients, intercepts))
    weight, bias = (value.double().requires_grad_() for value in (coefficients, intercepts))
    assert weight.shape == (classes, 8) and bias.shape == (classes,)
    logits = F.linear(train.x.double(), weight, bias)
    (F.cross_entropy(logits, train.label) + strength * weight.square().sum()).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 2e-4


# ------------------------------------------------------------------ nearest neighbours


def slow_vote(train: Features, test: Features, classes: int, k: int) -> float:
    """One sample after the other, as the definition reads."""
    mean, std = train.x.double().mean(dim=0), train.x.double().std(dim=0)
    known = ((train.x.double() - mean) / std).tolist()
    right = 0
    for asked, label in zip(((test.x.double() - mean) / std).tolist(), test.label.tolist(), strict=True):
        cosines = []
        for row, other in zip(known, train.label.tolist(), strict=True):
            product = sum(a * b for a, b in zip(asked, row, strict=True))
            cosines.append((product / (math.hypot(*asked) * math.hypot(*row)), other))
        votes = [0.0] * classes
        for cosine, other in sorted(cosines, reverse=True)[:k]:
            votes[other] += math.exp(cosine / TEMPERATURE)
        right += votes.index(max(votes)) == label
    return 100.0 * right / len(test.label)


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
@pytest.mark.parametrize("distance", [0.5, 1.5])
def test_neighbours_vote_as_the_definition_says(k: int, distance: float) -> None:
    train, test = blobs(90, distance, 0), blobs(70, distance, 1)
    for given in (train, test):
        given.x.mul_(torch.linspace(0.1, 3.0, 8)).add_(5.0)
    assert nearest_neighbours(train, test, k) == pytest.approx(slow_vote(train, test, 4, k))


def test_nearer_neighbours_count_for_more() -> None:
    """One neighbour at the very place against two of another class a little farther off."""
    angle = torch.tensor([0.0, 0.8, -0.8, math.pi, math.pi - 0.8, math.pi + 0.8])
    x = torch.stack([angle.cos(), angle.sin()], dim=1)
    train = Features(x, torch.tensor([0, 1, 1, 2, 3, 3]))
    assert nearest_neighbours(train, Features(x[[0, 3]], torch.tensor([0, 2])), k=3) == 100.0


def test_many_samples_are_asked_in_parts() -> None:
    train, test = blobs(60, 1.0, 0), blobs(2300, 1.0, 1)
    parts = [Features(test.x[start : start + 460], test.label[start : start + 460]) for start in range(0, 2300, 460)]
    whole = nearest_neighbours(train, test)
    assert whole == pytest.approx(sum(nearest_neighbours(train, part) for part in parts) / 5)
    assert 30 < whole < 100


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ValueError, match=r"probes need scikit-learn.*pip install '\.\[probes\]'"):
        linear_probe(blobs(50, 1.0, 0), blobs(50, 1.0, 1))


# ------------------------------------------------------------------ features


def tiny(class_token: bool) -> ViT:
    vit = ViT(
        image_size=(16, 16), patch=(8, 8), width=12, depth=5, num_heads=2, class_token=class_token, dropout=0.5,
        drop_path=0.5, maskable=True,
    )  # fmt: skip
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vit.train()


def batches() -> list[Batch]:
    hidden = torch.ones(3, 2, 2, dtype=torch.bool)
    return [
        Batch(torch.randn(3, 3, 16, 16), label=torch.tensor([1, 0, 2]), hidden=hidden, max_hidden=4),
        Batch(torch.randn(2, 3, 16, 16), label=torch.tensor([5, 4])),
    ]


@pytest.mark.parametrize("class_token", [True, False])
def test_features_are_the_means_of_patch_tokens_block_by_block(class_token: bool) -> None:
    vit, given = tiny(class_token), batches()
    found = features(vit, given, CPU)  # type: ignore[arg-type]  # whatever yields batches
    assert not vit.training and not found.x.requires_grad
    blocks = min(BLOCKS, len(vit.blocks))
    assert (
        found.x.shape == (5, 12 * blocks) and found.x.dtype == torch.float32 and found.label.tolist() == [1, 0, 2, 5, 4]
    )
    rows = []
    for batch in given:
        for picture in batch.clip:
            patches = [picture[:, y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8)]
            kernel, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
            tokens = torch.stack([(kernel * patch).sum(dim=(1, 2, 3)) + bias for patch in patches])[None]
            if class_token:
                tokens = torch.cat([vit.cls_token, tokens], dim=1)
            tokens = tokens + vit.pos_embed
            means = []
            for block in vit.blocks:
                tokens = block(tokens)
                means.append(tokens[0, int(class_token) :].sum(dim=0) / 4)
            rows.append(torch.cat(means[-BLOCKS:]))
    torch.testing.assert_close(found.x, torch.stack(rows).detach(), atol=1e-5, rtol=1e-5)


def test_feature_maps_are_averaged_over_their_places() -> None:
    """A ResNet's: each of its last blocks has a map of its own size and width."""
    torch.manual_seed(0)
    resnet, given = ResNet(depth=10, image_size=(64, 64)).eval(), [Batch(torch.randn(2, 3, 64, 64), torch.arange(2))]
    found = features(resnet, given, CPU)  # type: ignore[arg-type]
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(given[0].clip))))
    means = []
    for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        x = layer(x)
        means.append(x.sum(dim=(2, 3)) / (x.shape[2] * x.shape[3]))
    torch.testing.assert_close(found.x, torch.cat(means, dim=1).detach(), atol=1e-5, rtol=1e-4)
    assert not any(block._forward_hooks for block in resnet.repeated_blocks()), "nothing stays on the backbone"


def test_the_class_token_is_left_out() -> None:
    vit, given = tiny(True), batches()
    last = vit.blocks[-1]
    before = features(vit, given, CPU).x  # type: ignore[arg-type]
    handle = last.register_forward_hook(lambda _, __, out: torch.cat([out[:, :1] + 1000, out[:, 1:]], dim=1))
    after = features(vit, given, CPU).x  # type: ignore[arg-type]
    handle.remove()
    assert torch.equal(before, after)


def test_precision() -> None:
    vit, given = tiny(True), batches()
    exact = features(vit, given, CPU)  # type: ignore[arg-type]
    rough = features(vit, given, CPU, "bf16")  # type: ignore[arg-type]
    assert rough.x.dtype == torch.float32 and not torch.equal(exact.x, rough.x)
    torch.testing.assert_close(rough.x, exact.x, atol=0.1, rtol=0.1)


def test_a_sample_that_cannot_be_read_is_named() -> None:
    bad = Batch(torch.zeros(1, 3, 16, 16), label=torch.tensor([0]), bad=(BadSample(7, "a/b.png", "the file is empty"),))
    with pytest.raises(ValueError, match="a/b.png cannot be read .the file is empty."):
        features(tiny(False), [*batches(), bad], CPU)  # type: ignore[arg-type]
