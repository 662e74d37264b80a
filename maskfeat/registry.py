"""The registry of objectives, backbones and data sets: each is one file that registers itself under a name.

A spec says under which name of the config it is found, how it is built, which keys it adds to the config, and what it
checks. The built-in ones are registered like those of other packages, which a config names in PLUGINS; they are
imported when they are first asked for. This module is below all of them, and below the config.
"""

import importlib
import math
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from yacs.config import CfgNode

from maskfeat.errors import UserError

BUILT_IN = (
    "maskfeat.models.mvit_config",
    "maskfeat.models.resnet",
    "maskfeat.objectives.classification",
    "maskfeat.objectives.maskfeat",
    "maskfeat.objectives.mfm",
    "maskfeat.data.datasets.imagenet",
    "maskfeat.data.datasets.kinetics",
)
"""Modules that register what the package itself has, in the order in which messages list the names."""

MEDIA = ("image", "clip")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)

Check = Callable[[CfgNode], Iterable[str]]
"""Takes a config and yields one message for each problem: what was given, what was expected, which key fixes it."""


class Range(NamedTuple):
    """The numbers from `low` to `high`.

    Attributes:
        above: whether `low` itself is outside.
        below: whether `high` itself is outside.
        note: added to the range in words.
        too_high: what a larger number looks like and how to mend it, added to the message about one.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    note: str = ""
    too_high: str = ""

    @property
    def words(self) -> str:
        """The range in words, such as "between 0 and 1"."""
        low, high = f"{self.low:.10g}", f"{self.high:.10g}"
        if math.isinf(self.high):
            words = f"{'above' if self.above else 'at least'} {low}"
        elif self.above or self.below:
            words = f"{'above' if self.above else 'at least'} {low} and {'below' if self.below else 'at most'} {high}"
        else:
            words = f"between {low} and {high}"
        return words + self.note

    def holds(self, value: float) -> bool:
        """Return whether a number lies in the range."""
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)


AT_LEAST_0 = Range(0)
AT_LEAST_1 = Range(1)
SHARE = Range(0, 1)
BELOW_1 = Range(0, 1, below=True)
ABOVE_0_TO_1 = Range(0, 1, above=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rules:
    """The values that single keys of the config may have.

    Attributes:
        kinds: the type of keys whose default does not show it, such as "list[int]" or "float or None".
        choices: the values that a key may have.
        ranges: the range of a number, or of every number of a list.
        lengths: how many numbers a list may have.
    """

    kinds: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Spec(Rules):
    """The attributes that objectives, backbones and data sets share.

    Attributes:
        name: by which the config selects it.
        build: makes the object; its arguments depend on the kind of spec.
        keys: adds keys with their defaults to a config, as `config/defaults.py` does; None = it has none of its own.
        architecture: keys, shared ones too, that say which network its weights belong to. A run does not resume, and
            nothing is tested, with other values of them. Where a plugin names none, the shapes of its weights decide.
        initial: keys that only initial weights depend on: they have no effect on a run that resumes.
        check_lists: yields problems of lists that `check` relies on; they are reported before `check` is called.
        check: yields problems of keys that contradict one another; called only where the spec is in use.
    """

    name: str
    build: Callable[..., Any]
    keys: Callable[[CfgNode], None] | None = None
    architecture: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()
    check_lists: Check = lambda cfg: ()
    check: Check = lambda cfg: ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name by which it is found."""
        return (self.name,)

    @property
    def module(self) -> str:
        """The module that holds it."""
        return str(self.build.__module__)


@dataclass(frozen=True, kw_only=True, eq=False)
class BackboneSpec(Spec):
    """A backbone, chosen by MODEL.ARCH.

    Attributes:
        build: `build(cfg, maskable)` -> Backbone; `maskable` = with a mask token, so that `hidden` may be given.
        aliases: other values of MODEL.ARCH that mean it.
        title: its name in messages.
        media: its inputs: "image", "clip".
        mask_grid: the grid on which patches are hidden, ([T,] H, W); None = it cannot hide patches.
        classifier: `mean_pooling` and `head_init_scale` of `Classification` on top of it.
        any_size: whether images in testing may have another size than in training.
        act_checkpoint: whether MODEL.ACT_CHECKPOINT may be set.
        token_pixels: side in pixels of the area of a token, where it is the same for every config; 0 = it is not.
    """

    aliases: tuple[str, ...] = ()
    title: str = ""
    media: tuple[str, ...] = MEDIA
    mask_grid: Callable[[CfgNode], tuple[int, ...]] | None = None
    classifier: Callable[[CfgNode], Mapping[str, Any]] = lambda cfg: {"mean_pooling": True, "head_init_scale": None}
    any_size: bool = False
    act_checkpoint: bool = True
    token_pixels: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@dataclass(frozen=True, kw_only=True, eq=False)
