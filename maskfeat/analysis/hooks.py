"""What layers are given and return in a forward pass."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def captured(layers: Mapping[int, nn.Module], inputs: bool = False) -> Iterator[dict[int, Any]]:
    """Keep what layers return within the block, or the arguments that they are given.

    Other threads may compute with the same network meanwhile; what they do is not kept.

    Args:
        layers: by any number.
        inputs: keep the arguments, not what is returned.

    Yields:
        what was kept, by the numbers of the layers; empty before the forward pass.
    """
    thread = threading.get_ident()
    found: dict[int, Any] = {}

    def keep(number: int) -> Any:
        def hook(_layer: nn.Module, given: Any, *returned: Any) -> None:
            if threading.get_ident() == thread:
                found[number] = given if inputs else returned[0]

        return hook

    handles = [
        layer.register_forward_pre_hook(keep(number)) if inputs else layer.register_forward_hook(keep(number))
        for number, layer in layers.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
