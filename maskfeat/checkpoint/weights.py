"""Fit the weights in a file to a model: convert names and shapes, and report what was done with each parameter.

Files are released MaskFeat weights, PySlowFast's other MViT weights, or this project's. All names are released names.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from maskfeat.checkpoint.names import SPLIT_QKV, hint_at_prefixes, renamed, strip_prefixes
from maskfeat.checkpoint.resizing import is_planar, resize_weight
from maskfeat.distributed.fsdp import local_shard, shard_like
from maskfeat.errors import NotFinite, UserError
from maskfeat.text import matches, some


class Misfit(UserError):
    """Parameters of a file do not fit the model.

    Args:
        problems: one text for each parameter, which begins with its name.
        hint: what the names of the file suggest.
    """

    def __init__(self, problems: Sequence[str], hint: str = "") -> None:
        super().__init__(list(problems), hint)
        self.problems, self.hint = list(problems), hint

    @property
    def summary(self) -> str:
        """The text without advice."""
        return f"{len(self.problems)} parameters do not fit the model:\n  {list_problems(self.problems)}{self.hint}"

    def __str__(self) -> str:
        return (
            f"{self.summary}\n"
            "To load the rest, list their names or patterns of them: TRAIN.CHECKPOINT_ALLOW \"['name.*']\""
        )


@dataclass(frozen=True)
class LoadRules:
    """Patterns (`fnmatch`) of names by which an objective expects a file to differ from the model.

    Attributes:
        fresh: may be missing from the file and then keep their initial values.
        dropped: may be in the file without being in the model.
        anew: keep their initial values even where the file has them.
    """

    fresh: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    anew: tuple[str, ...] = ()


@dataclass
class LoadReport:
    """What was done with each parameter, by name.

    Attributes:
        loaded: copied unchanged.
        resized: copied after resizing; maps names to "(shape in the file) -> (shape in the model)".
        fresh: not in the file, or not wanted from it; initial values are kept.
        dropped: in the file but not used.
    """

    loaded: list[str] = field(default_factory=list)
    resized: "OrderedDict[str, str]" = field(default_factory=OrderedDict)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Return a table for the log: counts, and the first names of each kind."""
        rows = (
            ("loaded", self.loaded),
            ("resized", [f"{name} {change}" for name, change in self.resized.items()]),
            ("fresh", self.fresh),
            ("dropped", self.dropped),
        )
        return "\n".join(
            f"  {what:<8}{len(names):>5}  {'' if what == 'loaded' else some(names, 6)}".rstrip() for what, names in rows
        )


def _all_of(state: Mapping[str, Tensor], first: str, names: Sequence[str]) -> list[Tensor]:
    """Return the tensors of these names; a file that has `first` must have all of them."""
    try:
        return [state[name] for name in names]
    except KeyError as missing:
        raise UserError(f"the file has {first} but not {missing}: q, k and v must all be present") from missing