class ObjectiveSpec(Spec):
    """An objective, chosen by MODEL.MODEL_NAME.

    Attributes:
        build: `build(cfg, backbone)` -> Objective.
        losses: supported values of MODEL.LOSS_FUNC.
        title: its name in messages.
        classifies: whether it has classes, and can be tested.
        hides_patches: whether its backbone must be able to hide patches.
        backbones: names of the backbones that it supports; () = all, or all that can hide patches.
        backbone_hint: added to the message on a backbone that it does not support.
        media: its inputs: "image", "clip".
        mask_sampler: `mask_sampler(cfg, grid)` -> MaskSampler, see `maskfeat.masking`; `grid` is the backbone's
            `mask_grid`, or (). None = nothing is hidden. It needs AUG.GEN_MASK_LOADER True.
        requires: values that other keys must have.
    """

    losses: tuple[str, ...]
    title: str = ""
    classifies: bool = False
    hides_patches: bool = False
    backbones: tuple[str, ...] = ()
    backbone_hint: str = ""
    media: tuple[str, ...] = MEDIA
    mask_sampler: Callable[[CfgNode, tuple[int, ...]], Any] | None = None
    requires: Mapping[str, object] = field(default_factory=dict)

    def supports(self, backbone: BackboneSpec) -> bool:
        """Whether it goes with a backbone."""
        if self.backbones and backbone.name not in self.backbones:
            return False
        return backbone.mask_grid is not None or not self.hides_patches


@dataclass(frozen=True, kw_only=True, eq=False)
class DatasetSpec(Spec):
    """A data set, chosen by TRAIN.DATASET and TEST.DATASET. Its name is in lower case.

    Attributes:
        build: `build(cfg, request)` -> data set, see `maskfeat.data.datasets.base`.
        media: what it holds: "image" or "clip".
        test_views: how often each sample is tested: (clips, crops) for every test that is run in turn.
        mixes: whether `build` heeds DATA.SOURCES.
    """

    media: str
    test_views: Callable[[CfgNode], Sequence[tuple[int, int]]] = lambda cfg: [(1, 1)]
    mixes: bool = False


S = TypeVar("S", bound=Spec)
_WORDS = {ObjectiveSpec: "objective", BackboneSpec: "backbone", DatasetSpec: "data set"}

_specs: dict[tuple[type[Spec], str], Spec] = {}
_plugins: dict[str, set[tuple[type[Spec], str]]] = {}
"""Keys of `_specs` that the import of a module added."""


def register(spec: S) -> S:
    """Make a spec known under its names, and return it. That of a module which is run again replaces what it registered
    before, as a cell of a notebook does.

    Raises:
        ValueError: a name is taken, or a data set's is not in lower case. Where PLUGINS names the module, `load` says
            so in a `UserError`.
    """
    for name in spec.names:
        taken = _specs.get((type(spec), name))
        if taken is not None and (taken.module != spec.module or taken.module in BUILT_IN):
            raise ValueError(
                f"the {_WORDS[type(spec)]} {name!r} is already registered by {taken.module}; choose another name"
            )
    if isinstance(spec, DatasetSpec) and spec.name != spec.name.lower():
        raise ValueError(f"the name of a data set must be in lower case; given {spec.name!r}")
    _specs.update({(type(spec), name): spec for name in spec.names})
    return spec


@dataclass(frozen=True)
class Registered:
    """The specs that a config can choose from, by name.

    Attributes:
        objectives: by MODEL.MODEL_NAME.
        backbones: by MODEL.ARCH.
        datasets: by TRAIN.DATASET and TEST.DATASET, in lower case.
    """

    objectives: Mapping[str, ObjectiveSpec]
    backbones: Mapping[str, BackboneSpec]
    datasets: Mapping[str, DatasetSpec]

    @property
    def specs(self) -> tuple[Spec, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys([*self.objectives.values(), *self.backbones.values(), *self.datasets.values()]))


