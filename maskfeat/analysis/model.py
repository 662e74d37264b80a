"""A trained network in one line of Python: its inputs, features and predictions.

Shape legend: B samples, T frames, H x W pixels, D token width, N tokens (the class token, if there is one, comes
first), grid = ([T',] H', W') tokens along each axis, K classes.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from maskfeat.analysis.architecture import build_recognised, recognise
from maskfeat.analysis.foreign import CLASSIFIER
from maskfeat.analysis.hooks import captured
from maskfeat.analysis.said import class_names, training
from maskfeat.analysis.source import read_source
from maskfeat.analysis.transform import Transform, shown_size
from maskfeat.batch import Batch
from maskfeat.checkpoint.files import AVERAGE
from maskfeat.checkpoint.weights import LoadReport
from maskfeat.config import load_config
from maskfeat.engine.parallelize import PRECISIONS, autocast
from maskfeat.engine.resume import load_to_evaluate
from maskfeat.errors import UserError, about
from maskfeat.models.base import Backbone, Tokens
from maskfeat.objectives.base import Objective
from maskfeat.objectives.maskfeat import MaskFeat

logger = logging.getLogger(__name__)

POOLS = ("mean", "cls")


class Prediction(NamedTuple):
    """The classes with the highest scores.

    Attributes:
        path: of the input; "input 0" and so on for one that is not a file.
        classes: (name, probability), best first.
        numbers: of these classes.
    """

    path: str
    classes: list[tuple[str, float]]
    numbers: list[int]


class Model(nn.Module):
    """A trained network. It stays in evaluation mode, and its methods compute without gradients: to train, take
    `objective`, or `backbone.forward_tokens`.

    Args:
        objective: with its weights.
        cfg: that it was built from: architecture, DATA.MEAN and DATA.STD, crop sizes, DATA.NUM_FRAMES.
        source: the file or name that the weights come from.
        kind: "classifier", "pre-trained" or "backbone", see `architecture.Recognised`.
        report: what was done with each parameter of the file.
        classes: names of the classes by their numbers; None = not known.
        precision: "off" (float32), "bf16" or "fp16": in which the network computes.
        trained: how it was trained, in words; "" = not known.

    Attributes:
        media: "image" or "video": what the network takes.
        transform: turns inputs into what the network is shown; see `Transform.__call__`.
    """

    def __init__(
        self,
        objective: Objective,
        cfg: CfgNode,
        source: str,
        kind: str,
        report: LoadReport,
        classes: Sequence[str] | None = None,
        precision: str = "off",
        trained: str = "",
    ) -> None:
        super().__init__()
        self.trained = trained
        self.objective, self.source, self.kind, self.report = objective, source, kind, report
        self.cfg = shown_size(cfg, objective.backbone)
        self.classes = None if classes is None else list(classes)
        self.precision = precision
        self.media = "image" if len(objective.backbone.clip_size) == 2 else "video"
        self.transform = Transform(self.cfg, self.media, source)
        self.eval()

    def train(self, mode: bool = True) -> "Model":
        """Stay in evaluation mode: also as a part of a module whose other parts are trained."""
        return super().train(False)

    @property
    def backbone(self) -> Backbone:
        """The backbone of `objective`."""
        return self.objective.backbone

    @property
    def clip_size(self) -> tuple[int, ...]:
        """Size ([T,] H, W) of what the network is shown: a ResNet may have been trained on smaller crops."""
        return (*self.backbone.clip_size[:-2], *[self.cfg.DATA.TEST_CROP_SIZE] * 2)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 of a network that does not classify."""
        return int(self.objective.num_classes) if self.kind == CLASSIFIER else 0

    @property
    def mean_pooling(self) -> bool:
        """Whether the network classifies the mean of its tokens: its final norm is then of that mean, not of tokens."""
        return bool(getattr(self.objective, "mean_pooling", False))

    @property
    def norm(self) -> nn.Module:
        """The final norm, identity where the network has none: of tokens or, with `mean_pooling`, of their mean.

        That of MaskFeat is the first layer of its prediction head.
        """
        if isinstance(self.objective, MaskFeat):
            return self.objective.pred_head.transforms[0]
        norm = getattr(self.objective, "norm", None)
        return norm if isinstance(norm, nn.Module) else nn.Identity()

    def _batched(self, x: Tensor) -> Tensor:
        """Return inputs on the device of the network, as float32 with a batch axis.

        Raises:
            UserError: they are something else, or the network is not in evaluation mode or has other numbers.
        """
        if self.objective.training or any(part.training for part in self.objective.children()):
            raise UserError(
                "the network is in training mode, in which its outputs are random or change it: call eval() of the "
                "model before, and train() of its objective after"
            )
        dtype = next(self.parameters()).dtype
        if dtype != torch.float32:
            raise UserError(
                f"the parameters are {dtype}: leave them float32 (`model.float()`), and load the model with "
                'precision="fp16" or "bf16" to compute in that'
            )
        axes = len(self.backbone.clip_size) + 2
        known = isinstance(x, Tensor) and x.is_floating_point() and x.dim() in (axes - 1, axes)
        if not known or x.shape[1 - axes] != _CHANNELS:
            what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise UserError(
                f"{self.source} takes a tensor of floats of shape (B, 3, {'T, ' if axes == 5 else ''}H, W), as "
                f"`transform` returns it; given {what}"
            )
        return (x if x.dim() == axes else x.unsqueeze(0)).to(self.device, torch.float32)

    def _tokens(self, x: Tensor) -> Tokens:
        with autocast(self.device, self.precision):
            return self.backbone.forward_tokens(self._batched(x))

    @torch.no_grad()
    def tokens(self, x: Tensor) -> Tokens:
        """Return the output tokens, after the final norm where the network has one for tokens (see `mean_pooling`).

        Args:
            x: (B, 3, [T,] H, W) or (3, [T,] H, W) float32, see `transform`.

        Returns:
            x (B, N, D) float32, grid.
        """
        tokens = self._tokens(x)
        norm = nn.Identity() if self.mean_pooling else self.norm
        return Tokens(norm(tokens.x.float()), tokens.grid)

    @torch.no_grad()
    def features(self, x: Tensor, pool: str = "mean") -> Tensor:
        """Return one vector for each input: (B, D) float32.

        Args:
            x: as in `tokens`.
            pool: "mean" of the patch tokens (what a classifier with `mean_pooling` sees, after its norm), or "cls", the
                class token.

        Raises:
            UserError: the network has no class token.
        """
        if pool not in POOLS:
            raise UserError(f"pool must be one of {', '.join(POOLS)}; given {pool!r}")
        tokens = self.tokens(x)
        if pool == "mean":
            mean = tokens.patches.mean(dim=1)
            return self.norm(mean) if self.mean_pooling else mean
        if not tokens.has_class_token:
            raise UserError(f"{self.source} has no class token: pool 'mean'")
        return tokens.x[:, 0]

    @torch.no_grad()
    def blocks(self, x: Tensor, numbers: Sequence[int]) -> list[Tokens]:
        """Return the outputs of blocks, without a norm, class token first where there is one.

        Args:
            x: as in `tokens`.
            numbers: of the blocks, from 0; negative ones count from the end.

        Returns:
            tokens (B, N, D) float32 and grid for each number; width and grid may differ from block to block.

        Raises:
            UserError: there is no such block, no number is given, or `x` is not of this shape.
        """
        layers, numbers = self.backbone.repeated_blocks(), list(numbers)
        wrong = [number for number in numbers if not -len(layers) <= number < len(layers)]
        if wrong or not numbers:
            raise UserError(f"blocks are numbers from {-len(layers)} to {len(layers) - 1}; given {numbers}")
        with captured({number % len(layers): layers[number] for number in numbers}) as found:
            self._tokens(x)
        return [self._of_block(layers[number], found[number % len(layers)]) for number in numbers]

    def _of_block(self, layer: nn.Module, out: Tensor) -> Tokens:
        if out.dim() == 4:  # a feature map
            return Tokens(out.float().flatten(2).transpose(1, 2), tuple(out.shape[2:]))
        return Tokens(out.float(), tuple(getattr(layer, "grid_out", self.backbone.grid)))

    def forward(self, x: Tensor) -> Tensor:
        """Return `features(x)`."""
        return self.features(x)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return the scores of the classes before softmax, or sigmoid (DATA.MULTI_LABEL): (B, K) float32.

        Args:
            x: as in `tokens`.

        Raises:
            UserError: the network does not classify.
        """
        clip, objective = self._classified(x)
        with autocast(self.device, self.precision):
            return objective.logits(clip).float()

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """Return the probabilities of the classes: (B, K) float32, see `logits`."""
        clip, objective = self._classified(x)
        with autocast(self.device, self.precision):
            return objective.predict(Batch(clip=clip)).float()

    def _classified(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return inputs for a classifier, and the classifier."""
        self._check_classifier()
        return self._batched(x), self.objective

    def _check_classifier(self) -> None:
        if self.kind != CLASSIFIER:
            raise UserError(
                f"{self.source} does not classify (it is a {self.kind} file): fine-tune it first, or give a "
                "fine-tuned file"
            )

    @torch.no_grad()
    def predict(self, inputs: Any, top: int = 5, batch_size: int = 16) -> list[Prediction]:
        """Return the classes of inputs, of a video by its central clip.

        Args:
            inputs: one input or a list of them, as `transform` takes.
            top: how many classes of each, at most K.
            batch_size: inputs that are computed at once.

        Raises:
            UserError: the network does not classify.
        """
        self._check_classifier()
        for name, value in (("top", top), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1; given {value!r}")
        given = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        return [
            found
            for first in range(0, len(given), batch_size)
            for found in self._predict(given, first, batch_size, top)
        ]

    def _predict(self, given: list[Any], first: int, count: int, top: int) -> Iterator[Prediction]:
        part = given[first : first + count]
        scores = self.probabilities(self.transform(part)).cpu()
        best = scores.topk(min(top, scores.shape[1]), dim=1)
        for row, what in enumerate(part):
            path = os.fspath(what) if isinstance(what, str | os.PathLike) else f"input {first + row}"
            yield self.prediction(path, best.indices[row], best.values[row])

    def prediction(self, path: str, numbers: Tensor, scores: Tensor) -> Prediction:
        """Return classes by their numbers (k,) and probabilities (k,) as a prediction."""
        found: list[int] = numbers.tolist()
        pairs = zip(found, scores.tolist(), strict=True)
        return Prediction(path, [(self.class_name(number), score) for number, score in pairs], found)

    def class_name(self, number: int) -> str:
        """Return the name of a class, its number where names are not known."""
        return self.classes[number] if self.classes and number < len(self.classes) else str(number)


_CHANNELS = 3


def load_model(
    source: str | Path,
    cfg: str | CfgNode | None = None,
    device: str | torch.device | None = None,
    *,
    averaged: bool = False,
    precision: str = "off",
) -> Model:
    """Load a trained network.

    Args:
        source: a path (`.pyth`, `.pth`, `.safetensors`, a folder `.dcp`, or one that `export --to hf` wrote), an
            http(s) address, a name of `list_models`, or torchvision's name of weights of a ResNet; ~ = the home folder.
        cfg: a recipe, by path or name, or a config: what the network is. None = the file's own config, or what its
            names and shapes say.
        device: where it computes; None = CUDA where there is one, else the CPU.
        averaged: take the file's average of the weights (TRAIN.EMA).
        precision: "off" (float32), "bf16" or "fp16".

    What a file without a config leaves open is assumed, and each assumption logged as a warning.

    Raises:
        UserError: there is no such file, nobody knows the network, or the weights do not fit.
    """
    model, notes = load_with_notes(source, cfg, device, averaged=averaged, precision=precision)
    for note in notes:
        logger.warning("assumed, as %s does not say it (cfg, --cfg): %s", model.source, note)
    return model


def load_with_notes(
    source: str | Path,
    cfg: str | CfgNode | None = None,
    device: str | torch.device | None = None,
    *,
    averaged: bool = False,
    precision: str = "off",
) -> tuple[Model, Sequence[str]]:
    """Load a trained network as `load_model` does, and return it with what was assumed, a sentence each.

    Raises:
        UserError: as `load_model`; or the recipe, device or precision is not valid, or the file has no average.
    """
    place = chosen_device(device)
    if precision not in PRECISIONS:
        raise UserError(f"precision must be one of {', '.join(PRECISIONS)}; given {precision!r}")
    given = cfg if cfg is None or isinstance(cfg, CfgNode) else load_config(cfg)
    file = read_source(source, given)
    if averaged and AVERAGE not in file.content:
        raise UserError(f"{file.path} has no average of the weights ({AVERAGE})")
    try:
        found = recognise(file.content, file.cfg)
    except UserError as error:
        raise about(file.path, error) from error
    objective = build_recognised(found)
    report = load_to_evaluate(found.cfg, objective, file.path, file.content, AVERAGE if averaged else None)
    classes = class_names(objective, file, found)
    trained = training(file, found)
    model = Model(objective, found.cfg, os.fspath(source), found.kind, report, classes, precision, trained)
    return _moved(model, place), found.notes


def _moved(model: Model, place: torch.device) -> Model:
    try:
        return model.to(place)
    except (RuntimeError, AssertionError) as error:  # PyTorch was built without it
        raise UserError(f"device {place} cannot be used: {str(error).splitlines()[0]}") from error


def chosen_device(device: str | torch.device | None) -> torch.device:
    """Return a device by its name, None = CUDA where there is one, else the CPU; UserError where there is none."""
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except RuntimeError as error:
        raise UserError(f"there is no device {device!r}: cuda, cuda:1 or cpu") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {chosen}: this machine has {torch.cuda.device_count()} GPUs that PyTorch can use")
    return chosen
