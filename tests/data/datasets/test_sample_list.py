"""Lists of videos as people's programs write them: read right, or refused with line and key."""

import random
import re
import time
from pathlib import Path

import pytest

from maskfeat.data.datasets import sample_list
from maskfeat.data.datasets.lists import check_some_exist
from maskfeat.data.datasets.sample_list import MAX_LINE, NO_LABEL, read_sample_list
from maskfeat.errors import UserError


def read(tmp_path: Path, text: str | bytes, separator: str = " ", labelled: bool = True) -> list[tuple[str, int]]:
    path = tmp_path / "train.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_sample_list(path, separator, "/d", labelled)


@pytest.mark.parametrize("given", [" ", ",", ";", "\t", "\\t", "\\x01", "|", "::", " , "])
def test_quotes_of_csv(tmp_path: Path, given: str) -> None:
    sep = {"\\t": "\t", "\\x01": "\x01"}.get(given, given)
    text = f'v 0.mp4{sep}0\r\n"arm wrestling, 2; 3.mp4"{sep}1\r\n"say ""hi"" now.mp4"{sep}"2"\r\n5"tv.mp4{sep}3\r\n'
    names = ["v 0.mp4", "arm wrestling, 2; 3.mp4", 'say "hi" now.mp4', '5"tv.mp4']
    expected = [(f"/d/{name}", place) for place, name in enumerate(names)]
    assert read(tmp_path, text, given) == expected
    assert read(tmp_path, f"\ufeff{text}\r\n{sep}\r\n", given) == expected, "a BOM, and empty lines as Excel has them"
    assert read(tmp_path, f"path{sep}label\r\n{text}", given) == expected
    assert read(tmp_path, f'"Label"{sep}"Path"\n3{sep}"a b, c.mp4"\n', given) == [("/d/a b, c.mp4", 3)]
    three = f'"a, b.mp4"{sep}40{sep}0\nv 1.mp4{sep}41{sep}1\n'
    assert read(tmp_path, three, given) == [("/d/a, b.mp4", 0), ("/d/v 1.mp4", 1)]


@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("a/v0.mp4 40 0\na/v1.mkv 7 12\n", " ", [("a/v0.mp4", 0), ("a/v1.mkv", 12)]),
        ("path,frames,label\nclip,40,0\n", ",", [("clip", 0)]),
        (",path,label\n0,v0.mp4,3\n1,a, b.mp4,4\n", ",", [("v0.mp4", 3), ("a, b.mp4", 4)]),  # the index of pandas
        (" path label\n0 v0.mp4 3\n1 a  b.mp4 4\n", " ", [("v0.mp4", 3), ("a  b.mp4", 4)]),
        ("path,label,split\nv0.mp4,3,train\n", ",", [("v0.mp4", 3)]),
        ("v0.mp4,3.0\nv1.mp4,4.\n", ",", [("v0.mp4", 3), ("v1.mp4", 4)]),  # pandas, where a label is missing elsewhere
        ("v0.mp4, 3\n", ",", [("v0.mp4", 3)]),
        ("clip 40 0\nother 1\n", " ", [("clip 40", 0), ("other", 1)]),  # not every line has a number before its label
        ('"clip 40" 0\n"clip 41" 1\n', " ", [("clip 40", 0), ("clip 41", 1)]),
        ('"clip" 40 0\n"clip b" 41 1\n', " ", [("clip", 0), ("clip b", 1)]),
        ("12 v0.mp4 3\n7 v1.mp4 4\n", " ", [("12 v0.mp4", 3), ("7 v1.mp4", 4)]),
        ("a.mp4 0\rb.mp4 1\r", " ", [("a.mp4", 0), ("b.mp4", 1)]),
        ("./a//b/x.mp4 1\n..c.mp4 2\n", " ", [("a/b/x.mp4", 1), ("..c.mp4", 2)]),
    ],
)
def test_columns(tmp_path: Path, text: str, separator: str, expected: list[tuple[str, int]]) -> None:
    assert read(tmp_path, text, separator) == [(f"/d/{path}", label) for path, label in expected]


