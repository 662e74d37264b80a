"""Words of messages."""

import pytest

from maskfeat.text import count, duration, likeness, matches, nearest, some


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        ([], {}, ""),
        (["a", "b"], {"most": 2}, "a, b"),
        (["a", "b", "c"], {"most": 2}, "a, b and 1 more"),
        (["a", "b", "c"], {"most": 2, "mark": "; "}, "a; b; and 1 more"),
        (list("abcdefg"), {}, "a, b, c, d, e and 2 more"),
    ],
)
def test_some(names: list[str], given: dict[str, object], expected: str) -> None:
    assert some(names, **given) == expected  # type: ignore[arg-type]


def test_count() -> None:
    assert [count(number, "class") for number in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert [count(number, "image") for number in (1, 3)] == ["1 image", "3 images"]


def test_duration() -> None:
    assert [duration(seconds) for seconds in (0, 59.9, 3661, 90000)] == [
        "0:00:00",
        "0:00:59",
        "1:01:01",
        "1 day, 1:00:00",
    ]


def test_nearest_is_blind_to_case() -> None:
    assert nearest("PROB", ["train", "probe", "predict"]) == "probe"
    assert likeness("Probe", "pROBE") == 1.0 and likeness("abc", "xyz") == 0.0


def test_matches() -> None:
    assert matches("head.weight", ["norm.*", "head.*"]) and not matches("Head.weight", ["head.*"])
