"""The `maskfeat` command: one sub-command for each program. tools/ holds the same programs as scripts."""

import argparse
import importlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import maskfeat
from maskfeat.text import nearest


class Program(NamedTuple):
    """A sub-command.

    Attributes:
        module: holds `main(argv, prog)`, which returns an exit code. It is imported when the sub-command is given.
        summary: one line for the help.
        passive_threads: whether OpenMP threads that wait leave the cores to the data workers.
    """

    module: str
    summary: str
    passive_threads: bool = False


TRAIN = "train"

PROGRAMS = {
    TRAIN: Program("maskfeat.engine.run", "pre-train, fine-tune and test a model as a recipe says"),
    "check-data": Program("maskfeat.analysis.checks.command", "say what a data set holds and what is wrong with it"),
    "report": Program("maskfeat.report.command", "write a page on one run or several: curves, figures, differences"),
    "inspect": Program("maskfeat.analysis.inspect_checkpoint", "say what is in a file of weights"),
    "extract-features": Program("maskfeat.analysis.extract_features", "write features of images or videos into a file"),
    "probe": Program("maskfeat.analysis.probes.command", "measure frozen features by small classifiers", True),
    "predict": Program("maskfeat.analysis.predict", "say which classes a fine-tuned model sees in images or videos"),
    "visualize": Program("maskfeat.analysis.visualize", "draw what a network predicts, or attends to"),
    "export": Program("maskfeat.analysis.export", "export a trained network to timm, torchvision, ONNX and others"),
    "evidence": Program("maskfeat.demos.evidence", "measure over several seeds what pre-training brings", True),
    "sweep": Program("maskfeat.engine.sweep", "run a recipe with several values of some keys"),
    "submit": Program("maskfeat.engine.submit", "submit a run to a Slurm cluster"),
    "quickstart": Program("maskfeat.demos.quickstart", "train small models on data that it makes: a first look", True),
    "make-synthetic": Program("maskfeat.demos.synthetic", "make small labelled sets of images and clips"),
    "make-shards": Program("maskfeat.analysis.preparation.shards", "pack a data set into tar archives"),
    "prepare-ucf-hmdb": Program("maskfeat.analysis.preparation.ucf_hmdb", "list UCF-101, HMDB51, JHMDB or the like"),
    "prepare-imagenet": Program("maskfeat.analysis.preparation.imagenet", "lay out ImageNet-1K as folders"),
    "prepare-kinetics": Program("maskfeat.analysis.preparation.kinetics", "list Kinetics-400, -600 or -700"),
    "prepare-ssv2": Program("maskfeat.analysis.preparation.ssv2", "list Something-Something v2"),
    "prepare-caltech101": Program("maskfeat.demos.caltech101", "lay out Caltech-101 as folders"),
    "prepare-cifar10": Program("maskfeat.demos.cifar10", "lay out CIFAR-10 as folders"),
}


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, PROGRAMS))
    parser = argparse.ArgumentParser(
        prog="maskfeat",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description=maskfeat.__doc__,
        epilog="\n".join(
            [
                "commands (each has --help):",
                *(f"  {name:<{width}}  {program.summary}" for name, program in PROGRAMS.items()),
                "",
                "example: maskfeat train --cfg masked_ssl/in1k_VIT_B_MaskFeat_PT DATA.PATH_TO_DATA_DIR /data/imagenet",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {maskfeat.__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command and return its exit code.

    A training that fails ends the process at once instead of returning, as with tools/run_net.py.

    Args:
        argv: the sub-command and its arguments; None = those of the process.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    program = PROGRAMS.get(args.command)
    if program is None:
        meant = nearest(args.command, PROGRAMS)
        parser.error(f"unknown command {args.command!r}; did you mean {meant!r}? (--help lists the commands)")
    if program.passive_threads:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

    def run() -> int:
        return int(importlib.import_module(program.module).main(args.arguments, prog=f"maskfeat {args.command}"))

    if args.command == TRAIN:
        from maskfeat.distributed.processes import run_program

        run_program(run)
    try:
        return run()
    except KeyboardInterrupt as error:  # where a command has no words of its own for it, as while it is imported
        from maskfeat.distributed.preemption import end_interrupted

        return end_interrupted(error)
