"""docs/gpu.md, written from the results.json of a check: no figure in it comes from anywhere else."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import CORRECTNESS, Figures
from maskfeat.demos.evidence.report import table
from maskfeat.errors import UserError, naming

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"

HEAD = """# On a GPU

One command checks the program on a GPU and measures it, the most valuable first:

```bash
python tools/gpu_check.py --output gpu
python tools/gpu_check.py --output gpu --only learning
```

- **What it needs**: a CUDA device, Python 3.10 or later, PyTorch 2.11 or later with torchvision, and timm. It uses no
  network: JPEG and H.264 files are made on the spot. Other packages that the machine lacks are installed from a folder
  of wheels, `--wheels wheels`, which a machine with network fills: `pip download --only-binary=:all: -d wheels
  --python-version 3.12 av yacs iopath`, and others.
- **What it checks** (correctness): golden values in float32 and bf16, GPU against CPU, pooling kernels, HOG bins,
  compilation, layouts, steps without waiting for the device, resuming to the bit, processes, loss scaling, memory.
- **What it measures** (speed): the recipes in bf16, compiled, on files and on random input, beside the plain form of
  the same step; pooling kernels against compiled code; a trace of the slowest recipe; reading by number of workers.
- **What it trains** (`--only learning`): the suites of the [evidence](evidence.md) at the budget of a GPU.
- **When it is cut off**: each part runs in a process of its own with its own time limit. `results.json` in the folder
  is valid after every part and holds what was found until then. The same command goes on where it stopped.
  `--minutes` (9) is the time for all parts; those that no longer fit are listed.

Where there is no GPU, the same parts run at toy size, and what needs CUDA is listed as not run:

```bash
python tools/gpu_check.py --output toy --device cpu --toy
```

This page is written from the results:

```bash
python tools/gpu_check.py --page gpu/results.json
```
"""
NOTHING = """
## Results