def load(plugins: Sequence[str] = ()) -> Registered:
    """Return the built-in specs and those of PLUGINS; import what has not been imported yet.

    Args:
        plugins: dotted names of modules.

    Raises:
        UserError: a plugin's name is not a dotted name, or the module cannot be imported, registers nothing, or
            registers a name that is taken. The message names PLUGINS and the module.
    """
    for module in BUILT_IN:
        importlib.import_module(module)
    for name in plugins:
        if name not in _plugins:
            _plugins[name] = _import_plugin(name)
    ours = sorted((s for s in _specs.values() if s.module in BUILT_IN), key=lambda s: BUILT_IN.index(s.module))
    specs = list(dict.fromkeys([*ours, *(spec for name in plugins for spec in _of_plugin(name))]))
    return Registered(_by_name(specs, ObjectiveSpec), _by_name(specs, BackboneSpec), _by_name(specs, DatasetSpec))


def _by_name(specs: Iterable[Spec], kind: type[S]) -> dict[str, S]:
    return {name: spec for spec in specs if isinstance(spec, kind) for name in spec.names}


def _of_plugin(name: str) -> list[Spec]:
    """Return what a module has registered until now, and what its import added."""
    return [
        spec
        for key, spec in _specs.items()
        if key in _plugins[name] or spec.module == name or spec.module.startswith(f"{name}.")
    ]


def holder(kind: type[Spec], name: str) -> str:
    """Return the module that has registered a spec of this name; "" = none has."""
    spec = _specs.get((kind, name))
    return "" if spec is None else spec.module


def _import_plugin(name: str) -> set[tuple[type[Spec], str]]:
    """Import a module and return under which keys of `_specs` it registers something."""
    if not _DOTTED.fullmatch(name):
        raise UserError(
            "PLUGINS must hold dotted names of modules that Python can import, such as my_package.my_module; "
            f"given {name[:200]!r}"
        )
    before = dict(_specs)
    try:
        importlib.import_module(name)
    except Exception as error:  # a module may raise anything while it is imported
        _specs.clear()
        _specs.update(before)
        raise UserError(f"PLUGINS: the module {name} cannot be imported: {_in_one_line(error)}") from error
    added = {key for key in _specs if key not in before}
    # A module that was imported before PLUGINS named it has registered its specs already.
    if not added and not any(spec.module == name or spec.module.startswith(f"{name}.") for spec in _specs.values()):
        raise UserError(
            f"PLUGINS: the module {name} registers no objective, backbone or data set; it must call "
            "maskfeat.registry.register"
        )
    return added


def _in_one_line(error: Exception) -> str:
    """Return the error, and the file and line that raised it."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        return f"{text}; install it, or put its folder on PYTHONPATH"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({frame.filename}, line {frame.lineno})"


def lookup(cfg: CfgNode, key: str) -> Any:
    """Return the value of a full key; None for an inert key that was not given."""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return None
        node = node[part]
    return node


def objective_spec(cfg: CfgNode) -> ObjectiveSpec:
    """Return the spec of MODEL.MODEL_NAME."""
    return load(cfg.PLUGINS).objectives[cfg.MODEL.MODEL_NAME]


def backbone_spec(cfg: CfgNode) -> BackboneSpec:
    """Return the spec of MODEL.ARCH."""
    return load(cfg.PLUGINS).backbones[cfg.MODEL.ARCH]


def tests_at_any_size(cfg: CfgNode) -> bool:
    """Return whether tests may show another size than training: a classifier of ResNet features takes any, transformers
    have positions for one, and MFM a disc.
    """
    return objective_spec(cfg).classifies and backbone_spec(cfg).any_size


def dataset_spec(cfg: CfgNode, section: str) -> DatasetSpec:
    """Return the spec of TRAIN.DATASET or TEST.DATASET."""
    return load(cfg.PLUGINS).datasets[cfg[section].DATASET.lower()]


def datasets_in_use(cfg: CfgNode) -> Iterator[tuple[str, DatasetSpec]]:
    """Yield "TRAIN.DATASET" and "TEST.DATASET" with their specs, where training or testing is enabled."""
    for section in ("TRAIN", "TEST"):
        if cfg[section].ENABLE:
            yield f"{section}.DATASET", dataset_spec(cfg, section)
