"""The report that a run ends in, and that no report can make it fail."""

from pathlib import Path

import pytest

from maskfeat.engine import session
from maskfeat.engine.run import main
from tests.small import VIT_PT, images

PRETRAINING = ["--cfg", "masked_ssl/in1k_VIT_B_MaskFeat_PT", *VIT_PT, "SOLVER.MAX_EPOCH", "1"]


def run(data: Path, folder: Path, *opts: str) -> int:
    return main([*PRETRAINING, *images(data), "OUTPUT_DIR", str(folder), *opts])


def test_a_run_ends_in_its_report(image_data: Path, tmp_path: Path) -> None:
    assert run(image_data, tmp_path) == 0
    page = (tmp_path / "report.html").read_text()
    assert "complete: 1 of 1 epochs" in page and "maskfeat report" in page
    assert run(image_data, tmp_path / "none", "LOG.REPORT", "False") == 0
    assert not (tmp_path / "none" / "report.html").exists()


def test_a_run_that_is_refused_changes_no_report(image_data: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("that of another run")
    assert run(tmp_path / "nowhere", tmp_path) == 2
    assert (tmp_path / "report.html").read_text() == "that of another run"


@pytest.mark.parametrize("bug", [False, True])
def test_a_report_that_cannot_be_written(
    bug: bool, image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError("in the report")

    if bug:
        monkeypatch.setattr(session, "write_report", fail)
    else:
        (tmp_path / "report.html").mkdir(parents=True)
    assert run(image_data, tmp_path) == 0
    log = (tmp_path / "stdout.log").read_text()
    assert log.count("warning: no report was written") == 1
    assert ("ZeroDivisionError: in the report" if bug else "report.html cannot be written: Is a directory") in log
