"""What the commands that use a trained network share: options, and errors as exit codes."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskfeat.analysis.model import Model, load_model
from maskfeat.distributed.preemption import end_interrupted, was_interrupted
from maskfeat.distributed.processes import READER_GONE, flush_output
from maskfeat.engine.parallelize import PRECISIONS
from maskfeat.errors import NotFinite, UserError
from maskfeat.progress import close_lines

logger = logging.getLogger(__name__)

_NEGATIVE = re.compile(r"-\d[-\d,]*")


def views_option(text: str) -> int | tuple[int, int]:
    """Read --views: a number, or clips x crops such as 5x3."""
    numbers = text.lower().split("x")
    try:
        clips, *crops = map(int, numbers)
    except ValueError:
        clips, crops = 0, []
    if clips < 1 or len(crops) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of views nor CLIPSxCROPS, such as 5x3")
    return (clips, crops[0]) if crops else clips


def count_option(least: int) -> Callable[[str], int]:
    """Return what reads a whole number of `least` or more."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return number

    return read


def joined(argv: Sequence[str] | None, option: str) -> list[str]:
    """Write `option -3,-1` as `option=-3,-1`: argparse would take such numbers for another option.

    Args:
        argv: the command line; None = sys.argv.
    """
    words: list[str] = []
    for word in sys.argv[1:] if argv is None else argv:
        if words and words[-1] == option and _NEGATIVE.fullmatch(word):
            words[-1] = f"{option}={word}"
        else:
            words.append(word)
    return words


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which network is used."""
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="file, address or published name")
    parser.add_argument("--cfg", metavar="RECIPE", help="what the network is, where the file does not say")
    parser.add_argument("--averaged", action="store_true", help="take the average of the weights (TRAIN.EMA)")


def add_options(parser: argparse.ArgumentParser, views: str) -> None:
    """Add the options of the network and of reading; `views` says what --views is where it is not given."""
    add_network_options(parser)
    parser.add_argument("--prefix", default="", metavar="FOLDER", help="that paths in lists are relative to")
    parser.add_argument("--views", type=views_option, metavar="N|CLIPSxCROPS", help=f"of each video (default: {views})")
    parser.add_argument(
        "--batch-size", type=count_option(1), default=32, metavar="N", help="views (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=count_option(0), metavar="N", help="that read and decode (default: one a core)"
    )
    parser.add_argument("--device", metavar="NAME", help="cuda, cuda:1 or cpu (default: CUDA where there is one)")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="off", help="off: float32 (default)")


def are_same(first: str | Path, second: str | Path) -> bool:
    """Whether two paths name the same file or folder, which exists."""
    return os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)


def refuse_input(output: Path, inputs: Iterable[str]) -> None:
    """Refuse an --output that is one of the files that are read.

    Raises:
        UserError: it is.
    """
    for given in inputs:
        if are_same(output, given):
            raise UserError(f"--output {output} is what is read ({given}): give another name, it would be overwritten")


def load(args: argparse.Namespace) -> Model:
    """Return the network that the options name; its GPU is the current one of this process from now on."""
    model = load_model(args.checkpoint, args.cfg, args.device, averaged=args.averaged, precision=args.precision)
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # where Triton's kernels are launched
    return model


def exit_code(work: Callable[[], int], level: int = logging.INFO, goes_on: bool = False) -> int:
    """Return the exit code of `work`; 2, and the error in one line, where a user can mend it; INTERRUPTED after Ctrl-C;
    READER_GONE where nobody reads the output any more.

    Args:
        level: of the lines of this package that are shown; of other libraries those are from warnings on.
        goes_on: whether the same command goes on where an interrupted one stopped.
    """
    logging.basicConfig(format="%(message)s")
    package = logging.getLogger("maskfeat")
    package.setLevel(level)
    try:
        code = work()
        if sys.stdout is not None:
            sys.stdout.flush()  # here, and not at the end of Python, which would say that the reader has gone
        return code
    except BrokenPipeError:
        flush_output()
        return READER_GONE
    except (KeyboardInterrupt, RuntimeError, UserError) as error:
        if not isinstance(error, UserError) or was_interrupted(error):
            return end_interrupted(error, goes_on)
        package.error("error: %s", error)
        return 2
    finally:
        close_lines()


def check_finite(values: Tensor, path: str, what: str, precision: str) -> None:
    """Refuse outputs of an input that are NaN or infinite.

    Raises:
        NotFinite: names the input.
    """
    if not values.isfinite().all():
        raise NotFinite(
            f"{what} of {path} are not finite (NaN or infinite), in precision {precision}: --precision off, or look at "
            "the weights with maskfeat inspect"
        )
