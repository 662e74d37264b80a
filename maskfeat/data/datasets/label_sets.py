"""Labels of a sample: the number of its class or, with DATA.MULTI_LABEL, those of all classes that it shows.

Shape legend: K classes.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

LabelSet = tuple[int, ...]

_MOST_DIGITS = 18
_LABEL = rf"[0-9]{{1,{_MOST_DIGITS}}}"
LABELS = (_LABEL, rf"{_LABEL}(?:,{_LABEL})*")
"""Patterns of one label in a list, and of several."""
_POINTED = re.compile(r"[0-9]+\.0*")  # pandas writes whole numbers as 3.0 where a value of the column is missing


def is_number(text: str, several: bool = False) -> bool:
    """Return whether a text is a label, or several that are separated by commas."""
    if several and "," in text:
        return all(is_number(part.strip()) for part in text.split(","))
    return (text.isdigit() and text.isascii()) or ("." in text and _POINTED.fullmatch(text) is not None)


def read_labels(text: str, several: bool) -> int | LabelSet:
    """Return the label that `is_number` accepts; where `several`, all of them, sorted, each once.

    Raises:
        ValueError: a number is too long.
    """
    if several:
        return tuple(sorted({_read(part.strip()) for part in text.split(",")}))
    return _read(text)


def _read(text: str) -> int:
    digits = text.partition(".")[0]
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a label of {len(digits)} digits")
    return int(digits)


def labels_present(labels: Iterable[int | LabelSet]) -> set[int]:
    """Return every class number that occurs in the labels of a data set."""
    found = set(labels)
    return {number for label in found for number in (label if isinstance(label, tuple) else (label,))}


def target_of(label: int | LabelSet, num_classes: int) -> int | Tensor:
    """Return what a sample carries: the number of its class or, of several, (K,) float32 with 1 for each of them."""
    if not isinstance(label, tuple):
        return label
    return torch.zeros(num_classes).index_fill_(0, torch.tensor(label), 1.0)


def multi_hot(labels: Iterable[LabelSet], num_classes: int) -> Tensor:
    """Return the targets of several samples: (N, K) float32."""
    return torch.stack([torch.as_tensor(target_of(label, num_classes)) for label in labels])
