"""Names of classes, whether their numbers are those of the model, and the line that says what a split holds."""

import io
import os
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from maskfeat.data.datasets.folders import class_name
from maskfeat.data.datasets.label_sets import labels_present
from maskfeat.data.names import MAX_CLASS_NAME
from maskfeat.errors import UserError
from maskfeat.file_io import NotReadable, local_path, open_regular_file
from maskfeat.text import count, some


def read_class_names(path: str | os.PathLike[str], num_classes: int, what: str = "DATA.CLASS_NAMES") -> list[str]:
    """Read the names of classes from a text file: one a line, in the order of their numbers.

    Args:
        path: a local path or one whose scheme has a handler (`file_io.path_manager`).
        num_classes: how many the classifier has.
        what: what names the file, for messages.

    Raises:
        UserError: the file cannot be read, a line is empty, a name occurs twice or there are not `num_classes` names.
    """
    try:
        with io.TextIOWrapper(open_regular_file(local_path(os.fspath(path))), encoding="utf-8-sig") as file:
            lines = [line.strip() for line in iter(lambda: file.readline(MAX_CLASS_NAME + 1), "")]
    except NotReadable as error:
        raise UserError(f"the names of classes in {path} cannot be read ({error}): see {what}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the names of classes in {path} are not UTF-8 text: save them as UTF-8; see {what}") from error
    while lines and not lines[-1]:
        lines.pop()
    names = [*map(class_name, lines)]
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name or len(name) >= MAX_CLASS_NAME:
            why = "is empty" if not name else f"has {MAX_CLASS_NAME} characters or more"
            raise UserError(f"{path}, line {number} {why}: a line is the name of one class; see {what}")
        if first.setdefault(name, number) != number:
            raise UserError(f"{path} has the class {name!r} twice, in lines {first[name]} and {number}; see {what}")
    if len(names) != num_classes:
        raise UserError(
            f"{path} names {count(len(names), 'class')} ({some(names)}), and the classifier has {num_classes}: one "
            f"name a line is expected, in the order of the labels; see {what} and MODEL.NUM_CLASSES"
        )
    return names


def class_names(dataset: Any) -> list[str] | None:
    """Return the names of a data set's classes by their numbers; None if its samples carry numbers alone."""
    names = getattr(dataset, "classes", None)  # a data set of a plugin may have no such attribute
    return None if names is None else list(names)


def describe_split(split: str, dataset: Any, num_classes: int | None) -> str:
    """Return the line that a run logs for each split: place, samples, classes, what is left out.

    Args:
        num_classes: MODEL.NUM_CLASSES of a classifier; None for other objectives.
    """
    names, present = class_names(dataset), labels_present(dataset.labels)
    if max(present) < 0:
        classes = "no labels"
    elif names is None:
        classes = f"{count(len(present), 'class')} (labels {min(present)} to {max(present)})"
    elif len(present) == len(names):
        classes = count(len(names), "class")
    else:
        missing = [name for number, name in enumerate(names) if number not in present]
        classes = f"{len(present)} of {count(len(names), 'class')} (no sample of {some(missing)})"
    counted = len(present) if names is None else len(names)
    if num_classes not in (None, counted):
        classes += f", MODEL.NUM_CLASSES is {num_classes}"
    place, left_out = (getattr(dataset, name, "") for name in ("place", "left_out"))
    return (
        f"{split}: {f'{place}, ' if place else ''}{count(len(dataset), 'sample')}, {classes}"
        f"{f'; left out: {left_out}' if left_out else ''}"
    )


def check_labels(split: str, dataset: Any, num_classes: int, trains: bool) -> None:
    """Check the labels of a data set for a classifier of `num_classes`.

    Args:
        trains: whether the classifier learns from it.

    Raises:
        UserError: labels are too large, or there is nothing to learn.
    """
    present = labels_present(dataset.labels)
    other = next((label for label in present if not isinstance(label, Integral)), None)
    if other is not None:
        raise UserError(f"labels of {split} must be whole numbers from 0, the numbers of the classes; given {other!r}")
    if max(present) >= num_classes:
        from_1 = min(present) == 1 and max(present) == num_classes
        raise UserError(
            f"labels of {split} go up to {max(present)}, but MODEL.NUM_CLASSES is {num_classes}"
            f"{': the first label must be 0, not 1' if from_1 else ''}"
        )
    if trains and len(present) == 1 and min(len(dataset), num_classes) > 1:
        names, label = class_names(dataset), min(present)
        what = f"label {label}" if names is None else f"class {names[label]!r}"
        raise UserError(
            f"all {len(dataset)} samples of {split} have the {what}, and MODEL.NUM_CLASSES is {num_classes}: there is "
            "nothing to tell apart. The folders directly in train/, or the labels in the list, are the classes; see "
            "DATA.PATH_TO_DATA_DIR"
        )


def missing_classes(split: str, dataset: Any, num_classes: int) -> str:
    """Return a warning about outputs of a classifier that have no sample to learn from; "" if all have."""
    names, present = class_names(dataset), labels_present(dataset.labels)
    if len(present) == num_classes:
        return ""
    missing = [number for number in range(num_classes) if number not in present]
    called = [str(number) if names is None or number >= len(names) else names[number] for number in missing]
    return (
        f"{split} has samples of {count(len(present), 'class')} and MODEL.NUM_CLASSES is {num_classes}: nothing is "
        f"learned of the other {len(missing)} ({some(called)}). Set MODEL.NUM_CLASSES {max(present) + 1} if they are "
        "a mistake"
    )


def check_numbering(split: str, dataset: Any, num_classes: int, path: object) -> None:
    """Check the class folders that number a test, where the tested file does not say which classes it was trained on.

    Args:
        path: of the file.

    Raises:
        UserError: there are fewer than outputs of the classifier, so that their numbers would be a guess.
    """
    names = class_names(dataset)
    if names is not None and len(names) != num_classes:
        raise UserError(
            f"{path} does not name its classes, and {count(len(names), 'class folder')} ({some(names)}) cannot tell "
            f"the numbers of {split} where MODEL.NUM_CLASSES is {num_classes}: put a folder for every class into "
            "train/ of DATA.PATH_TO_DATA_DIR (it may be empty), or set MODEL.NUM_CLASSES"
        )


def check_same_classes(path: object, trained: Sequence[str] | None, dataset: Any) -> None:
    """Check that the classes of a data set are those that a checkpoint was trained on.

    Args:
        path: of the checkpoint.
        trained: the names in it; None = it has none.

    Raises:
        UserError: the classes are others.
    """
    names = class_names(dataset)
    if trained is None or names is None or [*map(class_name, trained)] == [*map(class_name, names)]:
        return
    gone, new = ([name for name in a if name not in b] for a, b in ((trained, names), (names, trained)))
    changes = [f"{what}: {some(found)}" for what, found in (("missing", gone), ("new", new)) if found]
    raise UserError(
        f"{path} was trained on {count(len(trained), 'class')} ({some(trained)}), and DATA.PATH_TO_DATA_DIR has "
        f"{len(names)} ({some(names)}){'; ' if changes else ', in another order'}{', '.join(changes)}. Restore them, "
        "or start a new run in another OUTPUT_DIR"
    )
