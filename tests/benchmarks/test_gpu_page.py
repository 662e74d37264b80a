"""docs/gpu.md: the page that stands there is the program's, and its figures are those of the JSON."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import page
from benchmarks.gpu.cli import main

PAGE = page.PAGE


def recipe(kind: str, speed: float, **more: Any) -> dict[str, Any]:
    line = {"recipe": "a_PT", "input": kind, "batch": 96, "steps": 41, "samples_per_second": speed, "asked": ">= 4000"}
    unknown = dict.fromkeys(("of_peak", "of_measured_peak", "peak_gib", "waits_per_step", "waiting_for_data"))
    return {**line, **unknown, "target_share": None, **more}


FIGURES: dict[str, dict[str, Any]] = {
    "speed A": {
        "random": recipe(
            "random", 4321.0, of_peak=0.4567, of_measured_peak=0.5717, peak_gib=33.25, target_share=0.0061
        ),
        "files": recipe("files", 4209.0, waiting_for_data=0.0259),
        "plain_autocast": {"batch": 48, "steps": 23, "samples_per_second": 1080.25},
        "layouts": {
            "images_per_second": {"channels_last": 5150.0, "channels_first": 3433.0}, "ratio": 1.5001, "batch": 128,
        },
    },
    "pooling": {
        "shapes": [
            {
                "shape": "8x56x56 | q",
                "triton": {"forward": 0.001234, "backward": 0.002},
                "convolutions": {"forward": 0.003, "backward": 0.004},
                "compiled": {"forward": 0.0015, "backward": 0.0025},
                "ratio": 1.237,
                "verdict": "the Triton kernels stay",
            }
        ],
        "ratio": 1.237,
        "verdict": "the Triton kernels stay",
    },
    "trace": {
        "recipe": "a_PT", "ms_per_step": 59.3, "top": [{"kernel": "gemm", "calls": 96, "ms": 21.7, "share": 0.366}],
    },
    "reading": {"samples_per_second_by_workers": {"images": {"16": 4444.4, "2": 555.5}}, "cores": 16},
    "learning": {
        "gains": [
            {"method": "M", "what": "fine-tuning", "on": "all", "without": 71.25, "with": 77.5, "gain": 6.25}
        ]
    },
    "goldens": {"tiny": {"loss": 1.25e-6}},
}  # fmt: skip


def results(**of: object) -> dict[str, Any]:
    parts: dict[str, Any] = {
        name: {
            "group": "correctness" if name == "goldens" else "speed",
            "status": "passed",
            "seconds": 12.0,
            "figures": f,
        }
        for name, f in FIGURES.items()
    }
    parts["hung one"] = {
        "group": "speed",
        "status": "hung",
        "why": "stopped | after 9 s",
        "not_run": ["a kernel: no time left"],
    }
    call = {
        "command": ["tools/gpu_check.py", "--output", "gpu"],
        "at": "2026-01-02",
        "machine": {"gpu": "H200", "cuda": None},
    }
    return {"of": {"device": "cuda", "toy": False, **of}, "calls": [call], "parts": parts}


def test_the_page_says_what_was_found() -> None:
    text = page.page(results())
    for shown in (
        "`python tools/gpu_check.py --output gpu`, 2026-01-02: gpu H200.",
        "| hung one | speed | hung |  | stopped \\| after 9 s |",
        "- hung one: a kernel: no time left",
        "| a_PT | random | 96 | 41 | 4321 | >= 4000 | 57.2% | 45.7% | 33.2 |  |  | 0.61% |",
        "| a_PT | files | 96 | 41 | 4209 | >= 4000 |  |  |  |  | 2.6% |  |",
        "| a_PT | random, plain form with autocast | 48 | 23 | 1080 | ours is 4.00x |",
        "| 8x56x56 \\| q | 1.234 | 2.000 | 3.000 | 4.000 | 1.500 | 2.500 | 1.24 | the Triton kernels stay |",
        "compiled / Triton = 1.24: **the Triton kernels stay**",
        "| `gemm` | 96 | 21.70 | 36.6% |",
        "| images | 2 | 555.5 |\n| images | 16 | 4444.4 |",
        "5150 images a second with channels last, 3433 with channels first (1.50x)",
        "| M | fine-tuning | all | 71.2 | 77.5 | +6.2 |",
        "| goldens | tiny, loss | 1.25e-06 |",
    ):
        assert shown in text, shown
    assert "At toy size" not in text and "Not measured yet" not in text
    assert "At toy size" in page.page(results(toy=True))


def test_parts_that_found_nothing_have_no_section() -> None:
    found = results()
    for part in found["parts"].values():
        part.pop("figures", None)
    assert page.page(found).count("###") == 0


def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "gpu.md")
    found = tmp_path / "results.json"
    found.write_text(json.dumps(results()))
    assert main(["--page", str(found)]) == 0
    assert (tmp_path / "gpu.md").read_text() == page.page(results())


@pytest.mark.parametrize("content", [None, "{", "[]", '{"parts": {}}'])
def test_what_is_not_of_a_check_is_refused(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "gpu.md")
    found = tmp_path / "results.json"
    if content is not None:
        found.write_text(content)
    with caplog.at_level(logging.INFO):
        assert main(["--page", str(found)]) == 2
    assert str(found) in caplog.text and not (tmp_path / "gpu.md").exists()


def test_the_page_that_stands_there_is_the_programs() -> None:
    assert PAGE.read_text(encoding="utf-8").startswith(page.HEAD)
