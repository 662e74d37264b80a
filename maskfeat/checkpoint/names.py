"""Names of parameters in files: what wrappers and other programs put before and into them.

All names of a model are released names.
"""

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor

from maskfeat.errors import UserError

SPLIT_QKV = re.compile(r"(.*\.attn\.)(?:([qkv])\.(weight|bias)|([qv])_bias)")
"""attn.q, attn.k, attn.v, attn.q_bias and attn.v_bias, where models have attn.qkv."""
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What PyTorch's wrappers (torch.compile, activation checkpointing, FSDP) put into names, at any place."""
_PREFIXES = ("module", "model", "objective", "backbone", "encoder")
"""What DistributedDataParallel, other programs and `load_model` put before names."""


def renamed(state: Mapping[str, Tensor], new: Callable[[str], str]) -> "OrderedDict[str, Tensor]":
    """Return a state dict under new names.

    Raises:
        UserError: two names in the file become one.
    """
    cleaned: OrderedDict[str, Tensor] = OrderedDict()
    before: dict[str, str] = {}
    for name, value in state.items():
        short = new(name)
        if short in cleaned:
            raise UserError(
                f"the file has {short} twice, as {before[short]} and as {name}: which of the two models is meant? "
                "Save it in a file of its own"
            )
        cleaned[short], before[short] = value, name
    return cleaned


def unwrapped(name: str) -> str:
    """Return a name without what PyTorch's wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def bare(name: str) -> str:
    """Return a name without what PyTorch's wrappers put into it and other programs before it."""
    parts = unwrapped(name).split(".")
    while len(parts) > 1 and parts[0] in _PREFIXES:
        del parts[0]
    return ".".join(parts)


def _shorter(name: str) -> Iterator[tuple[str, str]]:
    """Yield how a name can be cut between two parts: ("", name), ("a.", rest), ("a.b.", rest)."""
    parts = name.split(".")
    for number in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:number]), ".".join(parts[number:])


def strip_prefixes(
    state: Mapping[str, Tensor], own: Collection[str], released_name: Callable[[str], str]
) -> "OrderedDict[str, Tensor]":
    """Strip from the names in a file what wrappers and other programs put before them, where they then fit.

    Names that the model does not have (other heads, mask tokens) lose what was before those that it has.

    Args:
        own: the model's released names.
        released_name: of a name within the model, see `ReleasedModule`.

    Raises:
        UserError: the file has a name twice, with and without a prefix.
    """

    def cuts(name: str) -> Iterator[tuple[str, str]]:
        for prefix, rest in _shorter(name):
            yield prefix, rest
            if rest.split(".", 1)[0] not in _PREFIXES:
                return

    def fitting(rest: str) -> str | None:
        split = SPLIT_QKV.fullmatch(rest)
        if rest in own or (split is not None and f"{split[1]}qkv.weight" in own):
            return rest
        # What has another name inside of an objective than in files (the head of a ResNet), behind all prefixes.
        is_cut = rest.split(".", 1)[0] not in _PREFIXES
        return released_name(rest) if is_cut and released_name(rest) in own else None

    known: dict[str, str] = {}
    before = {""}
    for name in state:
        for prefix, rest in cuts(unwrapped(name)):
            fits = fitting(rest)
            if fits is not None:
                known[name] = fits
                before |= {part for part, _ in _shorter(prefix)}
                break

    def short(name: str) -> str:
        return known.get(name) or [rest for prefix, rest in cuts(unwrapped(name)) if prefix in before][-1]

    return renamed(state, short)


def hint_at_prefixes(state: Collection[str], own: Collection[str]) -> str:
    """Return a line on prefixes without which the names in a file would be half of those that are missing, or ""."""
    missing = {name for name in own if name not in state}
    counts = Counter(prefix for name in state if name not in own for prefix, rest in _shorter(name) if rest in missing)
    found = [prefix for prefix, count in counts.most_common(3) if 2 * count >= len(missing)]
    if not found:
        return ""
    return (
        f"\nNames in the file begin with {' or '.join(map(repr, found))}, and fit without it: "
        f'TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN "{found[:1]}" removes it'
    )
