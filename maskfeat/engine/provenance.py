"""Which program runs on which machine."""

import functools
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import maskfeat
from maskfeat.config.recipes import CONFIG_ROOT, INSTALLED

_PATIENCE = 10.0
"""Seconds for git, which looks at every file of the checkout."""


@functools.cache
def machine() -> str:
    """Return the name of the GPU, or of the CPU with its number of cores."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu()}, {os.cpu_count()} cores"


def cpu() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


@functools.cache
def revision() -> str:
    """Return the version of an installed package, or the commit of a checkout, with a + where files differ from it.

    It is asked once in a process, which goes on with the code it began with.
    """
    if INSTALLED:
        return f"maskfeat {maskfeat.__version__}"
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "describe", "--always", "--dirty=+"],
            capture_output=True,
            text=True,
            cwd=CONFIG_ROOT,
            check=True,
            timeout=_PATIENCE,
        )
    except (OSError, subprocess.SubprocessError):
        return "commit unknown"
    return f"commit {done.stdout.strip()}"
