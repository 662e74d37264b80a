"""A trained network as a folder of the Hugging Face Hub: weights, config and a model card."""

from collections import OrderedDict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save
from torch import Tensor
from yacs.config import CfgNode

import maskfeat
from maskfeat.analysis.architecture import CLASSIFIER, recognise
from maskfeat.analysis.model import Model
from maskfeat.build import build_objective
from maskfeat.checkpoint.atomic import write_and_fsync
from maskfeat.checkpoint.weights import LoadReport
from maskfeat.config import dump_config

WEIGHTS = "model.safetensors"


def own_state(model: Model, classifies: bool) -> "OrderedDict[str, Tensor]":
    """Return the weights under this project's names: of the whole objective, or of the backbone and the final norm."""
    objective = model.objective
    state = objective.released_state()
    if classifies:
        return state
    norms = [f"{name}." for name, module in objective.named_modules() if module is model.norm]
    inside = [name for name in objective.state_dict() if name.startswith(("backbone.", *norms))]
    names = {objective.released_name(name) for name in inside} - {"mask_token"}
    return OrderedDict((name, value) for name, value in state.items() if name in names)


def load_own_state(model: Model, state: dict[str, Tensor]) -> LoadReport:
    """Load what `own_state` returned; a head that it left out keeps its initial values."""
    left_out = () if model.kind == CLASSIFIER else [n for n in model.objective.released_state() if n not in state]
    return model.objective.load_released_state(state, allow=left_out)


class HubModel(Model, PyTorchModelHubMixin, library_name="maskfeat"):
    """A `Model` that `from_pretrained` loads from a folder or from the Hub, where `save_pretrained` or the command
    `export --to hf` wrote it.

    Args:
        cfg: the config of the network, as YAML text.
        kind: "classifier", or else "backbone": a head that predicts has random weights then.
        classes: names of the classes by their numbers; None = not known.
        source: where the weights come from.
    """

    def __init__(self, cfg: str, kind: str, classes: Sequence[str] | None = None, source: str = "") -> None:
        found = recognise({"cfg": cfg, "model_state": {}}).cfg
        super().__init__(build_objective(found), found, source, kind, LoadReport(), classes)

    @classmethod
    def of(cls, model: Model, classifies: bool) -> "HubModel":
        """Return a copy of a model that can be saved."""
        source = Path(model.source).name
        copy = cls(
            cfg=dump_config(_without_paths(model.cfg)),
            kind=CLASSIFIER if classifies else "backbone",
            classes=model.classes if classifies else None,
            source=source,
        )
        copy.report = load_own_state(copy, own_state(model, classifies))
        return copy

    def _save_pretrained(self, save_directory: Path) -> None:
        state = own_state(self, self.kind == CLASSIFIER)
        content = save({name: value.contiguous() for name, value in state.items()}, metadata={"format": "pt"})
        write_and_fsync(save_directory / WEIGHTS, content)

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        model.report = load_own_state(model, load_file(model_file))
        return model.to(map_location)


def _without_paths(cfg: CfgNode) -> CfgNode:
    """Return a config without the places of this machine's data and runs, which are nobody else's business."""
    cleaned = cfg.clone()
    cleaned.defrost()
    cleaned.OUTPUT_DIR = "."
    cleaned.DATA.PATH_TO_DATA_DIR = cleaned.DATA.PATH_PREFIX = ""
    cleaned.TRAIN.CHECKPOINT_FILE_PATH = cleaned.TEST.CHECKPOINT_FILE_PATH = ""
    cleaned.freeze()
    return cleaned


def model_card(model: Model, classifies: bool, licence: str, name: str, figures: Sequence[str] = ()) -> str:
    """Return the README.md of a folder: metadata that the Hub reads, what the network is, and how to load it.

    Args:
        model: what is exported.
        classifies: whether with its classifier.
        licence: identifier of the Hub, such as apache-2.0 or cc-by-nc-4.0.
        name: of the folder.
        figures: what was measured, a sentence each.
    """
    cfg, medium = model.cfg, {"image": "images", "video": "clips"}[model.media]
    task = {
        ("image", True): "image-classification",
        ("image", False): "image-feature-extraction",
        ("video", True): "video-classification",
        ("video", False): "feature-extraction",
    }[model.media, classifies]
    size = " x ".join(map(str, model.backbone.clip_size))
    parameters = sum(value.numel() for value in own_state(model, classifies).values()) / 1e6
    title = type(model.objective).__name__
    lines = [
        "---",
        f"license: {licence}",
        "library_name: maskfeat",
        f"pipeline_tag: {task}",
        "tags:",
        "- self-supervised-learning",
        f"- {title.lower()}",
        "---",
        "",
        f"# {name}",
        "",
        f"{'A classifier' if classifies else 'The backbone'} of {medium}: {type(model.backbone).__name__}, "
        f"{parameters:.1f} M parameters, for {size} {'pixels' if model.media == 'image' else '(frames x pixels)'}.",
        "",
        f"- Weights from: `{Path(model.source).name}` (a {model.kind} file)",
        f"- Recipe: {title} (`MODEL.MODEL_NAME {cfg.MODEL.MODEL_NAME}`), {cfg.SOLVER.MAX_EPOCH} epochs, "
        f"{cfg.SOLVER.OPTIMIZING_METHOD}, base learning rate {cfg.SOLVER.BASE_LR:g}",
        f"- Trained on: {cfg.TRAIN.DATASET}" + (f", {model.objective.num_classes} classes" if classifies else ""),
        f"- Input: normalised by mean {list(cfg.DATA.MEAN)} and standard deviation {list(cfg.DATA.STD)}",
        *(f"- {figure}" for figure in figures),
        f"- Licence: {licence}",
        "",
        "The complete recipe is `cfg` in `config.json`.",
        "",
        "## Use",
        "",
        "```python",
        "from maskfeat.analysis.hub import HubModel",
        "",
        f'model = HubModel.from_pretrained("{name}")',
        f'x = model.transform("{"photo.jpg" if model.media == "image" else "video.mp4"}")',
        'model.predict(["photo.jpg"], top=5)' if classifies and model.media == "image" else "model.features(x)",
        "```",
        "",
        f"Written by maskfeat {maskfeat.__version__} with PyTorch {version('torch')}.",
        "",
    ]
    return "\n".join(lines)
