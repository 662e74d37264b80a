"""A trained network as a folder of the Hugging Face Hub: weights, config and a model card."""

import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save
from torch import Tensor, nn
from yacs.config import CfgNode

import maskfeat
from maskfeat.analysis.architecture import Encoder, build_recognised, recognise
from maskfeat.analysis.foreign import BACKBONE, CLASSIFIER
from maskfeat.analysis.model import Model
from maskfeat.analysis.source import HUB_WEIGHTS
from maskfeat.checkpoint.atomic import write_and_fsync
from maskfeat.checkpoint.reading import CLASSES, KIND
from maskfeat.checkpoint.weights import LoadReport
from maskfeat.config import dump_config
from maskfeat.config.schema import full_keys, is_inert, schema
from maskfeat.registry import lookup


def final_norm(model: Model) -> nn.LayerNorm | None:
    """Return the final norm of a model; None where it has none."""
    return next((module for module in model.norm.modules() if isinstance(module, nn.LayerNorm)), None)


def without_head(model: Model) -> Model:
    """Return the backbone of a model with its final norm; the weights are shared."""
    norm = final_norm(model)
    encoder = Encoder(model.backbone, norm is not None, model.mean_pooling)
    encoder.norm = nn.Identity() if norm is None else norm
    cfg = model.cfg.clone()
    cfg.defrost()
    cfg.MVIT.USE_MEAN_POOLING = model.mean_pooling
    cfg.freeze()
    return Model(encoder, cfg, model.source, BACKBONE, model.report, trained=model.trained)


def own_state(model: Model) -> dict[str, Tensor]:
    """Return the weights under this project's names, by which `load_model` recognises them."""
    state = model.objective.released_state()
    if model.kind == BACKBONE:
        state.pop("mask_token", None)
        if model.mean_pooling:
            return {re.sub(r"^norm\.", "fc_norm.", name): value for name, value in state.items()}
    return dict(state)


class HubModel(Model, PyTorchModelHubMixin, library_name="maskfeat"):
    """A `Model` that `from_pretrained` loads from a folder or from the Hub, where `save_pretrained` or the command
    `export --to hf` wrote it.

    Args:
        cfg: the config of the network, as YAML text.
        kind: "classifier" or "backbone".
        norm: of a backbone, whether it has a final norm.
        classes: names of the classes by their numbers; None = not known.
        source: where the weights come from.
    """

    def __init__(
        self, cfg: str, kind: str, norm: bool = True, classes: list[str] | None = None, source: str = ""
    ) -> None:
        own = recognise({"cfg": cfg, "model_state": {}})
        objective = build_recognised(own._replace(kind=kind, norm=norm))
        super().__init__(objective, own.cfg, source, kind, LoadReport(), classes)

    @classmethod
    def of(cls, model: Model) -> "HubModel":
        """Return a copy of a model that can be saved."""
        copy = cls(
            cfg=dump_config(_without_paths(model.cfg)),
            kind=model.kind,
            norm=final_norm(model) is not None,
            classes=model.classes,
            source=Path(model.source).name,
        )
        copy.report = copy.objective.load_released_state(own_state(model))
        return copy

    def _save_pretrained(self, save_directory: Path) -> None:
        write_weights(save_directory / HUB_WEIGHTS, own_state(self))

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        model.report = model.objective.load_released_state(load_file(model_file))
        return model.to(map_location)


def own_words(model: Model) -> dict[str, str]:
    """Return the metadata by which `load_model` knows a safetensors file: config without paths, kind, classes."""
    return {"cfg": dump_config(_without_paths(model.cfg)), KIND: model.kind, CLASSES: json.dumps(model.classes)}


def write_weights(path: Path, state: dict[str, Tensor], **about: str) -> None:
    """Write tensors as a safetensors file, with what is said about them as its metadata."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    write_and_fsync(path, save(tensors, metadata={"format": "pt", **about}))


def _without_paths(cfg: CfgNode) -> CfgNode:
    """Return a config without the places of this machine's data and runs, which are nobody else's business.

    Keys of PySlowFast without effect here, of which nobody knows whether they are paths, are left out.
    """
    cleaned = cfg.clone()
    cleaned.defrost()
    allowed = schema(cfg.PLUGINS)
    for key in list(full_keys(cleaned)):
        *sections, name = key.split(".")
        node = lookup(cleaned, ".".join(sections)) if sections else cleaned
        if is_inert(key):
            del node[name]
        elif allowed.rules.kinds[key] in ("path", "list[source]"):
            node[name] = allowed.known[key]
    cleaned.freeze()
    return cleaned


def model_card(model: Model, licence: str, name: str, figures: Sequence[str] = ()) -> str:
    """Return the README.md of a folder: metadata that the Hub reads, what the network is, and how to load it.

    Args:
        model: what is exported.
        licence: identifier of the Hub, such as apache-2.0 or cc-by-nc-4.0.
        name: of the folder.
        figures: what was measured, a sentence each.
    """
    cfg, classifies = model.cfg, model.kind == CLASSIFIER
    medium = {"image": "images", "video": "clips"}[model.media]
    task = {
        ("image", True): "image-classification",
        ("image", False): "image-feature-extraction",
        ("video", True): "video-classification",
        ("video", False): "feature-extraction",
    }[model.media, classifies]
    size = " x ".join(map(str, model.clip_size))
    parameters = sum(value.numel() for value in own_state(model).values()) / 1e6
    lines = [
        "---",
        f"license: {licence}",
        "library_name: maskfeat",
        f"pipeline_tag: {task}",
        "tags:",
        "- self-supervised-learning",
        "---",
        "",
        f"# {name}",
        "",
        f"{'A classifier' if classifies else 'The backbone'} of {medium}: {type(model.backbone).__name__}, "
        f"{parameters:.1f} M parameters, for {size} {'pixels' if model.media == 'image' else '(frames x pixels)'}.",
        "",
        f"- Weights from: `{Path(model.source).name}`",
        *([f"- Training: {model.trained}"] if model.trained else []),
        *([f"- Classes: {model.objective.num_classes}"] if classifies else []),
        f"- Input: normalised by mean {list(cfg.DATA.MEAN)} and standard deviation {list(cfg.DATA.STD)}",
        *(f"- {figure}" for figure in figures),
        f"- Licence: {licence}",
        "",
        f"`cfg` in `config.json` is {'the complete recipe' if model.trained else 'the config of the network'}.",
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
