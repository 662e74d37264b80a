"""Fitting weights from files to a model: names, shapes, and a report of what became of each parameter.

Sources: released MaskFeat files, PySlowFast's other MViT files, our own. Names are released names throughout.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskfeat.distributed.fsdp import shard_like


@dataclass(frozen=True)
class LoadRules:
    """Patterns (`fnmatch`) of names that an objective itself expects.

    Attributes:
        fresh: may be missing from the file; they keep their initial values.
        dropped: may be in the file without a place in the model.
    """

    fresh: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass
class LoadReport:
    """What became of each parameter.

    Attributes:
        loaded: taken as they are.
        resized: name -> "(shape in the file) -> (shape in the model)", taken after resizing.
        fresh: not in the file; initial values kept.
        dropped: in the file, not in the model.
    """

    loaded: list[str] = field(default_factory=list)
    resized: "OrderedDict[str, str]" = field(default_factory=OrderedDict)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def table(self) -> str:
        """A short table for people: counts, and the names where they fit a line."""
        rows = (
            ("loaded", self.loaded),
            ("resized", [f"{name} {change}" for name, change in self.resized.items()]),
            ("fresh", self.fresh),
            ("dropped", self.dropped),
        )
        return "\n".join(f"  {what:<8}{len(names):>5}  {_short(what, names)}".rstrip() for what, names in rows)


def _short(what: str, names: Sequence[str], most: int = 6) -> str:
    if what == "loaded":
        return ""
    shown = ", ".join(names[:most])
    return shown + (f", and {len(names) - most} more" if len(names) > most else "")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _all_of(state: Mapping[str, Tensor], first: str, names: Sequence[str]) -> list[Tensor]:
    """The tensors of these names, which a file that has `first` must have all."""
    try:
        return [state[name] for name in names]
    except KeyError as missing:
        raise ValueError(f"the file has {first} but not {missing}: q, k and v come together") from missing


def fuse_qkv(state: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
    """Older MViT files carry attn.q, attn.k and attn.v: stack them into attn.qkv, as the model has it.

    Files of BEiT's family carry attn.q_bias and attn.v_bias beside attn.qkv.weight: keys have no bias there.
    """
    fused: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in state.items():
        part = re.fullmatch(r"(.*\.attn\.)(?:([qkv])\.(weight|bias)|([qv])_bias)", name)
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
    """Names without the prefix `module.` of wrapped models and without each string of `remove`."""
    cleaned: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in state.items():
        short = name.removeprefix("module.")
        for part in remove:
            short = short.replace(part, "")
        cleaned[short] = value
    return cleaned


def _resize_line(value: Tensor, rows: int, dim: int) -> Tensor:
    """Linear resize of one dimension of a 2-D table."""
    table = value.float().movedim(dim, -1)
    return F.interpolate(table[None], size=rows, mode="linear")[0].movedim(-1, dim).to(value.dtype)


def _resize_square(value: Tensor, places: int) -> Tensor | None:
    """Bicubic resize of (1, n^2, D) to (1, places, D); None where either is not a square."""
    have, want = math.isqrt(value.shape[1]), math.isqrt(places)
    if have * have != value.shape[1] or want * want != places:
        return None
    on_grid = value.float().reshape(1, have, have, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(on_grid, size=(want, want), mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(value.dtype)


def _resize_positions(name: str, value: Tensor, shape: torch.Size) -> Tensor | None:
    """Tables of positions of another clip or image size."""
    if re.search(r"rel_pos_[thw]$", name) and value.dim() == 2 and value.shape[1] == shape[1]:
        return _resize_line(value, shape[0], 0)
    if value.dim() != 3 or value.shape[2] != shape[2]:
        return None
    if name == "pos_embed_temporal":
        return _resize_line(value[0], shape[1], 0)[None]
    if name == "pos_embed_spatial":
        return _resize_square(value, shape[1])
    if name == "pos_embed":
        for prefix in (1, 0):  # with a class token, whose own position is kept, or without
            body = _resize_square(value[:, prefix:], shape[1] - prefix)
            if body is not None:
                return torch.cat([value[:, :prefix], body], dim=1)
    return None


def _change_axes(name: str, value: Tensor, shape: torch.Size, average: bool) -> Tensor | None:
    """2-D convolution weights for a 3-D model and the reverse.

    The patch kernel is placed at the centre frame or spread evenly over all (`average`): on a clip that stands still an
    inflated model sees what the image model saw. Pooling kernels are repeated over time (a LayerNorm that follows takes
    the scale out). 3-D weights are summed over time.
    """
    # Image models are also written as 3-D weights with one frame.
    if value.dim() == 4 and len(shape) == 5:
        value = value.unsqueeze(2)
    if value.dim() == 5 and len(shape) == 4:
        return value.sum(dim=2) if value.sum(dim=2).shape == shape else None
    if value.dim() != 5 or len(shape) != 5 or value.shape[:2] != shape[:2] or value.shape[3:] != shape[3:]:
        return None
    if value.shape[2] != 1:
        return None
    if ".pool_" in name:
        return value.expand(shape).clone()
    if average:
        return (value / shape[2]).expand(shape).clone()
    inflated = value.new_zeros(shape)
    inflated[:, :, shape[2] // 2] = value[:, :, 0]
    return inflated


def resize_weight(name: str, value: Tensor, shape: torch.Size, average: bool = False) -> Tensor | None:
    """`value` in the shape of the model, or None where there is no rule for it; `average`: see `fit_state`."""
    for resized in (_resize_positions(name, value, shape), _change_axes(name, value, shape, average)):
        if resized is not None and resized.shape == shape:
            return resized
    return None


def _kind_of_no_weight(value: object) -> str | None:
    """Return what kind of value cannot be copied into a parameter; None for those that can."""
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
        else:  # arithmetic on 8-bit floats, which resizing takes, is hardly implemented
            usable[name] = value.float() if value.is_floating_point() and value.itemsize == 1 else value
    problems = [f"{name} is {kind}" for name, kind in others.items() if not _matches(name, dropped)]
    if problems:
        raise ValueError(
            f"{len(problems)} entries cannot be loaded into parameters:\n  {_listed(problems)}\n"
            "Save them as dense tensors of floats, or leave them out: TRAIN.CHECKPOINT_ALLOW \"['name.*']\""
        )
    return usable, list(others)


def _listed(problems: Sequence[str], most: int = 12) -> str:
    """Return the first problems, one a line, and how many more there are."""
    return "\n  ".join(problems[:most]) + (f"\n  and {len(problems) - most} more" if len(problems) > most else "")


def fit_state(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    rules: LoadRules,
    allow: Sequence[str] = (),
    average: bool = False,
) -> tuple["OrderedDict[str, Tensor]", LoadReport]:
    """Match a file's parameters with a model's.

    Args:
        own: the model's released names and tensors (only shapes are read).
        state: the file's.
        rules: what the objective expects to be fresh or dropped.
        allow: what the user allows beyond that.
        average: spread 2-D patch kernels evenly over the frames of a 3-D model, rather than at the centre frame.

    Returns:
        tensors by name for the model, and the report.

    Raises:
        ValueError: listing every parameter that is missing, left over or of another shape.
    """
    report = LoadReport()
    problems: list[str] = []
    fitted: OrderedDict[str, Tensor] = OrderedDict()
    state, report.dropped = _usable(clean_names(state), (*rules.dropped, *allow))
    state = fuse_qkv(state)
    for name, parameter in own.items():
        if name not in state:
            if _matches(name, rules.fresh) or _matches(name, allow):
                report.fresh.append(name)
            elif name.endswith("num_batches_tracked"):
                report.loaded.append(name)  # older files do not count; nothing here depends on it
            else:
                problems.append(f"{name} is not in the file")
            continue
        value = state[name]
        if value.shape == parameter.shape:
            fitted[name] = value
            report.loaded.append(name)
            continue
        change = f"{tuple(value.shape)} -> {tuple(parameter.shape)}"
        resized = resize_weight(name, value, parameter.shape, average)
        if resized is not None:
            fitted[name] = resized
            report.resized[name] = change
        elif _matches(name, allow):
            report.fresh.append(name)
            report.dropped.append(name)
        else:
            problems.append(f"{name} has another shape: {change}")
    for name in state:
        if name in own:
            continue
        if _matches(name, rules.dropped) or _matches(name, allow):
            report.dropped.append(name)
        else:
            problems.append(f"{name} is in the file but not in the model")
    if problems:
        raise ValueError(
            f"{len(problems)} parameters do not fit the model:\n  {_listed(problems)}\n"
            "Allow them by name, patterns welcome: TRAIN.CHECKPOINT_ALLOW \"['name.*']\""
        )
    if not report.loaded and not report.resized:
        raise ValueError("nothing of the file fits the model: is it a checkpoint of this architecture?")
    return fitted, report


class ReleasedModule(nn.Module):
    """A module whose parameters have names of their own in released files."""

    def load_rules(self, state: Mapping[str, Tensor]) -> LoadRules:
        """Which names may be missing from or left over in a released state, beside what the user allows."""
        return LoadRules()

    def released_name(self, name: str) -> str:
        """The name in released files for a parameter or buffer of this module."""
        return name

    def released_state(self) -> "OrderedDict[str, Tensor]":
        """An ordered dict with the released names; the tensors are the module's own, not copies."""
        return OrderedDict((self.released_name(name), value) for name, value in self.state_dict().items())

    def load_released_state(
        self, state: Mapping[str, Tensor], allow: Sequence[str] = (), average: bool = False
    ) -> LoadReport:
        """Load a state dict with released names.

        Args:
            state: parameters by released name, of this or another objective, image size or number of axes.
            allow: patterns (`fnmatch`) of names which may stay fresh or be left over without an error.
            average: how 2-D patch kernels become 3-D, see `fit_state`.

        Raises:
            ValueError: naming each parameter that is missing, left over or of another shape, and
                TRAIN.CHECKPOINT_ALLOW, which allows it.
        """
        own = self.released_state()
        fitted, report = fit_state(own, state, self.load_rules(state), allow, average)
        inside = {self.released_name(name): name for name in self.state_dict()}
        self.load_state_dict(
            {inside[name]: shard_like(value, own[name]) for name, value in fitted.items()}, strict=False
        )
        return report
