"""Words of messages: names in a row, numbers with nouns, times, and the name that was meant."""

import difflib
from collections.abc import Iterable, Sequence
from datetime import timedelta
from fnmatch import fnmatchcase


def some(names: Sequence[str], most: int = 5, mark: str = ", ") -> str:
    """Return the first `most` of `names` with `mark` between them, and how many more there are: 'a, b and 3 more'."""
    more = len(names) - most
    return mark.join(names[:most]) + (f"{mark.rstrip(', ')} and {more} more" if more > 0 else "")


def count(number: int, noun: str) -> str:
    """Return a number and what it counts: '1 class', '2 classes', '3 images'."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def printable(text: str) -> str:
    """Return a text that UTF-8 can hold: bytes of a file's name that are none are written as \\udce9."""
    return text.encode("utf-8", "backslashreplace").decode()


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss, with days where there are any."""
    return str(timedelta(seconds=int(seconds)))


def likeness(first: str, second: str) -> float:
    """Return how alike two names are but for case, 0 to 1: the ratio of `difflib.SequenceMatcher`."""
    return difflib.SequenceMatcher(None, first.lower(), second.lower()).ratio()


def nearest(given: str, names: Iterable[str]) -> str:
    """Return the name that is most like the given one."""
    return max(names, key=lambda name: likeness(given, name))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name is of one of the patterns, in which * stands for any letters."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