**Not measured yet**: no GPU was at hand.
"""
EXPLAINED = (
    'Steady steps in bf16. "of 790" and "of 989": three times the multiply-adds of a forward pass over 790 TFLOP/s, '
    'which a large product reaches on an H200, and 989 TFLOP/s of its data sheet. "waits": how often the host waits '
    'for the device in a step that logs nothing. "for data": extra time on files. "HOG": targets over a step.'
)


def read_results(path: Path) -> dict[str, Any]:
    """Read the results.json of a check.

    Raises:
        UserError: it cannot be read, or is another file.
    """
    with naming(f"{path} cannot be read"):
        text = path.read_text(encoding="utf-8")
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not a results.json of tools/gpu_check.py: {error}") from error
    if not (isinstance(content, dict) and {"of", "calls", "parts"} <= content.keys()):
        raise UserError(f"{path} is not a results.json of tools/gpu_check.py")
    return content


def write_page(results: Mapping[str, Any] | None, path: Path) -> None:
    """Write the page; `results`: content of results.json, None where there is none."""
    path.write_text(page(results), encoding="utf-8")


def page(results: Mapping[str, Any] | None) -> str:
    """The text of the page."""
    return HEAD + ("\n" + "\n\n".join(_results(results)) + "\n" if results else NOTHING)


def _results(results: Mapping[str, Any]) -> Iterator[str]:
    parts: Mapping[str, Any] = results["parts"]
    yield "## Results"
    if results["of"]["toy"]:
        yield "**At toy size: these figures show that the program runs, and measure nothing.**"
    for call in results["calls"]:
        machine = ", ".join(f"{name} {value}" for name, value in call["machine"].items() if value is not None)
        yield f"`{shlex.join(['python', *call['command']])}`, {call['at']}: {machine}."
    rows = [
        (name, p["group"], p["status"], _number(p.get("seconds"), ".0f"), _line(p.get("why")))
        for name, p in parts.items()
    ]
    yield table(("part", "group", "result", "seconds", ""), rows)
    left_out = [f"- {name}: {what}" for name, part in parts.items() for what in part.get("not_run", ())]
    if left_out:
        yield "Not run within these parts:\n\n" + "\n".join(left_out)
    figures = {name: part.get("figures", {}) for name, part in parts.items()}
    for section in (_recipes, _pooling, _trace, _reading, _layouts, _learning):
        yield from section(list(figures.values()))
    yield from _checks({name: figures[name] for name, part in parts.items() if part["group"] == CORRECTNESS})


def _number(value: Any, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _line(text: Any) -> str:
    """Text for a cell of a table."""
    return " ".join(str(text or "").split()).replace("|", "\\|")


def _recipes(parts: Sequence[Figures]) -> Iterator[str]:
    rows = []
    for found in parts:
        lines = [found[kind] for kind in ("random", "files") if kind in found]
        for line in lines:
            rows.append((
                line["recipe"], line["input"], str(line["batch"]), str(line["steps"]),
                _number(line["samples_per_second"], ".4g"), line["asked"], _number(line["of_measured_peak"], ".1%"),
                _number(line["of_peak"], ".1%"), _number(line["peak_gib"], ".1f"),
                _number(line["waits_per_step"], ".1f"), _number(line["waiting_for_data"], ".1%"),
                _number(line["target_share"], ".2%"),
            ))  # fmt: skip
        for kind, name in _OTHERS.items():
            if lines and kind in found:
                other = found[kind]
                ratio = lines[0]["samples_per_second"] / other["samples_per_second"]
                speed = _number(other["samples_per_second"], ".4g")
                asked = f"ours is {ratio:.2f}x"
                rows.append(
                    (lines[0]["recipe"], name, str(other["batch"]), str(other["steps"]), speed, asked, *[""] * 6)
                )
    if rows:
        head = (
            "recipe",
            "input",
            "batch",
            "steps",
            "a second",
            "target",
            "of 790",
            "of 989",
            "GiB",
            "waits",
            "for data",
            "HOG",
        )
        yield from ("### Recipes", EXPLAINED, table(head, rows))


_OTHERS = {
    "plain_autocast": "random, plain form with autocast",
    "plain_float32": "random, plain form in float32",
    "not_compiled": "random, not compiled",
}


def _pooling(parts: Sequence[Figures]) -> Iterator[str]:
    for found in parts:
        if "shapes" not in found:
            continue
        rows = []
        for shape in found["shapes"]:
            times = [_ms(shape.get(form), way) for form in _FORMS for way in ("forward", "backward")]
            rows.append((_line(shape["shape"]), *times, _number(shape.get("ratio"), ".2f"), shape.get("verdict", "")))
        yield "### Pooling: Triton's kernels, PyTorch's convolutions, compiled conv3d"
        head = [f"{form} {way}, ms" for form in _FORMS for way in ("forward", "backward")]
        yield table(("shape", *head, "compiled / Triton", "so"), rows)
        if "verdict" in found:
            yield f"All shapes together: compiled / Triton = {found['ratio']:.2f}: **{found['verdict']}**."


_FORMS = ("triton", "convolutions", "compiled")


def _ms(seconds: Mapping[str, float] | None, way: str) -> str:
    return "" if seconds is None else f"{1e3 * seconds[way]:.3f}"


def _trace(parts: Sequence[Figures]) -> Iterator[str]:
    for found in parts:
        if "top" in found:
            rows = [
                (f"`{_line(row['kernel'])}`", str(row["calls"]), f"{row['ms']:.2f}", f"{row['share']:.1%}")
                for row in found["top"]
            ]
            yield f"### Where a step of {found['recipe']} spends its {found['ms_per_step']:.1f} ms"
            yield table(("kernel", "calls a step", "ms", "share"), rows)


def _reading(parts: Sequence[Figures]) -> Iterator[str]:
    for found in parts:
        if "samples_per_second_by_workers" in found:
            rows = [
                (what, workers, f"{speed:.1f}")
                for what, speeds in found["samples_per_second_by_workers"].items()
                for workers, speed in sorted(speeds.items(), key=lambda item: int(item[0]))
            ]
            yield f"### Reading, on {found['cores']} cores"
            yield table(("what", "workers", "samples a second"), rows)


def _layouts(parts: Sequence[Figures]) -> Iterator[str]:
    for found in parts:
        if "layouts" in found:
            size, ratio = found["layouts"]["batch"], found["layouts"]["ratio"]
            last, first = (found["layouts"]["images_per_second"][f"channels_{which}"] for which in ("last", "first"))
            yield "### ResNet-50 by layout"
            yield (
                f"Forward and backward pass of the encoder, {size} images in bf16: {last:.4g} images a second with "
                f"channels last, {first:.4g} with channels first ({ratio:.2f}x)."
            )


def _learning(parts: Sequence[Figures]) -> Iterator[str]:
    rows = [
        (row["method"], row["what"], row["on"], f"{row['without']:.1f}", f"{row['with']:.1f}", f"{row['gain']:+.1f}")
        for found in parts
        for row in found.get("gains", ())
    ]
    if rows:
        yield from ("### Learning", "Top-1 in percent, one seed; without = random weights, or training from scratch.")
        yield table(("method", "measured by", "on", "without", "with pre-training", "gain"), rows)


def _checks(parts: Mapping[str, Figures]) -> Iterator[str]:
    """Every figure of the checks, by the names under which they stand in the JSON."""
    rows = [(name, path, value) for name, found in parts.items() for path, value in _leaves(found)]
    if rows:
        yield from ("### Figures of the checks", table(("part", "figure", "value"), rows))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}, {name}" if path else str(name))
    else:
        yield _line(path), f"{value:.3g}" if isinstance(value, float) else _line(value)
