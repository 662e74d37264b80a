"""Many small classifiers on the same frozen features, trained together: one for each setting.

Every batch of features is read once and shown to all of them. As their losses are added and no parameter is shared,
each is trained as if it were alone (as DINOv2 does for linear probes, Oquab et al., 2023).

Shape legend: B samples, K classes, S settings.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from maskfeat.analysis.probes.features import Stored
from maskfeat.progress import Progress

_WARMUP = 0.05
"""Share of the steps in which learning rates rise."""


class Setting(NamedTuple):
    """One setting of a sweep.

    Attributes:
        features: name of the features that the classifier reads.
        lr: learning rate at its highest.
        weight_decay: of the optimizer.
    """

    features: str
    lr: float
    weight_decay: float


class Plan(NamedTuple):
    """How classifiers are trained.

    Attributes:
        epochs, least_steps: steps are those of `epochs`, at least `least_steps`.
        batch: B.
        optimizer: "sgd" (Nesterov's momentum 0.9; the penalty is added to the gradient) or "adamw".
    """

    epochs: int
    least_steps: int
    batch: int
    optimizer: str

    def steps(self, samples: int) -> int:
        """Return how many steps are made on so many samples."""
        return max(self.epochs * math.ceil(samples / self.batch), self.least_steps)


MakeHead = Callable[[str], nn.Module]
"""Name of features -> a classifier of them: (B, ...) -> (B, K). Calls with one seed give the same weights."""
ReadFeatures = Callable[[np.ndarray, int], Tensor]
"""Rows of samples and a view -> their features on the device."""


class Heads:
    """Classifiers, one for each setting; those of the same features are computed together.

    Args:
        make: makes one.
        settings: S of them.
        seed: of the initial weights, which are the same for all settings with the same features.
        device: of the classifiers.

    Attributes:
        groups: for each name of features: the numbers of its settings, a classifier that says how they compute, and the
            parameters of all of them by name, with the settings as first axis.
    """

    def __init__(self, make: MakeHead, settings: Sequence[Setting], seed: int, device: torch.device) -> None:
        self.settings = list(settings)
        self.groups: list[tuple[list[int], nn.Module, dict[str, Tensor]]] = []
        for name in dict.fromkeys(setting.features for setting in settings):
            numbers = [number for number, setting in enumerate(settings) if setting.features == name]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                module = make(name).to(device)
            weights = {
                key: torch.stack([value.detach()] * len(numbers)).requires_grad_()
                for key, value in module.named_parameters()
            }
            self.groups.append((numbers, module, weights))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits of all classifiers: (S, B, K) float32."""
        order, parts = [], []
        for numbers, module, weights in self.groups:

            def one(own: dict[str, Tensor], module: nn.Module = module) -> Tensor:
                logits: Tensor = functional_call(module, own, (x,))
                return logits

            parts.append(vmap(one)(weights))
            order += numbers
        return torch.cat(parts)[torch.tensor(order).argsort().to(x.device)]


class _Optimizer:
    """Nesterov's SGD (momentum 0.9) or AdamW (betas 0.9, 0.999), with a learning rate and a weight decay a setting.

    PyTorch's optimizers take them a group of parameters: with one group a setting, a step of a small sweep takes ten
    times as long.
    """

    def __init__(self, heads: Heads, kind: str) -> None:
        self.adaptive, self.steps = kind == "adamw", 0
        self.state: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        for numbers, _, weights in heads.groups:
            for weight in weights.values():
                shape = (len(numbers), *(1,) * (weight.dim() - 1))
                rates, decays = (
                    weight.new_tensor([getattr(heads.settings[number], name) for number in numbers]).reshape(shape)
                    for name in ("lr", "weight_decay")
                )
                self.state.append((weight, rates, decays, torch.zeros_like(weight), torch.zeros_like(weight)))

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Change the parameters by their gradients, which are removed; learning rates are multiplied by `factor`."""
        self.steps += 1
        for weight, rate, decay, mean, square in self.state:
            assert weight.grad is not None
            gradient, weight.grad = weight.grad, None
            if self.adaptive:
                mean.lerp_(gradient, 0.1)
                square.lerp_(gradient.square(), 0.001)
                weight.mul_(1 - factor * rate * decay)
                root = (square / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
                weight.sub_(factor * rate * (mean / (1 - 0.9**self.steps)) / root)
            else:
                gradient = gradient + decay * weight
                mean.mul_(0.9).add_(gradient)
                weight.sub_(factor * rate * (gradient + 0.9 * mean))


def fit(
    heads: Heads, plan: Plan, inputs: ReadFeatures, rows: np.ndarray, label: np.ndarray, seed: int, what: str
) -> None:
    """Train classifiers on samples in an order drawn at random, with a cosine schedule.

    Args:
        heads: in place.
        plan: how.
        inputs: reads their features; of the first view.
        rows: (M,) int64, the samples.
        label: (N,) int64, of all samples.
        seed: of the order.
        what: is trained, for the progress.
    """
    steps, size = plan.steps(len(rows)), min(plan.batch, len(rows))
    optimizer, warmup = _Optimizer(heads, plan.optimizer), max(int(_WARMUP * steps), 1)
    rng, progress, order = np.random.default_rng(seed), Progress(f"steps of {what}", steps), rows[:0]
    for step in range(steps):
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(rows)])
        batch, order = order[:size], order[size:]
        logits = heads(inputs(batch, 0))
        target = torch.from_numpy(label[batch]).to(logits.device)
        loss = F.cross_entropy(logits.flatten(0, 1), target.repeat(len(logits)), reduction="sum") / size
        loss.backward()
        cosine = 0.5 * (1 + math.cos(math.pi * max(step - warmup, 0) / max(steps - warmup, 1)))
        optimizer.step(min((step + 1) / warmup, cosine))
        progress.step(1)


@torch.no_grad()
def scores(heads: Heads, plan: Plan, inputs: ReadFeatures, rows: np.ndarray, views: int = 1) -> Tensor:
    """Return the softmax scores of all classifiers, averaged over views: (S, M, K) float32 on the CPU."""
    parts = []
    for start in range(0, len(rows), plan.batch):
        part = rows[start : start + plan.batch]
        parts.append(sum(heads(inputs(part, view)).softmax(dim=2) for view in range(views)) / views)
    return torch.cat([torch.as_tensor(part).cpu() for part in parts], dim=1)


class Chosen(NamedTuple):
    """What a sweep found.

    Attributes:
        setting: the best on held-out samples, of those within one standard error the one with the lowest cross-entropy.
        settings, held_out: all of them, and the top-1 accuracy of each on held-out samples, in percent.
        scores: (M, K) float32, of the test samples, by the chosen setting fitted to all training samples.
    """

    setting: Setting
    settings: list[Setting]
    held_out: list[float]
    scores: Tensor


def best_on(scores: Tensor, label: Tensor, slack: float = 0.0) -> tuple[int, list[float]]:
    """Return the number of the best classifier, and the top-1 accuracy of each in percent.

    Of the most accurate ones, the one with the lowest cross-entropy is best. One whose scores are not finite is never
    better than another.

    Args:
        scores: (S, M, K).
        label: (M,) int64.
        slack: how far below the highest an accuracy still counts as equal, in standard errors of that of M draws. Of
            few samples, the highest of many accuracies is mostly luck (Breiman et al., 1984, section 3.4.3).
    """
    finite = scores.isfinite().all(dim=2).all(dim=1)
    right = (scores.argmax(dim=2) == label).double().mean(dim=1).masked_fill(~finite, 0.0)
    loss = -scores[:, torch.arange(len(label)), label].clamp(min=1e-12).log().mean(dim=1)
    top = float(right.max())
    equal = right >= top - slack * math.sqrt(top * (1.0 - top) / len(label))
    keys = [(bool(f), bool(e), -float(loss_)) for f, e, loss_ in zip(finite, equal, loss, strict=True)]
    return max(range(len(keys)), key=keys.__getitem__), [100.0 * float(value) for value in right]


def sweep(
    make: MakeHead,
    features: Sequence[str],
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    plan: Plan,
    train: Stored,
    test: Stored,
    held: np.ndarray,
    prepare: Callable[[Tensor], Tensor],
    seed: int,
    device: torch.device,
    what: str,
) -> Chosen:
    """Train a classifier for each setting, choose the best on held-out samples, and fit it to all training samples.

    Args:
        make: makes a classifier.
        features, lrs, weight_decays: to choose from; every combination is a setting.
        plan: how they are trained.
        train, test: the samples; scores of test samples are averaged over their views.
        held: (M,) bool, which of `train.rows` choose.
        prepare: stored features (B, ...) float32 on the device -> what the classifiers are shown.
        seed: of the initial weights and the order of samples.
        device: of the classifiers.
        what: is trained, for the progress.
    """

    def reader(stored: Stored) -> ReadFeatures:
        return lambda rows, view: prepare(torch.from_numpy(stored.take(rows, view)).to(device))

    settings = [Setting(name, lr, decay) for name in features for lr in lrs for decay in weight_decays]
    read = reader(train)
    heads = Heads(make, settings, seed, device)
    fit(heads, plan, read, train.rows[~held], train.label, seed, f"the {what}, {len(settings)} settings")
    rest = train.rows[held]
    best, accuracies = best_on(scores(heads, plan, read, rest), torch.from_numpy(train.label[rest]), slack=1.0)
    final = Heads(make, [settings[best]], seed, device)
    fit(final, plan, read, train.rows, train.label, seed, f"the chosen {what} on all training samples")
    found = scores(final, plan, reader(test), test.rows, test.x.shape[1])[0]
    return Chosen(settings[best], settings, accuracies, found)
