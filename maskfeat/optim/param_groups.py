"""Parameter groups: weight decay and layer-wise learning rate decay."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    layer_id: Callable[[str], int],
    last_layer: int,
    weight_decay: float,
    layer_decay: float = 1.0,
    no_decay_1d: bool = False,
    no_decay_names: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Return parameter groups in the order of the published files, so that optimizer states can be exchanged.

    Without layer decay: two groups, those with weight decay first. With it: a group for each (layer, weight decay or
    not) in order of appearance, with learning rate multiplier layer_decay ^ (last_layer - layer) (BEiT; ELECTRA).

    Args:
        named: parameters by released name.
        layer_id: layer of a released name, 0 to `last_layer`.
        weight_decay: of parameters that are not exempt.
        layer_decay: 1.0 = off.
        no_decay_1d: exempt one-dimensional parameters and biases from weight decay.
        no_decay_names: released names to exempt as well.

    Returns:
        dicts with "params", "weight_decay" and "layer_decay".

    Raises:
        ValueError: a name of `no_decay_names` does not exist.
    """
    everything = list(named)
    named = [(name, parameter) for name, parameter in everything if parameter.requires_grad]
    exempt = set(no_decay_names)
    unknown = exempt - {name for name, _ in everything}
    if unknown:
        raise ValueError(f"no weight decay was asked for parameters that do not exist: {sorted(unknown)}")
    groups: OrderedDict[tuple[int, bool], dict[str, Any]] = OrderedDict()
    if layer_decay == 1.0:
        for decayed in (True, False):
            groups[(0, decayed)] = {"params": [], "weight_decay": weight_decay * decayed, "layer_decay": 1.0}
    for name, parameter in named:
        decayed = not (name in exempt or (no_decay_1d and (parameter.dim() == 1 or name.endswith(".bias"))))
        layer = layer_id(name) if layer_decay != 1.0 else 0
        rates = {"weight_decay": weight_decay * decayed, "layer_decay": layer_decay ** (last_layer - layer)}
        groups.setdefault((layer, decayed), {"params": [], **rates})["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