def fuse_qkv(state: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
    """Concatenate attn.q, attn.k and attn.v of older MViT files into attn.qkv, which the model has.

    Files of the BEiT family have attn.q_bias and attn.v_bias beside attn.qkv.weight; their keys have no bias.
    """
    fused: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in state.items():
        part = SPLIT_QKV.fullmatch(name)
        if part is None:
            fused[name] = value
            continue
        stem, letter, kind, biased = part.groups()
        if letter == "q":
            fused[f"{stem}qkv.{kind}"] = torch.cat(_all_of(state, name, [f"{stem}{other}.{kind}" for other in "qkv"]))
        elif biased == "q":
            (of_values,) = _all_of(state, name, [f"{stem}v_bias"])
            fused[f"{stem}qkv.bias"] = torch.cat([value, torch.zeros_like(value), of_values])
    return fused


def clean_names(state: Mapping[str, Tensor], remove: Sequence[str] = ()) -> "OrderedDict[str, Tensor]":
    """Remove each string of `remove` (TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN) from the names, wherever it stands."""

    def without(name: str) -> str:
        for part in remove:
            name = name.replace(part, "")
        return name

    return renamed(state, without)


def _kind_of_no_weight(value: object) -> str | None:
    """Return a description of a value that cannot be copied into a parameter; None if it can be."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if value.is_quantized:
        return f"a quantized tensor ({value.dtype})"
    if value.is_nested or value.layout is not torch.strided:
        return f"not a dense tensor ({'nested' if value.is_nested else value.layout})"
    if value.is_meta:
        return "a tensor without values (on the meta device)"
    if value.is_complex() or value.dtype is torch.float4_e2m1fn_x2:
        return f"a tensor of {value.dtype}"
    return None


def _usable(state: Mapping[str, Tensor], dropped: Sequence[str]) -> tuple["OrderedDict[str, Tensor]", list[str]]:
    """Return the entries of a file that can be copied into parameters, 8-bit floats as float32, and the names of the
    others, which `dropped` must match.
    """
    usable: OrderedDict[str, Tensor] = OrderedDict()
    others: dict[str, str] = {}
    for name, value in state.items():
        kind = _kind_of_no_weight(value)
        if kind is not None:
            others[name] = kind
        else:  # resizing computes with the values, and most operators do not support 8-bit floats
            usable[name] = value.float() if value.is_floating_point() and value.itemsize == 1 else value
    problems = [f"{name} is {kind}" for name, kind in others.items() if not matches(name, dropped)]
    if problems:
        raise UserError(
            f"{len(problems)} entries cannot be loaded into parameters:\n  {list_problems(problems)}\n"
            "Save them as dense tensors of floats, or leave them out: TRAIN.CHECKPOINT_ALLOW \"['name.*']\""
        )
    return usable, list(others)


def _is_kind_of(value: Tensor, parameter: Tensor) -> bool:
    """Whether the numbers in a file are of the parameter's kind; counts may be written as floats."""
    if parameter.is_floating_point():
        return value.is_floating_point()
    return (value.dtype is torch.bool) == (parameter.dtype is torch.bool)


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity, of sharded ones in this rank's shard.

    Waits for the device once.
    """
    flags = {name: local_shard(value).isfinite().all() for name, value in tensors if value.is_floating_point()}
    if not flags:
        return []
    device = max((flag.device for flag in flags.values()), key=lambda device: device.type != "cpu")
    finite = torch.stack([flag.to(device, non_blocking=True) for flag in flags.values()]).tolist()
    return [name for name, good in zip(flags, finite, strict=True) if not good]


def list_problems(problems: Sequence[str], most: int = 12) -> str:
    """Return the first `most` problems, one per line, and how many more there are."""
    return "\n  ".join(problems[:most]) + (f"\n  and {len(problems) - most} more" if len(problems) > most else "")


def _change(value: Tensor, parameter: Tensor) -> str:
    return f"{tuple(value.shape)} -> {tuple(parameter.shape)}"


def _fit(name: str, value: Tensor, parameter: Tensor, average: bool, planar: bool) -> tuple[Tensor | None, str]:
    """Return the value in the parameter's shape, itself where that is its shape, or None; and why it cannot be."""
    if not _is_kind_of(value, parameter):
        return None, f"is of {value.dtype}, expected {parameter.dtype}"
    if value.shape == parameter.shape:
        return value, ""
    resized = resize_weight(name, value, parameter.shape, average, planar)
    return resized, f"has a different shape: {_change(value, parameter)}"


def fit_state(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    rules: LoadRules,
    allow: Sequence[str] = (),
    average: bool = False,
) -> tuple["OrderedDict[str, Tensor]", LoadReport]:
    """Fit the parameters in a file to a model.

    Args:
        own: the model's tensors by released name; only their shapes and types are used.
        state: the file's tensors by name.
        rules: names that the objective expects to be fresh or dropped.
        allow: patterns of further names that the user allows to be fresh or dropped.
        average: spread 2-D patch kernels evenly over the frames of a 3-D model instead of using the centre frame.

    Returns:
        tensors for the model by name, and the report.

    Raises:
        UserError: listing every parameter that is missing, unexpected, of a different shape, or no dense tensor.
    """
    report = LoadReport()
    problems: list[str] = []
    fitted: OrderedDict[str, Tensor] = OrderedDict()
    state, report.dropped = _usable(state, (*rules.dropped, *allow))
    state = fuse_qkv(state)
    planar = is_planar(own) and is_planar(state)
    for name, parameter in own.items():
        if matches(name, rules.anew):
            report.fresh.append(name)
            report.dropped += [name] if name in state else []
            continue
        if name not in state:
            if matches(name, rules.fresh) or matches(name, allow):
                report.fresh.append(name)
            elif name.endswith("num_batches_tracked"):
                report.loaded.append(name)  # older files have no count; nothing here depends on it
            else:
                problems.append(f"{name} is not in the file")
            continue
        value = state[name]
        fits, problem = _fit(name, value, parameter, average, planar)
        if fits is not None:
            fitted[name] = fits
            if fits is value:
                report.loaded.append(name)
            else:
                report.resized[name] = _change(value, parameter)
        elif matches(name, allow):
            report.fresh.append(name)
            report.dropped.append(name)
        else:
            problems.append(f"{name} {problem}")
    for name in state:
        if name in own:
            continue
        if matches(name, rules.dropped) or matches(name, allow):
            report.dropped.append(name)
        else:
            problems.append(f"{name} is in the file but not in the model")
    hint = hint_at_prefixes(state, own)
    if problems:
        raise Misfit(problems, hint)
    if not report.loaded and not report.resized:
        raise UserError("no parameter in the file fits the model: is it a checkpoint of this architecture?" + hint)
    return fitted, report


class ReleasedModule(nn.Module):
    """A module that saves and loads its parameters under the names of released files."""

    def load_rules(self, state: Mapping[str, Tensor]) -> LoadRules:
        """Return which names of a released state may be missing or unexpected, beside those that the user allows."""
        return LoadRules()

    def released_name(self, name: str) -> str:
        """Return the name in released files of a parameter or buffer of this module."""
        return name

    def renamed_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a state under released names, where it has those of another program."""
        return state

    def released_state(self) -> "OrderedDict[str, Tensor]":
        """Return the state dict under released names; the tensors are the module's own, not copies."""
        return OrderedDict((self.released_name(name), value) for name, value in self.state_dict().items())

    def load_released_state(
        self, state: Mapping[str, Tensor], allow: Sequence[str] = (), average: bool = False
    ) -> LoadReport:
        """Load a state dict with released names.

        Args:
            state: parameters by released name; the objective, the image size and the number of axes may differ.
            allow: patterns (`fnmatch`) of names that may be missing or unexpected without an error.
            average: how 2-D patch kernels are inflated to 3-D, see `fit_state`.

        Raises:
            UserError: naming each parameter that is missing, unexpected or of a different shape, and
                TRAIN.CHECKPOINT_ALLOW, which allows it.
            NotFinite: naming parameters that hold a NaN or an infinity.
        """
        own = self.released_state()
        state = self.renamed_state(strip_prefixes(state, own, self.released_name))
        fitted, report = fit_state(own, state, self.load_rules(state), allow, average)
        broken = not_finite(  # as they will be: a file's numbers may be too large for the model's type
            (name, value.to(own[name].dtype) if own[name].is_floating_point() else value)
            for name, value in fitted.items()
        )
        if broken:
            raise NotFinite(
                f"{len(broken)} parameters are not finite (NaN or infinite):\n  {list_problems(broken, 6)}\n"
                "The file is of no use: take an earlier checkpoint of the run that wrote it"
            )
        inside = {self.released_name(name): name for name in self.state_dict()}
        self.load_state_dict(
            {inside[name]: shard_like(value, own[name]) for name, value in fitted.items()}, strict=False
        )
        return report
