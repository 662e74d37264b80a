"""The command line of every program that takes a config: --cfg FILE and overrides, with options in any order."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from maskfeat.config.merge import is_override
from maskfeat.config.recipes import shipped_file

_CFG = ("--cfg", "--cfg_files")
_OPTION = re.compile("--?[A-Za-z]")  # and not a negative number


class ConfigParser(argparse.ArgumentParser):
    """Parse options and overrides, as PySlowFast's programs and ours write them.

    Overrides are KEY VALUE or KEY=VALUE, before, between and after the options; --opts may stand before them. They are
    `opts` of the result, in their order and not yet checked: `load_config` takes them.
    """

    _several = False

    def add_cfg(self, text: str, *, required: bool = True, several: bool = False) -> None:
        """Add --cfg FILE; with `several`, `cfg` of the result is the list of all files that follow it."""
        self._several = several
        self.add_argument(*_CFG, dest="cfg", action="append", required=required, metavar="RECIPE", help=text)

    def add_overrides(self, text: str) -> None:
        """Add the overrides."""
        self.add_argument("--opts", dest="opts_follow", action="store_true", help="may stand before the overrides")
        self.add_argument("opts", nargs="*", metavar="KEY VALUE", help=text)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; what stands behind an option counts as an override, too."""
        found, left = super().parse_known_args(_name_each(args), namespace)
        unknown = [word for word in left if _OPTION.match(word)]
        if "opts_follow" in found:
            found.opts += [word for word in left if not _OPTION.match(word)]
            del found.opts_follow
        if isinstance(getattr(found, "cfg", None), list) and not self._several:
            if len(found.cfg) > 1:
                self.error(f"--cfg takes one file here; given {', '.join(found.cfg)}")
            (found.cfg,) = found.cfg
        return found, unknown


def _name_each(args: Sequence[str] | None) -> list[str]:
    """Write --cfg A B as --cfg A --cfg B. A word that follows is a file where it cannot be the key of an override."""
    words: list[str] = []
    for word in sys.argv[1:] if args is None else map(str, args):  # from Python, paths and numbers are given as such
        joined = words and words[-1].startswith(tuple(f"{option}=" for option in _CFG))
        after_file = joined or (len(words) > 1 and words[-2] in _CFG)
        words += [_CFG[0], word] if after_file and _names_file(word) else [word]
    return words


def _names_file(word: str) -> bool:
    if _OPTION.match(word) or ("=" in word and is_override(word)):
        return False
    return not is_override(word) or word.endswith((".yaml", ".yml")) or shipped_file(word) is not None