@pytest.mark.parametrize(
    ("text", "separator", "line", "words"),
    [
        ("path,label\nv0.mp4,0\n", " ", 1, "',' would fit"),
        ("v0.mp4\t0\n", " ", 1, "'\\t' would fit"),
        ("my clip;0\n", " ", 1, "';' would fit"),
        ("v0.mp4, 0\n", " ", 1, "',' would fit"),
        ("v0.mp4 0\n", ",", 1, "' ' would fit"),
        ('v0.mp4 0\n"v1.mp4",0\n', " ", 2, "quotes that are not those of a CSV file"),
        ('"a.mp4 0\nb.mp4 1\nc.mp4" 2\n', " ", 1, "quotes"),
        ('"a \\"b\\".mp4" 1\n', " ", 1, "quotes"),
        ('my "best" clip.mp4 0\n', " ", 1, "is not 'path label'"),
        ("'a b.mp4' 1\n", " ", 1, "in quotes that are not read as quotes"),
        ("\u201ca b.mp4\u201d 1\n", " ", 1, "in quotes that are not read as quotes"),
        ('"""a.mp4""" 1\n', " ", 1, "in quotes that are not read as quotes"),
        ("clip 40 0\nclip 41 1\n", " ", 1, "two or three columns"),
        ("v0.mp4 40 0\nv1.mp4 1\n", " ", 2, "lacks the column of frames that line 1 has"),
        ("v0.mp4 3 13 0\n", " ", 1, "two or three columns"),
        ("v0.mp4,abseiling,0\n", ",", 1, "more than a path and a label"),
        ("v0.mp4 arm wrestling 0\n", " ", 1, "more than a path and a label"),
        ("0,v0.mp4,3\n1,v1.mp4,4\n", ",", 1, "index=False"),
        ("1 v0.mp4 3\n0 v1.mp4 4\n", " ", 1, "index=False"),
        ('0,"a, b.mp4",3\n', ",", 1, "is not 'path,label'"),
        ("path,name,label\na,b,3\n", ",", 1, "more than one column"),
        ("path\nv0.mp4\n", ",", 1, "names no column 'label'"),
        ("label,youtube_id,time_start\n0,abc,3\n", ",", 1, "is not 'path,label'"),
        ("path,label\nv0.mp4,0\nv1.mp4,1,x\n", ",", 3, "3 columns, and the first line names 2"),
        ("path,label\nv0.mp4,cat\n", ",", 2, "the label 'cat'"),
        ("v0.mp4,0,\n", ",", 1, "is not 'path,label'"),
        ("v0.mp4 0\n\nv1.mp4\t40 0\n", " ", 3, "is not 'path label'"),
        ("v0.mp4\nv1.mp4\n", " ", 1, "is not 'path label'"),
        ("v0.mp4 1.5\n", " ", 1, "is not 'path label'"),
        ('"" 0\n', " ", 1, "has no path"),
    ],
)
def test_what_is_refused_names_line_and_key(tmp_path: Path, text: str, separator: str, line: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text, separator)
    said = str(caught.value)
    assert f"train.csv, line {line}: " in said and words in said
    assert f"DATA.PATH_LABEL_SEPARATOR is {separator!r}" in said


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("v0.mp4\n\na/v 1.webm\n", ["v0.mp4", "a/v 1.webm"]),
        ("path\nv0.mp4\n", ["v0.mp4"]),
        ('"a, b"\nc\n', ["a, b", "c"]),
        ("a/b\nc/d\n", ["a/b", "c/d"]),
        ("my photo.jpg\na/b, c; d.PNG\nv 1.mp4\n", ["my photo.jpg", "a/b, c; d.PNG", "v 1.mp4"]),
    ],
)
def test_paths_alone_where_no_label_is_needed(tmp_path: Path, text: str, names: list[str]) -> None:
    assert read(tmp_path, text, labelled=False) == [(f"/d/{name}", NO_LABEL) for name in names]
    with pytest.raises(UserError, match="line 1"):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("v0.mp4,0\n", 1), ("v0.mp4;0\n", 1), ("v0.mp4\t0\n", 1), ("v0.mp4|0\n", 1), ("v0.mp4 cat\n", 1),
        ("v0.mp4 v1.mp4\n", 1), ("v0.mp4 0\nv1.mp4\n", 2), ("0 v0.mp4\n3 v1.mp4\n", 1), ("my clip\nyour clip\n", 1),
        ("path,label\nv0.mp4,0\n", 1), ("0.jpg,0\n", 1), ("0.jpg cat\n", 1), ("0.jpg 1.jpg\n", 1),
        ("0.jpg, 1.png\n", 1), ("0.jpg 0\n1.jpg\n", 2), ("0 0.jpg\n3 1.jpg\n", 1),
    ],
)  # fmt: skip
def test_other_lists_are_not_taken_for_paths_alone(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(UserError, match=rf"line {line}: .*DATA.PATH_LABEL_SEPARATOR is ' '"):
        read(tmp_path, text, labelled=False)


def test_encodings_and_lengths(tmp_path: Path) -> None:
    assert read(tmp_path, "\u00e9\u00a0x.mp4 0\n") == [("/d/\u00e9\u00a0x.mp4", 0)]
    for text, line in (("a.mp4 0\n\u00e9.mp4 0\n".encode("latin-1"), 2), ("a.mp4 0\n".encode("utf-16"), 1)):
        with pytest.raises(UserError, match=rf"train.csv is not UTF-8 text \(line {line}\)"):
            read(tmp_path, text)
    with pytest.raises(UserError, match=f"more than {MAX_LINE} characters: line 2"):
        read(tmp_path, "a.mp4 0\n" + "x" * (MAX_LINE + 1))
    for separator in ("", '"', "\\n"):
        with pytest.raises(UserError, match=re.escape(f"given {separator!r}")):
            read(tmp_path, "a.mp4 0\n", separator)


@pytest.mark.slow
@pytest.mark.parametrize("separator", [" ", ",", "\t"])
def test_plain_lists_are_read_as_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str) -> None:
    """Lists of plain lines take a shorter way, which must end where the long one does: same videos or same refusal."""
    draw = random.Random(0)
    names = ["v0.mp4", "a b/c.d-1.MKV", "x.mp4 y.mp4", "7 z.mp4", "/top.mp4", "a//b.mp4", ".h.mp4", "../u.mp4"]
    names += ["v.mp4.mp4", "v.mp4x", " v.mp4", "v .mp4", "v\u00e9.mp4", "'v.mp4", "v:1.mp4", "v,w.mp4", "v\tw.mp4"]
    names += ["clip", "a/.b.mp4", "\u0663 v.mp4", "12 v.mp4"]
    ends = ["0", "12", "3.0", "-1", "1" * 19, "40{0}3", "40{0}", "cat", "0 "]
    plain = 0
    for trial in range(300):
        few = draw.sample(names, draw.choice((1, 1, 2))), draw.sample(ends, draw.choice((1, 1, 2)))
        lines = [separator.join([draw.choice(few[0]), draw.choice(few[1]).format(separator)]) for _ in range(3)]
        text = "\n".join([separator.join(["path", "label"])] * (trial % 2) + lines)
        given = []
        for skip in (False, True):
            with monkeypatch.context() as patched:
                if skip:
                    patched.setattr(sample_list._Reader, "_plain_list", lambda *_, **__: None)
                try:
                    given.append(read(tmp_path, text, separator))
                except UserError as error:
                    given.append(str(error))
        assert given[0] == given[1], text
        plain += isinstance(given[0], list)
    assert plain > 20


