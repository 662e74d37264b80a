"""What a file of weights says beside them: the names of the classes, and how it was trained."""

from maskfeat.analysis.architecture import Recognised
from maskfeat.analysis.published import imagenet_classes
from maskfeat.analysis.source import Source
from maskfeat.checkpoint.reading import trained_classes
from maskfeat.objectives.base import Objective
from maskfeat.registry import objective_spec


def class_names(objective: Objective, file: Source, found: Recognised) -> list[str] | None:
    """Return the names of the classes: those in the file, else ImageNet-1K's where a file without a config of its own
    has 1000 classes of images.
    """
    names = trained_classes(file.content)
    if names is None and (found.recipe or file.about) and len(objective.backbone.clip_size) == 2:
        names = imagenet_classes()
    return names if names and len(names) == objective.num_classes else None


def training(file: Source, found: Recognised) -> str:
    """Return what a file or the table of published ones says about how the weights were trained; "" = nothing."""
    if file.about or file.cfg is not None or found.recipe:
        return file.about
    solver, epoch = found.cfg.SOLVER, file.content.get("epoch")
    what = f"{objective_spec(found.cfg).title} (`MODEL.MODEL_NAME {found.cfg.MODEL.MODEL_NAME}`)"
    epochs = f"{epoch + 1} of {solver.MAX_EPOCH}" if isinstance(epoch, int) else f"{solver.MAX_EPOCH}"
    return f"{what}, {epochs} epochs, {solver.OPTIMIZING_METHOD}, base learning rate {solver.BASE_LR:g}"
