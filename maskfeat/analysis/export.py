"""Export a trained network: to timm, torchvision, the Hugging Face Hub, safetensors, ONNX and torch.export.

What was written is loaded again, by the library that it is for, and compared with this project's network before it gets
its name: `tools/export.py` calls `main`.

Shape legend: B samples, D token width, N tokens (the class token, if there is one, comes first), K classes.
"""

import argparse
import contextlib
import io
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskfeat.analysis.command import add_network_options, exit_code, refuse_input
from maskfeat.analysis.foreign import BACKBONE, CLASSIFIER
from maskfeat.analysis.hub import HubModel, model_card, own_state, own_words, without_head, write_weights
from maskfeat.analysis.model import Model, load_model, load_with_notes
from maskfeat.analysis.published import list_models
from maskfeat.analysis.source import HUB_WEIGHTS
from maskfeat.analysis.twins import Different, twin
from maskfeat.checkpoint.atomic import fsync_dir, write_and_fsync
from maskfeat.errors import UserError, naming
from maskfeat.models.base import Tokens
from maskfeat.models.resnet import ResNet

logger = logging.getLogger(__name__)

PARTS = (BACKBONE, CLASSIFIER)
OPSET = 18
"""Of ONNX, where none is given: the lowest that PyTorch's exporter writes."""
BATCHES = (1, 3)
"""Batch sizes with which an export is compared; it is traced with another one."""
_TRACED = 2