@pytest.mark.alone
def test_a_list_of_a_quarter_of_a_million_lines(tmp_path: Path) -> None:
    text = "".join(f"train/some class {n % 400}/-1Q3bJgdXfA_{n:06d}_000032.mp4 {n % 400}\n" for n in range(240_000))
    started = time.process_time()
    assert len(read(tmp_path, text)) == 240_000
    assert time.process_time() - started < 6, "2 s on an idle core"


def test_a_wrong_prefix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v7.mp4").write_bytes(b"x")
    names = [f"v{n}.mp4" for n in range(8)]

    def check(prefix: str, folder: str = "/none") -> None:
        check_some_exist([(f"{prefix}/{name}" if prefix else name, 0) for name in names], "val.csv", prefix, folder)

    check(str(tmp_path / "videos"))  # one of them is enough: others are counted as they are read
    with pytest.raises(UserError, match="no file of val.csv was found.*/wrong/v0.mp4: no such file.*DATA.PATH_PREFIX"):
        check("/wrong")
    names = [f"v{n}.mp4" for n in (7, 1, 2)]
    with pytest.raises(UserError, match=f"there with DATA.PATH_PREFIX '{tmp_path}/videos'"):
        check(str(tmp_path / "videos" / "deeper"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"v7.mp4: no such file, from the working folder {tmp_path}\. .*PREFIX 'videos'"
    ):
        check("", "videos")
    monkeypatch.chdir(tmp_path / "videos")
    check("")
