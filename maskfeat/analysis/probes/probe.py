"""A frozen network under probes: which features it is read for, and what the probes find.

Shape legend: B samples, N tokens, D token width, F features, M validation samples, K classes.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskfeat.analysis.identity import inputs_digest, network_digest
from maskfeat.analysis.inputs import Inputs, input_loader
from maskfeat.analysis.model import Model
from maskfeat.analysis.probes.attentive import attentive_probe
from maskfeat.analysis.probes.data import Splits
from maskfeat.analysis.probes.features import Stored, extract
from maskfeat.analysis.probes.knn import KS, neighbour_shares
from maskfeat.analysis.probes.linear import linear_probe
from maskfeat.analysis.probes.split import held_out
from maskfeat.analysis.probes.sweep import Chosen, best_on
from maskfeat.models.base import Tokens

logger = logging.getLogger(__name__)

KINDS = ("knn", "linear", "attentive")


class Result(NamedTuple):
    """What one probe of one network found.

    Attributes:
        weights: "given" or "random".
        kind: of `KINDS`.
        setting: the chosen one.
        held_out: its top-1 accuracy on held-out training samples, in percent.
        top1, top5: on validation samples, in percent.
        error: standard error of `top1`, that of M draws.
        tried: every setting with its "held_out", for kNN also its "top1".
    """

    weights: str
    kind: str
    setting: dict[str, Any]
    held_out: float
    top1: float
    top5: float
    error: float
    tried: list[dict[str, Any]]


@dataclass(frozen=True)
class Probing:
    """The probes of a network on a data set.

    Attributes:
        model: the network.
        weights: what its weights are, for results and names of files.
        splits: the samples.
        folder: where features are stored.
        blocks: numbers of the blocks that kNN and linear probes read, ascending.
        views: of validation samples, (clips, crops).
        seed: of held-out samples, initial weights and orders.
        batch_size, workers: of the loader.
        gray: whether the network is shown the mean of the channels in each of them.
    """

    model: Model
    weights: str
    splits: Splits
    folder: Path
    blocks: Sequence[int]
    views: tuple[int, int] = (1, 1)
    seed: int = 0
    batch_size: int = 64
    workers: int | None = None
    gray: bool = False
    unreadable: dict[str, list[str]] = field(default_factory=dict)

    def run(self, kind: str) -> Result:
        """Fit a probe of one of `KINDS`."""
        read = self.attend if kind == "attentive" else self.pool
        train, val = (self._stored(name, inputs, read) for name, inputs in self._inputs().items())
        held = held_out(train.label[train.rows], self.seed)
        if kind == "knn":
            return self._knn(train, val, held)
        classes, device = len(self.splits.classes), self.model.device
        if kind == "linear":
            found = linear_probe(train, val, self.columns(), classes, held, self.seed, device)
        else:
            found = attentive_probe(train, val, classes, held, self.seed, device)
        return self._swept(kind, found, val)

    # ------------------------------------------------------------------ features

    def pool(self, clip: Tensor) -> Tensor:
        """Return the mean of the patch tokens of each block, then its class token where there is one: (B, F)."""
        found = self.model.blocks(self._seen(clip), self.blocks)
        return torch.cat([part for tokens in found for part in _pooled(tokens)], dim=1)

    def attend(self, clip: Tensor) -> Tensor:
        """Return the output tokens, class token included: (B, N, D)."""
        return self.model.tokens(self._seen(clip)).x

    def _seen(self, clip: Tensor) -> Tensor:
        return clip.mean(dim=1, keepdim=True).expand_as(clip).contiguous() if self.gray else clip

    def columns(self) -> dict[str, Tensor]:
        """Return which features a probe may read: of the last block or of all of them, means or class tokens.

        Returns:
            name -> (F',) int64, their places among the F that `pool` returns.
        """
        empty = torch.zeros(1, 3, *self.model.clip_size)
        places: dict[str, list[range]] = {"mean": [], "class token": []}
        start = 0
        for tokens in self.model.blocks(empty, self.blocks):
            for pool, part in zip(places, _pooled(tokens), strict=False):
                places[pool].append(range(start, start := start + part.shape[1]))
        sets: dict[str, Tensor] = {}
        for pool, found in places.items():
            for name, chosen in {f"block {self.blocks[-1]}": found[-1:], self._names(): found}.items():
                if chosen:
                    sets[f"{pool} of {name}"] = torch.tensor([place for part in chosen for place in part])
        return sets

    def _names(self) -> str:
        return f"block{'s' if len(self.blocks) > 1 else ''} {', '.join(map(str, self.blocks))}"

    def _inputs(self) -> dict[str, Inputs]:
        return {"train": self.splits.train, "val": self.splits.val}

    @cached_property
    def _network(self) -> str:
        """The digest of the network: every kind of probe asks for it, and it reads all weights."""
        return network_digest(self.model)

    def _stored(self, split: str, inputs: Inputs, read: Callable[[Tensor], Tensor]) -> Stored:
        clips, crops = views = self.views if split == "val" else (1, 1)
        tokens = read == self.attend
        empty = torch.zeros(1, 3, *self.model.clip_size)
        asked = {
            "network": self._network,
            "samples": inputs_digest(inputs),
            "views": views,
            "features": "tokens" if tokens else f"pooled, {self._names()}",
            "precision": self.model.precision,
            "device": self.model.device.type,
            "batch size": self.batch_size,
        }
        stored = extract(
            self.folder / f"{self.weights}-{'tokens' if tokens else 'pooled'}{'-gray' if self.gray else ''}",
            split,
            asked,
            inputs.numbers,
            clips * crops,
            tuple(read(empty).shape[1:]),
            "float16" if tokens else "float32",
            lambda numbers: input_loader(self.model, inputs, views, self.batch_size, self.workers, numbers),
            self.batch_size,
            read,
        )
        self.unreadable[split] = list(stored.bad.values())
        return stored

    # ------------------------------------------------------------------ probes

    def _knn(self, train: Stored, val: Stored, held: Any) -> Result:
        """Choose features and k on held-out samples, and report every k on validation samples."""
        columns, classes, device = self.columns(), len(self.splits.classes), self.model.device
        known, asked = train.among(train.rows[~held]), train.among(train.rows[held])
        settings = [{"features": name, "k": k} for name in columns for k in KS]
        shares = torch.cat([neighbour_shares(known, asked, chosen, KS, classes, device) for chosen in columns.values()])
        best, accuracies = best_on(shares, torch.from_numpy(train.label[asked.rows]))
        chosen = settings[best]
        tried = [{**setting, "held_out": value} for setting, value in zip(settings, accuracies, strict=True)]
        found = neighbour_shares(train, val, columns[str(chosen["features"])], KS, classes, device)
        own = [one for one in tried if one["features"] == chosen["features"]]
        for one, share in zip(own, found, strict=True):
            one["top1"] = _accuracy(share, val, 1)
        share = found[KS.index(chosen["k"])]
        return self._result("knn", chosen, accuracies[best], share, val, tried)

    def _swept(self, kind: str, found: Chosen, val: Stored) -> Result:
        tried = [
            {**setting._asdict(), "held_out": value}
            for setting, value in zip(found.settings, found.held_out, strict=True)
        ]
        best = found.held_out[found.settings.index(found.setting)]
        return self._result(kind, found.setting._asdict(), best, found.scores, val, tried)

    def _result(
        self, kind: str, setting: dict[str, Any], held: float, scores: Tensor, val: Stored, tried: list[dict[str, Any]]
    ) -> Result:
        top1 = _accuracy(scores, val, 1)
        error = (top1 * (100.0 - top1) / len(val.rows)) ** 0.5
        least = 0.0 if kind == "knn" else -math.inf  # a class without a vote is none of the five
        return Result(self.weights, kind, setting, held, top1, _accuracy(scores, val, 5, least), error, tried)


def _pooled(tokens: Tokens) -> list[Tensor]:
    mean = tokens.patches.mean(dim=1)
    return [mean, tokens.x[:, 0]] if tokens.has_class_token else [mean]


def _accuracy(scores: Tensor, val: Stored, k: int, least: float = -math.inf) -> float:
    """Return the top-k accuracy in percent of scores (M, K), of which those above `least` count."""
    best = scores.topk(min(k, scores.shape[1]), dim=1)
    hit = (best.indices == torch.from_numpy(val.label[val.rows])[:, None]) & (best.values > least)
    return 100.0 * float(hit.any(dim=1).float().mean())