class Network(nn.Module):
    """What is exported of a model.

    Args:
        model: a classifier or a backbone, with its weights.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.classifies = model, model.kind == CLASSIFIER
        self.names = ("logits",) if self.classifies else ("tokens", "features")
        self.eval()

    def forward(self, clip: Tensor) -> tuple[Tensor, ...]:
        """Return (logits (B, K),), or else what `Model.tokens` and `Model.features` return: (B, N, D) and (B, D).

        Args:
            clip: (B, 3, [T,] H, W) float32.
        """
        model: Any = self.model
        if self.classifies:
            return (model.objective.logits(clip),)
        tokens = model.backbone.forward_tokens(clip)
        if model.mean_pooling:
            return tokens.x, model.norm(tokens.patches.mean(dim=1))
        tokens = Tokens(model.norm(tokens.x), tokens.grid)
        return tokens.x, tokens.patches.mean(dim=1)


class Written(NamedTuple):
    """What an exporter has written.

    Attributes:
        outputs: computes the outputs of `Network` from what lies in the file.
        how: how it is loaded, in one line; {path} stands for the file.
        tolerance: largest difference of two outputs, where the largest value of ours is at most 1, otherwise times it.
    """

    outputs: Callable[[Tensor], Sequence[Tensor]]
    how: str
    tolerance: float


@dataclass(frozen=True)
class Job:
    """What is to be exported.

    Attributes:
        network: of the model.
        opset: of ONNX.
        licence: for the model card.
        name: of the folder in the model card.
        figures: for the model card, a sentence each.
    """

    network: Network
    opset: int = OPSET
    licence: str = "unknown"
    name: str = ""
    figures: tuple[str, ...] = ()

    @property
    def model(self) -> Model:
        """The model that is exported."""
        return self.network.model

    def clips(self, batch: int) -> Tensor:
        """Return random input (batch, 3, [T,] H, W), the same for the same size."""
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, 3, *self.model.clip_size, generator=generator)


def _plain(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _write_safetensors(job: Job, path: Path) -> Written:
    model = job.model
    write_weights(path, own_state(model), **own_words(model))
    again, _ = load_with_notes(path, device="cpu")
    return Written(Network(again), 'maskfeat.load_model("{path}")', 1e-6)


def _write_twin(library: str) -> Callable[[Job, Path], Written]:
    def write(job: Job, path: Path) -> Written:
        found = twin(job.model, library)
        if isinstance(found, Different):
            logger.warning("%s has no network that computes the same: %s", library, found.why)
            return _write_safetensors(job, path)
        # `load_model` reads all names but those of torchvision's ViT.
        unread = library == "torchvision" and not isinstance(job.model.backbone, ResNet)
        words = {} if unread else own_words(job.model)
        write_weights(path, found.state, load=found.how.format(path=job.name), **words)
        network = found.load(path)
        # Other libraries write the attention of a ViT in another way; a ResNet is the same code.
        tolerance = 1e-6 if isinstance(job.model.backbone, ResNet) else 1e-5
        return Written(lambda x: found.outputs(network, x), found.how, tolerance)

    return write


def _write_hub(job: Job, path: Path) -> Written:
    HubModel.of(job.model).save_pretrained(path)
    card = model_card(job.model, job.licence, job.name, job.figures)
    write_and_fsync(path / "README.md", card.encode())
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it reads a local folder
        again = HubModel.from_pretrained(path, local_files_only=True)
    how = 'maskfeat.analysis.hub.HubModel.from_pretrained("{path}")'
    return Written(Network(again), how, 1e-6)


def _traced(job: Job) -> torch.export.ExportedProgram:
    """Trace the network for a batch of any size."""
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(job.network, (job.clips(_TRACED),), dynamic_shapes={"clip": {0: batch}})


def _write_program(job: Job, path: Path) -> Written:
    content = io.BytesIO()
    torch.export.save(_traced(job), content)
    write_and_fsync(path, content.getvalue())
    module = torch.export.load(str(path)).module()
    return Written(lambda x: _plain(module(x)), 'torch.export.load("{path}").module()', 1e-5)


def _conv3d(
    clip: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Any:
    """Translate `aten::conv3d` into ONNX: onnxscript gives one without a bias zeros of a wrong shape, (channels, 2)."""
    from onnxscript import opset18

    bias = () if bias is None else (bias,)
    pads = [*padding, *padding]
    return opset18.Conv(clip, weight, *bias, strides=list(stride), pads=pads, dilations=list(dilation), group=groups)


def onnx_runtime() -> Any:
    """Return the module `onnxruntime`.

    Raises:
        UserError: a library of the extra `export` is not installed.
    """
    try:
        import onnx  # noqa: F401  # PyTorch's exporter needs them
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}, which is not installed: pip install '.[export]'") from error
    return onnxruntime


def _check_opset(opset: int) -> None:
    from onnx.defs import onnx_opset_version

    if not OPSET <= opset <= onnx_opset_version():
        raise UserError(f"--opset must be from {OPSET} to {onnx_opset_version()}, what is installed; given {opset}")


def _write_onnx(job: Job, path: Path) -> Written:
    runtime = onnx_runtime()
    _check_opset(job.opset)
    program = torch.onnx.export(
        _traced(job),
        input_names=["clip"],
        output_names=list(job.network.names),
        opset_version=job.opset,
        dynamo=True,
        custom_translation_table={torch.ops.aten.conv3d.default: _conv3d},
        verbose=False,
        optimize=False,  # onnxruntime does it on loading; onnxscript needs more than 20 minutes for MViTv2-S
    )
    assert program is not None
    program.save(str(path), external_data=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def outputs(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(out) for out in session.run(None, {"clip": x.numpy()})]

    how = f'onnxruntime.InferenceSession("{{path}}"): opset {job.opset}, input clip, outputs '
    return Written(outputs, how + ", ".join(job.network.names), 1e-4)


class Target(NamedTuple):
    """A format or library.

    Attributes:
        suffix: of the file; "" = a folder.
        write: writes the file or folder.
    """

    suffix: str
    write: Callable[[Job, Path], Written]


TARGETS = {
    "timm": Target(".safetensors", _write_twin("timm")),
    "torchvision": Target(".safetensors", _write_twin("torchvision")),
    "hf": Target("", _write_hub),
    "safetensors": Target(".safetensors", _write_safetensors),
    "onnx": Target(".onnx", _write_onnx),
    "torch.export": Target(".pt2", _write_program),
}


@torch.no_grad()
def greatest_difference(job: Job, written: Written) -> float:
    """Return the greatest difference between our outputs and those of an export, for batches of 1 and 3.

    Raises:
        UserError: it exceeds the tolerance, or shapes differ.
    """
    worst = 0.0
    for batch in BATCHES:
        clips = job.clips(batch)
        theirs = _plain(written.outputs(clips))
        for name, ours, other in zip(job.network.names, job.network(clips), theirs, strict=True):
            if ours.shape != other.shape:
                raise UserError(f"{name} of the export have shape {tuple(other.shape)}, ours {tuple(ours.shape)}")
            difference, largest = float((ours - other).abs().max()), float(ours.abs().max())
            allowed = written.tolerance * max(1.0, largest)
            if not difference <= allowed:
                raise UserError(
                    f"{name} of the export differ from ours by up to {difference:.2g}, where at most {allowed:.2g} is "
                    f"allowed (values up to {largest:.2g}, a batch of {batch}): nothing was written"
                )
            worst = max(worst, difference)
    return worst


def _check_output(output: Path, target: Target, to: str, source: str) -> None:
    refuse_input(output, [source, os.path.join(source, HUB_WEIGHTS)])
    if target.suffix and output.suffix != target.suffix:
        raise UserError(f"--output must end with {target.suffix} for --to {to}; given {output}")
    if target.suffix and output.is_dir():
        raise UserError(f"--output {output} is a folder, and --to {to} writes a file")
    if not target.suffix and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists: --to {to} writes a new folder")


def export(
    model: Model,
    to: str,
    output: str | Path,
    what: str | None = None,
    opset: int = OPSET,
    licence: str = "unknown",
    figures: Sequence[str] = (),
) -> tuple[float, str]:
    """Export a model, and compare what was written with it.

    Args:
        model: on the CPU.
        to: a key of `TARGETS`.
        output: a file that ends with the suffix of the target, or a folder that does not exist or is empty.
        what: "classifier" or "backbone"; None = "classifier" where the model is one.
        opset: of ONNX.
        licence: for the model card of "hf".
        figures: for the model card of "hf": what was measured, a sentence each.

    Returns:
        the greatest difference between both, and how the export is loaded, in one line.

    Raises:
        UserError: the model has no such part, the output cannot be written, or what was written computes something
            else; then nothing is left behind.
    """
    if to not in TARGETS:
        raise UserError(f"--to must be one of {', '.join(TARGETS)}; given {to!r}")
    target, output = TARGETS[to], Path(output).expanduser()
    if what not in (None, *PARTS):
        raise UserError(f"--what must be one of {', '.join(PARTS)}; given {what!r}")
    if what == CLASSIFIER and model.kind != CLASSIFIER:
        raise UserError(f"{model.source} does not classify (it is a {model.kind} file): --what backbone")
    _check_output(output, target, to, model.source)
    classifies = model.kind == CLASSIFIER if what is None else what == CLASSIFIER
    part = model if classifies else without_head(model)
    job = Job(Network(part), opset, licence, output.name, tuple(figures))
    with naming(f"--output {output} cannot be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder, torch.no_grad():
            draft = Path(folder) / output.name
            written = target.write(job, draft)
            worst = greatest_difference(job, written)
            os.replace(draft, output)
        fsync_dir(output.parent)
    return worst, written.how.format(path=output)


def _export(args: argparse.Namespace) -> int:
    """Do what the command line says."""
    _check_output(Path(args.output), TARGETS[args.to], args.to, args.checkpoint)
    model = load_model(args.checkpoint, args.cfg, device="cpu", averaged=args.averaged)
    figures = [f"As published: {entry.accuracy}" for entry in list_models() if entry.name == args.checkpoint]
    worst, how = export(model, args.to, args.output, args.what, args.opset, args.license, figures)
    logger.info("wrote %s; greatest difference from the network here: %.2g", args.output, worst)
    logger.info("load it by %s", how)
    return 0


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Export a checkpoint; return the exit code.

    Args:
        argv: the command line; None = sys.argv.
        prog: name of the command in its help.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Export a trained network. What was written is loaded again and compared with the network on "
        "random input, for batches of 1 and 3, before it gets its name.",
        epilog="timm and torchvision: weights under that library's names, where it has a network that computes the "
        "same, otherwise this project's. onnx and torch.export take batches of any size. A backbone has two outputs: "
        "its tokens and their mean over the picture; a classifier has logits. "
        "example: %(prog)s --checkpoint maskfeat_vit_base_in1k --to timm --output vit_b.safetensors",
    )
    add_network_options(parser)
    parser.add_argument("--to", required=True, choices=list(TARGETS), help="library or format")
    parser.add_argument("--output", required=True, metavar="PATH", help="file; for hf a new folder")
    parser.add_argument("--what", choices=PARTS, help="default: classifier where the file has one")
    parser.add_argument("--opset", type=int, default=OPSET, help="of ONNX (default: %(default)s)")
    parser.add_argument(
        "--license", default="unknown", help="for the model card, such as apache-2.0 (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    return exit_code(lambda: _export(args))
